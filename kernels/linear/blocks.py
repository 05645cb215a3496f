"""Formats of GGUF files, in the byte order of the files: a row is a sequence of blocks of bytes.

Source: ggml's documentation of its quantised types; ``gguf.quants`` has the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.linear.formats import Field, Format, Plain
from kernels.linear.groups import GroupFormat, Groups, unpacked

CURVE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Values of IQ4_NL and IQ4_XS."""
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Values of MXFP4 and NVFP4, times 2."""

Decoder = Callable[[torch.Tensor], Groups]


@dataclass(frozen=True, slots=True)
class Blocks(GroupFormat):
    """Blocks of ``columns`` columns and ``elements`` bytes each."""

    name: str
    columns: int
    elements: int
    decode: Decoder = field(repr=False, compare=False)
    """Maps bytes ``[..., blocks, elements]`` to ``Groups`` whose last dimension is one block."""
    bits: int = 4
    group: int = 32
    zero: int = 0
    table: tuple[int, ...] | None = None
    scales: int = 1
    """Scales per block of bytes."""
    quantize: Callable[[torch.Tensor], torch.Tensor] | None = field(
        default=None, repr=False, compare=False
    )
    """Maps float32 ``[..., blocks, columns]`` to bytes ``[..., blocks, elements]``."""

    @property
    def block(self) -> int:
        return self.columns // self.scales

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"blocks": Field(torch.uint8, self.columns, self.elements)}

    def describe(self) -> str:
        return self.name

    def decoded(self, fields: Mapping[str, torch.Tensor]) -> Groups:
        found = self.decode(fields["blocks"].unflatten(-1, (-1, self.elements)))
        parts: dict[str, Any] = {name: getattr(found, name) for name in Groups.__slots__}
        for name, part in parts.items():
            parts[name] = None if part is None else part.flatten(-2)
        return Groups(**parts)

    def quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the blocks with the bytes of ``gguf.quants.quantize``."""
        if self.quantize is None:
            return GroupFormat.quantized(self, weight)
        if weight.shape[-1] % self.columns:
            raise ValueError(
                f"rows in {self.name} must have a multiple of {self.columns} columns "
                f"(got {weight.shape[-1]})."
            )
        blocks = weight.float().unflatten(-1, (-1, self.columns))
        return {"blocks": self.quantize(blocks).flatten(-2)}


def halves(data: torch.Tensor) -> torch.Tensor:
    """Return bytes as float16, half as many."""
    return data.contiguous().view(torch.float16)


def factors_and_minima(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two times eight 6-bit numbers from the 12 bytes in Q4_K and Q5_K."""
    first, second, rest = data.split(4, dim=-1)
    factors = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=-1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=-1)
    return factors.view(torch.int8), minima


def q4_0(data: torch.Tensor) -> Groups:
    return Groups(unpacked(data[..., 2:], 4), halves(data[..., :2]))


def q4_1(data: torch.Tensor) -> Groups:
    return Groups(
        unpacked(data[..., 4:], 4), halves(data[..., :2]), minimum=-halves(data[..., 2:4])
    )


def fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """Return the bits of each byte in turn, as the fifth bits of codes."""
    return unpacked(data[..., None], 1).flatten(-2) << 4


def q5_0(data: torch.Tensor) -> Groups:
    return Groups(unpacked(data[..., 6:], 4) | fifth_bits(data[..., 2:6]), halves(data[..., :2]))


def q5_1(data: torch.Tensor) -> Groups:
    scale, minimum = halves(data[..., :4]).split(1, dim=-1)
    codes = unpacked(data[..., 8:], 4) | fifth_bits(data[..., 4:8])
    return Groups(codes, scale, minimum=-minimum)


def q8_0(data: torch.Tensor) -> Groups:
    return Groups(data[..., 2:] ^ 128, halves(data[..., :2]))


def q2_k(data: torch.Tensor) -> Groups:
    scales, codes = data[..., :16], unpacked(data[..., 16:80], 2, 32)
    scale, minimum = halves(data[..., 80:]).split(1, dim=-1)
    return Groups(codes, scale, (scales & 15).view(torch.int8), minimum, scales >> 4)


def q3_k(data: torch.Tensor) -> Groups:
    codes = unpacked(data[..., 32:96], 2, 32) | unpacked(data[..., :32], 1) << 2
    low, high = data[..., 96:108].split([8, 4], dim=-1)
    factors = (unpacked(low, 4) | unpacked(high, 2) << 4).view(torch.int8) - 32
    return Groups(codes, halves(data[..., 108:]), factors)


def q4_k(data: torch.Tensor) -> Groups:
    scale, minimum = halves(data[..., :4]).split(1, dim=-1)
    factors, minima = factors_and_minima(data[..., 4:16])
    return Groups(unpacked(data[..., 16:], 4, 32), scale, factors, minimum, minima)


def q5_k(data: torch.Tensor) -> Groups:
    scale, minimum = halves(data[..., :4]).split(1, dim=-1)
    factors, minima = factors_and_minima(data[..., 4:16])
    codes = unpacked(data[..., 48:], 4, 32) | unpacked(data[..., 16:48], 1) << 4
    return Groups(codes, scale, factors, minimum, minima)


def q6_k(data: torch.Tensor) -> Groups:
    codes = unpacked(data[..., :128], 4, 64) | unpacked(data[..., 128:192], 2, 32) << 4
    factors = data[..., 192:208].view(torch.int8)
    return Groups(codes, halves(data[..., 208:]), factors)


def iq4_xs(data: torch.Tensor) -> Groups:
    high = unpacked(data[..., 2:4, None], 2).flatten(-2)
    low = unpacked(data[..., 4:8, None], 4).flatten(-2)
    factors = (low | high << 4).view(torch.int8) - 32
    return Groups(unpacked(data[..., 8:], 4, 16), halves(data[..., :2]), factors)


def mxfp4(data: torch.Tensor) -> Groups:
    return Groups(unpacked(data[..., 1:], 4), data[..., :1])


def nvfp4(data: torch.Tensor) -> Groups:
    """The scales are half of unsigned e4m3 numbers."""
    exponent, digits = (data[..., :4] >> 3 & 15).float(), (data[..., :4] & 7).float()
    scale = torch.where(exponent == 0, digits / 4, (8 + digits) / 8 * exponent.exp2()) / 2**8
    scale = scale.masked_fill(data[..., :4] == 127, 0.0)
    return Groups(unpacked(data[..., 4:], 4, 8), scale.half())


def as_bytes(scale: torch.Tensor) -> torch.Tensor:
    """Return ``scale [..., 1]`` in float16, as two bytes."""
    return scale.half().view(torch.uint8)


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """Return ``1 / scale``, and 0 for 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def quantize_q4_0(weight: torch.Tensor) -> torch.Tensor:
    """The element with the largest magnitude becomes -8."""
    scale = weight.gather(-1, weight.abs().argmax(dim=-1, keepdim=True)) / -8
    codes = (weight * inverse(scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    return torch.cat([as_bytes(scale), low | high << 4], dim=-1)


def quantize_q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Half is rounded away from 0."""
    scale = weight.abs().amax(dim=-1, keepdim=True) / 127
    scaled = weight * inverse(scale)
    size = scaled.abs().floor()
    size += (2 * (scaled.abs() - size)).floor()
    values = (scaled.sign() * size).to(torch.int8).view(torch.uint8)
    return torch.cat([as_bytes(scale), values], dim=-1)


GGML_TYPES: dict[int, Format] = {
    0: Plain(torch.float32),
    1: Plain(torch.float16),
    2: Blocks("Q4_0", 32, 18, q4_0, zero=8, quantize=quantize_q4_0),
    3: Blocks("Q4_1", 32, 20, q4_1),
    6: Blocks("Q5_0", 32, 22, q5_0, bits=5, zero=16),
    7: Blocks("Q5_1", 32, 24, q5_1, bits=5),
    8: Blocks("Q8_0", 32, 34, q8_0, bits=8, zero=128, quantize=quantize_q8_0),
    10: Blocks("Q2_K", 256, 84, q2_k, bits=2, group=16),
    11: Blocks("Q3_K", 256, 110, q3_k, bits=3, group=16, zero=4),
    12: Blocks("Q4_K", 256, 144, q4_k),
    13: Blocks("Q5_K", 256, 176, q5_k, bits=5),
    14: Blocks("Q6_K", 256, 210, q6_k, bits=6, group=16, zero=32),
    20: Blocks("IQ4_NL", 32, 18, q4_0, table=CURVE),
    23: Blocks("IQ4_XS", 256, 136, iq4_xs, table=CURVE),
    30: Plain(torch.bfloat16),
    39: Blocks("MXFP4", 32, 17, mxfp4, table=E2M1),
    40: Blocks("NVFP4", 64, 36, nvfp4, group=16, table=E2M1, scales=4),
}
"""Formats of tensors in GGUF files, by the numbers of their types."""
