"""Causal convolution: all backends compared with torch's conv1d and with each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.conv1d import reference
from kernels.packed import TILE_SIZES, Exports, Packed
from tests.kernels.compiled import BY_DTYPE, assert_verifies, by_backend, int32, native

fused = pytest.importorskip("kernels.conv1d.fused")
BACKENDS = by_backend("conv1d")
COMPILED = pytest.mark.parametrize("backend", [native("conv1d")])
LENGTHS = (1, 63, 0, 64, 2, 130)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return a tensor with rows that are slices of wider ones."""
    wide = torch.randn(*shape[:-1], shape[-1] + 5, device=device).to(dtype)
    return wide[..., 2 : 2 + shape[-1]]


def expected_rows(
    history: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool = True
) -> torch.Tensor:
    """Convolve ``[W - 1 + n, C]`` to ``[n, C]`` by torch."""
    bias = None if bias is None else bias.double()
    rows = F.conv1d(history.double().mT[None], weight.double()[:, None], bias, groups=len(weight))
    return F.silu(rows[0].mT) if silu else rows[0].mT


@BACKENDS
@BY_DTYPE
@pytest.mark.parametrize(
    ("has_bias", "silu"),
    [(False, True), (True, True), (False, False)],
    ids=["plain", "bias", "without-silu"],
)
def test_prompts_and_exported_windows_equal_torch(backend, dtype, has_bias, silu, device) -> None:
    channels, width = 70, 4
    packed = Packed.from_lengths(LENGTHS, device)
    x = draw(sum(LENGTHS), channels, dtype=dtype, device=device)
    weight = draw(channels, width, dtype=dtype, device=device)
    bias = torch.randn(channels, device=device) if has_bias else None
    slots, resumed = [7, 2, 9, 0, 4, 5], [True, False, False, True, True, True]
    exports = {(5, 64): 10, (5, 128): 11, (5, 130): 12, (4, 2): 13, (3, 64): 14, (0, 1): 15}
    states = torch.full((17, channels, width - 1), torch.nan, dtype=dtype, device=device)
    states[[s for s, r in zip(slots, resumed, strict=True) if r]] = 1.5
    before = states.clone()
    out = backend.prefill_conv1d(
        x,
        weight,
        bias,
        states=states,
        packed=packed,
        slots=int32(slots, device),
        resumed=torch.tensor(resumed, device=device),
        exports=Exports.plan(packed, [(*key, slot) for key, slot in exports.items()]),
        silu=silu,
    )
    assert out.dtype == dtype
    windows, start = {}, 0
    for sequence, length in enumerate(LENGTHS):
        if not length:
            continue
        window = before[slots[sequence]] if resumed[sequence] else torch.zeros_like(before[0])
        history = torch.cat([window.mT, x[start : start + length]])
        expected = expected_rows(history, weight, bias, silu)
        torch.testing.assert_close(
            out[start : start + length].double(),
            expected,
            atol=TOLERANCE[dtype],
            rtol=TOLERANCE[dtype],
        )
        ends = [(end, slot) for (owner, end), slot in exports.items() if owner == sequence]
        for end, slot in [*ends, (length, slots[sequence])]:
            windows[slot] = history[end : end + width - 1].mT
        start += length
    for slot in range(17):
        expected = windows.get(slot, before[slot])
        assert torch.equal(states[slot].nan_to_num(7.0), expected.nan_to_num(7.0)), slot


@pytest.mark.full("64-1-fp32-reference", "64-1-fp32-native", "16-1-bf16-fused")
@BACKENDS
@BY_DTYPE
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("tile", TILE_SIZES)
def test_resume_and_batching_change_no_bit(backend, dtype, num_threads, tile, device) -> None:
    torch.manual_seed(1)
    channels, lengths, slots = 24, (70, 200, 3), [5, 3, 1]
    weight = draw(channels, 4, dtype=dtype, device=device)
    x = draw(sum(lengths), channels, dtype=dtype, device=device)
    initial = torch.randn(3, channels, 3, device=device).to(dtype)
    torch.set_num_threads(num_threads)
    exports = [(1, tile, 6), (1, 2 * tile, 7)]
    packed, states = run(backend, x, weight, lengths, initial, slots, exports, tile)
    start = 0
    for sequence, length in enumerate(lengths):
        own, window = x[start : start + length], initial[sequence : sequence + 1]
        single, last = run(backend, own, weight, [length], window, [0], [], tile)
        assert torch.equal(single, packed[start : start + length])
        assert torch.equal(last[0], states[slots[sequence]])
        start += length
    for _, end, slot in exports:
        assert torch.equal(states[slot], x[70 + end - 3 : 70 + end].mT)
        own, window = x[70 + end : 270], states[[slot]]
        rest, last = run(backend, own, weight, [200 - end], window, [2], [], tile)
        assert torch.equal(rest, packed[70 + end : 270])
        assert torch.equal(last[2], states[3])


def run(
    backend, x, weight, lengths, initial, slots, exports, tile=64
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = Packed.from_lengths(lengths, x.device, tile)
    states = initial.new_full((9, *initial.shape[1:]), torch.nan)
    states[slots] = initial
    out = backend.prefill_conv1d(
        x,
        weight,
        None,
        states=states,
        packed=packed,
        slots=int32(slots, x.device),
        resumed=torch.ones(len(lengths), dtype=torch.bool, device=x.device),
        exports=Exports.plan(packed, exports),
    )
    return out, states


@settings(max_examples=10)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 63, 64, 65, 129]), min_size=0, max_size=3),
    channels=st.sampled_from([1, 16, 65]),
    width=st.integers(2, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_kernel_equals_reference(lengths, channels, width, dtype, seed, device) -> None:
    torch.manual_seed(seed)
    x = draw(sum(lengths), channels, dtype=dtype, device=device)
    weight = draw(channels, width, dtype=dtype, device=device)
    initial = torch.randn(len(lengths), channels, width - 1, device=device).to(dtype)
    slots = torch.randperm(9)[: len(lengths)].tolist()
    expected, expected_states = run(reference, x, weight, lengths, initial, slots, [])
    out, states = run(fused, x, weight, lengths, initial, slots, [])
    tolerance = TOLERANCE.get(dtype, 5e-3)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(states, expected_states, atol=0, rtol=0, equal_nan=True)


@BACKENDS
@BY_DTYPE
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "without-silu"])
def test_decode_continues_a_prompt(backend, dtype, silu, device) -> None:
    """Tokens one after another give the rows of the whole sequence."""
    torch.manual_seed(2)
    x = draw(10, 40, dtype=dtype, device=device)
    weight, bias = draw(40, 4, dtype=dtype, device=device), torch.randn(40, device=device)
    states = torch.full((5, 40, 3), torch.nan, dtype=dtype, device=device)
    states[[4, 0]] = 0.0
    rows = [
        backend.decode_conv1d(
            torch.stack([x[t], x[9 - t]]),
            weight,
            bias,
            states=states,
            slots=int32([4, 0], device),
            silu=silu,
        )
        for t in range(10)
    ]
    for sequence, slot, history in ((0, 4, x), (1, 0, x.flip(0))):
        padded = torch.cat([torch.zeros_like(history[:3]), history])
        out = torch.stack([row[sequence] for row in rows])
        torch.testing.assert_close(
            out.double(),
            expected_rows(padded, weight, bias, silu),
            atol=TOLERANCE[dtype],
            rtol=TOLERANCE[dtype],
        )
        assert torch.equal(states[slot], padded[-3:].mT)
    assert states[[1, 2, 3]].isnan().all()


@BACKENDS
@BY_DTYPE
def test_verification_equals_decode(backend, dtype, device) -> None:
    torch.manual_seed(3)
    weight, bias = (draw(40, *sizes, dtype=dtype, device=device) for sizes in ([4], []))
    for silu in (True, False):

        def decode(x, silu=silu, **where):
            return backend.decode_conv1d(x, weight, bias, silu=silu, **where)

        x, states = draw(8, 40, dtype=dtype, device=device), torch.randn(14, 40, 3, device=device)
        assert_verifies(decode, [x], states.to(dtype))


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_window_is_written_after_a_barrier(kind, device, monkeypatch) -> None:
    """Threads read other parts than they write, so all reads must come before any write."""
    if device != "cpu":
        pytest.skip("the test observes the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    states = torch.zeros(2, 8, 3, device=device)
    window = range(states[1].data_ptr(), states[1].data_ptr() + states[1].nbytes)
    events = []

    def observe(name: str, events_of) -> None:
        inner = getattr(InterpreterBuilder, name)

        def observed(builder, *args):
            events.extend(events_of(*args))
            return inner(builder, *args)

        monkeypatch.setattr(InterpreterBuilder, name, observed)

    def touched(event: str, pointers, mask) -> list[str]:
        return [event] if any(int(p) in window for p in pointers.data[mask.data]) else []

    observe("create_masked_load", lambda p, mask, *rest: touched("read", p, mask))
    observe("create_masked_store", lambda p, value, mask, *rest: touched("write", p, mask))
    observe("create_barrier", lambda: ["barrier"])
    x, weight = torch.ones(1, 8, device=device), torch.ones(8, 4, device=device)
    slots = int32([1], device)
    if kind == "decode":
        fused.decode_conv1d(x, weight, None, states=states, slots=slots)
    else:
        where = {
            "packed": Packed.from_lengths([1], device),
            "resumed": torch.tensor([True], device=device),
        }
        fused.prefill_conv1d(x, weight, None, states=states, slots=slots, exports=None, **where)
    read_for_output = events.index("barrier")
    assert events[:read_for_output].count("read") >= 3
    assert "write" not in events[:read_for_output] and "write" in events


@COMPILED
@BY_DTYPE
def test_native_prefill_and_decode_have_equal_bits(backend, dtype, device) -> None:
    torch.manual_seed(4)
    x, weight = draw(70, 40, dtype=dtype, device=device), draw(40, 3, dtype=dtype, device=device)
    states = torch.zeros(5, 40, 2, dtype=dtype, device=device)
    out, after = run(backend, x, weight, [70], states[:1], [0], [])
    slots = int32([4], device)
    for t in range(70):
        row = backend.decode_conv1d(x[t : t + 1], weight, None, states=states, slots=slots)
        assert torch.equal(row[0], out[t])
    assert torch.equal(states[4], after[0])
