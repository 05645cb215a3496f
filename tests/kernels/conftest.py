"""Kernel tests run on the GPU, or in Triton's interpreter on CPU tensors where `TRITON_INTERPRET`
is 1.

`tests/conftest.py` sets it where there is no GPU; set it by hand to interpret beside one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from experiments.gpu import interpreter

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
