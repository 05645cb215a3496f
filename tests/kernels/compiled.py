"""Compiled kernels in tests: native backends as parameters, and Triton functions of a folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels.native import DTYPES, has, kernel_choices, shared_library

ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"
WITHOUT_NATIVE = pytest.mark.skipif(
    not ON_CPU or shared_library() is None, reason="no C++ compiler, or tensors on a GPU"
)


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
                    methods = methods_of_prompts(dtype) or methods  # Without AVX-512, none.
                for method in methods:
                    backend = module if method is None else OneMethod(module, method, dtype)
                    words = (
                        [name] * (len(names) > 1) + [word, kind] + [method] * (method is not None)
                    )
                    found.append(pytest.param(backend, dtype, id="-".join(words), marks=marks))
    return found


def triton_functions(folder: str) -> dict[str, Any]:
    """Return the functions of ``kernels.FOLDER`` that Triton compiles, by name."""
    package = importlib.import_module(f"kernels.{folder}")
    functions: dict[str, Any] = {}
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"kernels.{folder}.{module.name}"))
        for name, member in members.items():
            if type(member).__name__ in {"JITFunction", "InterpretedFunction"}:
                functions[name] = member.fn
    return functions
