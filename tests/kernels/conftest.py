"""Fixtures of the kernel tests, which run on a GPU or in Triton's interpreter on CPU tensors.

On a GPU, references and C++ are not tested alone: a library may choose another algorithm there by
the number of rows, which would look like a fault of a kernel. In the interpreter, a kernel refuses
tensors that were made without ``device=``, because a GPU would.

`TRITON_INTERPRET=1` selects the interpreter. `tests/conftest.py` sets it if there is no GPU; set it
by hand to use the interpreter on a machine with a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.kernels import interpreter
from tests.selection import EMULATED


@pytest.fixture(scope="session")
def device() -> str:
    """Return the device of this process: "cuda", or "cpu" with the interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="session")
def device_name(device: str) -> str:
    return (
        "cpu, interpreted" if device == "cpu" else torch.get_device_module(device).get_device_name()
    )


@pytest.fixture(autouse=True)
def record_device(device_name: str, record_property: Callable[[str, object], None]) -> None:
    """Add the device to the report of each test."""
    record_property("device", device_name)


@pytest.fixture(autouse=True)
def restore_num_threads() -> Iterator[None]:
    """Restore torch's number of threads after each test."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN (integers with their maximum), so that unwritten elements fail."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(torch.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    return allocate_poisoned


@pytest.fixture(autouse=True, scope="session")
def repaired_interpreter() -> None:
    interpreter.repair()


# --- Tests that would fail on a GPU although the kernels are right -------------------------------

ON_CPU_ONLY = ("reference", "native", "mamba1")
"""Parts of a test's name or parameters that name code for the CPU."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("KERNELS_ON_DEVICE") != "1":
        return
    skipped = pytest.mark.skip(reason="code for the CPU is tested without a GPU")
    for item in items:
        _, _, parameters = item.name.partition("[")
        is_reference = item.name.startswith("test_reference_")
        if is_reference or any(part in ON_CPU_ONLY for part in re.split(r"[-\]]", parameters)):
            item.add_marker(skipped)


class _Placed(TorchFunctionMode):
    """Mark of tensors that were made with a device, or from such tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if function is torch.as_tensor or any(map(_is_placed, given)):
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    tensor.is_placed = True
        return out


def _is_placed(value: object) -> bool:
    """Return True for a device, a marked tensor, or a sequence with one."""
    if isinstance(value, torch.Tensor):
        return getattr(value, "is_placed", False)
    if isinstance(value, (tuple, list)):
        return any(map(_is_placed, value))
    return value == "cpu" or isinstance(value, torch.device)


@pytest.fixture(autouse=True)
def placed_arguments(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let kernels in the interpreter refuse tensors that would be on the CPU next to a GPU."""
    if device != "cpu" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def checked(executor, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor) and not _is_placed(tensor):
                    shape = tuple(tensor.shape)
                    raise AssertionError(f"tensor {shape} of a kernel was made without device=")
        if EMULATED:
            pytest.skip("Triton's interpreter runs on the real processor")
        with torch._C.DisableTorchFunction():
            return launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", checked)
    with _Placed():
        yield
