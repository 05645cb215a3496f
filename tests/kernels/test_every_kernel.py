"""Rules for all kernels: few parameters, documented wrappers with the signature of their reference,
and references that name the device of each tensor."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import kernels
from kernels.library import SOURCES

pytest.importorskip("triton")
REFERENCE_ONLY = {"mamba1"}
FOLDERS = sorted(
    module.name
    for module in pkgutil.iter_modules(kernels.__path__)
    if module.ispkg and module.name not in REFERENCE_ONLY
)


NATIVE = sorted(path.parent.name for path in SOURCES.glob("*/native.py"))
ROOT = Path(kernels.__path__[0])


def parameters(function: Callable[..., object]) -> tuple[list[str], set[str]]:
    """Return the names of positional parameters, and those of keywords. A record of keywords, as
    ``**name: Unpack[Record]``, stands for its fields."""
    positional, keywords = [], set[str]()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            [record] = get_args(get_type_hints(function)[name])
            keywords |= {*get_type_hints(record)}
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keywords.add(name)
        else:
            positional.append(name)
    return positional, keywords


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
    if backend_name == "native":  # It has all functions that Triton has.
        fused = importlib.import_module(f"kernels.{folder}.fused")
        own = {
            name
            for name, member in vars(fused).items()
            if getattr(member, "__module__", "").startswith(f"kernels.{folder}.")
        }
        wanted = {name for name in own if inspect.isfunction(vars(reference).get(name))}
        assert wanted
        assert wanted <= {*vars(backend)}
    for name in shared:
        ours, expected = (parameters(getattr(module, name)) for module in (backend, reference))
        assert ours == expected, name
        assert inspect.getdoc(getattr(backend, name)), name


# --- Functions that are avoided -----------------------------------------------------------------

POSITION_DEPENDENT = {"silu", "sigmoid", "softplus", "gelu", "SiLU", "Sigmoid", "Softplus", "GELU"}
"""Functions of torch whose bits depend on an element's position: on a CPU, elements after the last
full vector are computed in another way. ``kernels.activation`` has replacements."""


def position_dependent_calls(source: str) -> list[str]:
    """Return the uses of such functions: of torch by name, and methods without arguments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [alias.name for alias in node.names if alias.name in POSITION_DEPENDENT]
        is_method = isinstance(node, ast.Call) and not node.args and not node.keywords
        use = node.func if is_method else node
        if isinstance(use, ast.Attribute) and use.attr.removesuffix("_") in POSITION_DEPENDENT:
            of_torch = ast.unparse(use.value).split(".")[0] in ("torch", "F", "nn", "functional")
            found += [ast.unparse(use)] if of_torch or is_method else []
    return found


@pytest.mark.parametrize("package", ["engine", "kernels"])
def test_kernels_and_layers_avoid_position_dependent_functions(package: str) -> None:
    files = (ROOT.parent / package).rglob("*.py")
    uses = {str(file): position_dependent_calls(file.read_text("utf-8")) for file in files}
    assert {file: calls for file, calls in uses.items() if calls} == {}


def test_optional_numbers_are_not_tested_for_truth() -> None:
    """``scale or 1.0`` and ``if scale`` would take 0 for a number that was not given, and one
    backend could do so alone."""
    trees = (ast.parse(file.read_text("utf-8")) for file in ROOT.rglob("*.py"))
    functions = [node for tree in trees for node in ast.walk(tree)]
    for function in functions:
        if isinstance(function, ast.FunctionDef):
            given = (*function.args.args, *function.args.kwonlyargs)
            kinds = {one.arg: ast.unparse(one.annotation) for one in given if one.annotation}
            for node in ast.walk(function):
                tested = node.values if isinstance(node, ast.BoolOp) else []
                tested = [*tested, getattr(node, "test", None), getattr(node, "operand", None)]
                names = {one.id for one in tested if isinstance(one, ast.Name)}
                wrong = [one for one in names if kinds.get(one) in ("int | None", "float | None")]
                assert not wrong, (function.name, wrong)


# --- Devices ------------------------------------------------------------------------------------

FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
}
"""Functions of torch that make a tensor on the default device if ``device`` is not given."""


def test_references_name_the_device_of_every_tensor() -> None:
    """A tensor on the default device would fail on a GPU only."""
    shared = [ROOT / "packed.py", ROOT / "attention" / "sequences.py"]
    found = {
        f"{file.relative_to(ROOT)}:{node.lineno}": {word.arg for word in node.keywords}
        for file in (*ROOT.glob("*/reference.py"), *shared)
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
    }
    assert found and [place for place, words in found.items() if "device" not in words] == []
