"""Import rules: packages and folders import in one direction, light imports stay light, and our
package names do not break others.

Where code moves, MAY_IMPORT and SHARED are the two tables to update.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("hybridcache", "kernels", "engine", "experiments")
ALLOWED = {
    "hybridcache": {"hybridcache"},
    "kernels": {"kernels"},
    "engine": {"engine", "hybridcache", "kernels"},
    "experiments": {"experiments", "engine", "hybridcache", "kernels"},
}


@pytest.fixture(autouse=True, scope="module")
def forgets_trees() -> Iterator[None]:
    """Drop the syntax trees at the end: garbage collection would visit them in every later test."""
    yield
    parsed.cache_clear()


@cache
def parsed(path: Path) -> ast.Module:
    """Parse a file; what newer versions of Python warn of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ast.parse(path.read_text(encoding="utf-8"))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and all statements in it. Their expressions, nine of ten nodes, are left out."""
    yield node
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        found = getattr(node, name, ())
        for child in found if isinstance(found, list) else ():
            yield from statements(child)


@cache
def imported_modules(path: Path) -> set[str]:
    """Return the absolute dotted names that a file imports, type-checking blocks included."""
    package = path.relative_to(ROOT).parent.parts
    names: set[str] = set()
    for node in statements(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names.add(".".join((*base, *(node.module or "").split("."))).strip("."))
    return names


def files_of(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports_of(*folders: str) -> list[tuple[str, str]]:
    """Return (file, module) for every import under the folders."""
    return [
        (str(file.relative_to(ROOT)), module)
        for file in files_of(*folders)
        for module in imported_modules(file)
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms_point_one_way(room: str) -> None:
    assert files_of(room), f"{room} is empty"
    wrong = [
        (file, module)
        for file, module in imports_of(room)
        if module.split(".")[0] in ROOMS and module.split(".")[0] not in ALLOWED[room]
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_version_of_python_compiles_every_file(room: str) -> None:
    """3.12 warns of unknown escapes; 3.13 cannot compile docstrings that have no UTF-8."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files_of(room):
        for node in statements(parsed(file)):
            if isinstance(node, kinds):
                (ast.get_docstring(node, clean=False) or "").encode()


MAY_IMPORT = {
    "hybridcache/tokens.py": "",
    "hybridcache/allocators": "tokens",
    "hybridcache/radix": "allocators tokens",
    "hybridcache/policies": "tokens",
    "hybridcache/api.py": "allocators policies radix tokens",
    "hybridcache/offload.py": "allocators policies radix tokens",
    "hybridcache/residency.py": "allocators api offload policies radix tokens",
    "hybridcache/hybrid.py": "allocators api policies radix residency tokens watch",
    "hybridcache/variants.py": "allocators api hybrid offload policies radix residency tokens",
    "hybridcache/config.py": "allocators api hybrid offload policies radix variants",
    "hybridcache/lease.py": "allocators api policies tokens radix",
    "hybridcache/geometry": "",
    "hybridcache/watch": "allocators api policies radix",
    "hybridcache/export": "allocators api config hybrid lease policies radix residency tokens "
    "variants",
    "hybridcache/scheduling": "allocators api export lease policies tokens",
    "hybridcache/lab": "allocators api config export geometry lease policies routing scheduling "
    "tokens watch",
    "hybridcache/routing": "api export policies tokens",
    "engine/config.py": "",
    "engine/errors.py": "",
    "engine/text": "plugins",
    "engine/requests": "config errors plugins text",
    "engine/schedule": "config errors requests text",
    "engine/interfaces.py": "config requests schedule text",
    "engine/layers": "runner weights",
    "engine/models": "layers runner weights",
    "engine/weights": "layers models runner",
    "engine/runner": "config interfaces layers models plugins requests schedule text weights",
    "engine/testing": "requests schedule text",
    "engine/async_engine.py": "config engine errors interfaces plugins requests schedule text",
    "engine/worker": "async_engine build config engine errors interfaces "
    "plugins requests runner schedule server text",
    "engine/server": "async_engine config engine errors plugins requests schedule text",
    "engine/plugins/tool_calls": "requests text",
    "engine/plugins/guided": "config requests text",
    "engine/plugins/diagnostics": "config server text",
    "engine/plugins/dialects": "config requests server text",
    "engine/plugins/record": "config hub server text",
    "engine/plugins/hub": "config hub models runner weights",
    "engine/plugins/inspect": "config hub models weights",
    "engine/plugins/convert": "hub layers weights",
    "engine/plugins/disaggregation": "config errors interfaces requests runner schedule text",
    "engine/plugins/observe": "async_engine config engine errors interfaces requests server text",
    "engine/plugins/speculation": "config interfaces layers models requests runner schedule text",
    "engine/plugins/tiers": "config interfaces requests runner schedule text weights",
    "engine/plugins/tensor_parallel": "config errors interfaces layers models runner "
    "schedule weights",
    "engine/plugins/replicas": "async_engine build config engine errors hub interfaces requests "
    "schedule server text",
}
"""Folder or file -> what it may import of its own package besides itself; nothing else is
allowed."""


@pytest.mark.parametrize("here", MAY_IMPORT)
def test_a_room_imports_only_what_it_is_allowed(here: str) -> None:
    package, own, *_ = here.removesuffix(".py").split("/")
    allowed = {own, *MAY_IMPORT[here].split()}
    files = [ROOT / here] if here.endswith(".py") else files_of(here)
    assert files and files[0].exists(), f"{here} is gone: remove or rename its row in MAY_IMPORT"
    wrong = [
        (str(file.relative_to(ROOT)), module)
        for file in files
        for module in imported_modules(file)
        if (parts := module.split("."))[0] == package and len(parts) > 1 and parts[1] not in allowed
    ]
    assert wrong == []


def test_every_room_of_the_cache_is_in_the_list() -> None:
    listed = {Path(here).name for here in MAY_IMPORT if here.startswith("hybridcache/")}
    files = files_of("hybridcache")
    found = {file.relative_to(ROOT / "hybridcache").parts[0] for file in files}
    missing = found - listed - {"__init__.py", "__main__.py"}
    assert not missing, f"give {', '.join(sorted(missing))} a row in MAY_IMPORT"


def test_the_engine_imports_neither_the_laboratory_nor_the_caches_state() -> None:
    """Except what both commands share: names of packages, the parser, and handlers of signals."""
    shared = ("hybridcache.lab.extras", "hybridcache.lab.parser", "hybridcache.lab.signals")
    wrong = [
        (file, module)
        for file, module in imports_of("engine")
        if module.startswith(("hybridcache.lab", "hybridcache.residency")) and module not in shared
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ("hybridcache", "engine"))
def test_modules_import_each_other_in_one_direction(package: str) -> None:
    """Imports for type checkers count too."""
    files = files_of(package)
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    if package == "engine":  # its packages' own imports count too
        dotted = {name.removesuffix(".__init__"): file for name, file in dotted.items()}
    names = dotted
    graph = {name: imported_modules(file) & names.keys() - {name} for name, file in names.items()}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def plugins_named_in(path: Path) -> set[str]:
    """Return the plugins that a file imports, also by a name in a string."""
    strings = {
        node.value
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    names = (name.split(".") for name in imported_modules(path) | strings)
    return {parts[2] for parts in names if parts[:2] == ["engine", "plugins"] and len(parts) > 2}


def test_the_core_of_the_engine_imports_no_plugin() -> None:
    """It asks the registry ``engine.plugins``, which loads a on its first use."""
    found = {
        str(file.relative_to(ROOT)): plugins
        for file in files_of("engine")
        if "plugins" not in file.parts and (plugins := plugins_named_in(file))
    }
    assert found == {}


def test_a_plugin_imports_no_other_plugin() -> None:
    found = {
        str(file.relative_to(ROOT)): others
        for file in files_of("engine/plugins")
        if file.parent.name != "plugins" and (others := plugins_named_in(file) - {plugin_of(file)})
    }
    assert found == {}


def plugin_of(file: Path) -> str:
    return file.relative_to(ROOT / "engine/plugins").parts[0]


def test_imports_of_plugins_are_found() -> None:
    assert plugins_named_in(ROOT / "engine/plugins/tiers/plugin.py") == {"tiers"}
    code = ROOT / "engine/plugins/tensor_parallel/worker_pool.py"
    assert plugins_named_in(code) == {"tensor_parallel"}


SHARED = {
    "engine.models": {"decoder"},
    "hybridcache.geometry.families": {"fields", "by_layer_types"},
}
"""Packages of families -> their modules that are not families."""


@pytest.mark.parametrize("families", SHARED)
def test_a_family_is_a_file_that_nobody_names(families: str) -> None:
    folder = families.replace(".", "/")
    wrong = [
        (file, module)
        for file, module in imports_of("engine", "hybridcache", "experiments")
        if module.startswith(f"{families}.")
        and module.rpartition(".")[2] not in SHARED[families]
        and not file.startswith(folder)
    ]
    assert wrong == []


def test_hybridcache_never_imports_torch() -> None:
    """Except in the plug-in that SGLang loads."""
    guest = "hybridcache/export/sglang/"
    tops = ((file, module.split(".")[0]) for file, module in imports_of("hybridcache"))
    torch = [file for file, top in tops if top in ("torch", "sglang")]
    assert torch and all(file.startswith(guest) for file in torch)
    heavy = (
        "('torch', 'matplotlib', 'scipy', 'triton', 'sglang', 'html', 'hybridcache.watch.drawing')"
    )
    load = "import sys, hybridcache, hybridcache.export.sglang"
    code = f"{load}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_cache_and_the_core_of_the_laboratory_need_three_packages() -> None:
    """Without extras of the distribution, a simulation and its table run."""
    code = """
import importlib.abc, sys
allowed = {"numpy", "sortedcontainers", "tqdm", "hybridcache"}
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names and top[0] != "_":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import hybridcache
print(hybridcache.simulate("short?head=5", gib=[1.0], processes=1).table().count("survival"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and int(done.stdout) >= 1, done.stderr


def test_kernels_is_a_docstring_and_nothing_else() -> None:
    """A Hugging Face distribution has the same import name: ours must offer nothing."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


@pytest.mark.full
def test_a_transformers_model_class_imports_beside_our_kernels() -> None:
    assert importlib.util.find_spec("kernels") is not None
    code = "from transformers import Qwen3NextForCausalLM; print(Qwen3NextForCausalLM.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "Qwen3NextForCausalLM"


ADAPTERS = ("hybridcache/export", "hybridcache/routing", "hybridcache/watch", "engine")
OWN = ("self", "cls")
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def private_accesses(tree: ast.AST) -> list[str]:
    """Return every access to a private attribute of an object that is not ``self`` or ``cls``.

    An attribute that the same file defines on one of its own classes is its own business.
    """
    nodes = list(ast.walk(tree))
    defined = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in OWN
    }
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in OWN)
        and node.attr not in defined | OF_NAMED_TUPLES
    ]


def test_private_accesses_are_found() -> None:
    source = "class A:\n    def f(self, other):\n        self._a = other._a\n        self._b._c()\n"
    assert private_accesses(ast.parse(source)) == ["line 4: self._b._c"]
    assert private_accesses(ast.parse("cache._residency.lock(node)")) == [
        "line 1: cache._residency"
    ]


@pytest.mark.parametrize("folder", ADAPTERS)
def test_adapters_use_the_public_interface_of_the_cache(folder: str) -> None:
    """The SGLang adapter, snapshots and the engine do nothing that a stranger could not do."""
    core = {"_residency", "_tree", "_pages", "_slots", "_gathered", "_step", "_rows", "_plan"}
    found = {
        str(file.relative_to(ROOT)): [
            access
            for access in private_accesses(parsed(file))
            if folder.startswith("hybridcache") or any(f".{name}" in access for name in core)
        ]
        for file in files_of(folder)
    }
    assert {file: accesses for file, accesses in found.items() if accesses} == {}


READERS = (
    "hybridcache/tokens.py",
    "hybridcache/policies/memory.py",
    "hybridcache/export/snapshot_file.py",
    "hybridcache/export/namespaces.py",
    "hybridcache/export/mirror.py",
    "hybridcache/lab/trace.py",
)
READING = ("load", "_build", "unpack", "recall", "_recall", "_check", "_share", "_states")


def asserts_in(node: ast.AST) -> list[int]:
    return [one.lineno for one in statements(node) if isinstance(one, ast.Assert)]


def test_readers_of_outside_data_contain_no_assert() -> None:
    """``python -O`` removes assert statements, so they validate nothing."""
    files = [*(ROOT / name for name in READERS), *files_of("hybridcache/lab/traces")]
    found = {str(file): lines for file in files if (lines := asserts_in(parsed(file)))}
    assert found == {}
    for name in ("snapshot", "warm_state"):  # the writing half may state invariants of the tree
        reading = [
            node
            for node in statements(parsed(ROOT / "hybridcache/export" / f"{name}.py"))
            if isinstance(node, ast.FunctionDef) and node.name.startswith(READING)
        ]
        assert len(reading) >= 3
        found = {node.name: lines for node in reading if (lines := asserts_in(node))}
        assert found == {}


def test_the_public_names_are_few_and_explained() -> None:
    import hybridcache

    steps = {"StepMemory", "StepPlan", "Move", "Copy", "Drop", "RowWrite"}
    loads = {"FetchRule", "Exchange", "PrefillTimes"}
    assert sorted(hybridcache.__all__) == hybridcache.__all__
    assert len({*hybridcache.__all__} - steps - loads) <= 26
    for name in hybridcache.__all__:
        assert (getattr(hybridcache, name).__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.full
def test_deprecated_names_still_work_and_we_do_not_use_them() -> None:
    import hybridcache

    with pytest.warns(DeprecationWarning, match=r"import it from hybridcache\.lab\.generators"):
        generators = hybridcache.__getattr__("GENERATORS")
    assert generators is importlib.import_module("hybridcache.lab.generators").GENERATORS
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        hybridcache.__getattr__("Nothing")
    used = {
        f"{file.relative_to(ROOT)}: {alias.name}"
        for file in files_of(*ROOMS, "tests", "examples")
        for node in statements(parsed(file))
        if isinstance(node, ast.ImportFrom) and node.module == "hybridcache"
        for alias in node.names
        if alias.name not in hybridcache.__all__
        and not (ROOT / "hybridcache" / alias.name).exists()
    }
    assert used == set()
