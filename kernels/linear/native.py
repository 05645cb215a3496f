"""Linear layers with ``native.cpp``, which sums every row in one order for any number of rows.

Rows need no padding. Otherwise as in ``reference``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from kernels import huge_pages
from kernels.linear import reference
from kernels.linear.blocks import Blocks
from kernels.linear.formats import Matrix
from kernels.linear.groups import UNIT, GroupFormat
from kernels.linear.reference import (
    PRODUCTS,
    linear,
    linear_8bit,
    linear_fp8,
    quantize,
    quantize_rows,
    widened,
)
from kernels.native import DTYPES, address, function, has, kernel_choices

__all__ = [
    "PRODUCTS",
    "ROWS",
    "has_groups",
    "join",
    "linear",
    "linear_8bit",
    "linear_fp8",
    "look_up",
    "prepare",
    "prepare_8bit",
    "prepare_groups",
    "quantize",
    "quantize_rows",
]

ROWS = 1
"""Rows per padding unit, as ``reference.ROWS``."""
PANEL = 64
"""Outputs per panel of a packed weight."""
GROUP_PANEL = 16
"""Outputs per panel of small integers in groups."""
SCALE_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.uint8: 3}
"""Numbers in ``native_groups.cpp`` of the dtypes of ``Groups.scale``."""
GROUP_PARTS = ("scale", "minimum", "zeros", "factors", "minima")
"""Parts of ``Groups`` in the order of ``PackedGroups``, after the codes."""
BAND_ELEMENTS = 2**22
"""Number of weights that are decoded at a time."""


def join(products: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """Return the product with the outputs of all ``products``; see ``reference.join``. Native ones
    write into one result."""
    native = [product for product in products if isinstance(product, NativeProduct)]
    if len(products) == 1 or len(native) < len(products):
        return reference.join(products)
    sizes = [product.num_outputs for product in native]

    def joined(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), sum(sizes))
        for product, part in zip(native, out.split(sizes, dim=1), strict=True):
            product.write(x, part)
        return out

    return joined


def look_up(matrix: Matrix, index: torch.Tensor, out: torch.Tensor) -> None:
    """Write widened rows; see ``reference.look_up``. Blocks of GGUF files are read in one pass."""
    format = matrix.format
    name = f"look_up_{format.describe().lower()}_{DTYPES.get(out.dtype)}"
    if not isinstance(format, Blocks) or not has(name) or index.dtype is not torch.int64:
        reference.look_up(matrix, index, out)
        return
    rows, table = matrix.fields["blocks"], table_of(format)
    function(name, "piipipip")(
        rows.data_ptr(), rows.stride(0), rows.shape[1] // format.elements, index.data_ptr(),
        len(index), None if table is None else table.ctypes.data, format.zero, out.data_ptr(),
    )  # fmt: skip


@cache
def table_of(format: GroupFormat) -> npt.NDArray[np.int8] | None:
    return None if format.table is None else np.array(format.table, np.int8)


def prepare(
    weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``linear`` with this weight ``[M, N]``, which is copied."""
    if not _is_served(weight):
        return reference.prepare(weight, bias)
    return NativeLinear(weight, None, bias)


def prepare_8bit(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    fp8_rows: bool = False,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``linear_8bit`` with this weight, for x of ``dtype``; ``linear_fp8`` is the
    reference's.

    int8 weights use int8 activations. fp8 weights with one scale per row are widened exactly.
    """
    if fp8_rows:
        return reference.prepare_8bit(quantized, scale, bias, dtype, fp8_rows=True)
    if quantized.dtype is torch.int8 and scale.ndim == 1:
        if dtype in DTYPES and kernel_choices()["linear_int8"] != "reference":
            return NativeInt8Linear(quantized, scale, bias)
        return reference.prepare_8bit(quantized, scale, bias, dtype)
    if scale.ndim == 1 and _is_served(exact := quantized.to(dtype)):
        return NativeLinear(exact, scale, bias)
    return prepare(widened(quantized, scale, dtype), bias)


def has_groups(format: GroupFormat) -> bool:
    """Return True if ``prepare_groups`` works on this processor: blocks have whole units."""
    return format.block % UNIT == 0 and kernel_choices()["linear_groups"] != "reference"


def prepare_groups(
    format: GroupFormat,
    fields: Mapping[str, torch.Tensor],
    num_columns: int,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``groups.linear_groups`` with this weight, for x of ``dtype``."""
    return NativeGroups(format, fields, num_columns, bias, dtype)


def _is_served(weight: torch.Tensor) -> bool:
    """Return True if rows are whole 32-bit words of a dtype that this processor multiplies."""
    has_words = weight.shape[1] * weight.element_size() % 4 == 0
    return has_words and _method(weight.dtype) != "reference"


def _method(dtype: torch.dtype) -> str:
    return kernel_choices().get(f"linear_{DTYPES.get(dtype)}", "reference")


class NativeProduct(ABC):
    """Linear layer that writes rows of any distance, x ``[T, N]`` to out ``[T, M]``."""

    num_outputs: int
    description: torch.Tensor
    """int64: the packed weight, as the library's functions for experts read it."""

    @abstractmethod
    def suffix(self, dtype: torch.dtype) -> str:
        """Return the end of the names of functions for x of ``dtype``: the method and the dtype."""

    @abstractmethod
    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Compute the product of x into out, whose rows are contiguous."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], self.num_outputs)
        self.write(x, out)
        return out


class NativeLinear(NativeProduct):
    """Linear layer ``(x @ weight.T) * scale + bias`` for x ``[T, N]`` of the weight's dtype.

    ``scale``: float32 ``[M]`` or None. ``method``: of ``kernels.native.kernel_choices``, which is
    the default.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        method: str | None = None,
    ) -> None:
        self.num_outputs = len(weight)
        self._weight = pack(weight)
        self._bias = None if bias is None else bias.to(weight.dtype).contiguous()
        self._scale = None if scale is None else scale.contiguous()
        self._address = self._weight.data_ptr()
        self._steps = self._weight.shape[1]
        self._name = f"{DTYPES[weight.dtype]}_{method or _method(weight.dtype)}"
        self._multiply = function(f"linear_{self._name}", "piippppiiit")
        self.description = torch.tensor([
            self._address, 0, address(self._scale) or 0, *weight.shape, self._steps
        ])  # fmt: skip

    def suffix(self, dtype: torch.dtype) -> str:
        return self._name

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        num_rows, stride = x.shape[0], x.stride(0)
        if x.stride(1) != 1 or stride % 2:
            x = x.contiguous()
            stride = x.stride(0)
        self._multiply(
            x.data_ptr(), stride, num_rows, self._address, address(self._scale),
            address(self._bias), out.data_ptr(), out.stride(0), self._steps, self.num_outputs,
            torch.get_num_threads(),
        )  # fmt: skip


class NativeInt8Linear(NativeProduct):
    """Native version of ``int8.Int8Linear`` with equal bits in every method."""

    def __init__(
        self,
        quantized: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        method: str | None = None,
    ) -> None:
        self.num_outputs, self._size = quantized.shape
        self._weight = pack(F.pad(quantized, (0, -self._size % 4)))
        # The instruction takes unsigned rows: 128 is added to them, and this subtracted from sums.
        self._offsets = quantized.sum(dim=1, dtype=torch.int32).mul_(128)
        self._scale, self._bias = scale.contiguous(), bias
        self._method = method or kernel_choices()["linear_int8"]
        parts = self._weight, self._offsets, self._scale
        self.description = torch.tensor([
            *(part.data_ptr() for part in parts), *quantized.shape, self._weight.shape[1]
        ])  # fmt: skip

    def suffix(self, dtype: torch.dtype) -> str:
        return f"int8_{self._method}_{DTYPES[dtype]}"

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if x.stride(1) != 1:
            x = x.contiguous()
        function(f"linear_{self.suffix(x.dtype)}", "piiipppppiit")(
            x.data_ptr(), x.stride(0), x.shape[0], self._size, self._weight.data_ptr(),
            self._offsets.data_ptr(), self._scale.data_ptr(),
            address(self._bias), out.data_ptr(), out.stride(0),
            self.num_outputs, torch.get_num_threads(),
        )  # fmt: skip


class NativeGroups(NativeProduct):
    """Native version of ``groups.linear_groups`` with equal bits in every method.

    The packed weight has the format's bits, and one byte for each factor of a group.
    """

    def __init__(
        self,
        format: GroupFormat,
        fields: Mapping[str, torch.Tensor],
        num_columns: int,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        method: str | None = None,
    ) -> None:
        self.num_outputs = len(next(iter(fields.values())))
        self._bias = None if bias is None else bias.to(dtype).contiguous()
        self._packed = pack_groups(format, fields, num_columns)
        parts, table = (
            (self._packed.get(name) for name in ("codes", *GROUP_PARTS)),
            table_of(format),
        )
        self.description = torch.tensor([
            *(address(part) or 0 for part in parts), 0 if table is None else table.ctypes.data,
            self.num_outputs, num_columns, self._packed["codes"].shape[1], format.block // UNIT,
            format.bits, format.zero, SCALE_KINDS[self._packed["scale"].dtype],
            max(1, UNIT // format.group),
        ])  # fmt: skip
        self._method = method or kernel_choices()["linear_groups"]
        self._multiply = function(f"linear_{self.suffix(dtype)}", "piipppit")

    def split(self, count: int) -> list[NativeGroups]:
        """Return products with equal parts of the outputs, in whole panels, in the same memory."""
        parts = [copy(self) for _ in range(count)]
        packed = [self._packed.get(name) for name in ("codes", *GROUP_PARTS)]
        sizes = [0 if part is None else part.nbytes // count for part in packed]
        steps = torch.tensor(sizes + [0] * (len(self.description) - len(sizes)))
        for number, part in enumerate(parts):
            part.num_outputs = self.num_outputs // count
            part.description = self.description + number * steps
            part.description[len(sizes) + 1] = part.num_outputs
        return parts

    def suffix(self, dtype: torch.dtype) -> str:
        return f"groups_{self._method}_{DTYPES[dtype]}"

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weight."""
        return sum(part.nbytes for part in self._packed.values())

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if x.stride(1) != 1:
            x = x.contiguous()
        self._multiply(
            x.data_ptr(), x.stride(0), x.shape[0], self.description.data_ptr(),
            address(self._bias), out.data_ptr(), out.stride(0), torch.get_num_threads(),
        )  # fmt: skip


def pack_groups(
    format: GroupFormat, fields: Mapping[str, torch.Tensor], num_columns: int
) -> dict[str, torch.Tensor]:
    """Pack a matrix ``[M, N]`` into panels of 16 outputs, by the names of ``Groups``.

    Codes are int32 ``[panels, units, words, 16]``, as ``native_groups.cpp`` says, other parts
    ``[panels, units, groups or blocks, 16]``. Missing outputs of the last panel are zero.
    """
    if isinstance(format, Blocks) and has(f"pack_{format.name.lower()}"):
        return pack_blocks(format, fields["blocks"])
    num_outputs = len(next(iter(fields.values())))
    panels = -(-num_outputs // GROUP_PANEL)
    padded = -(-num_columns // format.block) * format.block
    words = 8 if format.bits == 8 else format.bits
    codes = huge_pages.empty(panels, padded // UNIT, words, GROUP_PANEL, dtype=torch.int32)
    packed = {"codes": codes}
    band = max(GROUP_PANEL, BAND_ELEMENTS // padded // GROUP_PANEL * GROUP_PANEL)
    for first in range(0, num_outputs, band):
        found = format.decoded({name: rows[first : first + band] for name, rows in fields.items()})
        own, place = found.codes.contiguous(), first // GROUP_PANEL
        function("pack_codes", "ppiiit")(
            own.data_ptr(), codes[place:].data_ptr(), *own.shape, format.bits,
            torch.get_num_threads(),
        )  # fmt: skip
        for name in GROUP_PARTS:
            part = getattr(found, name)
            if part is None:
                continue
            if first == 0:
                packed[name] = huge_pages.empty(
                    panels, part.shape[1], GROUP_PANEL, dtype=part.dtype
                )
            part = F.pad(part, (0, 0, 0, -len(part) % GROUP_PANEL)).unflatten(0, (-1, GROUP_PANEL))
            packed[name][place : place + len(part)] = part.transpose(1, 2)
    return packed


def pack_blocks(format: Blocks, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack rows of blocks as ``pack_groups`` does, in one pass over their bytes."""
    (num_outputs, num_bytes), first = rows.shape, rows[:1, : format.elements]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    panels, num_blocks = -(-num_outputs // GROUP_PANEL), num_bytes // format.elements
    words, found = num_blocks * format.columns // UNIT, format.decoded({"blocks": first})
    packed = {"codes": huge_pages.empty(panels, words, format.bits, GROUP_PANEL, dtype=torch.int32)}
    for name in GROUP_PARTS:
        if (part := getattr(found, name)) is not None:
            sizes = panels, num_blocks * part.shape[1], GROUP_PANEL
            packed[name] = huge_pages.empty(*sizes, dtype=part.dtype)
    function(f"pack_{format.name.lower()}", "piiipppppt")(
        rows.data_ptr(), rows.stride(0), num_outputs, num_blocks,
        *(address(packed.get(name)) for name in ("codes", "scale", "minimum", "factors", "minima")),
        torch.get_num_threads(),
    )  # fmt: skip
    if missing := -num_outputs % GROUP_PANEL:
        for part in packed.values():
            part[-1, ..., -missing:] = 0
    return packed


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack ``[M, N]`` into panels of 64 outputs, word by word: int32 ``[panels, words, 64]``.

    Missing outputs of the last panel are zero.
    """
    words = weight.contiguous().view(torch.int32)
    num_outputs, num_words = words.shape
    panels = -(-num_outputs // PANEL)
    packed = huge_pages.empty(panels, num_words, PANEL, dtype=torch.int32)
    function("pack_words", "ppiit")(
        words.data_ptr(), packed.data_ptr(), num_outputs, num_words, torch.get_num_threads()
    )
    return packed
