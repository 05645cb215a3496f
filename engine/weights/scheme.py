"""Layouts of quantised weights in safetensors files, and the modules of a checkpoint that have one.
``forms`` reads both from the description of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from engine.weights.layer_names import Names
from engine.weights.model_config import ModelError
from kernels.linear.eight_bits import EightBits
from kernels.linear.formats import Format, Matrix
from kernels.linear.grouped import Grouped

Section = Mapping[str, Any]
"""Description of quantised weights in a config.json. A reader may raise the errors of a value with
the wrong type; ``forms.read_quantization`` reports them."""
Tensors = Mapping[str, torch.Tensor]
"""Tensors of one module, by the last part of their names."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a module in a file."""

    shapes: tuple[tuple[int, ...], ...] = ()
    """Allowed shapes; errors name the first one. Empty to allow any."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Allowed dtypes, or empty to allow any."""
    is_optional: bool = False


class Scheme(ABC):
    """Layout of the weight of one linear layer in a file. Instances are immutable."""

    FIELDS: ClassVar[str] = "quant_method"
    """Fields of the description that determine the shapes, for errors."""

    @property
    @abstractmethod
    def format(self) -> Format:
        """Format of the matrix that the file's tensors become."""

    @abstractmethod
    def describe(self) -> str:
        """Return a description such as ``fp8 in blocks of 128 x 128``."""

    @abstractmethod
    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        """Return the tensors of a weight ``[num_rows, num_columns]``, by the last part of their
        names."""

    @abstractmethod
    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        """Return the weight. Raises ValueError for contents that are not supported, with a sentence
        about them that a name can precede."""


@dataclass(frozen=True, slots=True)
class EightBitScheme(Scheme):
    """One 8-bit weight ``[M, N]``: ``stored * scale``, with one scale per block."""

    kind: Literal["int8", "fp8"]
    block: tuple[int | None, int | None]
    """Rows and columns of a block; blocks at the end may be smaller. None means all; ``(1, None)``
    is one scale per output channel."""
    scale_name: str
    """Last part of the name of the scales, in place of ``weight``."""
    is_weight_only: bool = False
    """True if activations stay in full precision."""

    FIELDS = "weight_block_size or strategy"

    @property
    def format(self) -> EightBits:
        return EightBits(self.kind, self.block[1], self.is_weight_only)

    def describe(self) -> str:
        rows, columns = self.block
        if columns is not None:
            said = f"{self.kind} in blocks of {rows or 'all'} x {columns}"
        else:
            said = f"{self.kind} with a scale per {'tensor' if rows is None else 'output channel'}"
        return f"{said}, weights only" if self.is_weight_only else said

    def scale_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a weight; partial blocks count."""
        rows, columns = self.block
        return (
            1 if rows is None else -(-num_rows // rows),
            1 if columns is None else -(-num_columns // columns),
        )

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        shape = self.scale_shape(num_rows, num_columns)
        shapes: tuple[tuple[int, ...], ...] = (shape,)
        if self.block[1] is None:  # The last dimensions may be missing.
            shapes = (shape, shape[:1]) if self.block[0] is not None else (shape, (1,), ())
        return {
            "weight": Stored(((num_rows, num_columns),), (self.format.fields["weight"].dtype,)),
            self.scale_name: Stored(shapes),
            **dict.fromkeys(OFFSETS, Stored(is_optional=True)),
        }

    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        """Return the weight with the scales of each row, so that rows can be read in any order."""
        for name in OFFSETS:
            if name in tensors and tensors[name].float().count_nonzero():
                raise ValueError(
                    f"has zero points in {name}, although its config says none: use a checkpoint "
                    "with symmetric weights."
                )
        scale = tensors[self.scale_name]
        if scale.dtype is torch.uint8:  # exponents (ue8m0)
            scale = scale.view(torch.float8_e8m0fnu)
        grid = scale.float().reshape(self.scale_shape(num_rows, num_columns))
        scales = grid.repeat_interleave(self.block[0] or num_rows, dim=0)[:num_rows]
        return Matrix(self.format, {"weight": tensors["weight"], "scale": scales}, num_columns)


@dataclass(frozen=True, slots=True)
class GroupedScheme(Scheme):
    """Integers in words, with a scale and perhaps a zero for each group of columns."""

    grouped: Grouped
    is_per_row: bool
    """True if a row is one group."""

    @property
    def format(self) -> Grouped:
        return self.grouped

    @property
    def group(self) -> int | None:
        """Number of columns of a group, or None for a whole row."""
        return None if self.is_per_row else self.grouped.group

    def num_groups(self, num_columns: int) -> int:
        """Return the number of groups in a row."""
        return 1 if self.is_per_row else -(-num_columns // self.grouped.group)


OFFSETS = ("weight_offset", "weight_zero_point")
"""Last parts of the names of zero points, which ModelSlim, and older versions of
compressed-tensors, also write if all are 0."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Formats of the modules of a checkpoint. Modules are named as in the files or without a
    multimodal prefix; fused products are not supported."""

    groups: tuple[tuple[Scheme, Names | None], ...]
    """Schemes, each with its modules, or None for every linear layer."""
    ignored: Names
    """Modules in full precision."""

    def scheme(self, module: str) -> Scheme | None:
        """Return the layout of the linear layer ``module``, or None for full precision."""
        is_table = module.rpartition(".")[2].startswith("embed")
        if is_table or self.ignored.has(module):
            return None
        return next((s for s, names in self.groups if names is None or names.has(module)), None)

    def format(self, module: str) -> Format | None:
        scheme = self.scheme(module)
        return None if scheme is None else scheme.format

    def column_order(self, module: str) -> torch.Tensor | None:
        return None

    def described(self) -> Sequence[tuple[str, Format]]:
        schemes = dict.fromkeys(scheme for scheme, _ in self.groups)
        return [(scheme.describe(), scheme.format) for scheme in schemes]

    def describe(self) -> str:
        """Return a description such as ``fp8 in blocks of 128 x 128``."""
        return " and ".join(words for words, _ in self.described())


class UnsupportedError(Exception):
    """Part of a description that is not supported; the message names it."""


def check_served(name: str, section: Section, served: Mapping[str, Sequence[object]]) -> None:
    """Raise UnsupportedError if a key of ``section`` has a value that is not ``served``."""
    for key, values in served.items():
        if key in section and section[key] not in values:
            raise UnsupportedError(f"{name} with {key} {section[key]!r}")


def block_size(size: object, name: str) -> tuple[int, int]:
    """Return the rows and columns of a block. Raises ModelError if it is not two positive
    integers."""
    if not (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise ModelError(f"{name} must be two positive integers in config.json (got {size}).")
    return size[0], size[1]


def scale_dtype(
    tensors: Mapping[str, torch.Tensor], word: str, default: torch.dtype
) -> torch.dtype:
    """Return the dtype of the first tensor whose name ends in ``word``, or ``default`` if there is
    none."""
    found = (tensor.dtype for name, tensor in tensors.items() if name.endswith(f".{word}"))
    return next(found, default)


def modules_with(tensors: Mapping[str, torch.Tensor], word: str) -> Names:
    """Return the modules that have a tensor ``word``."""
    return Names.of(name.removesuffix(f".{word}") for name in tensors if name.endswith(f".{word}"))
