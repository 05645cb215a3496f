"""Kernel tests run on the GPU, or in Triton's interpreter on CPU tensors where `TRITON_INTERPRET`
is 1.

`tests/conftest.py` sets it where there is no GPU; set it by hand to interpret beside one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch

from experiments.gpu import interpreter
from kernels.packed import Packed

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Root mean square error over root mean square, by dtype."""


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Compares with an error relative to the size of the whole, so that cancellation in one element
    is none."""
    return _assert_close


def _assert_close(got: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """Same shape and dtype, nothing NaN, and an error of at most ``factor`` times what the dtype
    allows."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.isfinite().all()
    if got.numel():
        error = (got.double() - expected.double()).square().mean().sqrt()
        size = expected.double().square().mean().sqrt()
        assert error <= factor * TOLERANCE[got.dtype] * size, f"{error / size:.2e}"


@pytest.fixture(scope="session")
def assert_verifies() -> Callable[..., None]:
    """Compares the verification of several tokens per sequence with one call per token."""
    return _assert_verifies


def _assert_verifies(
    decode: Callable[..., torch.Tensor], tokens: Sequence[torch.Tensor], states: torch.Tensor
) -> None:
    """Rows and states after each token are equal, for 4, 0, 1 and 3 of the 8 ``tokens``.

    The slots that are read keep their states, except that of the sequence with one token, which
    writes to its own slot. ``decode`` takes tokens, states and slots; there are 14 ``states``.
    """
    lengths, slots, step_slots = [4, 0, 1, 3], [4, 1, 0, 3], [9, 8, 13, 7, 0, 12, 10, 11]
    packed = Packed.from_lengths(lengths, states.device)
    initial, decoded = states.clone(), states.clone()

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=states.device)

    where = {"packed": packed, "slots": int32(slots), "step_slots": int32(step_slots)}
    out = decode(*tokens, states=states, **where)
    owners = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    for t, slot in enumerate(owners):
        own = [x[t : t + 1] for x in tokens]
        row = decode(*own, states=decoded, slots=int32([slot]))
        assert torch.equal(row[0], out[t])
        assert torch.equal(decoded[slot], states[step_slots[t]])
    others = [slot for slot in range(len(states)) if slot not in step_slots]
    assert torch.equal(states[others], initial[others])


@pytest.fixture(scope="session")
def device() -> str:
    """Where this process runs kernels: "cuda", or "cpu" under the interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="session")
def device_name(device: str) -> str:
    return (
        "cpu, interpreted" if device == "cpu" else torch.get_device_module(device).get_device_name()
    )


@pytest.fixture(autouse=True)
def note_device(device_name: str, record_property: Callable[[str, object], None]) -> None:
    """Into the report of every test."""
    record_property("device", device_name)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN (integers their maximum): an element that a kernel forgets to write
    can not pass."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    return allocate_poisoned


@pytest.fixture(autouse=True, scope="session")
def repaired_interpreter() -> None:
    interpreter.repair()
