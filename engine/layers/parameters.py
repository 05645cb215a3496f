"""Where the tensors of the weight files go: layers declare it, the loader fills it in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch

from engine.layers.rank import ALONE, Rank, RankCut
from engine.runner.backends import Kernels
from engine.weights.model_config import ModelError
from engine.weights.scheme import Quantization, Scheme, widen
from kernels import huge_pages

Role = Literal["matrix", "norm", "centred_norm", "log_decay", "time_bias", "skip"]
"""What a tensor is for: says how dummy weights are drawn. A centred norm's weight is around 0
(Gemma-style), a norm's 1, as is what a state space lets pass."""
Precision = Literal["int8", "fp8"]

FULL_PRECISION = (
    "lm_head",
    "gate",
    "shared_expert_gate",
    "router",
    "in_proj_ba",
    "in_proj_b",
    "in_proj_a",
    "b_proj",
    "a_proj",
    "x_proj",
    "dt_proj",
    "kv_b_proj",
)
"""Parts of a dotted name whose weights stay as they are: where few numbers decide much."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the weight files and its destination."""

    target: torch.Tensor
    """The view to fill; without a cut its shape is the file's tensor's."""
    role: Role = "matrix"
    rows: torch.Tensor | None = None
    """Order in which the file's rows are taken: ``target = tensor[rows]``; None: as they are."""
    scheme: Scheme | None = None
    """How the file's tensor is quantised; None: it is not."""
    scale: torch.Tensor | None = None
    """Where the scales of the target's rows go, if they stay quantised: float32 ``[M, blocks of
    columns]``."""
    cut: RankCut | None = None
    """What the target is of ``tensor[rows]``; None: all of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the file's tensor."""
        shape = tuple(self.target.shape)
        return shape if self.cut is None else self.cut.whole(shape)

    @property
    def row_size(self) -> int:
        """Numbers in one row of ``runs``: of what lies behind the dimension that is cut."""
        return math.prod(self.target.shape[1 if self.cut is None else self.cut.dim + 1 :])

    def runs(self) -> list[tuple[int, int, int]]:
        """(first row of the target, first row in the file, rows) of what lies together in both."""
        cut = self.cut
        if cut is not None and cut.dim and cut.span is not None:
            count, first = len(cut), cut.span.start
            stacks = range(math.prod(self.target.shape[: cut.dim]))
            return [(i * count, i * cut.size + first, count) for i in stacks]
        rows = self._file_rows()
        if rows is None:
            return [(0, 0, len(self.target))]
        starts = [0, *(1 + rows.diff().ne(1).nonzero()[:, 0]).tolist(), len(rows)]
        firsts = rows[starts[:-1]].tolist()
        pairs = zip(pairwise(starts), firsts, strict=True)
        return [(start, first, end - start) for (start, end), first in pairs]

    def _file_rows(self) -> torch.Tensor | None:
        """The file's row of each of the target's; None: they are the same."""
        cut = self.cut
        if cut is None:
            return self.rows
        if cut.dim == 0:
            return cut.index if self.rows is None else self.rows[cut.index]
        assert self.rows is None, "rows in another order are cut as rows"
        stacked = torch.arange(math.prod(self.target.shape[: cut.dim]))
        return (stacked[:, None] * cut.size + cut.index).flatten()

    @torch.inference_mode()
    def fill(self, tensor: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Copy a file's tensor of the target's shape, in the target's dtype. With a scheme
        ``scale`` is the file's, and a target without scales of its own gets what it stands for."""
        if self.scheme is None:
            self.target.copy_(self._part(tensor))
            return
        assert scale is not None
        device = self.target.device
        row_scales = self._part_of_scales(self.scheme.row_scales(scale, *tensor.shape)).to(device)
        stored = self._part(tensor).to(device)
        if self.scale is None:
            widen(self.target, stored, row_scales, self.scheme.block[1])
        else:
            self.target.copy_(stored)
            self.scale.copy_(row_scales)

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor if self.rows is None else tensor[self.rows]
        return tensor if self.cut is None else self.cut.of(tensor)

    def _part_of_scales(self, row_scales: torch.Tensor) -> torch.Tensor:
        """Of the scales of all rows, ``[M, blocks of columns]``."""
        cut, scheme = self.cut, self.scheme
        if cut is None or cut.dim == 0:
            return self._part(row_scales)
        columns = None if scheme is None else scheme.block[1]
        if columns is None:
            return row_scales
        return row_scales[:, int(cut.index[0]) // columns : int(cut.index[-1]) // columns + 1]


class Layer(Protocol):
    """Anything with weights."""

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Full names in the weight files and where they go; only before ``seal``."""
        ...

    def seal(self) -> None:
        """Called once all weights are in: bring them into the form they are multiplied in."""
        ...


@dataclass(frozen=True, slots=True)
class Storage:
    """What a product's weight is multiplied as, and what is kept of it until then."""

    precision: Precision | None
    """None: full precision."""
    dtype: torch.dtype | None = None
    """Of a weight that stays quantised as it is in the files; None: the model's own."""
    columns: int | None = None
    """Of such a weight: that share a scale; None: all."""

    def scales(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Shape of the scales of such a weight ``[num_rows, num_columns]``."""
        return num_rows, 1 if self.columns is None else -(-num_columns // self.columns)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Where and in what dtype weights live."""

    device: torch.device
    dtype: torch.dtype
    quantization: Precision | None = None
    """Format that the weights of large products are brought into when their layer is sealed."""
    files: Quantization | None = None
    """Which modules are quantised in the files."""
    products: frozenset[tuple[Precision, int | None]] = frozenset()
    """8-bit weights that can be multiplied with as they lie in the files: format, and columns that
    share a scale (None: all)."""

    def precision(self, name: str) -> Precision | None:
        """Of the module ``name`` (full, without ``.weight``); None: the dtype as it is."""
        if any(part in FULL_PRECISION for part in name.split(".")):
            return None
        return self.quantization

    def storage(self, name: str) -> Storage:
        """Of the module ``name`` (full, without ``.weight``). What no product takes as it lies in
        the files, or is asked for in another format, is widened on the way in."""
        wanted, scheme = self.precision(name), self.scheme(name)
        if scheme is None or wanted not in (None, scheme.format):
            return Storage(wanted)
        columns = scheme.block[1]
        if self._multiplies(scheme):
            return Storage(scheme.format, scheme.dtype, columns)
        return Storage(None)

    def _multiplies(self, scheme: Scheme) -> bool:
        """Whether weights are multiplied as they lie in the files. On a CPU such a product rounds
        activations too, which is not what weights alone in 8 bits stand for."""
        rounds = self.device.type == "cpu" and scheme.is_weight_only
        return not rounds and (scheme.format, scheme.block[1]) in self.products

    def scheme(self, name: str) -> Scheme | None:
        """Of the module ``name`` in the files."""
        return None if self.files is None else self.files.scheme(name)

    def note(self) -> str:
        """What is done with weights that are quantised in the files, if any are: for the line that
        says where they came from."""
        dtype, notes = str(self.dtype).removeprefix("torch."), []
        for scheme in () if self.files is None else self.files.schemes():
            done = "multiplied as they are"
            if self.quantization not in (None, scheme.format):
                done = f"brought into {self.quantization}"
            elif not self._multiplies(scheme):
                done = f"widened to {dtype}: no product here computes that"
            notes.append(f"; {scheme.describe()}, {done}")
        return "".join(notes)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Raises ModelError where there is no memory for it."""
        try:
            return huge_pages.empty(*shape, dtype=dtype or self.dtype, device=self.device)
        except RuntimeError:  # All that torch's CPU allocator raises.
            sizes = " x ".join(map(str, shape))
            raise ModelError(
                f"the weights do not fit the memory of {self.device}: there was none left for one "
                f"of {sizes}."
            ) from None


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer is made with."""

    kernels: Kernels
    weights: WeightSpec
    rank: Rank = ALONE
    """Whose part of the model is built."""
