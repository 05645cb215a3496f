"""Mamba-2: all backends compared with the recurrence in float64 and with each other."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import tuning
from kernels.mamba2 import reference
from kernels.packed import Exports, Packed
from tests.kernels.compiled import native

fused = pytest.importorskip("kernels.mamba2.fused")
IMPLEMENTATIONS = pytest.mark.parametrize(
    "mamba2",
    [pytest.param(reference, id="reference"), pytest.param(fused, id="fused"), native("mamba2")],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
STATE_DTYPES = pytest.mark.parametrize(
    "state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"]
)
LENGTHS = (1, 63, 0, 64, 65, 130)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Inputs(NamedTuple):
    x: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    gate: torch.Tensor
    step: torch.Tensor

    def rows(self, start: int, end: int) -> Inputs:
        return Inputs(*(x[start:end] for x in self))


def draw_inputs(num_tokens, groups, heads, state_size, head_dim, dtype, device) -> Inputs:
    """Return slices of one wider tensor, as in a model: rows are not contiguous."""
    sizes = [heads * head_dim, groups * state_size, groups * state_size]
    mixed = torch.randn(num_tokens, sum(sizes) + 3, device=device).to(dtype)
    x, B, C, _ = mixed.split([*sizes, 3], dim=1)
    return Inputs(
        x.unflatten(1, (heads, head_dim)),
        B.unflatten(1, (groups, state_size)) * state_size**-0.5,
        C.unflatten(1, (groups, state_size)),
        -torch.rand(num_tokens, heads, device=device) * 0.5,
        torch.rand(num_tokens, heads, device=device),
    )


def int32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def recurrence(
    inputs: Inputs, D: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the outputs of one sequence and the state after each token, in float64."""
    x, B, C, gate, step = (part.double() for part in inputs)
    group = x.shape[1] // B.shape[1]
    B, C = (part.repeat_interleave(group, dim=1) for part in (B, C))
    outs, states, state = [], [], state.double()
    for t in range(len(x)):
        state = state * gate[t].exp()[:, None, None]
        state = state + B[t][:, :, None] * (x[t] * step[t][:, None])[:, None, :]
        outs.append(torch.einsum("hk,hkv->hv", C[t], state) + x[t] * D.double()[:, None])
        states.append(state)
    return torch.stack(outs) if outs else x, states


@IMPLEMENTATIONS
@DTYPES
def test_prompts_and_exports_follow_the_recurrence(mamba2, dtype, device) -> None:
    torch.manual_seed(0)
    groups, heads, state_size, head_dim = 2, 4, 32, 24
    packed = Packed.from_lengths(LENGTHS, device)
    inputs = draw_inputs(sum(LENGTHS), groups, heads, state_size, head_dim, dtype, device)
    D = torch.randn(heads, device=device)
    slots, resumed = [7, 2, 9, 0, 4, 5], [True, False, False, True, False, True]
    exports = {(5, 64): 10, (5, 128): 11, (5, 130): 12, (4, 64): 13, (3, 64): 14, (0, 1): 15}
    states = torch.full((17, heads, state_size, head_dim), torch.nan, device=device)
    for slot, is_resumed in zip(slots, resumed, strict=True):
        if is_resumed:  # Other slots keep NaN, which must not affect the results.
            states[slot] = torch.randn(heads, state_size, head_dim, device=device)
    before = states.clone()
    out = mamba2.chunk_mamba2(
        *inputs,
        D,
        states=states,
        packed=packed,
        slots=int32(slots, device),
        resumed=torch.tensor(resumed, device=device),
        exports=Exports.plan(packed, [(*key, slot) for key, slot in exports.items()]),
    )
    assert out.dtype == dtype
    tolerance, start = TOLERANCE[dtype], 0
    for sequence, length in enumerate(LENGTHS):
        initial = before[slots[sequence]] if resumed[sequence] else torch.zeros_like(before[0])
        expected, path = recurrence(inputs.rows(start, start + length), D, initial)
        close(out[start : start + length], expected, 2 * tolerance)
        start += length
        ends = {end: slot for (owner, end), slot in exports.items() if owner == sequence}
        if length:
            ends |= {length: slots[sequence]} if length not in ends else {}
            close(states[slots[sequence]], path[-1], 4 * tolerance)
        for end, slot in ends.items():
            close(states[slot], path[end - 1], 4 * tolerance)
    written = {s for s, n in zip(slots, LENGTHS, strict=True) if n} | set(exports.values())
    others = [slot for slot in range(17) if slot not in written]
    assert torch.equal(states[others].nan_to_num(7.0), before[others].nan_to_num(7.0))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.full("s32-fp32-reference", "s32-fp32-native-2-threads", "s16-bf16-reference-2-threads")
@pytest.mark.parametrize(
    ("mamba2", "num_threads"),
    [
        (reference, 1),
        (reference, 2),
        (fused, 1),
        pytest.param(*native("mamba2").values, 2, marks=native("mamba2").marks),
    ],
    ids=["reference", "reference-2-threads", "fused", "native-2-threads"],
)
@DTYPES
@STATE_DTYPES
def test_resume_and_batching_change_no_bit(mamba2, dtype, state_dtype, num_threads, device) -> None:
    """A sequence is computed separately, in a packed batch, and resumed at each export."""
    torch.manual_seed(1)
    sizes = (1, 2, 16, 16) if mamba2 is fused else (2, 24, 64, 32)
    lengths = (70, 200, 64)
    inputs = draw_inputs(sum(lengths), *sizes, dtype, device)
    initial = torch.randn(3, *sizes[1:], device=device).to(state_dtype)
    torch.set_num_threads(num_threads)
    packed, states = run(mamba2, inputs, lengths, initial, [5, 3, 1], [(1, 64, 6), (1, 128, 7)])
    start = 0
    for sequence, length in enumerate(lengths):
        own = inputs.rows(start, start + length)
        single, last = run(mamba2, own, [length], initial[sequence : sequence + 1], [0], [])
        assert torch.equal(single, packed[start : start + length])
        assert torch.equal(last[0], states[[5, 3, 1][sequence]])
        start += length
    whole = inputs.rows(70, 270)
    for end, slot in ((64, 6), (128, 7)):
        rest, last = run(mamba2, whole.rows(end, 200), [200 - end], states[[slot]], [2], [])
        assert torch.equal(rest, packed[70 + end : 270])
        assert torch.equal(last[2], states[3])


def run(mamba2, inputs, lengths, initial, slots, exports) -> tuple[torch.Tensor, torch.Tensor]:
    device = inputs.x.device
    packed = Packed.from_lengths(lengths, device)
    states = initial.new_full((9, *initial.shape[1:]), torch.nan)
    states[slots] = initial
    out = mamba2.chunk_mamba2(
        *inputs,
        torch.linspace(-1, 2, initial.shape[1], device=device),
        states=states,
        packed=packed,
        slots=int32(slots, device),
        resumed=torch.ones(len(lengths), dtype=torch.bool, device=device),
        exports=Exports.plan(packed, exports),
    )
    return out, states


def test_block_size_of_the_reference_changes_no_bit(monkeypatch, device) -> None:
    torch.manual_seed(10)
    inputs = draw_inputs(333, 2, 4, 16, 16, torch.float32, device)
    initial = torch.randn(2, 4, 16, 16, device=device)
    results = []
    for block in (1, 2**16, 2**30):
        monkeypatch.setattr(reference, "BLOCK", block)
        results.append(run(reference, inputs, [260, 73], initial, [4, 1], [(0, 192, 2)]))
    for out, states in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(states.nan_to_num(7.0), results[0][1].nan_to_num(7.0))


@IMPLEMENTATIONS
def test_nan_in_one_sequence_does_not_reach_others(mamba2, device) -> None:
    torch.manual_seed(8)
    inputs = draw_inputs(70 + 20 + 65, 1, 2, 16, 16, torch.float32, device)
    initial = torch.randn(3, 2, 16, 16, device=device)
    expected, expected_states = run(mamba2, inputs, [70, 20, 65], initial, [0, 1, 2], [])
    inputs.B[70:90], initial[1] = torch.nan, torch.inf
    out, states = run(mamba2, inputs, [70, 20, 65], initial, [0, 1, 2], [])
    assert torch.equal(out[:70], expected[:70])
    assert torch.equal(out[90:], expected[90:])
    assert torch.equal(states[[0, 2]], expected_states[[0, 2]])


@settings(max_examples=8)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 16, 63, 64, 65, 129]), min_size=0, max_size=3),
    groups=st.integers(1, 2),
    group=st.integers(1, 3),
    state_size=st.sampled_from([16, 24, 128]),
    head_dim=st.sampled_from([16, 40, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_kernel_equals_reference(
    lengths, groups, group, state_size, head_dim, dtype, seed, device
) -> None:
    torch.manual_seed(seed)
    sizes = (groups, groups * group, state_size, head_dim)
    inputs = draw_inputs(sum(lengths), *sizes, dtype, device)
    initial = torch.randn(len(lengths), *sizes[1:], device=device)
    slots = torch.randperm(9)[: len(lengths)].tolist()
    expected, expected_states = run(reference, inputs, lengths, initial, slots, [])
    out, states = run(fused, inputs, lengths, initial, slots, [])
    tolerance = 2 * TOLERANCE.get(dtype, 5e-3)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        states, expected_states, atol=2 * tolerance, rtol=2 * tolerance, equal_nan=True
    )


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", [0.0, -30.0], ids=["no-decay", "full-decay"])
def test_extreme_decays_follow_the_recurrence(mamba2, decay, device) -> None:
    torch.manual_seed(2)
    inputs = draw_inputs(130, 1, 1, 16, 16, torch.float32, device)
    inputs = inputs._replace(gate=torch.full_like(inputs.gate, decay))
    initial = torch.randn(1, 1, 16, 16, device=device)
    out, states = run(mamba2, inputs, [130], initial, [4], [])
    expected, path = recurrence(inputs, torch.tensor([-1.0], device=device), initial[0])
    close(out, expected, 2e-5)
    close(states[4], path[-1], 2e-5)


@pytest.mark.full
@DTYPES
def test_heads_per_program_change_no_bit(dtype, device) -> None:
    torch.manual_seed(9)
    inputs = draw_inputs(70, 2, 6, 16, 16, dtype, device)
    initial = torch.randn(1, 6, 16, 16, device=device)
    results = []
    for heads in (1, 2, 3):
        with tuning.using({("mamba2.weigh_kernel", (dtype, 16)): {"HEADS": heads}}):
            results.append(run(fused, inputs, [70], initial, [4], []))
    for out, states in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(states[4], results[0][1][4])


@IMPLEMENTATIONS
@pytest.mark.parametrize("limits", [(0.0, float("inf")), (0.01, 2.5)], ids=["unlimited", "limited"])
def test_gates_equal_the_formula(mamba2, limits, device) -> None:
    torch.manual_seed(3)
    dt = torch.randn(50, 7, device=device) * 12
    A_log, dt_bias = torch.randn(2, 7, device=device)
    wide = torch.cat([dt, dt], dim=1)
    gate, step = mamba2.gates(wide[:, 7:], A_log, dt_bias, limits)
    shifted = dt.double() + dt_bias.double()
    expected = torch.where(shifted > 30, shifted, shifted.exp().log1p()).clamp(*limits)
    torch.testing.assert_close(step.double(), expected, atol=0, rtol=1e-5)
    torch.testing.assert_close(gate.double(), -A_log.double().exp() * expected, atol=0, rtol=1e-5)


def draw_steps(count, sizes, dtype, device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return tokens x, B, C and dt, and parameters A_log, dt_bias and D."""
    groups, heads, state_size, head_dim = sizes
    shapes = [(heads, head_dim), (groups, state_size), (groups, state_size), (heads,)]
    tokens = [torch.randn(count, *shape, device=device).to(dtype) for shape in shapes]
    return tokens, list(torch.randn(3, heads, device=device))


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("sizes", [(2, 4, 32, 48), (1, 2, 256, 64), (1, 3, 20, 16)])
def test_decode_follows_the_recurrence(mamba2, dtype, sizes, device) -> None:
    torch.manual_seed(4)
    limits = (0.1, 3.0)
    states, slots = torch.randn(6, *sizes[1:], device=device), [5, 0, 2]
    initial = states.clone()
    steps = [draw_steps(3, sizes, dtype, device)[0] for _ in range(2)]
    A_log, dt_bias, D = draw_steps(3, sizes, dtype, device)[1]
    outs = [
        mamba2.decode_mamba2(
            *tokens, A_log, dt_bias, D, states=states, slots=int32(slots, device), limits=limits
        )
        for tokens in steps
    ]
    for sequence, slot in enumerate(slots):
        x, B, C, dt = (torch.stack([step[i][sequence] for step in steps]) for i in range(4))
        gate, step = reference.gates(dt, A_log, dt_bias, limits)
        expected, path = recurrence(Inputs(x, B, C, gate, step), D, initial[slot])
        tolerance = 4 * TOLERANCE[dtype]
        close(torch.stack([out[sequence] for out in outs]), expected, tolerance)
        close(states[slot], path[-1], 2e-5)
    assert torch.equal(states[[1, 3, 4]], initial[[1, 3, 4]])


@IMPLEMENTATIONS
@STATE_DTYPES
def test_decode_is_independent_of_the_batch(mamba2, state_dtype, device) -> None:
    torch.manual_seed(5)
    for sizes in [(2, 4, 32, 16)] + [(1, 16, 128, 32)] * (mamba2 is reference):
        tokens, parameters = draw_steps(5, sizes, torch.bfloat16, device)
        pool = torch.randn(8, *sizes[1:], device=device).to(state_dtype)
        slots = [6, 1, 0, 7, 3]
        batched = pool.clone()
        out = mamba2.decode_mamba2(*tokens, *parameters, states=batched, slots=int32(slots, device))
        for sequence, slot in enumerate(slots):
            single, own = pool.clone(), [x[sequence : sequence + 1] for x in tokens]
            row = mamba2.decode_mamba2(
                *own, *parameters, states=single, slots=int32([slot], device)
            )
            assert torch.equal(row[0], out[sequence])
            assert torch.equal(single[slot], batched[slot])


@IMPLEMENTATIONS
@STATE_DTYPES
def test_verification_equals_decode(mamba2, state_dtype, assert_verifies, device) -> None:
    torch.manual_seed(6)
    sizes = (2, 4, 32, 16)
    tokens, parameters = draw_steps(8, sizes, torch.bfloat16, device)

    def decode(*tokens, **where):
        return mamba2.decode_mamba2(*tokens, *parameters, limits=(0.1, 3.0), **where)

    assert_verifies(decode, tokens, torch.randn(14, *sizes[1:], device=device).to(state_dtype))


def test_reference_equals_transformers(device) -> None:
    modeling = pytest.importorskip("transformers.models.granitemoehybrid.modeling_granitemoehybrid")
    if not hasattr(modeling, "mamba2_chunk_scan"):
        pytest.skip("this version of transformers has no separate scan function")
    torch.manual_seed(7)
    tokens, (A_log, dt_bias, D) = draw_steps(150, (2, 4, 32, 48), torch.float32, "cpu")
    x, B, C, dt = tokens
    limits = (0.3, 2.0)
    gate, step = reference.gates(dt, A_log, dt_bias, limits)
    states = torch.zeros(1, 4, 32, 48)
    out = reference.chunk_mamba2(
        x,
        B,
        C,
        gate,
        step,
        D,
        states=states,
        packed=Packed.from_lengths([150]),
        slots=int32([0], "cpu"),
        resumed=torch.tensor([False]),
        exports=None,
    )
    expected, last = modeling.mamba2_chunk_scan(
        x[None],
        dt[None],
        -A_log.exp(),
        B[None],
        C[None],
        chunk_size=256,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=limits,
        return_final_states=True,
    )
    torch.testing.assert_close(out, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[0], last[0].mT, atol=1e-4, rtol=1e-4)
