"""Rules for all kernels: few parameters, and documented wrappers with the signature of their
reference."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import kernels
from kernels.native import SOURCES
from tests.kernels.compiled import triton_functions

pytest.importorskip("triton")
REFERENCE_ONLY = {"mamba1"}
FOLDERS = sorted(
    module.name
    for module in pkgutil.iter_modules(kernels.__path__)
    if module.ispkg and module.name not in REFERENCE_ONLY
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kernels_have_few_parameters(folder: str) -> None:
    functions = triton_functions(folder)
    assert functions
    counts = {name: len(inspect.signature(f).parameters) for name, f in functions.items()}
    assert {name: count for name, count in counts.items() if count > 20} == {}


NATIVE = sorted(path.parent.name for path in SOURCES.glob("*/native.py"))


@pytest.mark.parametrize(
    "folder, backend_name",
    [(folder, "fused") for folder in FOLDERS] + [(folder, "native") for folder in NATIVE],
)
def test_backends_have_the_signature_of_the_reference(folder: str, backend_name: str) -> None:
    backend = importlib.import_module(f"kernels.{folder}.{backend_name}")
    reference = importlib.import_module(f"kernels.{folder}.reference")
    shared = [
        name
        for name in vars(reference)
        if not name.startswith("_")
        and inspect.isfunction(getattr(reference, name))
        and getattr(reference, name).__module__ == reference.__name__
        and inspect.isfunction(getattr(backend, name, None))
    ]
    assert shared
    for name in shared:
        ours, expected = (
            inspect.signature(getattr(module, name)) for module in (backend, reference)
        )
        assert list(ours.parameters) == list(expected.parameters), name
        assert inspect.getdoc(getattr(backend, name)), name
