"""Parameters: layers declare the target of each tensor in the weight files, and the loader fills
it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Literal, Protocol

import torch

from engine.layers.rank import ALONE, Rank, RankCut
from engine.weights.model_config import ModelError
from engine.weights.scheme import Quantization, Scheme, widen
from kernels import huge_pages

Role = Literal["matrix", "norm", "centred_norm", "log_decay", "time_bias", "skip"]
"""Role of a tensor, which determines its dummy values. A centred norm's weight is around 0
(Gemma-style); a norm's weight and the skip weight of a state space are around 1."""
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
"""Parts of a dotted name of weights that stay in full precision, because a few numbers have a large
effect."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the weight files and its destination."""

    target: torch.Tensor
    """View to fill; without a cut it has the shape of the file's tensor."""
    role: Role = "matrix"
    rows: torch.Tensor | None = None
    """Order in which the file's rows are read: ``target = tensor[rows]``. None to keep the
    order."""
    scheme: Scheme | None = None
    """Format of the file's tensor, or None if it is not quantised."""
    scale: torch.Tensor | None = None
    """Target of the row scales if the weight stays quantised: float32 ``[M, blocks of
    columns]``."""
    cut: RankCut | None = None
    """Part of ``tensor[rows]`` to copy, or None to copy all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the file's tensor."""
        shape = tuple(self.target.shape)
        return shape if self.cut is None else self.cut.whole(shape)

    @property
    def row_size(self) -> int:
        """Number of values in one row of ``runs``: those after the dimension that is cut."""
        return math.prod(self.target.shape[1 if self.cut is None else self.cut.dim + 1 :])

    def runs(self) -> list[tuple[int, int, int]]:
        """List (first row of the target, first row in the file, number of rows) of all contiguous
        runs."""
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
        """Return the file's row of each row of the target, or None if they are the same."""
        cut = self.cut
        if cut is None:
            return self.rows
        if cut.dim == 0:
            return cut.index if self.rows is None else self.rows[cut.index]
        assert self.rows is None, "reordered rows can only be cut along rows"
        stacked = torch.arange(math.prod(self.target.shape[: cut.dim]))
        return (stacked[:, None] * cut.size + cut.index).flatten()

    @torch.inference_mode()
    def fill(self, tensor: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Copy a file's tensor of the target's shape, in the target's dtype.

        With a scheme, ``scale`` is that of the file. A target without scales gets the dequantised
        values.
        """
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
        """Return this part of the scales of all rows, ``[M, blocks of columns]``."""
        cut, scheme = self.cut, self.scheme
        if cut is None or cut.dim == 0:
            return self._part(row_scales)
        columns = None if scheme is None else scheme.block[1]
        if columns is None:
            return row_scales
        return row_scales[:, int(cut.index[0]) // columns : int(cut.index[-1]) // columns + 1]


class Layer(Protocol):
    """Any object with weights."""

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield full names in the weight files and their parameters. Only before ``seal``."""
        ...

    def seal(self) -> None:
        """Convert the weights to the form for computation. Called once, after all weights are
        loaded."""
        ...


class Composite:
    """Layer made of other layers, and of weights of its own."""

    layers: Sequence[Layer] = ()
    own: list[tuple[str, Parameter]]
    """Its own weights with their names, until it is sealed. Not set if there are none."""

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """See ``Layer``."""
        for layer in self.layers:
            yield from layer.parameters()
        yield from getattr(self, "own", ())

    def seal(self) -> None:
        """See ``Layer``."""
        for layer in self.layers:
            layer.seal()
        self.own = []


@dataclass(frozen=True, slots=True)
class Storage:
    """Format of a product's weight, during the load and in the product."""

    precision: Precision | None
    """Precision of the product, or None for full precision."""
    dtype: torch.dtype | None = None
    """dtype of a weight that stays quantised as in the files, or None for the model's dtype."""
    columns: int | None = None
    """Number of columns of such a weight that share a scale, or None if all do."""

    def scales(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Return the shape of the scales of such a weight ``[num_rows, num_columns]``."""
        return num_rows, 1 if self.columns is None else -(-num_columns // self.columns)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Device, dtype and formats of the weights."""

    device: torch.device
    dtype: torch.dtype
    quantization: Precision | None = None
    """Format to which the weights of large products are converted when their layer is sealed."""
    files: Quantization | None = None
    """Formats of the modules that are quantised in the files."""
    products: frozenset[tuple[Precision, int | None]] = frozenset()
    """8-bit formats that can be multiplied without conversion: format, and number of columns that
    share a scale (None if all do)."""
    fp8_activations: bool = False
    """True to quantise the inputs of products with fp8 weights."""

    @property
    def has_fp8_products(self) -> bool:
        """True if weights are multiplied in fp8."""
        schemes = () if self.files is None else self.files.schemes()
        return self.quantization == "fp8" or any(
            scheme.format == "fp8" and self._multiplies(scheme) for scheme in schemes
        )

    def product_options(self, precision: Precision) -> dict[str, bool]:
        """Return keyword arguments of ``prepare_8bit`` for weights of this precision."""
        return {"fp8_rows": True} if self.fp8_activations and precision == "fp8" else {}

    def precision(self, name: str) -> Precision | None:
        """Return the precision of the module ``name`` (full, without ``.weight``), or None for full
        precision."""
        if any(part in FULL_PRECISION for part in name.split(".")):
            return None
        return self.quantization

    def storage(self, name: str) -> Storage:
        """Return the storage of the module ``name`` (full, without ``.weight``).

        A weight is dequantised during the load if no product supports its format, or if another
        format is configured.
        """
        wanted, scheme = self.precision(name), self.scheme(name)
        if scheme is None or wanted not in (None, scheme.format):
            return Storage(wanted)
        columns = scheme.block[1]
        if self._multiplies(scheme):
            return Storage(scheme.format, scheme.dtype, columns)
        return Storage(None)

    def _multiplies(self, scheme: Scheme) -> bool:
        """Return True if weights are multiplied in the format of the files. On a CPU such a product
        would also round activations, which weight-only formats do not do."""
        rounds = self.device.type == "cpu" and scheme.is_weight_only
        return not rounds and (scheme.format, scheme.block[1]) in self.products

    def scheme(self, name: str) -> Scheme | None:
        """Return the format of the module ``name`` in the files."""
        return None if self.files is None else self.files.scheme(name)

    def note(self) -> str:
        """Describe the conversion of weights to or from 8 bits for the line on the loaded files.
        Empty if there is none."""
        dtype, notes = str(self.dtype).removeprefix("torch."), list[str]()
        if self.files is None and self.quantization is not None:
            notes.append(f"; brought into {self.quantization}")
        for scheme in () if self.files is None else self.files.schemes():
            done = "multiplied as they are"
            if self.quantization not in (None, scheme.format):
                done = f"brought into {self.quantization}"
            elif not self._multiplies(scheme):
                done = f"widened to {dtype}: no product here computes that"
            elif self.product_options(scheme.format):
                done = "multiplied as they are, by activations in fp8"
            notes.append(f"; {scheme.describe()}, {done}")
        return "".join(notes)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Allocate a tensor for weights. Raises ModelError if there is not enough memory."""
        try:
            return huge_pages.empty(*shape, dtype=dtype or self.dtype, device=self.device)
        except RuntimeError:  # The only error of torch's CPU allocator.
            sizes = " x ".join(map(str, shape))
            raise ModelError(
                f"the weights do not fit the memory of {self.device}: there was none left for one "
                f"of {sizes}."
            ) from None


@dataclass(frozen=True, slots=True)
class Build:
    """Common arguments of all layers."""

    kernels: Mapping[str, ModuleType]
    weights: WeightSpec
    rank: Rank = ALONE
    """Rank for which the part of the model is built."""
