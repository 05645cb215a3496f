"""Gated DeltaNet: all backends compared with the recurrence in float64 and with each other."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import tuning
from kernels.gdn import reference
from kernels.packed import Exports, Packed
from tests.kernels.compiled import native

fused = pytest.importorskip("kernels.gdn.fused")
IMPLEMENTATIONS = pytest.mark.parametrize(
    "gdn", [pytest.param(reference, id="reference"), pytest.param(fused, id="fused"), native("gdn")]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LENGTHS = (1, 63, 0, 64, 65, 130)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Inputs(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor
    beta: torch.Tensor

    def rows(self, start: int, end: int) -> Inputs:
        return Inputs(*(x[start:end] for x in self))


def draw_inputs(num_tokens, heads, value_heads, key_dim, value_dim, dtype, device) -> Inputs:
    """Return slices of one wider tensor, as in a model: rows are not contiguous."""
    sizes = [heads * key_dim, heads * key_dim, value_heads * value_dim]
    mixed = torch.randn(num_tokens, sum(sizes) + 3, device=device).to(dtype)
    query, key, value, _ = mixed.split([*sizes, 3], dim=1)
    return Inputs(
        query.unflatten(1, (heads, key_dim)),
        key.unflatten(1, (heads, key_dim)),
        value.unflatten(1, (value_heads, value_dim)),
        -torch.rand(num_tokens, value_heads, device=device) * 0.5,
        torch.rand(num_tokens, value_heads, device=device),
    )


def int32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def recurrence(inputs: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the outputs of one sequence and the state after each token, in float64."""
    query, key, value, gate, beta = (x.double() for x in inputs)
    group = value.shape[1] // key.shape[1]
    query, key = (
        (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(group, dim=1)
        for x in (query, key)
    )
    outs, states, state = [], [], state.double()
    for t in range(len(query)):
        state = state * gate[t].exp()[:, None, None]
        recalled = torch.einsum("hk,hkv->hv", key[t], state)
        delta = (value[t] - recalled) * beta[t][:, None]
        state = state + key[t][:, :, None] * delta[:, None, :]
        outs.append(torch.einsum("hk,hkv->hv", query[t], state) * key.shape[-1] ** -0.5)
        states.append(state)
    return torch.stack(outs) if outs else value, states


@IMPLEMENTATIONS
@DTYPES
def test_prompts_and_exports_follow_the_recurrence(gdn, dtype, device) -> None:
    torch.manual_seed(0)
    heads, value_heads, key_dim, value_dim = 1, 2, 32, 48
    packed = Packed.from_lengths(LENGTHS, device)
    inputs = draw_inputs(sum(LENGTHS), heads, value_heads, key_dim, value_dim, dtype, device)
    slots, resumed = [7, 2, 9, 0, 4, 5], [True, False, False, True, False, True]
    exports = {(5, 64): 10, (5, 128): 11, (5, 130): 12, (4, 64): 13, (3, 64): 14, (0, 1): 15}
    states = torch.full((17, value_heads, key_dim, value_dim), torch.nan, device=device)
    for slot, is_resumed in zip(slots, resumed, strict=True):
        if is_resumed:  # Other slots keep NaN, which must not affect the results.
            states[slot] = torch.randn(value_heads, key_dim, value_dim, device=device)
    before = states.clone()
    out = gdn.chunk_gdn(
        *inputs,
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
        expected, path = recurrence(inputs.rows(start, start + length), initial)
        close(out[start : start + length], expected, tolerance)
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


@pytest.mark.parametrize(
    ("gdn", "num_threads"),
    [
        (reference, 1),
        (reference, 2),
        (fused, 1),
        pytest.param(*native("gdn").values, 2, marks=native("gdn").marks),
    ],
    ids=["reference", "reference-2-threads", "fused", "native-2-threads"],
)
@DTYPES
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"])
def test_resume_and_batching_change_no_bit(gdn, dtype, state_dtype, num_threads, device) -> None:
    """A sequence is computed separately, in a packed batch, and resumed at each export."""
    torch.manual_seed(1)
    sizes = (1, 2, 16, 16) if gdn is fused else (4, 8, 64, 32)
    lengths = (70, 200, 64)
    inputs = draw_inputs(sum(lengths), *sizes, dtype, device)
    initial = torch.randn(3, *sizes[1:], device=device).to(state_dtype)
    torch.set_num_threads(num_threads)
    packed, states = run(gdn, inputs, lengths, initial, [5, 3, 1], [(1, 64, 6), (1, 128, 7)])
    start = 0
    for sequence, length in enumerate(lengths):
        own = inputs.rows(start, start + length)
        single, last = run(gdn, own, [length], initial[sequence : sequence + 1], [0], [])
        assert torch.equal(single, packed[start : start + length])
        assert torch.equal(last[0], states[[5, 3, 1][sequence]])
        start += length
    whole = inputs.rows(70, 270)
    for end, slot in ((64, 6), (128, 7)):
        rest, last = run(gdn, whole.rows(end, 200), [200 - end], states[[slot]], [2], [])
        assert torch.equal(rest, packed[70 + end : 270])
        assert torch.equal(last[2], states[3])


def run(gdn, inputs, lengths, initial, slots, exports) -> tuple[torch.Tensor, torch.Tensor]:
    device = inputs.query.device
    packed = Packed.from_lengths(lengths, device)
    states = initial.new_full((9, *initial.shape[1:]), torch.nan)
    states[slots] = initial
    out = gdn.chunk_gdn(
        *inputs,
        states=states,
        packed=packed,
        slots=int32(slots, device),
        resumed=torch.ones(len(lengths), dtype=torch.bool, device=device),
        exports=Exports.plan(packed, exports),
    )
    return out, states


@pytest.mark.full("native", "reference")
@IMPLEMENTATIONS
def test_nan_in_one_sequence_does_not_reach_others(gdn, device) -> None:
    torch.manual_seed(8)
    inputs = draw_inputs(70 + 20 + 65, 1, 2, 16, 16, torch.float32, device)
    initial = torch.randn(3, 2, 16, 16, device=device)
    expected, expected_states = run(gdn, inputs, [70, 20, 65], initial, [0, 1, 2], [])
    inputs.key[70:90], initial[1] = torch.nan, torch.inf
    out, states = run(gdn, inputs, [70, 20, 65], initial, [0, 1, 2], [])
    assert torch.equal(out[:70], expected[:70])
    assert torch.equal(out[90:], expected[90:])
    assert torch.equal(states[[0, 2]], expected_states[[0, 2]])


@settings(max_examples=8)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 16, 63, 64, 65, 129]), min_size=0, max_size=3),
    heads=st.integers(1, 2),
    group=st.integers(1, 2),
    key_dim=st.sampled_from([16, 24, 128]),
    value_dim=st.sampled_from([16, 40, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_kernel_equals_reference(
    lengths, heads, group, key_dim, value_dim, dtype, seed, device
) -> None:
    torch.manual_seed(seed)
    inputs = draw_inputs(sum(lengths), heads, heads * group, key_dim, value_dim, dtype, device)
    initial = torch.randn(len(lengths), heads * group, key_dim, value_dim, device=device)
    slots = torch.randperm(9)[: len(lengths)].tolist()
    expected, expected_states = run(reference, inputs, lengths, initial, slots, [])
    out, states = run(fused, inputs, lengths, initial, slots, [])
    tolerance = TOLERANCE.get(dtype, 5e-3)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        states, expected_states, atol=4 * tolerance, rtol=4 * tolerance, equal_nan=True
    )


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("decay", [0.0, -30.0], ids=["no-decay", "full-decay"])
@pytest.mark.parametrize("noise", [0.0, 0.14], ids=["equal-keys", "similar-keys"])
def test_ill_conditioned_tiles_follow_the_recurrence(gdn, dtype, decay, noise, device) -> None:
    """Equal keys, or keys of cosine 0.99, with beta 1 give the worst conditioned systems.

    The test uses both extremes of the gate. For 16-bit inputs, systems are solved in float16.
    """
    torch.manual_seed(2)
    inputs = draw_inputs(130, 1, 1, 16, 16, dtype, device)
    key = inputs.key[:1].float() + noise * torch.randn(130, 1, 16, device=device)
    inputs = Inputs(
        inputs.query,
        key.to(dtype),
        inputs.value,
        torch.full_like(inputs.gate, decay),
        torch.ones_like(inputs.beta),
    )
    initial = torch.randn(1, 1, 16, 16, device=device)
    out, states = run(gdn, inputs, [130], initial, [4], [])
    expected, path = recurrence(inputs, initial[0])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    close(out, expected, tolerance)
    close(states[4], path[-1], tolerance)


@pytest.mark.full
@DTYPES
def test_heads_per_program_change_no_bit(dtype, device) -> None:
    torch.manual_seed(9)
    inputs = draw_inputs(70, 2, 6, 16, 16, dtype, device)
    initial = torch.randn(1, 6, 16, 16, device=device)
    results = []
    for heads in (1, 2, 3):
        with tuning.using({("gdn.solve_kernel", (dtype, 16)): {"HEADS": heads}}):
            results.append(run(fused, inputs, [70], initial, [4], []))
    for out, states in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(states[4], results[0][1][4])


@IMPLEMENTATIONS
@pytest.mark.parametrize("max_beta", [1.0, 2.0])
def test_gates_equal_the_formula(gdn, max_beta, device) -> None:
    torch.manual_seed(3)
    a, b = (
        torch.randn(2, 50, 7, device=device)
        * torch.tensor([12.0, 5.0], device=device)[:, None, None]
    )
    A_log, dt_bias = torch.randn(2, 7, device=device)
    wide = torch.cat([a, b], dim=1)
    gate, beta = gdn.gates(wide[:, :7], wide[:, 7:], A_log, dt_bias, max_beta=max_beta)
    x = a.double() + dt_bias.double()
    expected = -A_log.double().exp() * torch.where(x > 30, x, x.exp().log1p())
    torch.testing.assert_close(gate.double(), expected, atol=0, rtol=1e-5)
    torch.testing.assert_close(beta.double(), max_beta * b.double().sigmoid(), atol=0, rtol=1e-5)


def draw_steps(
    sequences, steps, sizes, dtype, device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    heads, value_heads, key_dim, value_dim = sizes
    shapes = [
        (heads, key_dim),
        (heads, key_dim),
        (value_heads, value_dim),
        (value_heads,),
        (value_heads,),
    ]
    tokens = [torch.randn(sequences, steps, *shape, device=device).to(dtype) for shape in shapes]
    return tokens, list(torch.randn(2, value_heads, device=device))


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(
    ("sizes", "max_beta"),
    [((2, 4, 32, 48), 1.0), ((1, 1, 128, 128), 1.0), ((1, 3, 20, 16), 2.0)],
)
def test_decode_follows_the_recurrence(gdn, dtype, sizes, max_beta, device) -> None:
    torch.manual_seed(4)
    tokens, parameters = draw_steps(3, 2, sizes, dtype, device)
    states, slots = torch.randn(6, *sizes[1:], device=device), [5, 0, 2]
    initial = states.clone()
    outs = [
        gdn.decode_gdn(
            *(x[:, t] for x in tokens),
            *parameters,
            states=states,
            slots=int32(slots, device),
            max_beta=max_beta,
        )
        for t in range(2)
    ]
    gate, beta = reference.gates(*tokens[3:], *parameters, max_beta=max_beta)
    for sequence, slot in enumerate(slots):
        inputs = Inputs(*(x[sequence] for x in (*tokens[:3], gate, beta)))
        expected, path = recurrence(inputs, initial[slot])
        close(torch.stack([out[sequence] for out in outs]), expected, TOLERANCE[dtype])
        close(states[slot], path[-1], 1e-5)
    assert torch.equal(states[[1, 3, 4]], initial[[1, 3, 4]])


@IMPLEMENTATIONS
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"])
def test_decode_is_independent_of_the_batch(gdn, state_dtype, device) -> None:
    torch.manual_seed(5)
    sizes = (2, 4, 32, 16)
    tokens, parameters = draw_steps(5, 1, sizes, torch.bfloat16, device)
    tokens = [x[:, 0] for x in tokens]
    pool = torch.randn(8, *sizes[1:], device=device).to(state_dtype)
    slots = [6, 1, 0, 7, 3]
    batched = pool.clone()
    out = gdn.decode_gdn(*tokens, *parameters, states=batched, slots=int32(slots, device))
    for sequence, slot in enumerate(slots):
        single, own = pool.clone(), [x[sequence : sequence + 1] for x in tokens]
        row = gdn.decode_gdn(*own, *parameters, states=single, slots=int32([slot], device))
        assert torch.equal(row[0], out[sequence])
        assert torch.equal(single[slot], batched[slot])


@IMPLEMENTATIONS
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"])
def test_verification_equals_decode(gdn, state_dtype, assert_verifies, device) -> None:
    torch.manual_seed(6)
    sizes = (1, 2, 32, 16)
    tokens, parameters = draw_steps(8, 1, sizes, torch.bfloat16, device)
    states = torch.randn(14, *sizes[1:], device=device).to(state_dtype)

    def decode(*tokens, **where):
        return gdn.decode_gdn(*tokens, *parameters, max_beta=2.0, **where)

    assert_verifies(decode, [x[:, 0] for x in tokens], states)


def test_reference_equals_transformers(device) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    torch.manual_seed(7)
    inputs = draw_inputs(150, 2, 4, 32, 48, torch.float32, "cpu")
    initial = torch.randn(1, 4, 32, 48)
    out, states = run(reference, inputs, [150], initial, [0], [])
    query, key = (x.repeat_interleave(2, dim=1)[None] for x in inputs[:2])
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for oracle in (
        modeling.torch_chunk_gated_delta_rule,
        modeling.torch_recurrent_gated_delta_rule,
    ):
        expected, last = oracle(
            query,
            key,
            inputs.value[None],
            g=inputs.gate[None],
            beta=inputs.beta[None],
            initial_state=initial,
            **options,
        )
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states[0], last[0], atol=1e-5, rtol=1e-4)
