"""Shared parts of the native kernels: the floating-point mode of a region."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from kernels.gdn import native as gdn
from kernels.kda import native as kda
from kernels.mamba2 import native as mamba2
from kernels.native import has, kernel_choices
from kernels.packed import Packed

pytestmark = pytest.mark.skipif(not has("decode_gdn_float32_float32"), reason="no C++ compiler")
NEEDS_AVX512 = pytest.mark.skipif(not has("chunk_gdn_float32_lanes"), reason="no AVX-512")

HEADS, KEY, VALUE, TOKENS = 3, 32, 48, 150
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
DECAYS = pytest.mark.parametrize("decay", [-0.01, -1.0, -10.0, -100.0])


@pytest.fixture(autouse=True)
def restored_mode() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


def chunk_gdn(decay: float) -> list[torch.Tensor]:
    gate = decay * (0.5 + torch.rand(TOKENS, HEADS))
    tokens = [torch.randn(TOKENS, HEADS, size) for size in (KEY, KEY, VALUE)]
    states = torch.zeros(1, HEADS, KEY, VALUE)
    beta = torch.rand(TOKENS, HEADS)
    return [gdn.chunk_gdn(*tokens, gate, beta, states=states, **one_sequence()), states]


def chunk_mamba2(decay: float) -> list[torch.Tensor]:
    gate = decay * (0.5 + torch.rand(TOKENS, HEADS))
    x, B, C = (torch.randn(TOKENS, *shape) for shape in ((HEADS, VALUE), (1, KEY), (1, KEY)))
    states = torch.zeros(1, HEADS, KEY, VALUE)
    step = torch.rand(TOKENS, HEADS)
    D = torch.ones(HEADS)
    return [mamba2.chunk_mamba2(x, B, C, gate, step, D, states=states, **one_sequence()), states]


def one_sequence() -> dict:
    return {
        "packed": Packed.from_lengths([TOKENS]),
        "slots": torch.zeros(1, dtype=torch.int32),
        "resumed": torch.zeros(1, dtype=torch.bool),
        "exports": None,
    }


def decode_gdn(decay: float) -> list[torch.Tensor]:
    return decode(gdn.decode_gdn, decay, ())


def decode_kda(decay: float) -> list[torch.Tensor]:
    return decode(kda.decode_kda, decay, (KEY,))


def decode(function, decay: float, gates: tuple[int, ...]) -> list[torch.Tensor]:
    """Decode a token that writes nothing, with states that are nearly subnormal."""
    count = 8
    tokens = [torch.randn(count, HEADS, size) for size in (KEY, KEY, VALUE)]
    a, b = torch.zeros(count, HEADS, *gates), torch.full((count, HEADS), -200.0)
    A_log = torch.full((HEADS,), math.log(-decay / math.log(2)))
    states = torch.randn(count, HEADS, KEY, VALUE) * 1e-37
    slots = torch.arange(count, dtype=torch.int32)
    bias = torch.zeros(HEADS, *gates)
    return [function(*tokens, a, b, A_log, bias, states=states, slots=slots), states]


KERNELS = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(chunk_gdn, marks=NEEDS_AVX512),
        pytest.param(chunk_mamba2, marks=NEEDS_AVX512),
        decode_gdn,
        decode_kda,
    ],
)


@KERNELS
@DECAYS
@pytest.mark.parametrize("num_threads", [1, 2])
def test_bits_do_not_depend_on_the_mode_of_the_threads(kernel, decay, num_threads) -> None:
    """`torch.set_flush_denormal` changes the calling thread and no worker of an existing pool."""
    torch.set_num_threads(num_threads)
    results = []
    for flush in (False, True):
        torch.manual_seed(0)
        torch.set_flush_denormal(flush)
        results.append(kernel(decay))
        kept = torch.tensor([SMALLEST_NORMAL / 4]) * 1.0
        assert (kept == 0) == flush
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@KERNELS
@DECAYS
def test_results_have_no_subnormal_numbers(kernel, decay) -> None:
    """Operations with them take a hundred times as long."""
    torch.manual_seed(0)
    for result in kernel(decay):
        assert result.isfinite().all()
        assert not ((result != 0) & (result.abs() < SMALLEST_NORMAL)).any()


def test_choices_name_a_method_of_each_operation() -> None:
    choices = kernel_choices()
    names = ["linear_float32", "linear_bfloat16", "prompts_float32", "prompts_bfloat16"]
    if not has("chunk_gdn_float32_lanes"):
        assert {choices[name] for name in [*names, "linear_int8"]} == {"reference"}
        return
    assert choices["linear_float32"] == choices["prompts_float32"] == "lanes"
    assert choices["linear_bfloat16"] in ("amx", "pairs", "halves")
    assert choices["prompts_bfloat16"] in ("amx", "pairs", "lanes")
    assert choices["linear_int8"] in ("amx", "lanes", "reference")
