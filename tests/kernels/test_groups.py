"""Matrices of small integers in groups of columns: checkpoints."""

from __future__ import annotations

import pytest
import torch

from kernels.linear import grouped
from kernels.linear.blocks import GGML_TYPES
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack numbers ``[..., N]`` into int32 words: number i has the bits from ``bits * i`` on."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[-1] % per_word))
    shifts = torch.arange(0, 32, bits)
    packed = (padded.unflatten(-1, (-1, per_word)) << shifts).sum(dim=-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def draw(num_outputs, size, group, bits):
    torch.manual_seed(0)
    num_groups = -(-size // group)
    codes, zeros = (torch.randint(2**bits, (num_outputs, n)) for n in (size, num_groups))
    return codes, torch.randn(num_outputs, num_groups).half(), zeros


def formula(codes, scale, zeros, group):
    each = lambda part: part.repeat_interleave(group, dim=1)[:, : codes.shape[1]]  # noqa: E731
    return (codes - each(zeros)).float() * each(scale.float())


def widened(read, size):
    format, fields = read
    matrix = Matrix(format, fields, size)
    for name, field in format.fields.items():
        assert fields[name].dtype is field.dtype
        assert fields[name].shape == (matrix.shape[0], field.width(size))
    return matrix.widened(torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size, group", [(256, 128), (96, 32), (300, 300), (192, 64)])
def test_compressed_tensors_keep_their_numbers(size, group, bits) -> None:
    codes, scale, zeros = draw(24, size, group, bits)
    packed, order = words(codes, bits), torch.arange(size) // group
    read = grouped.from_compressed_tensors(packed, scale, size, bits, words(zeros.T, bits).T, order)
    assert torch.equal(widened(read, size), formula(codes, scale, zeros, group))
    read = grouped.from_compressed_tensors(packed, scale, size, bits)
    middle = torch.full_like(zeros, 2 ** (bits - 1))
    assert torch.equal(widened(read, size), formula(codes, scale, middle, group))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_keeps_its_numbers(bits) -> None:
    codes, scale, zeros = draw(40, 256, 128, bits)
    zeros = zeros.clamp(min=1, max=2**bits - 1)
    weight = words(codes, bits).T.contiguous()
    for first in (1, 0):
        read = grouped.from_gptq(weight, scale.T, words((zeros - first).T, bits), bits, None, first)
        assert torch.equal(widened(read, 256), formula(codes, scale, zeros, 128))
    read = grouped.from_gptq(weight, scale.T, None, bits, torch.arange(256) // 128)
    middle = torch.full_like(zeros, 2 ** (bits - 1))
    assert torch.equal(widened(read, 256), formula(codes, scale, middle, 128))


def test_awq_keeps_its_numbers() -> None:
    codes, scale, zeros = draw(40, 256, 128, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    weight, packed_zeros = (
        words(part.T.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4) for part in (codes, zeros)
    )
    read = grouped.from_awq(weight, scale.T, packed_zeros)
    assert torch.equal(widened(read, 256), formula(codes, scale, zeros, 128))


def test_mxfp4_keeps_its_numbers() -> None:
    torch.manual_seed(0)
    blocks = torch.randint(256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(1, 255, (3, 10, 4), dtype=torch.uint8)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    numbers = values[torch.stack([blocks & 15, blocks >> 4], dim=-1).int()].flatten(-2)
    expected = numbers.double() * (scales.double() - 127).exp2()[..., None]
    found = GGML_TYPES[39].widened(grouped.from_mxfp4(blocks, scales), 128)
    assert torch.equal(found.double(), expected.flatten(-2))


def test_mixed_columns_and_odd_groups_are_refused() -> None:
    codes, scale, _ = draw(8, 256, 128, 4)
    order = torch.arange(256) // 128
    order[[0, 200]] = order[[200, 0]]
    with pytest.raises(ValueError, match="not together"):
        grouped.from_compressed_tensors(words(codes, 4), scale, 256, g_idx=order)
    with pytest.raises(ValueError, match="got 4 bits, 16 columns"):
        grouped.from_compressed_tensors(words(codes, 4), torch.ones(8, 16), 256)


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, 64)])
def test_quantized_weights_are_close(bits, group) -> None:
    """An element at the end of the shorter side of the range has an error of up to one step, others
    of half a step. A scale in bfloat16 differs by up to 1/256 before codes are rounded."""
    torch.manual_seed(0)
    weight = torch.randn(3, 8, 300) * torch.logspace(-20, 3, 24).view(3, 8, 1)
    weight[0, 0] = 0.0
    format = Grouped(bits, group)
    matrix = Matrix(format, format.quantized(weight), 300)
    assert matrix.shape == (3, 8, 300)
    largest = torch.nn.functional.pad(weight, (0, -300 % group)).unflatten(-1, (-1, group))
    step = largest.abs().amax(dim=-1).repeat_interleave(group, dim=-1)[..., :300] / format.zero
    error = (matrix.widened(torch.float32) - weight).abs()
    assert (error <= step * (1 + 2**-8 * (format.zero + 1))).all()
    assert error.norm() < {4: 0.12, 8: 0.008}[bits] * weight.norm()


def test_columns_and_rows_can_be_cut_out() -> None:
    format = Grouped(4, 32)
    matrix = Matrix(format, format.quantized(torch.randn(12, 256)), 256)
    whole = matrix.widened(torch.float32)
    assert format.unit == 64
    assert torch.equal(matrix.columns(64, 192).widened(torch.float32), whole[:, 64:192])
    assert torch.equal(matrix.split([5, 7])[1].widened(torch.float32), whole[5:])
