"""Weights of layers: the target of each tensor of the weight files, which the loader fills, and the
formats in which they are stored and multiplied.

A layer names its weights, and the units (heads, channels) of which their dimensions consist. The
files, the formats and the division among ranks are behind ``Build``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, Protocol, Self, TypeVar

import torch

from engine.weights.model_config import ModelError
from engine.weights.ranks import ALONE, Cut, Rank
from engine.weights.ranks import Kinds as Kinds
from kernels import huge_pages
from kernels.linear.eight_bits import EightBits
from kernels.linear.formats import Format, Matrix, Plain
from kernels.linear.grouped import Grouped

Role = Literal["matrix", "norm", "centred_norm", "log_decay", "time_bias", "skip"]
"""Role of a tensor, which determines its dummy values. A centred norm's weight is around 0
(Gemma-style); a norm's weight and the skip weight of a state space are around 1."""
Precision = Literal["int8", "fp8", "int4", "int4-128"]
PRECISIONS: Mapping[str, Format] = {
    "int8": EightBits("int8"),
    "fp8": EightBits("fp8"),
    "int4": Grouped(4, 32),
    "int4-128": Grouped(4, 128),
}
"""Formats into which weights in full precision can be brought, by their names in the settings."""

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
class Source:
    """One tensor of the weight files, before its bytes are read."""

    shape: tuple[int, ...]
    format: Format
    read: Callable[[], Matrix]
    """Returns the whole tensor in the order of the file, where possible as a view of its bytes."""
    rows: torch.Tensor | None = None
    """int64: row in the file of each row of the model, or None if they are equal."""
    columns: torch.Tensor | None = None
    """int64: column in the file of each column of the model, or None if they are equal. Products
    take them into account, and a cut names columns of the file."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Source:
        """Return the source of a tensor in full precision."""
        matrix = Matrix.of(tensor)
        return cls(tuple(tensor.shape), matrix.format, lambda: matrix)

    def part(self, cut: Cut | None) -> Matrix:
        """Read a part. Raises ValueError if it would divide a block of columns."""
        matrix = self.read()
        rows, is_rows = self.rows, cut is not None and cut.dim == len(self.shape) - 2
        if cut is not None and is_rows:
            rows = cut.index if rows is None else rows[cut.index]
        if rows is not None:
            matrix = matrix.rows(rows)
        if cut is None or is_rows:
            return matrix
        if isinstance(matrix.format, Plain):
            return Matrix.of(cut.of(matrix.fields["weight"]))
        return matrix.columns(cut.index)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the weight files and its destination."""

    target: torch.Tensor | Matrix
    """View to fill; without a cut it has the shape of the file's tensor."""
    role: Role = "matrix"
    cut: Cut | None = None
    """Part of the file's tensor to copy, or None to copy all."""
    take: Callable[[Matrix], None] | None = None
    """Takes a matrix of the file as it is, in place of a copy, if it has the order, format and
    device of the target."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the file's tensor."""
        shape = tuple(self.target.shape)
        return shape if self.cut is None else self.cut.whole(shape)

    @torch.inference_mode()
    def fill(self, source: Source) -> None:
        """Copy the part of a file's tensor. A target in full precision gets the widened values, in
        its dtype."""
        part, target = source.part(self.cut), self.target
        if isinstance(target, Matrix):
            is_view = self.cut is None and source.rows is None
            if self.take is not None and is_view and target.device == part.device:
                self.take(part)
            else:
                target.copy_(part)
        elif isinstance(part.format, Plain):
            target.copy_(part.fields["weight"])
        else:
            part.to(target.device).widen_into(target)


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


class FileFormats(Protocol):
    """Formats of the weights of one checkpoint."""

    def format(self, module: str) -> Format | None:
        """Return the format of the matrix ``module`` (full name without ``.weight``), or None for
        full precision."""

    def column_order(self, module: str) -> torch.Tensor | None:
        """Return the column in the file of each column of the model, int64, or None if they are
        equal."""

    def described(self) -> Sequence[tuple[str, Format]]:
        """Return each format, with its description."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Format of a weight during the load, and in the product."""

    loaded: Format
    computed: Format


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Device, dtype and formats of the weights."""

    device: torch.device
    dtype: torch.dtype
    quantization: Precision | None = None
    """Format to which the weights of large products are converted when their layer is sealed."""
    files: FileFormats | None = None
    """Formats of the modules that are quantised in the files."""
    multiplies: Callable[[Format], bool] = lambda format: False
    """Returns True for formats that the products of this device multiply as they are."""
    fp8_activations: bool = False
    """True to quantise the inputs of all products with fp8 weights."""
    follows_files: bool = False
    """True to quantise those of fp8 weights in checkpoints that say so (dynamic activations)."""

    @property
    def has_fp8_products(self) -> bool:
        """True if weights are multiplied in fp8."""
        described = () if self.files is None else self.files.described()
        return self.quantization == "fp8" or any(
            format.kind == "fp8" and self.is_multiplied(format) for _, format in described
        )

    def product_options(self, format: Format) -> dict[str, bool]:
        """Return keyword arguments of ``Format.product`` for weights of this format."""
        if format.kind != "fp8":
            return {}
        described = () if self.files is None else self.files.described()
        is_said = not format.keeps_inputs and any(format == known for _, known in described)
        rounds = self.fp8_activations or (self.follows_files and is_said)
        return {"fp8_rows": True} if rounds else {}

    def storage(self, name: str) -> Storage:
        """Return the storage of the module ``name`` (full, without ``.weight``).

        A weight is dequantised during the load if no product supports its format, or if another
        format is configured.
        """
        plain = Plain(self.dtype)
        is_full = any(part in FULL_PRECISION for part in name.split("."))
        wanted = None if is_full else self.quantization
        stored = None if self.files is None else self.files.format(name)
        if stored is None or not (wanted is None or PRECISIONS[wanted].kind == stored.kind):
            return Storage(plain, plain if wanted is None else PRECISIONS[wanted])
        return Storage(stored, stored) if self.is_multiplied(stored) else Storage(plain, plain)

    def is_multiplied(self, format: Format) -> bool:
        """Return True if weights are multiplied in the format of the files. On a CPU such a product
        would also round activations, which weight-only formats of 8 bits do not do."""
        rounds = self.device.type == "cpu" and format.keeps_inputs
        return not rounds and self.multiplies(format)

    def note(self) -> str:
        """Describe the conversion of weights to or from few bits for the line on the loaded files.
        Empty if there is none."""
        dtype, notes = str(self.dtype).removeprefix("torch."), list[str]()
        if self.files is None and self.quantization is not None:
            notes.append(f"; brought into {self.quantization}")
        for described, format in () if self.files is None else self.files.described():
            done = "multiplied as they are"
            wanted = self.quantization
            if wanted is not None and PRECISIONS[wanted].kind != format.kind:
                done = f"brought into {self.quantization}"
            elif not self.is_multiplied(format):
                done = f"widened to {dtype}: no product here computes that"
            elif self.product_options(format):
                done = "multiplied as they are, by activations in fp8"
            notes.append(f"; {described}, {done}")
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


class Divided(Protocol):
    """Sizes that ranks can share."""

    def share(self, num_ranks: int) -> Self:
        """Return the sizes of one rank's part."""


S = TypeVar("S", bound=Divided)


@dataclass(frozen=True, slots=True)
class Build:
    """Common arguments of all layers."""

    kernels: Mapping[str, ModuleType]
    weights: WeightSpec
    rank: Rank = ALONE
    """Rank for which the part of the model is built."""

    @property
    def is_divided(self) -> bool:
        """True if this is a part of the model."""
        return self.rank.count > 1

    def own(self, sizes: S) -> S:
        """Return the sizes of the part of a layer that is built."""
        return sizes.share(self.rank.count)

    def parameter(
        self,
        name: str,
        target: torch.Tensor,
        role: Role = "matrix",
        kinds: Kinds = (),
        *,
        dim: int = 0,
    ) -> tuple[str, Parameter]:
        """Return a weight with its name. Its dimension ``dim`` consists of ``kinds`` if it is
        divided."""
        cut = self.rank.cut(*kinds, dim=dim) if kinds else None
        return name, Parameter(target, role, cut)

    def parameters(
        self, sizes: Mapping[str, int], target: torch.Tensor, kinds: Kinds
    ) -> Iterator[tuple[str, Parameter]]:
        """Yield the weights that follow each other in ``target``, by name with their sizes in the
        files, which together consist of ``kinds``."""
        cuts = dict(zip(sizes, self.rank.cuts([*sizes.values()], kinds), strict=True))
        own = [n if (cut := cuts[name]) is None else len(cut) for name, n in sizes.items()]
        for (name, cut), part in zip(cuts.items(), target.split(own), strict=True):
            yield name, Parameter(part, cut=cut)


def plain_or(matrix: Matrix) -> torch.Tensor | Matrix:
    """Return the tensor of a matrix in full precision, and others as they are."""
    return matrix.fields["weight"] if isinstance(matrix.format, Plain) else matrix
