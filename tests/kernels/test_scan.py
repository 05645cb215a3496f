"""Recurrences of Gated DeltaNet, Kimi Delta Attention, Mamba-2 and Mamba-1: all backends compared
with the recurrence in float64 and with each other.

`tests/engine/models` compares the references with transformers, inside of whole models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from kernels import tuning
from kernels.gdn import reference as gdn
from kernels.kda import reference as kda
from kernels.mamba1 import reference as mamba1
from kernels.mamba2 import reference as mamba2
from kernels.packed import TILE_SIZES, Exports, Packed
from tests.kernels.compiled import assert_verifies, backends
from tests.kernels.records import Model, taking

KERNELS = ("gdn", "kda", "mamba2", "mamba1")
PROMPTS = pytest.mark.parametrize(("backend", "dtype"), backends(*KERNELS))
DECODES = pytest.mark.parametrize(("backend", "dtype"), backends(*KERNELS, prompts=False))
STATE_DTYPES = pytest.mark.parametrize(
    "state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"]
)
LENGTHS = (1, 63, 0, 64, 65, 130)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Sizes(NamedTuple):
    groups: int
    heads: int
    key: int
    value: int


class Scan:
    """Functions of one backend of one kernel, with the same arguments for all kernels."""

    def __init__(self, backend: Any, device: str = "cpu", tile_size: int = 64) -> None:
        _, self.name, kind = backend.__name__.split(".")
        self.is_fused = kind == "fused"
        self.backend, self.device, self.tile_size = backend, device, tile_size
        self._chunk = taking(getattr(backend, f"chunk_{self.name}"))
        self._decode = taking(getattr(backend, f"decode_{self.name}"))

    def model(self, sizes: Sizes) -> Model:
        return Model(self.name, sizes.heads if self.name == "kda" else sizes.groups, *sizes[1:])

    def state_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return sizes[2:] if self.name == "mamba1" else sizes[1:]

    def draw(self, count: int, sizes: Sizes, dtype: torch.dtype) -> Prompt:
        """Return tokens that are slices of one wider tensor, as in a model: rows are not
        contiguous."""
        _, heads, key, value = sizes
        shapes = self.model(sizes).tokens
        if self.name == "mamba1":
            shapes = [(value,), (key,), (key,)]
        widths = [math.prod(shape) for shape in shapes]
        mixed = torch.randn(count, sum(widths) + 3, device=self.device).to(dtype)
        parts = mixed.split([*widths, 3], dim=1)[:3]
        tokens = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        rand = torch.rand(count, *tokens[0 if "mamba" in self.name else 2].shape[1:-1])
        if self.name == "mamba1":
            tokens.append(torch.rand(count, value))
            return Prompt(tokens, [-torch.rand(key, value) * 2, torch.linspace(-1, 2, value)])
        decays = torch.rand(count, heads, key if self.name == "kda" else 1)
        if self.name == "kda":  # half of the channels decay a hundred times faster
            decays[..., ::2] *= 100
        gate = -0.5 * (decays if self.name == "kda" else decays[..., 0]).to(self.device)
        tokens += [gate, rand.to(self.device)]
        if self.name == "mamba2":
            tokens[1] = tokens[1] * key**-0.5
            return Prompt(tokens, [torch.linspace(-1, 2, heads, device=self.device)])
        return Prompt(tokens, [])

    def chunk(
        self,
        prompt: Prompt,
        lengths: Sequence[int],
        states: torch.Tensor,
        slots: Sequence[int],
        exports: Sequence[tuple[int, int, int]] = (),
        resumed: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        packed = Packed.from_lengths(lengths, self.device, self.tile_size)
        is_resumed = [True] * len(lengths) if resumed is None else list(resumed)
        return self._chunk(
            *prompt.tokens,
            *prompt.constants,
            states=states,
            packed=packed,
            slots=self.int32(slots),
            resumed=torch.tensor(is_resumed, dtype=torch.bool, device=self.device),
            exports=Exports.plan(packed, exports),
        )

    def run(
        self,
        prompt: Prompt,
        lengths: Sequence[int],
        initial: torch.Tensor,
        slots: Sequence[int],
        exports: Sequence[tuple[int, int, int]] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs and nine states. Slots without a state have NaN before."""
        states = initial.new_full((9, *initial.shape[1:]), torch.nan)
        states[list(slots)] = initial
        return self.chunk(prompt, lengths, states, slots, exports), states

    def int32(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def draw_steps(self, count: int, sizes: Sizes, dtype: torch.dtype) -> Step:
        """Return tokens and parameters of a decoding step of ``count`` sequences."""
        _, heads, key, value = sizes
        model = self.model(sizes)
        shapes, (_, per_head) = model.tokens + model.gate_inputs, model.gate_parameters
        if self.name == "mamba1":
            shapes, per_head = [(value,), (key,), (key,), (value,)], (value,)
        tokens = [torch.randn(count, *shape, device=self.device).to(dtype) for shape in shapes]
        bias = torch.randn(per_head, device=self.device)
        if self.name == "mamba1":
            return Step(tokens, [-torch.rand(key, value), bias, torch.linspace(-1, 2, value)])
        rate = torch.randn(heads, device=self.device)
        D = [torch.linspace(-1, 2, heads, device=self.device)] * (self.name == "mamba2")
        return Step(tokens, [rate, bias, *D])

    def options(self) -> dict[str, Any]:
        """Return options of decoding that are not the default."""
        return {"gdn": {"max_beta": 2.0}, "mamba2": {"limits": (0.1, 3.0)}}.get(self.name, {})

    def decode(self, step: Step, states: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        return self._decode(
            *step.tokens, *step.parameters, states=states, slots=self.int32(slots), **self.options()
        )

    def verify(self, step: Step) -> Any:
        def decode(*tokens: torch.Tensor, **where: Any) -> torch.Tensor:
            return self._decode(*tokens, *step.parameters, **where, **self.options())

        return decode

    def prompt_of(self, step: Step) -> Prompt:
        """Return the inputs of a prompt with the tokens of a step, as one sequence."""
        if self.name == "mamba1":
            *tokens, dt = step.tokens
            A, bias, D = step.parameters
            return Prompt([*tokens, mamba1.time_steps(dt, bias)], [A, D])
        if self.name == "mamba2":
            *tokens, dt = step.tokens
            rate, bias, D = step.parameters
            return Prompt([*tokens, *mamba2.gates(dt, rate, bias, (0.1, 3.0))], [D])
        *tokens, a, b = step.tokens
        gates = gdn.gates(a, b, *step.parameters, max_beta=2.0) if self.name == "gdn" else None
        return Prompt([*tokens, *(gates or kda.gates(a, b, *step.parameters))], [])

    def recurrence(self, prompt: Prompt, state: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """Return the outputs of one sequence and the state after each token, in float64."""
        tokens, state = [x.double() for x in prompt.tokens], state.double()
        constants = [x.double() for x in prompt.constants]
        if self.name in ("gdn", "kda"):
            for place, x in enumerate(tokens[:2]):  # Queries and keys have length 1 in each head.
                unit = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
                tokens[place] = unit.repeat_interleave(len(state) // x.shape[1], dim=1)
        outs, states = [], []
        with torch._C.DisableTorchFunction():  # No kernel reads these numbers: see `_Placed`.
            for token in zip(*tokens, strict=True):
                out, state = getattr(self, f"_{self.name}")(state, *token, *constants)
                outs.append(out)
                states.append(state)
        return torch.stack(outs) if outs else tokens[0][:0], states

    def _gdn(self, state, query, key, value, gate, beta):
        state = state * gate.exp().view(len(value), -1, 1)
        delta = (value - torch.einsum("hk,hkv->hv", key, state)) * beta[:, None]
        state = state + key[:, :, None] * delta[:, None, :]
        return torch.einsum("hk,hkv->hv", query, state) * key.shape[-1] ** -0.5, state

    _kda = _gdn

    def _mamba2(self, state, x, B, C, gate, step, D):
        B, C = (part.repeat_interleave(len(x) // len(part), dim=0) for part in (B, C))
        state = state * gate.exp()[:, None, None]
        state = state + B[:, :, None] * (x * step[:, None])[:, None, :]
        return torch.einsum("hk,hkv->hv", C, state) + x * D[:, None], state

    def _mamba1(self, state, x, B, C, step, A, D):
        state = state * (step * A).exp() + B[:, None] * (step * x)
        return C @ state + x * D, state


class Prompt(NamedTuple):
    tokens: list[torch.Tensor]
    constants: list[torch.Tensor]

    def rows(self, start: int, end: int) -> Prompt:
        return Prompt([x[start:end] for x in self.tokens], self.constants)


class Step(NamedTuple):
    tokens: list[torch.Tensor]
    parameters: list[torch.Tensor]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@PROMPTS
def test_prompts_and_exports_follow_the_recurrence(backend, dtype, device) -> None:
    scan = Scan(backend, device)
    sizes = Sizes(1, 2, 40, 24) if scan.is_fused else Sizes(2, 4, 80, 80)
    shape = scan.state_shape(sizes)
    prompt = scan.draw(sum(LENGTHS), sizes, dtype)
    slots, resumed = [7, 2, 9, 0, 4, 5], [True, False, False, True, False, True]
    exports = {(5, 64): 10, (5, 128): 11, (5, 130): 12, (4, 64): 13, (3, 64): 14, (0, 1): 15}
    states = torch.full((17, *shape), torch.nan, device=device)
    for slot, is_resumed in zip(slots, resumed, strict=True):
        if is_resumed:  # Other slots keep NaN, which must not affect the results.
            states[slot] = torch.randn(shape, device=device)
    before = states.clone()
    if not scan.is_fused:  # Native kernels use the memory of earlier prompts again.
        nan_sizes = Sizes(1, 1, 128, 128)
        larger = scan.draw(64, nan_sizes, dtype)
        larger.tokens[0].fill_(torch.nan)
        scan.run(larger, [64], torch.full((1, *scan.state_shape(nan_sizes)), torch.nan), [0])
    planned = [(*key, slot) for key, slot in exports.items()]
    out = scan.chunk(prompt, LENGTHS, states, slots, planned, resumed)
    assert out.dtype == dtype
    tolerance, start = 4 * TOLERANCE[dtype], 0
    limit = tolerance / (4 if scan.is_fused else 20)
    for sequence, length in enumerate(LENGTHS):
        initial = before[slots[sequence]] if resumed[sequence] else torch.zeros_like(before[0])
        expected, path = scan.recurrence(prompt.rows(start, start + length), initial)
        if length:
            close(out[start : start + length], expected, tolerance)
        if length > 60:
            assert error(out[start : start + length], expected) < limit
        start += length
        ends = {end: slot for (owner, end), slot in exports.items() if owner == sequence}
        if length:
            close(states[slots[sequence]], path[-1], tolerance)
        for end, slot in ends.items():
            close(states[slot], path[end - 1], tolerance)
    written = {s for s, n in zip(slots, LENGTHS, strict=True) if n} | set(exports.values())
    others = [slot for slot in range(17) if slot not in written]
    assert torch.equal(states[others].nan_to_num(7.0), before[others].nan_to_num(7.0))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square error relative to the numbers."""
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("tile_size", TILE_SIZES)
@STATE_DTYPES
@pytest.mark.parametrize("num_threads", [1, 2])
@PROMPTS
def test_resume_and_batching_change_no_bit(
    backend, dtype, num_threads, state_dtype, tile_size, device, monkeypatch
) -> None:
    """A sequence is computed separately, in a packed batch, and resumed at each export. References
    that work by blocks use another size for the batch."""
    torch.manual_seed(1)
    scan = Scan(backend, device, tile_size)
    sizes = Sizes(1, 2, 16, 16) if scan.is_fused else Sizes(4, 8, 64, 32)
    shape, lengths = scan.state_shape(sizes), (20, 2 * tile_size + 22, 64)
    prompt = scan.draw(sum(lengths), sizes, dtype)
    initial = torch.randn(3, *shape, device=device).to(state_dtype)
    torch.set_num_threads(num_threads)
    packed, states = scan.run(
        prompt, lengths, initial, [5, 3, 1], [(1, tile_size, 6), (1, 2 * tile_size, 7)]
    )
    for module in (mamba1, mamba2):
        monkeypatch.setattr(module, "BLOCK", 5 * math.prod(shape))
    start = 0
    for sequence, length in enumerate(lengths):
        own = prompt.rows(start, start + length)
        single, last = scan.run(own, [length], initial[sequence : sequence + 1], [0])
        assert torch.equal(single, packed[start : start + length])
        assert torch.equal(last[0], states[[5, 3, 1][sequence]])
        start += length
    for end, slot in ((tile_size, 6), (2 * tile_size, 7)):
        rest, last = scan.run(
            prompt.rows(20 + end, 20 + lengths[1]), [lengths[1] - end], states[[slot]], [2]
        )
        assert torch.equal(rest, packed[20 + end : 20 + lengths[1]])
        assert torch.equal(last[2], states[3])


@pytest.mark.full("gdn-fp32-reference", "mamba2-bf16-reference")
@PROMPTS
def test_nan_in_one_sequence_does_not_reach_others(backend, dtype, device) -> None:
    torch.manual_seed(8)
    scan, sizes = Scan(backend, device), Sizes(1, 2, 16, 16)
    prompt = scan.draw(70 + 20 + 65, sizes, dtype)
    initial = torch.randn(3, *scan.state_shape(sizes), device=device)
    expected, expected_states = scan.run(prompt, [70, 20, 65], initial, [0, 1, 2])
    prompt.tokens[1][70:90], initial[1] = torch.nan, torch.inf
    out, states = scan.run(prompt, [70, 20, 65], initial, [0, 1, 2])
    assert torch.equal(out[:70], expected[:70])
    assert torch.equal(out[90:], expected[90:])
    assert torch.equal(states[[0, 2]], expected_states[[0, 2]])


@settings(max_examples=8)
@given(
    kernel=st.sampled_from(["gdn", "kda", "mamba2"]),
    lengths=st.lists(st.sampled_from([0, 1, 16, 63, 64, 65, 129]), min_size=0, max_size=3),
    groups=st.integers(1, 2),
    group=st.integers(1, 3),
    key=st.sampled_from([16, 24, 128]),
    value=st.sampled_from([16, 40, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_triton_equals_reference(
    kernel, lengths, groups, group, key, value, dtype, seed, device
) -> None:
    fused = pytest.importorskip(f"kernels.{kernel}.fused")
    torch.manual_seed(seed)
    plain = Scan({"gdn": gdn, "kda": kda, "mamba2": mamba2}[kernel], device)
    sizes = Sizes(groups, groups * group, key, value)
    prompt = plain.draw(sum(lengths), sizes, dtype)
    initial = torch.randn(len(lengths), *plain.state_shape(sizes), device=device)
    slots = torch.randperm(9)[: len(lengths)].tolist()
    expected, expected_states = plain.run(prompt, lengths, initial, slots)
    out, states = Scan(fused, device).run(prompt, lengths, initial, slots)
    tolerance = 2 * TOLERANCE[dtype]
    close(out, expected.double(), tolerance)
    torch.testing.assert_close(
        states, expected_states, atol=2 * tolerance, rtol=2 * tolerance, equal_nan=True
    )


@pytest.mark.parametrize("decay", [0.0, -30.0, -300.0], ids=["none", "full", "at-once"])
@pytest.mark.parametrize("noise", [0.0, 0.14], ids=["equal-keys", "similar-keys"])
@PROMPTS
def test_extreme_decays_and_keys_follow_the_recurrence(
    backend, dtype, decay, noise, device
) -> None:
    """Equal keys, or keys of cosine 0.99, with beta 1 give the worst conditioned systems. For
    16-bit inputs, Triton solves systems in float16."""
    torch.manual_seed(2)
    scan, sizes = Scan(backend, device), Sizes(1, 1, 16, 16)
    prompt = scan.draw(130, sizes, dtype)
    if scan.name == "mamba1":
        prompt.constants[0].fill_(decay)
    else:
        prompt.tokens[3][:, ..., : 8 if scan.name == "kda" else None] = decay
    if scan.name in ("gdn", "kda"):
        key = prompt.tokens[1]
        key[:] = key[:1].clone() + noise * torch.randn(key.shape, device=device).to(dtype)
        prompt.tokens[4].fill_(1.0)
    initial = torch.randn(1, *scan.state_shape(sizes), device=device)
    out, states = scan.run(prompt, [130], initial, [4])
    expected, path = scan.recurrence(prompt, initial[0])
    tolerance = {torch.float32: 4e-5, torch.bfloat16: 6e-2}[dtype]
    close(out, expected, tolerance)
    close(states[4], path[-1], tolerance)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "kernel"), [("gdn", "gdn.solve_kernel"), ("mamba2", "mamba2.weigh_kernel")]
)
def test_heads_per_program_change_no_bit(name, kernel, dtype, device) -> None:
    torch.manual_seed(9)
    scan = Scan(pytest.importorskip(f"kernels.{name}.fused"), device)
    prompt = scan.draw(70, Sizes(2, 6, 16, 16), dtype)
    initial = torch.randn(1, 6, 16, 16, device=device)
    results = []
    for heads in (1, 2, 3):
        with tuning.using({(kernel, (dtype, 16)): {"HEADS": heads}}):
            results.append(scan.run(prompt, [70], initial, [4]))
    for out, states in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(states[4], results[0][1][4])


@DECODES
@pytest.mark.parametrize("is_aligned", [True, False])
def test_decode_follows_the_recurrence(backend, dtype, is_aligned, device) -> None:
    """Native kernels serve whole registers; others are the reference's."""
    torch.manual_seed(4)
    scan = Scan(backend, device)
    sizes = Sizes(2, 4, 80, 80) if is_aligned else Sizes(1, 3, 20, 16)
    states, slots = torch.randn(6, *scan.state_shape(sizes), device=device), [5, 0, 2]
    initial = states.clone()
    first, second = (scan.draw_steps(3, sizes, dtype) for _ in range(2))
    second = second._replace(parameters=first.parameters)
    outs = [scan.decode(step, states, slots) for step in (first, second)]
    for sequence, slot in enumerate(slots):
        pairs = zip(first.tokens, second.tokens, strict=True)
        both = [torch.stack([a[sequence], b[sequence]]) for a, b in pairs]
        prompt = scan.prompt_of(Step(both, first.parameters))
        expected, path = scan.recurrence(prompt, initial[slot])
        close(torch.stack([out[sequence] for out in outs]), expected, 4 * TOLERANCE[dtype])
        close(states[slot], path[-1], 4e-5)
    assert torch.equal(states[[1, 3, 4]], initial[[1, 3, 4]])


@STATE_DTYPES
@DECODES
def test_decode_is_independent_of_the_batch(backend, dtype, state_dtype, device) -> None:
    torch.manual_seed(5)
    scan = Scan(backend, device)
    for sizes in (Sizes(2, 4, 32, 16), *[Sizes(1, 16, 128, 128)] * (not scan.is_fused)):
        step = scan.draw_steps(5, sizes, dtype)
        pool = torch.randn(8, *scan.state_shape(sizes), device=device).to(state_dtype)
        slots, batched = [6, 1, 0, 7, 3], pool.clone()
        out = scan.decode(step, batched, slots)
        for sequence, slot in enumerate(slots):
            single, own = pool.clone(), [x[sequence : sequence + 1] for x in step.tokens]
            row = scan.decode(Step(own, step.parameters), single, [slot])
            assert torch.equal(row[0], out[sequence])
            assert torch.equal(single[slot], batched[slot])


@STATE_DTYPES
@DECODES
def test_verification_equals_decode(backend, dtype, state_dtype, device) -> None:
    torch.manual_seed(6)
    scan, sizes = Scan(backend, device), Sizes(1, 2, 32, 16)
    step = scan.draw_steps(8, sizes, dtype)
    states = torch.randn(14, *scan.state_shape(sizes), device=device).to(state_dtype)
    assert_verifies(scan.verify(step), step.tokens, states)


@DECODES
def test_empty_batches(backend, dtype, device) -> None:
    scan, sizes = Scan(backend, device), Sizes(1, 1, 16, 32)
    states = torch.ones(2, *scan.state_shape(sizes), device=device)
    out_shape = (0, 32) if scan.name == "mamba1" else (0, 1, 32)
    for lengths in ([], [0, 0]):
        out = scan.chunk(scan.draw(0, sizes, dtype), lengths, states, list(range(len(lengths))))
        assert out.shape == out_shape
    step = scan.draw_steps(0, sizes, dtype)
    assert scan.decode(step, states, []).shape == out_shape
    assert torch.equal(states, torch.ones_like(states))


# --- Gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), backends("gdn", "kda", "mamba2", prompts=False))
@pytest.mark.parametrize("is_limited", [False, True])
def test_gates_equal_the_formula(backend, dtype, is_limited, device) -> None:
    torch.manual_seed(3)
    name = Scan(backend).name
    shape = (7, 20) if name == "kda" else (7,)
    wide = torch.randn(50, 2 * math.prod(shape), device=device)
    a, b = (12 * part.unflatten(1, shape) for part in wide.to(dtype).chunk(2, dim=1))
    b = b.flatten(1)[:, :7] / 2
    A_log, bias = torch.randn(7, device=device), torch.randn(shape, device=device)
    rate = A_log.double().exp().view(-1, *[1] * (len(shape) - 1))
    soft = softplus(a.double() + bias.double(), threshold=30)
    if name == "mamba2":
        limits = (0.01, 2.5) if is_limited else (0.0, math.inf)
        soft = soft.clamp(*limits)
        gate, other = backend.gates(a, A_log, bias, limits)
        expected = soft
    else:
        largest = 2.0 if is_limited and name == "gdn" else 1.0
        options = {"max_beta": largest} if name == "gdn" else {}
        gate, other = backend.gates(a, b, A_log, bias, **options)
        expected = largest * b.double().sigmoid()
    assert gate.dtype is other.dtype is torch.float32
    torch.testing.assert_close(gate.double(), -rate * soft, atol=0, rtol=1e-5)
    torch.testing.assert_close(other.double(), expected, atol=0, rtol=1e-5)


def test_time_steps_of_mamba1_equal_the_formula() -> None:
    dt, bias = 12 * torch.randn(50, 20), torch.randn(20)
    expected = softplus(dt.double() + bias.double(), threshold=30)
    torch.testing.assert_close(mamba1.time_steps(dt, bias).double(), expected, atol=0, rtol=1e-5)
