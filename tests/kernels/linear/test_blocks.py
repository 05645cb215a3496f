"""Formats of GGUF files against the package ``gguf``, bit by bit."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from kernels.linear.blocks import GGML_TYPES, Blocks
from kernels.linear.formats import Plain
from tests.refused import refused

NUMBERS = [number for number, format in GGML_TYPES.items() if isinstance(format, Blocks)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: GGML_TYPES[number].describe())
def test_any_bytes_have_the_numbers_of_gguf(number: int) -> None:
    """Random bytes have scales of every kind: subnormal, negative, infinite and NaN."""
    format = GGML_TYPES[number]
    data = torch.randint(256, (2, 30, 5 * format.elements), dtype=torch.uint8)
    data[0, 0], data[0, 1] = 0, 255
    size = 5 * format.columns
    expected = torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType(number)))
    found = format.widened({"blocks": data}, size)
    assert found.shape == (2, 30, size) and found.dtype is torch.float32
    numbers = ~expected.isnan()
    assert numbers.float().mean() > 0.8
    assert torch.equal(found.isnan(), ~numbers)
    assert torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("number", NUMBERS)
def test_names_and_sizes_are_those_of_gguf(number: int) -> None:
    kind, format = GGMLQuantizationType(number), GGML_TYPES[number]
    assert format.describe() == kind.name
    assert (format.columns, format.elements) == quants.GGML_QUANT_SIZES[kind]


def test_plain_types_have_their_numbers() -> None:
    for number, format in GGML_TYPES.items():
        name = GGMLQuantizationType(number).name
        assert isinstance(format, Plain) == (name in {"F32", "F16", "BF16"})


@pytest.mark.parametrize("number", [2, 8], ids=["Q4_0", "Q8_0"])
def test_quantized_blocks_are_those_of_gguf(number: int) -> None:
    """Zeros, equal magnitudes of both signs, and halves included."""
    weight = torch.randn(40, 96) * torch.logspace(-8, 4, 40)[:, None]
    weight[0], weight[1, :32] = 0.0, -1.0
    weight[2] = torch.arange(96).remainder(5) - 2.0
    weight[3] = (weight[3] / weight[3].abs().max() * 254).round() / 2
    expected = quants.quantize(weight.numpy(), GGMLQuantizationType(number))
    assert torch.equal(GGML_TYPES[number].quantized(weight)["blocks"], torch.from_numpy(expected))


def test_types_that_are_only_read_refuse_weights() -> None:
    refused("cannot be brought into Q4_K", GGML_TYPES[12].quantized, torch.randn(4, 256))
    refused(r"multiple of 32 columns \(got 40\)", GGML_TYPES[2].quantized, torch.randn(4, 40))
