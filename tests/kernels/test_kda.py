"""Kimi Delta Attention: all backends compared with the recurrence in float64, with transformers and
with each other."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from kernels.kda import reference
from kernels.packed import Exports, Packed
from tests.kernels.compiled import native

fused = pytest.importorskip("kernels.kda.fused")
IMPLEMENTATIONS = pytest.mark.parametrize(
    "kda",
    [pytest.param(reference, id="reference"), pytest.param(fused, id="fused"), native("kda")],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
STATE_DTYPES = pytest.mark.parametrize(
    "state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"]
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Inputs(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor
    beta: torch.Tensor

    def rows(self, start: int, end: int) -> Inputs:
        return Inputs(*(x[start:end] for x in self))


def draw_inputs(num_tokens, heads, key_dim, value_dim, dtype, device, decay=0.5) -> Inputs:
    """Return slices of one wider tensor, with rows that are not contiguous.

    Half of the channels of a head decay a hundred times faster.
    """
    sizes = [heads * key_dim, heads * key_dim, heads * value_dim]
    mixed = torch.randn(num_tokens, sum(sizes) + 3, device=device).to(dtype)
    query, key, value, _ = mixed.split([*sizes, 3], dim=1)
    gate = -torch.rand(num_tokens, heads, key_dim, device=device) * decay
    gate[..., ::2] *= 100
    return Inputs(
        query.unflatten(1, (heads, key_dim)),
        key.unflatten(1, (heads, key_dim)),
        value.unflatten(1, (heads, value_dim)),
        gate,
        torch.rand(num_tokens, heads, device=device),
    )


def int32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def recurrence(inputs: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the outputs of one sequence and the state after each token, in float64."""
    query, key, value, gate, beta = (x.double() for x in inputs)
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    outs, states, state = [], [], state.double()
    for t in range(len(query)):
        state = state * gate[t].exp()[:, :, None]
        recalled = torch.einsum("hk,hkv->hv", key[t], state)
        delta = (value[t] - recalled) * beta[t][:, None]
        state = state + key[t][:, :, None] * delta[:, None, :]
        outs.append(torch.einsum("hk,hkv->hv", query[t], state) * key.shape[-1] ** -0.5)
        states.append(state)
    return torch.stack(outs) if outs else value, states


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@IMPLEMENTATIONS
@DTYPES
def test_prompts_and_exports_follow_the_recurrence(kda, dtype, device) -> None:
    torch.manual_seed(0)
    lengths, heads, key_dim, value_dim = (1, 63, 0, 64, 65, 130), 1, 40, 24
    packed = Packed.from_lengths(lengths, device)
    inputs = draw_inputs(sum(lengths), heads, key_dim, value_dim, dtype, device)
    slots, resumed = [7, 2, 9, 0, 4, 5], [True, False, False, True, False, True]
    exports = {(5, 64): 10, (5, 128): 11, (5, 130): 12, (4, 64): 13, (3, 64): 14, (0, 1): 15}
    states = torch.full((17, heads, key_dim, value_dim), torch.nan, device=device)
    for slot, is_resumed in zip(slots, resumed, strict=True):
        if is_resumed:  # Other slots keep NaN, which must not affect the results.
            states[slot] = torch.randn(heads, key_dim, value_dim, device=device)
    before = states.clone()
    out = kda.chunk_kda(
        *inputs,
        states=states,
        packed=packed,
        slots=int32(slots, device),
        resumed=torch.tensor(resumed, device=device),
        exports=Exports.plan(packed, [(*key, slot) for key, slot in exports.items()]),
    )
    assert out.dtype == dtype
    tolerance, start = TOLERANCE[dtype], 0
    for sequence, length in enumerate(lengths):
        initial = before[slots[sequence]] if resumed[sequence] else torch.zeros_like(before[0])
        expected, path = recurrence(inputs.rows(start, start + length), initial)
        close(out[start : start + length], expected, tolerance)
        start += length
        ends = {end: slot for (owner, end), slot in exports.items() if owner == sequence}
        if length:
            ends.setdefault(length, slots[sequence])
            close(states[slots[sequence]], path[-1], 4 * tolerance)
        for end, slot in ends.items():
            close(states[slot], path[end - 1], 4 * tolerance)
    written = {s for s, n in zip(slots, lengths, strict=True) if n} | set(exports.values())
    others = [slot for slot in range(17) if slot not in written]
    assert torch.equal(states[others].nan_to_num(7.0), before[others].nan_to_num(7.0))


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", [0.0, 0.002, 30.0], ids=["none", "slow", "at-once"])
def test_extreme_decays_follow_the_recurrence(kda, decay, device) -> None:
    """Equal keys with beta 1 give the worst conditioned system.

    Some channels do not decay while others decay at once, and some tokens forget all earlier ones.
    """
    torch.manual_seed(2)
    inputs = draw_inputs(130, 1, 32, 16, torch.float32, device, decay=decay)
    inputs.gate[:, :, :8] = 0.0
    inputs.gate[40:42] = -300.0
    inputs.key[:] = inputs.key[:1].clone()
    inputs = inputs._replace(beta=torch.ones_like(inputs.beta))
    initial = torch.randn(1, 1, 32, 16, device=device)
    out, states = run(kda, inputs, [130], initial, [4], [])
    expected, path = recurrence(inputs, initial[0])
    close(out, expected, 1e-5)
    close(states[4], path[-1], 1e-5)


def test_reference_equals_transformers() -> None:
    """Compare with the chunked form and the recurrence, on gates of an initialised layer."""
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    torch.manual_seed(3)
    inputs = draw_inputs(130, 2, 32, 32, torch.float32, "cpu")
    a, b = torch.randn(130, 2, 32), torch.randn(130, 2)
    A_log, dt_bias = torch.linspace(0.1, 2.7, 2), torch.linspace(-6.0, -2.0, 64).view(2, 32)
    gate, beta = reference.gates(a, b, A_log, dt_bias)
    expected = -A_log.exp()[:, None] * torch.nn.functional.softplus(a + dt_bias)
    torch.testing.assert_close(gate, expected, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(beta, b.sigmoid())
    inputs = inputs._replace(gate=gate, beta=beta)
    out, states = run(reference, inputs, [130], torch.zeros(1, 2, 32, 32), [0], [])
    for form in ("chunk", "recurrent"):
        expected, state = vars(modeling)[f"{form}_kimi_delta_attention"](
            *(x[None] for x in inputs),
            initial_state=None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        torch.testing.assert_close(out, expected[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(states[0], state[0], atol=1e-5, rtol=1e-5)


@pytest.mark.full("s32-fp32-reference", "s16-bf16-reference-2-threads")
@pytest.mark.parametrize(
    ("kda", "num_threads"),
    [(reference, 1), (reference, 2), (fused, 1)],
    ids=["reference", "reference-2-threads", "fused"],
)
@DTYPES
@STATE_DTYPES
def test_resume_and_batching_change_no_bit(kda, dtype, state_dtype, num_threads, device) -> None:
    """A sequence is computed separately, in a packed batch, and resumed at each export."""
    torch.manual_seed(1)
    sizes = (1, 16, 16) if kda is fused else (5, 128, 32)
    lengths = (70, 150, 64)
    inputs = draw_inputs(sum(lengths), *sizes, dtype, device)
    initial = torch.randn(3, *sizes, device=device).to(state_dtype)
    torch.set_num_threads(num_threads)
    packed, states = run(kda, inputs, lengths, initial, [5, 3, 1], [(1, 64, 6), (1, 128, 7)])
    start = 0
    for sequence, length in enumerate(lengths):
        own = inputs.rows(start, start + length)
        single, last = run(kda, own, [length], initial[sequence : sequence + 1], [0], [])
        assert torch.equal(single, packed[start : start + length])
        assert torch.equal(last[0], states[[5, 3, 1][sequence]])
        start += length
    whole = inputs.rows(70, 220)
    for end, slot in ((64, 6), (128, 7)):
        rest, last = run(kda, whole.rows(end, 150), [150 - end], states[[slot]], [2], [])
        assert torch.equal(rest, packed[70 + end : 220])
        assert torch.equal(last[2], states[3])


def run(kda, inputs, lengths, initial, slots, exports) -> tuple[torch.Tensor, torch.Tensor]:
    device = inputs.query.device
    packed = Packed.from_lengths(lengths, device)
    states = initial.new_full((9, *initial.shape[1:]), torch.nan)
    states[slots] = initial
    out = kda.chunk_kda(
        *inputs,
        states=states,
        packed=packed,
        slots=int32(slots, device),
        resumed=torch.ones(len(lengths), dtype=torch.bool, device=device),
        exports=Exports.plan(packed, exports),
    )
    return out, states


@pytest.mark.full("sizes1")
@pytest.mark.parametrize("sizes", [(2, 48, 40), (1, 128, 16)])
def test_kernel_equals_reference(sizes, device) -> None:
    torch.manual_seed(5)
    inputs = draw_inputs(100, *sizes, torch.float16, device)
    initial = torch.randn(2, *sizes, device=device)
    expected, expected_states = run(reference, inputs, [33, 67], initial, [3, 1], [])
    out, states = run(fused, inputs, [33, 67], initial, [3, 1], [])
    torch.testing.assert_close(out, expected, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(states, expected_states, atol=2e-2, rtol=2e-2, equal_nan=True)


@IMPLEMENTATIONS
def test_gates_equal_the_formula(kda, device) -> None:
    torch.manual_seed(3)
    wide = torch.randn(50, 100, device=device)
    a, b = 12 * wide[:, :60].unflatten(1, (3, 20)), 5 * wide[:, 60:63]
    A_log, dt_bias = torch.randn(3, device=device), torch.randn(3, 20, device=device)
    gate, beta = kda.gates(a, b, A_log, dt_bias)
    x = a.double() + dt_bias.double()
    expected = -A_log.double().exp()[:, None] * torch.where(x > 30, x, x.exp().log1p())
    torch.testing.assert_close(gate.double(), expected, atol=0, rtol=1e-5)
    torch.testing.assert_close(beta.double(), b.double().sigmoid(), atol=0, rtol=1e-5)


def draw_steps(sequences, steps, sizes, dtype, device) -> tuple[list, list]:
    heads, key_dim, value_dim = sizes
    shapes = [(heads, key_dim), (heads, key_dim), (heads, value_dim), (heads, key_dim), (heads,)]
    tokens = [torch.randn(sequences, steps, *shape, device=device).to(dtype) for shape in shapes]
    return tokens, [torch.randn(heads, device=device), torch.randn(heads, key_dim, device=device)]


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("sizes", [(2, 32, 48), (1, 128, 128), (3, 20, 16)])
def test_decode_follows_the_recurrence(kda, dtype, sizes, device) -> None:
    torch.manual_seed(4)
    tokens, parameters = draw_steps(3, 2, sizes, dtype, device)
    states, slots = torch.randn(6, *sizes, device=device), [5, 0, 2]
    initial = states.clone()
    outs = [
        kda.decode_kda(
            *(x[:, t] for x in tokens), *parameters, states=states, slots=int32(slots, device)
        )
        for t in range(2)
    ]
    gate, beta = reference.gates(*tokens[3:], *parameters)
    for sequence, slot in enumerate(slots):
        inputs = Inputs(*(x[sequence] for x in (*tokens[:3], gate, beta)))
        expected, path = recurrence(inputs, initial[slot])
        close(torch.stack([out[sequence] for out in outs]), expected, TOLERANCE[dtype])
        close(states[slot], path[-1], 1e-5)
    assert torch.equal(states[[1, 3, 4]], initial[[1, 3, 4]])


@pytest.mark.parametrize(
    ("kda", "sizes"),
    [
        (reference, (4, 32, 16)),
        (reference, (2, 128, 128)),
        (fused, (2, 32, 16)),
        pytest.param(*native("kda").values, (2, 32, 16), marks=native("kda").marks),
    ],
    ids=["reference", "reference-in-place", "fused", "native"],
)
@STATE_DTYPES
def test_decode_is_independent_of_the_batch(kda, state_dtype, sizes, device) -> None:
    torch.manual_seed(5)
    tokens, parameters = draw_steps(5, 1, sizes, torch.bfloat16, device)
    tokens = [x[:, 0] for x in tokens]
    pool = torch.randn(8, *sizes, device=device).to(state_dtype)
    slots = [6, 1, 0, 7, 3]
    batched = pool.clone()
    out = kda.decode_kda(*tokens, *parameters, states=batched, slots=int32(slots, device))
    for sequence, slot in enumerate(slots):
        single, own = pool.clone(), [x[sequence : sequence + 1] for x in tokens]
        row = kda.decode_kda(*own, *parameters, states=single, slots=int32([slot], device))
        assert torch.equal(row[0], out[sequence])
        assert torch.equal(single[slot], batched[slot])


@IMPLEMENTATIONS
@STATE_DTYPES
def test_verification_equals_decode(kda, state_dtype, assert_verifies, device) -> None:
    torch.manual_seed(6)
    tokens, parameters = draw_steps(8, 1, (2, 32, 16), torch.bfloat16, device)
    states = torch.randn(14, 2, 32, 16, device=device).to(state_dtype)

    def decode(*tokens, **where):
        return kda.decode_kda(*tokens, *parameters, **where)

    assert_verifies(decode, [x[:, 0] for x in tokens], states)


@IMPLEMENTATIONS
def test_empty_batches(kda, device) -> None:
    states = torch.ones(2, 1, 16, 16, device=device)
    for lengths in ([], [0, 0]):
        inputs = draw_inputs(0, 1, 16, 16, torch.float32, device)
        out, _ = run(kda, inputs, lengths, states[: len(lengths)], list(range(len(lengths))), [])
        assert out.shape == (0, 1, 16)
    tokens, parameters = draw_steps(0, 1, (1, 16, 16), torch.float32, device)
    nothing = [x[:, 0] for x in tokens]
    out = kda.decode_kda(*nothing, *parameters, states=states, slots=int32([], device))
    assert out.shape == (0, 1, 16)
    assert kda.gates(*nothing[3:], *parameters)[0].shape == (0, 1, 16)
    assert torch.equal(states, torch.ones_like(states))
