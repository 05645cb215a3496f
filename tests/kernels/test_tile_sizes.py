"""Tiles of 16, 32 and 64 tokens: results are close for all sizes, and exact after a resume at any
tile."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from kernels.attention.sequences import Sequences
from kernels.packed import TILE_SIZES, Exports, Packed
from tests.kernels.compiled import ON_CPU, native, shared_library

pytest.importorskip("triton")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIZES = pytest.mark.parametrize("tile_size", TILE_SIZES)
LENGTHS = (150, 1, 47)
NUM_HEADS, KEY_DIM, VALUE_DIM = 2, 32, 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


class Case(NamedTuple):
    """Recurrence over packed sequences. ``chunk`` takes tensors of ``draw``, a row per token."""

    chunk: Callable[..., torch.Tensor]
    draw: Callable[[int, torch.dtype, Any], list[torch.Tensor]]
    constants: Callable[[Any], list[torch.Tensor]]
    state_shape: tuple[int, ...]


def _tokens(count: int, dtype: torch.dtype, device: Any, *sizes: int) -> list[torch.Tensor]:
    return [torch.randn(count, NUM_HEADS, size, device=device).to(dtype) for size in sizes]


def _gdn(count: int, dtype: torch.dtype, device: Any) -> list[torch.Tensor]:
    drawn = torch.rand(2, count, NUM_HEADS, device=device)
    return [*_tokens(count, dtype, device, KEY_DIM, KEY_DIM, VALUE_DIM), -drawn[0], drawn[1]]


def _kda(count: int, dtype: torch.dtype, device: Any) -> list[torch.Tensor]:
    gate = -torch.rand(count, NUM_HEADS, KEY_DIM, device=device)
    beta = torch.rand(count, NUM_HEADS, device=device)
    return [*_tokens(count, dtype, device, KEY_DIM, KEY_DIM, VALUE_DIM), gate, beta]


def _mamba2(count: int, dtype: torch.dtype, device: Any) -> list[torch.Tensor]:
    drawn = torch.rand(2, count, NUM_HEADS, device=device)
    return [*_tokens(count, dtype, device, VALUE_DIM, KEY_DIM, KEY_DIM), -drawn[0], drawn[1]]


def _mamba1(count: int, dtype: torch.dtype, device: Any) -> list[torch.Tensor]:
    sizes = VALUE_DIM, KEY_DIM, KEY_DIM
    x = [torch.randn(count, size, device=device).to(dtype) for size in sizes]
    return [*x, torch.rand(count, VALUE_DIM, device=device)]


DRAW_INPUTS = {"gdn": _gdn, "kda": _kda, "mamba2": _mamba2, "mamba1": _mamba1}
CONSTANTS: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "gdn": lambda device: [],
    "kda": lambda device: [],
    "mamba2": lambda device: [torch.ones(NUM_HEADS, device=device)],
    "mamba1": lambda device: [
        -torch.rand(KEY_DIM, VALUE_DIM, device=device),
        torch.ones(VALUE_DIM, device=device),
    ],
}


def _cases() -> list[Any]:
    cases = []
    for name, backends in {
        "gdn": ("reference", "native", "fused"),
        "kda": ("reference", "fused"),
        "mamba2": ("reference", "native", "fused"),
        "mamba1": ("reference",),
    }.items():
        for backend in backends:
            marks = native(name).marks if backend == "native" else ()
            heads = () if name == "mamba1" else (NUM_HEADS,)
            module = importlib.import_module(f"kernels.{name}.{backend}")
            case = Case(
                getattr(module, f"chunk_{name}"),
                DRAW_INPUTS[name],
                CONSTANTS[name],
                (*heads, KEY_DIM, VALUE_DIM),
            )
            cases.append(pytest.param(case, id=f"{name}-{backend}", marks=marks))
    return cases


CASES = pytest.mark.parametrize("case", _cases())


def run(
    case: Case,
    inputs: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    lengths: Sequence[int],
    tile_size: int,
    states: torch.Tensor,
    exports: Sequence[tuple[int, int, int]] = (),
) -> torch.Tensor:
    """Resume all sequences from the first slots and store their last states there."""
    device = inputs[0].device
    packed = Packed.from_lengths(lengths, device, tile_size)
    return case.chunk(
        *inputs,
        *constants,
        states=states,
        packed=packed,
        slots=torch.arange(len(lengths), dtype=torch.int32, device=device),
        resumed=torch.ones(len(lengths), dtype=torch.bool, device=device),
        exports=Exports.plan(packed, exports),
    )


def draw(case: Case, dtype: torch.dtype, state_dtype: torch.dtype, device: Any) -> tuple[Any, ...]:
    torch.manual_seed(3)
    inputs = case.draw(sum(LENGTHS), dtype, device)
    states = torch.full((20, *case.state_shape), torch.nan, device=device, dtype=state_dtype)
    states[: len(LENGTHS)] = torch.randn(len(LENGTHS), *case.state_shape, device=device)
    return inputs, case.constants(device), states


@pytest.mark.full(
    "16-fp32-gdn-native",
    "32-bf16-mamba2-native",
    "16-bf16-mamba1-reference",
    "32-fp32-kda-reference",
)
@CASES
@DTYPES
@pytest.mark.parametrize("tile_size", [16, 32])
def test_tile_size_changes_results_little(case, dtype, tile_size, device) -> None:
    """Other tests compare tiles of 64 with the recurrence."""
    inputs, constants, states = draw(case, dtype, torch.float32, device)
    expected_states = states.clone()
    expected = run(case, inputs, constants, LENGTHS, 64, expected_states)
    out = run(case, inputs, constants, LENGTHS, tile_size, states)
    tolerance = TOLERANCE[dtype]
    for actual, wanted in ((out, expected), (states[:3], expected_states[:3])):
        error = (actual.float() - wanted.float()).abs().max()
        assert error <= tolerance * wanted.float().abs().max()


@pytest.mark.full(
    "s32-16-fp32-gdn-native",
    "s16-32-bf16-mamba2-native",
    "s32-64-bf16-mamba1-reference",
    "s16-16-fp32-kda-reference",
)
@CASES
@DTYPES
@SIZES
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"])
def test_resume_after_any_tile_changes_no_bit(case, dtype, state_dtype, tile_size, device) -> None:
    inputs, constants, states = draw(case, dtype, state_dtype, device)
    ends = range(tile_size, LENGTHS[0], tile_size)
    exports = [(0, end, 5 + i) for i, end in enumerate(ends)]
    whole = run(case, inputs, constants, LENGTHS, tile_size, states, exports)
    for _, end, slot in exports:
        own = states[slot : slot + 1].clone()
        rest = [x[end : LENGTHS[0]] for x in inputs]
        out = run(case, rest, constants, [LENGTHS[0] - end], tile_size, own)
        assert torch.equal(out, whole[end : LENGTHS[0]])
        assert torch.equal(own[0], states[0])


@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        "fused",
        pytest.param("native", marks=pytest.mark.skipif(not ON_CPU, reason="tensors on a GPU")),
    ],
)
@DTYPES
@pytest.mark.parametrize("tile_size", [16, 32])
def test_conv_resumes_at_any_tile(backend, dtype, tile_size, device) -> None:
    if backend == "native" and shared_library() is None:
        pytest.skip("no C++ compiler")
    conv = importlib.import_module(f"kernels.conv1d.{backend}").prefill_conv1d
    torch.manual_seed(4)
    x, weight = torch.randn(70, 8, device=device).to(dtype), torch.randn(8, 4, device=device)
    states = torch.full((9, 8, 3), torch.nan, dtype=dtype, device=device)

    def convolve(first: int, slot: int, exports: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        packed = Packed.from_lengths([70 - first], device, tile_size)
        return conv(
            x[first:],
            weight.to(dtype),
            None,
            states=states,
            packed=packed,
            slots=torch.tensor([slot], dtype=torch.int32, device=device),
            resumed=torch.tensor([first > 0], device=device),
            exports=Exports.plan(packed, exports),
        )

    ends = range(tile_size, 70, tile_size)
    whole = convolve(0, 0, [(0, end, i + 1) for i, end in enumerate(ends)])
    for i, end in enumerate(ends):
        assert torch.equal(states[i + 1], x[end - 3 : end].mT)
        assert torch.equal(convolve(end, i + 1, []), whole[end:])


@pytest.mark.parametrize("backend", ["reference", "fused"])
@DTYPES
@pytest.mark.parametrize("tile_size", [16, 32])
def test_attention_resumes_at_any_tile(backend, dtype, tile_size, device) -> None:
    attend = importlib.import_module(f"kernels.attention.{backend}").prefill_attention
    torch.manual_seed(5)
    length = 150 if backend == "fused" else 600
    query = torch.randn(length, 4, 32, device=device).to(dtype)
    pools = torch.randn(2, length, 2, 32, device=device).to(dtype)

    def attended(first: int) -> torch.Tensor:
        return attend(
            query[first:],
            *pools,
            table=torch.arange(length, dtype=torch.int32, device=device)[None],
            sequences=Sequences.of([0], [length], device),
            packed=Packed.from_lengths([length - first], device, tile_size),
            scale=32**-0.5,
        )

    whole = attended(0)
    for first in (*range(tile_size, length, 5 * tile_size), length - length % tile_size):
        assert torch.equal(attended(first), whole[first:])
