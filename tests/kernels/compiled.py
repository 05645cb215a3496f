"""Parts of kernel tests: backends as parameters, comparisons, and Triton functions of a folder."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import library
from kernels.native import DTYPES, has, kernel_choices, shared_library
from kernels.packed import Packed

ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"
WITHOUT_NATIVE = pytest.mark.skipif(
    not ON_CPU or shared_library() is None, reason="no C++ compiler, or tensors on a GPU"
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Root mean square error over root mean square, by dtype."""


@contextmanager
def kept_folder() -> Iterator[Path]:
    """Yield a folder for compiled code, next to the library. It is temporary if the user has no
    such folder."""
    try:
        with library._user_folder() as folder:
            (folder / "tests").mkdir(exist_ok=True)
    except (OSError, RuntimeError):
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
    else:
        yield folder / "tests"


def native(name: str) -> Any:
    """Return ``kernels.NAME.native`` as a parameter; skipped without a compiler or on a GPU."""
    module = importlib.import_module(f"kernels.{name}.native")
    return pytest.param(module, id="native", marks=WITHOUT_NATIVE)


BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def by_backend(name: str) -> pytest.MarkDecorator:
    """Return the parameter ``backend``: the modules of the kernels ``name``."""
    kinds = ("reference", "fused")
    modules = [importlib.import_module(f"kernels.{name}.{kind}") for kind in kinds]
    parameters = [
        pytest.param(module, id=kind) for module, kind in zip(modules, kinds, strict=True)
    ]
    has_native = importlib.util.find_spec(f"kernels.{name}.native") is not None
    return pytest.mark.parametrize("backend", [*parameters, *[native(name)] * has_native])


def int32(values: Sequence[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_close(
    got: torch.Tensor,
    expected: torch.Tensor,
    factor: float = 1.0,
    scale: torch.Tensor | None = None,
) -> None:
    """Check shape, dtype and finite values, and an error of at most ``factor`` times the
    tolerance of the dtype.

    The error is relative to the whole tensor, so cancellation in one element is not an error.
    A tensor with few elements has a ``scale`` of the same shape, which does not cancel.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.isfinite().all()
    if got.numel():
        error = (got.double() - expected.double()).square().mean().sqrt()
        size = (expected if scale is None else scale).double().square().mean().sqrt()
        assert error <= factor * TOLERANCE[got.dtype] * size, f"{error / size:.2e}"


def assert_verifies(
    decode: Callable[..., torch.Tensor], tokens: Sequence[torch.Tensor], states: torch.Tensor
) -> None:
    """Check that rows and states after each token are equal, for 4, 0, 1 and 3 of the 8 ``tokens``.

    Slots that are read keep their states, except that of the sequence with one token, which writes
    to its own slot. ``decode`` takes tokens, states and slots; there are 14 ``states``.
    """
    lengths, slots, step_slots = [4, 0, 1, 3], [4, 1, 0, 3], [9, 8, 13, 7, 0, 12, 10, 11]
    device = states.device
    packed = Packed.from_lengths(lengths, device)
    initial, decoded = states.clone(), states.clone()
    where = {
        "packed": packed,
        "slots": int32(slots, device),
        "step_slots": int32(step_slots, device),
    }
    out = decode(*tokens, states=states, **where)
    owners = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    for t, slot in enumerate(owners):
        own = [x[t : t + 1] for x in tokens]
        row = decode(*own, states=decoded, slots=int32([slot], device))
        assert torch.equal(row[0], out[t])
        assert torch.equal(decoded[slot], states[step_slots[t]])
    others = [slot for slot in range(len(states)) if slot not in step_slots]
    assert torch.equal(states[others], initial[others])


def methods_of_prompts(dtype: torch.dtype) -> list[str]:
    """Return the native methods of prompts that this processor can execute."""
    methods = ["lanes"]
    if dtype is torch.bfloat16:
        methods += ["pairs", "plain_tiles"]
        if kernel_choices()["prompts_bfloat16"] == "amx":
            methods.append("amx")
    return [name for name in methods if has(f"prefill_attention_{DTYPES[dtype]}_{name}")]


@contextmanager
def prompts_by(method: str, dtype: torch.dtype) -> Iterator[None]:
    """Compute prompts of ``dtype`` with this native method."""
    name = f"prompts_{str(dtype).removeprefix('torch.')}"
    choices = kernel_choices()
    former = choices[name]
    choices[name] = method
    try:
        yield
    finally:
        choices[name] = former


class OneMethod:
    """The functions of a native module, with one method for prompts."""

    def __init__(self, module: ModuleType, method: str, dtype: torch.dtype) -> None:
        self._module, self._method, self._dtype = module, method, dtype
        self.__name__ = module.__name__

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with prompts_by(self._method, self._dtype):
                return function(*args, **kwargs)

        return call


def backends(*names: str, prompts: bool = True) -> list[Any]:
    """Return parameters (backend, dtype) for float32 and bfloat16: all backends of the kernels
    ``names``, and every native method if ``prompts``. A backend is a module or a `OneMethod`."""
    found = []
    for name in names:
        for dtype, word in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            for kind in ("reference", "fused", "native"):
                try:
                    module = importlib.import_module(f"kernels.{name}.{kind}")
                except ImportError:  # Mamba-1 has one backend, and machines can lack Triton.
                    continue
                marks = (WITHOUT_NATIVE,) if kind == "native" else ()
                methods = [None]
                if kind == "native" and prompts and shared_library() is not None:
                    methods = methods_of_prompts(dtype) or methods  # Without AVX2, none.
                for method in methods:
                    backend = module if method is None else OneMethod(module, method, dtype)
                    words = (
                        [name] * (len(names) > 1) + [word, kind] + [method] * (method is not None)
                    )
                    found.append(pytest.param(backend, dtype, id="-".join(words), marks=marks))
    return found


def triton_functions(folder: str) -> dict[str, Any]:
    """Return the functions of ``kernels.FOLDER`` and ``recurrence`` that Triton compiles."""
    path = importlib.import_module(f"kernels.{folder}").__path__
    functions: dict[str, Any] = {}
    modules = (f"{folder}.{module.name}" for module in pkgutil.iter_modules(path))
    for module in ("recurrence", *modules):
        for name, member in vars(importlib.import_module(f"kernels.{module}")).items():
            if type(member).__name__ in {"JITFunction", "InterpretedFunction"}:
                functions[name] = member.fn
    return functions
