"""Format of integers in groups of columns, and its readers for 4-bit and 8-bit checkpoints.

Checkpoints pack integers into words in several orders. All are brought into one, without a change
of a number; MXFP4 checkpoints are brought into GGUF's MXFP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.linear.formats import Field
from kernels.linear.groups import GroupFormat, Groups, unpacked

Read = tuple["Grouped", dict[str, torch.Tensor]]
"""A format with the fields of a matrix."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word of each of eight numbers."""


@dataclass(frozen=True, slots=True)
class Grouped(GroupFormat):
    """Codes of 4 or 8 bits with a scale per group of columns: ``(code - zero) * scale``.

    Of every ``span`` columns, bytes of two 4-bit codes have one of the first half in their lower
    bits and one of the second half in their upper bits.
    """

    bits: int = 4
    group: int = 128
    """32, 64 or 128 columns."""
    has_zeros: bool = False
    """True if each group has a zero, else it is the middle of the codes."""
    dtype: torch.dtype = torch.bfloat16
    """Dtype of scales: float16, bfloat16 or float32."""

    table = None

    @property
    def block(self) -> int:
        return self.group

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def span(self) -> int:
        return max(64, self.group)

    @property
    def fields(self) -> Mapping[str, Field]:
        weight = Field(torch.uint8, self.span, self.span * self.bits // 8)
        fields = {"weight": weight, "scale": Field(self.dtype, self.group)}
        return fields | ({"zeros": Field(torch.uint8, self.group)} if self.has_zeros else {})

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    def describe(self) -> str:
        return f"{self.kind} in groups of {self.group} columns"

    def decoded(self, fields: Mapping[str, torch.Tensor]) -> Groups:
        weight, scale = fields["weight"], fields["scale"]
        codes = weight if self.bits == 8 else unpacked(weight, 4, self.span // 2)
        return Groups(codes[..., : scale.shape[-1] * self.group], scale, zeros=fields.get("zeros"))

    def packed(
        self, codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the fields of a matrix with these numbers.

        Args:
            codes: uint8 ``[..., M, N]``; scale: ``[..., M, groups]`` of the dtype.
            zeros: uint8 ``[..., M, groups]``, if the format has them.
        """
        codes = F.pad(codes, (0, -codes.shape[-1] % self.span))
        if self.bits == 4:
            low, high = codes.unflatten(-1, (-1, 2, self.span // 2)).unbind(-2)
            codes = (low | high << 4).flatten(-2)
        return {"weight": codes, "scale": scale} | ({} if zeros is None else {"zeros": zeros})

    def quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return codes rounded to nearest. The element of a group with the largest magnitude gets
        code 0, the end of the longer side of the range; so its scale can be negative."""
        if self.has_zeros:
            return GroupFormat.quantized(self, weight)
        groups = F.pad(weight.float(), (0, -weight.shape[-1] % self.group))
        groups = groups.unflatten(-1, (-1, self.group))
        largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
        scale = (largest / -self.zero).to(self.dtype)
        codes = (groups / torch.where(scale == 0, 1.0, scale.float())).round_().add_(self.zero)
        codes = codes.clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return self.packed(codes.flatten(-2)[..., : weight.shape[-1]], scale.squeeze(-1))


def from_compressed_tensors(
    packed: torch.Tensor,
    scale: torch.Tensor,
    num_columns: int,
    group: int | None,
    bits: int = 4,
    zero_point: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
) -> Read:
    """Read a matrix in the format ``pack-quantized`` of compressed-tensors.

    Args:
        packed: ``weight_packed`` int32 ``[M, ceil(N * bits / 32)]``.
        scale: ``weight_scale [M, groups]``.
        num_columns: N, of ``weight_shape``.
        group: columns of a group, the last of which may be smaller, or None for one group per row.
        zero_point: ``weight_zero_point`` int32 ``[ceil(M * bits / 32), groups]``.
        g_idx: ``weight_g_idx [N]``.

    Raises:
        ValueError: the columns of a group are not together, or have an unsupported number.
    """
    codes = _numbers(packed, bits)[:, :num_columns]
    zeros = None
    if zero_point is not None:
        zeros = _numbers(zero_point.t(), bits).t()[: len(codes)]
    return _grouped(codes, scale, zeros, bits, group, g_idx)


def to_compressed_tensors(
    format: Grouped, fields: Mapping[str, torch.Tensor], num_columns: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of ``from_compressed_tensors`` for a matrix ``[M, N]`` without zeros."""
    codes, per_word = format.decoded(fields).codes[:, :num_columns], 32 // format.bits
    codes = F.pad(codes, (0, -num_columns % per_word)).unflatten(1, (-1, per_word)).long()
    words = (codes << torch.arange(0, 32, format.bits)).sum(-1)
    return {
        "weight_packed": words.to(torch.int32),
        "weight_scale": fields["scale"],
        "weight_shape": torch.tensor([len(codes), num_columns]),
    }


def from_gptq(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    num_columns: int,
    group: int | None,
    bits: int = 4,
    g_idx: torch.Tensor | None = None,
    first_zero: int = 1,
) -> Read:
    """Read a matrix in the format of GPTQ.

    Args:
        qweight: int32 ``[ceil(N * bits / 32), M]``; scales: ``[groups, M]``.
        qzeros: int32 ``[groups, ceil(M * bits / 32)]``, of zeros less ``first_zero``. None if the
            checkpoint is symmetric (``sym``).
        num_columns, group: N, and as in ``from_compressed_tensors``.
        g_idx: ``[N]``.
        first_zero: 1, or 0 if ``checkpoint_format`` is ``gptq_v2``.

    Raises:
        ValueError: as in ``from_compressed_tensors``, or a zero is less than ``first_zero``. It was
            stored as the largest number, which readers of GPTQ take for different zeros.
    """
    codes, zeros = _numbers(qweight.t(), bits)[:, :num_columns], None
    if qzeros is not None:
        zeros = _numbers(qzeros, bits)[:, : len(codes)]
        if first_zero and (zeros == 2**bits - 1).any():
            raise ValueError(
                "has zeros in qzeros that checkpoint_format gptq cannot store: its readers differ "
                "about them; quantise the model again with checkpoint_format gptq_v2."
            )
        zeros = (zeros + first_zero).t()
    return _grouped(codes, scales.t(), zeros, bits, group, g_idx)


def from_awq(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor, group: int | None
) -> Read:
    """Read a matrix in the format of AWQ, with 4 bits.

    Args:
        qweight: int32 ``[N, M / 8]``; scales: ``[groups, M]``; qzeros: int32 ``[groups, M / 8]``.
        group: as in ``from_compressed_tensors``.

    Raises:
        ValueError: the number of columns per group is not supported.
    """
    codes, zeros = (
        _numbers(part, 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2).t()
        for part in (qweight, qzeros)
    )
    return _grouped(codes, scales.t(), zeros, 4, group, None)


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the fields of GGUF's MXFP4 for the bytes of a checkpoint.

    Args:
        blocks: uint8 ``[..., M, N / 32, 16]``, of elements ``2 j`` and ``2 j + 1``.
        scales: uint8 ``[..., M, N / 32]``, exponents with a bias of 127.
    """
    low, high = unpacked(blocks[..., None], 4).flatten(-2).chunk(2, dim=-1)
    return {"blocks": torch.cat([scales[..., None], low | high << 4], dim=-1).flatten(-2)}


def _numbers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers in words ``[..., words]``, lowest bits first, as uint8."""
    data = packed.contiguous().view(torch.uint8)
    return data if bits == 8 else unpacked(data[..., None], bits).flatten(-2)


def _grouped(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int | None,
    g_idx: torch.Tensor | None,
) -> Read:
    """Return a matrix with these codes ``[M, N]``, scales and zeros ``[M, groups]``."""
    num_columns, is_per_row = codes.shape[1], group is None
    group = 128 if group is None else group  # Whole rows can be of any length.
    if bits not in (4, 8) or group not in (32, 64, 128):
        raise ValueError(
            f"weights must have 4 or 8 bits and groups of 32, 64 or 128 columns (got {bits} bits, "
            f"{group} columns)."
        )
    num_groups = -(-num_columns // group)
    if scale.shape[1] != (1 if is_per_row else num_groups):
        raise ValueError(
            f"has {scale.shape[1]} scales per row, and {num_columns} columns in groups of "
            f"{'a row' if is_per_row else group}."
        )
    places = torch.arange(num_columns, device=codes.device) // group
    if g_idx is not None and not torch.equal(g_idx.to(places), places * (not is_per_row)):
        raise ValueError(
            "has groups whose columns are not together (g_idx is not sorted): use a checkpoint "
            "without activation ordering (desc_act, actorder)."
        )
    if is_per_row:
        scale = scale.repeat(1, num_groups)
        zeros = None if zeros is None else zeros.repeat(1, num_groups)
    format = Grouped(bits, group, zeros is not None, scale.dtype)
    return format, format.packed(codes, scale.contiguous(), zeros)
