"""Weights of layers: their parts for tensor parallelism, the target of each tensor in the weight
files, which the loader fills, and dense products and norms.

A dimension that is divided among ranks consists of kinds of units, one after the other: heads of
queries, heads of keys, and so on. Every rank has the same number of adjacent units of each kind. If
a kind has fewer units than there are ranks, adjacent ranks share a unit; a kind with one unit is on
all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from engine.weights.model_config import ModelError
from engine.weights.scheme import Quantization, Scheme, widen
from kernels import huge_pages
from kernels.recording import repeated

Kinds = Sequence[tuple[int, int]]
"""Number of units of each kind, and size of a unit."""


class Group(Protocol):
    """Exchange among all ranks."""

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's ``x``, all of one shape, in the order of ranks. All ranks call it in
        the same order."""


@dataclass(frozen=True, slots=True)
class RankCut:
    """The part of a tensor of the weight files that one rank has, along one dimension."""

    size: int
    """Size of the dimension in the file."""
    index: torch.Tensor
    """int64: indices in the file, in the order of the rank."""
    dim: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this part of a whole ``tensor``: a view if it has neither gaps nor a new order."""
        if self.index.diff().ne(1).any():
            return tensor.index_select(self.dim, self.index.to(tensor.device))
        return tensor.narrow(self.dim, int(self.index[0]), len(self.index))

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in the file of a tensor with ``shape`` on this rank."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Rank:
    """One of ``count`` processes that share a model; by default the only one."""

    number: int = 0
    count: int = 1
    group: Group | None = None
    """Collectives, or None for a single rank."""

    def cut(self, *kinds: tuple[int, int], dim: int = 0) -> RankCut | None:
        """Return this rank's part of a dimension ``dim`` made of ``kinds``, or None for all."""
        (made,) = self.cuts([sum(units * width for units, width in kinds)], kinds, dim=dim)
        return made

    def cuts(self, sizes: Sequence[int], kinds: Kinds, *, dim: int = 0) -> list[RankCut | None]:
        """Return the parts of several tensors that together make up the dimension. ``sizes`` are
        theirs; borders of kinds may be inside a tensor."""
        if self.count == 1:
            return [None] * len(sizes)
        held, first, made = self._held(kinds), 0, []
        for size in sizes:
            own = held[(held >= first) & (held < first + size)] - first
            made.append(RankCut(size, own, dim))
            first += size
        return list(made)

    def _held(self, kinds: Kinds) -> torch.Tensor:
        spans, first = [], 0
        for units, width in kinds:
            begin = self.number * units // self.count
            end = begin + max(1, units // self.count)
            spans.append(torch.arange(first + begin * width, first + end * width))
            first += units * width
        return torch.cat(spans)

    def span(self, size: int) -> range:
        """Return this rank's part of ``size`` rows, which need not be a multiple of the ranks."""
        return range(
            self.number * size // self.count,
            (self.number + 1) * size // self.count,
        )

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over all ranks in float32, rounded once. The fixed order gives the same bits on
        each rank."""
        if self.group is None:
            return x
        out = x.new_empty(x.shape)
        repeated(self._sum, x, out)  # Replayed with recorded steps, like ``_join``.
        return out

    def join(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Concatenate every rank's columns ``x [T, span(size)]`` to ``[T, size]``."""
        if self.group is None:
            return x
        out = x.new_empty(len(x), size)
        repeated(self._join, x, out)
        return out

    def _sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        assert self.group is not None
        first, *others = self.group.gather(x.contiguous())
        out.copy_(sum((other.float() for other in others), first.float()))

    def _join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Concatenate parts that are padded to the width of the widest."""
        assert self.group is not None
        ranks = [Rank(number, self.count) for number in range(self.count)]
        counts = [len(rank.span(out.shape[1])) for rank in ranks]
        parts = self.group.gather(F.pad(x, (0, max(counts) - x.shape[1])))
        columns = [part[:, :count] for part, count in zip(parts, counts, strict=True)]
        torch.cat(columns, dim=-1, out=out)


ALONE = Rank()


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
    scheme: Scheme | None = None
    """Format of the file's tensor, or None if it is not quantised."""
    scale: torch.Tensor | None = None
    """Row scales of a weight that stays quantised: float32 ``[M, blocks of columns]``."""
    cut: RankCut | None = None
    """Part of the file's tensor to copy, or None to copy all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the file's tensor."""
        shape = tuple(self.target.shape)
        return shape if self.cut is None else self.cut.whole(shape)

    @torch.inference_mode()
    def fill(self, tensor: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Copy the part of a file's tensor, in the target's dtype.

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

    def seal(self) -> None:
        """Convert the weights for computation. Called once, after all are loaded."""


class Composite:
    """Layer made of other layers, and of weights of its own."""

    layers: Sequence[Layer] = ()
    own: list[tuple[str, Parameter]]
    """Its own weights with their names, until it is sealed. Not set if there are none."""

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for layer in self.layers:
            yield from layer.parameters()
        yield from getattr(self, "own", ())

    def seal(self) -> None:
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

    def allocate(
        self, weights: WeightSpec, *shape: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocate a weight ``[..., M, N]``, and its scales ``[..., M, blocks of columns]`` if it
        stays quantised."""
        weight = weights.empty(*shape, dtype=self.dtype)
        if self.dtype is None:
            return weight, None
        blocks = 1 if self.columns is None else -(-shape[-1] // self.columns)
        return weight, weights.empty(*shape[:-1], blocks, dtype=torch.float32)


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
        """Return the precision of ``name`` (without ``.weight``), or None for full precision."""
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


Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of the weight files, out of those with the same input."""

    name: str
    """Full name without ``.weight``."""
    num_rows: int
    """Number of rows in the files."""
    rows: torch.Tensor | None = None
    """int64: rows in the files, in the order of this rank, or None for all in their order."""

    @property
    def num_outputs(self) -> int:
        """Number of rows of this rank."""
        return self.num_rows if self.rows is None else len(self.rows)

    @property
    def cut(self) -> RankCut | None:
        return None if self.rows is None else RankCut(self.num_rows, self.rows)


def shared(parts: Sequence[Part], kinds: Kinds, rank: Rank) -> list[Part]:
    """Cut ``parts`` for ``rank``. Their outputs together consist of ``kinds``."""
    cuts = rank.cuts([part.num_rows for part in parts], kinds)
    return [
        part
        if cut is None
        else replace(part, rows=cut.index if part.rows is None else part.rows[cut.index])
        for part, cut in zip(parts, cuts, strict=True)
    ]


class Linear:
    """``x @ weight.T + bias``. Each row of the result is independent of the number of rows.

    The outputs of all parts are next to each other. The name of a part determines its storage
    format; adjacent parts of the same format are one product.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        build: Build,
        *,
        bias: bool = False,
        weight: torch.Tensor | None = None,
        shares_inputs: bool = False,
    ) -> None:
        """Make the product.

        ``weight`` is an existing weight for all parts. With ``shares_inputs``, each rank has a part
        of the inputs, and the outputs are summed over ranks.
        """
        stacks = groupby(parts, key=lambda part: build.weights.storage(part.name))
        inputs = build.rank.cut((in_features, 1), dim=1) if shares_inputs else None
        self._stacks = [
            _Stack(in_features, list(stacked), storage, build, inputs, bias=bias, weight=weight)
            for storage, stacked in stacks
        ]
        self._kernel = build.kernels["linear"]
        self._rank = build.rank if shares_inputs else ALONE

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for stack in self._stacks:
            yield from stack.parameters()

    def seal(self) -> None:
        products = [stack.product(self._kernel) for stack in self._stacks]
        self._product: Product = self._kernel.join(products)
        self._stacks.clear()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._rank.sum(self._product(x))


class _Stack:
    """Adjacent parts with the same storage format, stacked in one weight."""

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        storage: Storage,
        build: Build,
        inputs: RankCut | None,
        *,
        bias: bool,
        weight: torch.Tensor | None,
    ) -> None:
        if weight is not None:
            storage = Storage(None)
        self._parts, self._storage, self._weights = parts, storage, build.weights
        self._inputs, self._adds_bias = inputs, inputs is None or build.rank.number == 0
        num_rows, weights = sum(part.num_outputs for part in parts), build.weights
        in_features = in_features if inputs is None else len(inputs)
        self._weight, self._scale = (
            storage.allocate(weights, num_rows, in_features) if weight is None else (weight, None)
        )
        self._bias = weights.empty(num_rows) if bias else None

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        sizes = [part.num_outputs for part in self._parts]
        weights = self._weight.split(sizes)
        scales = len(sizes) * [None] if self._scale is None else self._scale.split(sizes)
        for part, weight, scale in zip(self._parts, weights, scales, strict=True):
            scheme = self._weights.scheme(part.name)
            cut = part.cut or self._inputs
            yield f"{part.name}.weight", Parameter(weight, "matrix", scheme, scale, cut)
        if self._bias is not None:
            for part, bias in zip(self._parts, self._bias.split(sizes), strict=True):
                yield f"{part.name}.bias", Parameter(bias, cut=part.cut)

    def product(self, kernel: Any) -> Product:
        precision, dtype = self._storage.precision, self._weights.dtype
        if self._bias is not None and not self._adds_bias:
            self._bias.zero_()  # The bias of one rank is in the sum.
        if precision is None:
            return kernel.prepare(self._weight, self._bias)
        if self._scale is None:
            quantized, scale = kernel.quantize(self._weight, precision)
        else:
            quantized, scale = self._weight, as_kernels_take(self._scale)
        options = self._weights.product_options(precision)
        return kernel.prepare_8bit(quantized, scale, self._bias, dtype, **options)


def as_kernels_take(scale: torch.Tensor) -> torch.Tensor:
    """Return scales ``[..., M, blocks]`` as ``[..., M]`` if a row has one block."""
    return scale.squeeze(-1) if scale.shape[-1] == 1 else scale


class RMSNorm(Composite):
    """``x / rms(x) * weight``, or ``* (1 + weight)`` with ``centred``."""

    def __init__(
        self, name: str, size: int, build: Build, *, eps: float, centred: bool = False
    ) -> None:
        self.size, self.eps, self._offset = size, eps, 1.0 if centred else 0.0
        self.weight = build.weights.empty(size)
        role: Role = "centred_norm" if centred else "norm"
        self.own = [(f"{name}.weight", Parameter(self.weight, role))]
        self._norm = build.kernels["norm"].rms_norm

    def seal(self) -> None:
        super().seal()
        self.weight = self.weight.float() + self._offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm of x + residual, x + residual). ``residual`` is None in the first layer."""
        if residual is None:
            return self(x), x
        return self._norm(x, self.weight, self.eps, residual=residual)
