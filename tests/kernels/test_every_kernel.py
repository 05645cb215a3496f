"""What holds for every kernel: few parameters, and a documented wrapper with a plain twin of the
same signature."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import kernels
from kernels.native import SOURCES

pytest.importorskip("triton")
REFERENCE_ONLY = {"mamba1"}
FOLDERS = sorted(
    module.name
    for module in pkgutil.iter_modules(kernels.__path__)
    if module.ispkg and module.name not in REFERENCE_ONLY
)


def triton_functions(folder: str) -> dict[str, inspect.Signature]:
    """Every function of a folder that Triton compiles."""
    package = importlib.import_module(f"kernels.{folder}")
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"kernels.{folder}.{module.name}"))
        for name, member in members.items():
            if type(member).__name__ in {"JITFunction", "InterpretedFunction"}:
                found[name] = member.fn
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_kernel_has_many_parameters(folder: str) -> None:
    functions = triton_functions(folder)
    assert functions
    counts = {name: len(inspect.signature(f).parameters) for name, f in functions.items()}
    assert {name: count for name, count in counts.items() if count > 20} == {}


NATIVE = sorted(path.parent.name for path in SOURCES.glob("*/native.py"))


@pytest.mark.parametrize(
    "folder, word",
    [(folder, "fused") for folder in FOLDERS] + [(folder, "native") for folder in NATIVE],
)
def test_twins_have_one_signature(folder: str, word: str) -> None:
    twin = importlib.import_module(f"kernels.{folder}.{word}")
    reference = importlib.import_module(f"kernels.{folder}.reference")
    shared = [
        name
        for name in vars(reference)
        if not name.startswith("_")
        and inspect.isfunction(getattr(reference, name))
        and getattr(reference, name).__module__ == reference.__name__
        and inspect.isfunction(getattr(twin, name, None))
    ]
    assert shared
    for name in shared:
        ours, plain = (inspect.signature(getattr(module, name)) for module in (twin, reference))
        assert list(ours.parameters) == list(plain.parameters), name
        assert inspect.getdoc(getattr(twin, name)), name
