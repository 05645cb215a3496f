"""Source code of users' policies, by which stored results are matched with the code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from hybridcache.policies.user import import_module


def spec_of(own: type[Any]) -> str | None:
    """Return ``module:Class`` of a class that is an attribute of its module, or None.

    Works for classes defined in a notebook cell.
    """
    module_name, name = own.__module__, own.__qualname__
    if getattr(sys.modules.get(module_name), name, None) is not own:
        return None
    return f"{module_name}:{name}"


def source_of(spec: str) -> str:
    """Return the source of the module in a spec like ``module:Class``, and of the modules that it
    imports, directly or not.

    Leaves out the standard library, installed packages and this project. Imports by a computed name
    are not found. Empty for other specs, including numbered ones such as ``marconi:2``.

    Raises:
        ValueError: the source cannot be read.
    """
    module_name, colon, rest = spec.strip().partition(":")
    if not colon or rest.replace(".", "", 1).isdecimal():
        return ""
    try:
        module = import_module(spec, module_name)
        found = {module.__name__: inspect.getsource(module)}
    except (OSError, TypeError) as error:
        raise ValueError(
            f"{spec!r}: its source cannot be read, so stored runs cannot be matched with this "
            "class; put the class in "
            "a file, or store no runs"
        ) from error
    names = [module.__name__]
    while names:
        name = names.pop()
        for imported in _imports(name, found[name]):
            if imported not in found and (text := _own_source(imported)) is not None:
                found[imported] = text
                names.append(imported)
    first, *others = found.values()
    return first + "".join(sorted(others))


def _imports(module_name: str, text: str) -> set[str]:
    """Return the names of all modules that ``text``, the source of a module, may import."""
    loaded = sys.modules.get(module_name)
    spec = importlib.util.find_spec(module_name) if loaded is None else loaded.__spec__
    is_package = spec is not None and spec.submodule_search_locations is not None
    package = module_name if is_package else module_name.rpartition(".")[0]
    names: set[str] = set()
    try:
        tree = ast.parse(text)
    except SyntaxError:  # of a module that is imported later, or never
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else ()), *filter(None, [node.module])])
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    # The import of a module also runs the packages that contain it.
    return {name.rsplit(".", number)[0] for name in names for number in range(name.count(".") + 1)}


def _own_source(module_name: str) -> str | None:
    """Return the source of a module of the user; None for any other, and if there is none."""
    file = None
    for number in range(module_name.count("."), -1, -1):  # packages first: a look-up imports them
        name = module_name.rsplit(".", number)[0]
        if name in sys.stdlib_module_names or name in ("hybridcache", "engine", "kernels"):
            return None
        try:
            spec = importlib.util.find_spec(name)
        except Exception:  # the look-up may import a package of the user, which can raise anything
            return None
        file = None if spec is None else spec.origin
        if file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts):
            return None
    if file is None or not file.endswith(".py"):
        return None
    return Path(file).read_text(encoding="utf-8")
