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
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch.overrides import TorchFunctionMode

from experiments.gpu import interpreter
from kernels.packed import Packed

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Root mean square error over root mean square, by dtype."""


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Return a comparison with an error relative to the whole tensor.

    Cancellation in one element is then not an error.
    """
    return _assert_close


def _assert_close(got: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """Check shape, dtype and finite values, and an error of at most ``factor`` times the
    tolerance of the dtype."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.isfinite().all()
    if got.numel():
        error = (got.double() - expected.double()).square().mean().sqrt()
        size = expected.double().square().mean().sqrt()
        assert error <= factor * TOLERANCE[got.dtype] * size, f"{error / size:.2e}"


@pytest.fixture(scope="session")
def assert_verifies() -> Callable[..., None]:
    """Return a comparison of verification with one decode call per token."""
    return _assert_verifies


def _assert_verifies(
    decode: Callable[..., torch.Tensor], tokens: Sequence[torch.Tensor], states: torch.Tensor
) -> None:
    """Check that rows and states after each token are equal, for 4, 0, 1 and 3 of the 8 ``tokens``.

    Slots that are read keep their states, except that of the sequence with one token, which writes
    to its own slot. ``decode`` takes tokens, states and slots; there are 14 ``states``.
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
        with torch._C.DisableTorchFunction():
            return launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", checked)
    with _Placed():
        yield
