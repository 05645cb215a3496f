"""Mamba-1's selective scan compared with the recurrence in float64 and with transformers."""

from __future__ import annotations

import pytest
import torch

from kernels.mamba1 import reference
from kernels.packed import Exports, Packed

LENGTHS = (1, 63, 0, 64, 65, 130)


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def draw(num_tokens, state_size, channels, dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return x, B, C and time steps, and A."""
    x, dt = torch.randn(2, num_tokens, channels).to(dtype)
    B, C = torch.randn(2, num_tokens, state_size).to(dtype)
    return [x, B, C, reference.time_steps(dt, torch.zeros(channels))], -torch.rand(
        state_size, channels
    ) * 2


def recurrence(tokens, A, D, state) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the outputs of one sequence and the state after each token, in float64."""
    x, B, C, step = (part.double() for part in tokens)
    outs, states, state = [], [], state.double()
    for t in range(len(x)):
        state = state * (step[t] * A.double()).exp() + B[t][:, None] * (step[t] * x[t])
        outs.append(C[t] @ state + x[t] * D.double())
        states.append(state)
    return torch.stack(outs) if outs else x, states


def test_prompts_and_exports_follow_the_recurrence() -> None:
    torch.manual_seed(0)
    tokens, A = draw(sum(LENGTHS), 16, 24, torch.float32)
    D = torch.randn(24)
    packed = Packed.from_lengths(LENGTHS)
    slots, resumed = [7, 2, 9, 0, 4, 5], [True, False, False, True, False, True]
    exports = {(5, 64): 10, (5, 128): 11, (5, 130): 12, (4, 64): 13, (3, 64): 14, (0, 1): 15}
    states = torch.full((17, 16, 24), torch.nan)
    for slot, is_resumed in zip(slots, resumed, strict=True):
        if is_resumed:
            states[slot] = torch.randn(16, 24)
    before = states.clone()
    out = reference.chunk_mamba1(
        *tokens,
        A,
        D,
        states=states,
        packed=packed,
        slots=int32(slots),
        resumed=torch.tensor(resumed),
        exports=Exports.plan(packed, [(*key, slot) for key, slot in exports.items()]),
    )
    start = 0
    for sequence, length in enumerate(LENGTHS):
        initial = before[slots[sequence]] if resumed[sequence] else torch.zeros_like(before[0])
        own = [part[start : start + length] for part in tokens]
        expected, path = recurrence(own, A, D, initial)
        close(out[start : start + length], expected)
        start += length
        ends = {end: slot for (owner, end), slot in exports.items() if owner == sequence}
        ends |= {length: slots[sequence]} if length not in ends and length else {}
        for end, slot in ends.items():
            close(states[slot], path[end - 1])
    written = {s for s, n in zip(slots, LENGTHS, strict=True) if n} | set(exports.values())
    others = [slot for slot in range(17) if slot not in written]
    assert torch.equal(states[others].nan_to_num(7.0), before[others].nan_to_num(7.0))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=4e-5, rtol=4e-5)


def run(tokens, A, lengths, initial, slots, exports) -> tuple[torch.Tensor, torch.Tensor]:
    packed = Packed.from_lengths(lengths)
    states = initial.new_full((9, *initial.shape[1:]), torch.nan)
    states[slots] = initial
    out = reference.chunk_mamba1(
        *tokens,
        A,
        torch.linspace(-1, 2, A.shape[1]),
        states=states,
        packed=packed,
        slots=int32(slots),
        resumed=torch.ones(len(lengths), dtype=torch.bool),
        exports=Exports.plan(packed, exports),
    )
    return out, states


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"])
@pytest.mark.parametrize("sizes", [(16, 200), (7, 33)])
def test_resume_and_batching_change_no_bit(
    dtype, state_dtype, num_threads, sizes, monkeypatch
) -> None:
    """A sequence is computed separately, in a packed batch, and resumed at each export, with
    several block sizes."""
    torch.manual_seed(1)
    lengths = (70, 200, 64)
    tokens, A = draw(sum(lengths), *sizes, dtype)
    initial = torch.randn(3, *sizes).to(state_dtype)
    torch.set_num_threads(num_threads)
    packed, states = run(tokens, A, lengths, initial, [5, 3, 1], [(1, 64, 6), (1, 128, 7)])
    monkeypatch.setattr(reference, "BLOCK", 5 * sizes[0] * sizes[1])
    start = 0
    for sequence, length in enumerate(lengths):
        own = [part[start : start + length] for part in tokens]
        single, last = run(own, A, [length], initial[sequence : sequence + 1], [0], [])
        assert torch.equal(single, packed[start : start + length])
        assert torch.equal(last[0], states[[5, 3, 1][sequence]])
        start += length
    for end, slot in ((64, 6), (128, 7)):
        own = [part[70 + end : 270] for part in tokens]
        rest, last = run(own, A, [200 - end], states[[slot]], [2], [])
        assert torch.equal(rest, packed[70 + end : 270])
        assert torch.equal(last[2], states[3])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"])
def test_decode_equals_prefill_and_ignores_the_batch(state_dtype) -> None:
    """Three sequences of three tokens: as prompts, in one batch, and separately."""
    torch.manual_seed(2)
    x, dt = torch.randn(2, 3, 3, 33)
    B, C = torch.randn(2, 3, 3, 16)
    A, dt_bias, D = -torch.rand(16, 33), torch.randn(33), torch.linspace(-1, 2, 33)
    initial = torch.randn(6, 16, 33).to(state_dtype)
    slots = [5, 0, 2]
    where = (A, dt_bias, D)
    batched, single = initial.clone(), initial.clone()
    for t in range(3):
        tokens = [part[:, t] for part in (x, B, C, dt)]
        out = reference.decode_mamba1(*tokens, *where, states=batched, slots=int32(slots))
        for i, slot in enumerate(slots):
            own = [part[i : i + 1] for part in tokens]
            row = reference.decode_mamba1(*own, *where, states=single, slots=int32([slot]))
            assert torch.equal(row[0], out[i])
            step = reference.time_steps(dt[i : i + 1, t], dt_bias)
            if t == 0:
                prompt, state = run([*own[:3], step], A, [1], initial[slot : slot + 1], [3], [])
                assert torch.equal(prompt[0], out[i])
                assert torch.equal(state[3], batched[slot])
    assert torch.equal(batched, single)
    assert torch.equal(batched[[1, 3, 4]], initial[[1, 3, 4]])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"])
def test_verification_equals_decode(state_dtype, assert_verifies) -> None:
    torch.manual_seed(6)
    x, dt = torch.randn(2, 8, 33).bfloat16()
    B, C = torch.randn(2, 8, 16).bfloat16()
    parameters = -torch.rand(16, 33), torch.randn(33), torch.linspace(-1, 2, 33)

    def decode(*tokens, **where):
        return reference.decode_mamba1(*tokens, *parameters, **where)

    assert_verifies(decode, [x, B, C, dt], torch.randn(14, 16, 33).to(state_dtype))


def test_reference_equals_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    if not hasattr(modeling, "mamba_selective_scan"):
        pytest.skip("this version of transformers has no separate scan function")
    torch.manual_seed(7)
    (x, B, C, _), A = draw(150, 16, 24, torch.float32)
    dt, dt_bias, D = torch.randn(150, 24), torch.randn(24), torch.randn(24)
    states = torch.zeros(1, 16, 24)
    out = reference.chunk_mamba1(
        *(x, B, C, reference.time_steps(dt, dt_bias), A, D),
        states=states,
        packed=Packed.from_lengths([150]),
        slots=int32([0]),
        resumed=torch.tensor([False]),
        exports=None,
    )
    expected, last = modeling.mamba_selective_scan(
        *(part.T[None] for part in (x, dt)),
        A.T,
        *(part.T[None] for part in (B, C)),
        D=D,
        delta_bias=dt_bias,
        delta_softplus=True,
        return_last_state=True,
    )
    torch.testing.assert_close(out, expected[0].T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[0], last[0].T, atol=1e-4, rtol=1e-4)
