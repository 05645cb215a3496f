"""Import rules: packages import in one direction, light imports stay light, and our package
names do not break other packages.

When code moves, update the tables MAY_IMPORT and SHARED.
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
PACKAGES = ("hybridcache", "kernels", "engine", "experiments")
ALLOWED = {
    "hybridcache": {"hybridcache"},
    "kernels": {"kernels"},
    "engine": {"engine", "hybridcache", "kernels"},
    "experiments": {"experiments", "engine", "hybridcache", "kernels"},
}


@pytest.fixture(autouse=True, scope="module")
def clear_syntax_trees() -> Iterator[None]:
    """Free the syntax trees at the end, which slow down garbage collection in later tests."""
    yield
    parsed.cache_clear()


@cache
def parsed(path: Path) -> ast.Module:
    """Parse a file. Warnings of newer Python versions are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ast.parse(path.read_text(encoding="utf-8"))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and all statements in it, without expressions (nine of ten nodes)."""
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


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_allowed_packages(package: str) -> None:
    assert files_of(package), f"{package} is empty"
    wrong = [
        (file, module)
        for file, module in imports_of(package)
        if module.split(".")[0] in PACKAGES and module.split(".")[0] not in ALLOWED[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_compiles_without_warnings(package: str) -> None:
    """Python 3.12 warns of unknown escapes. 3.13 cannot compile docstrings that cannot be encoded
    as UTF-8."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files_of(package):
        for node in statements(parsed(file)):
            if isinstance(node, kinds):
                (ast.get_docstring(node, clean=False) or "").encode()


MAY_IMPORT = {
    "hybridcache/tokens.py": "",
    "hybridcache/allocators": "tokens",
    "hybridcache/radix": "allocators tokens",
    "hybridcache/policies": "tokens",
    "hybridcache/api.py": "allocators policies radix tokens",
    "hybridcache/cache.py": "allocators api policies radix tokens watch",
    "hybridcache/tiers.py": "allocators api cache policies radix tokens",
    "hybridcache/config.py": "allocators cache policies radix tiers",
    "hybridcache/lease.py": "allocators api policies tokens radix",
    "hybridcache/geometry": "",
    "hybridcache/watch": "allocators api policies radix",
    "hybridcache/export": "allocators api cache config lease policies radix tiers tokens",
    "hybridcache/scheduling": "allocators api lease policies radix tokens",
    "hybridcache/command": "",
    "hybridcache/lab": "allocators api command config export geometry lease policies routing "
    "scheduling tokens watch",
    "hybridcache/routing": "api export policies tokens",
    "engine/config.py": "",
    "engine/errors.py": "",
    "engine/text": "",
    "engine/requests": "config errors text",
    "engine/schedule": "config errors requests text",
    "engine/interfaces.py": "config requests schedule text",
    "engine/layers": "weights",
    "engine/models": "layers weights",
    "engine/weights": "",
    "engine/runner": "config interfaces layers models plugins requests schedule text weights",
    "engine/messages.py": "errors interfaces requests text",
    "engine/host.py": "engine errors interfaces messages plugins requests text",
    "engine/async_engine.py": "config engine errors host interfaces messages requests "
    "schedule text",
    "engine/worker": "async_engine build config host messages engine errors interfaces "
    "plugins requests runner schedule server text",
    "engine/server": "async_engine config engine errors plugins requests schedule text",
    "engine/plugins/tool_calls": "requests text",
    "engine/plugins/guided": "config requests text",
    "engine/plugins/diagnostics": "config server text",
    "engine/plugins/dialects": "config requests server text",
    "engine/plugins/record": "config hub server text",
    "engine/plugins/hub": "config models runner weights",
    "engine/plugins/convert": "hub layers weights",
    "engine/plugins/disaggregation": "config errors interfaces messages requests runner "
    "schedule text",
    "engine/plugins/observe": "async_engine config engine errors interfaces requests server text",
    "engine/plugins/speculation": "config interfaces layers models requests runner schedule text",
    "engine/plugins/tiers": "config interfaces requests runner schedule text weights",
    "engine/plugins/tensor_parallel": "config errors interfaces layers models runner "
    "schedule weights",
    "engine/plugins/replicas": "async_engine build config engine errors hub interfaces messages "
    "requests schedule server text",
}
"""Folder or file -> other modules of the same package that it may import."""


@pytest.mark.parametrize("module_path", MAY_IMPORT)
def test_module_imports_only_what_its_row_allows(module_path: str) -> None:
    package, own, *_ = module_path.removesuffix(".py").split("/")
    allowed = {own, *MAY_IMPORT[module_path].split()}
    files = [ROOT / module_path] if module_path.endswith(".py") else files_of(module_path)
    assert files and files[0].exists(), f"{module_path} is missing: update its row in MAY_IMPORT"
    wrong = [
        (str(file.relative_to(ROOT)), module)
        for file in files
        for module in imported_modules(file)
        if (parts := module.split("."))[0] == package and len(parts) > 1 and parts[1] not in allowed
    ]
    assert wrong == []


def test_every_module_of_hybridcache_has_a_row_in_MAY_IMPORT() -> None:
    listed = {Path(path).name for path in MAY_IMPORT if path.startswith("hybridcache/")}
    files = files_of("hybridcache")
    found = {file.relative_to(ROOT / "hybridcache").parts[0] for file in files}
    missing = found - listed - {"__init__.py", "__main__.py"}
    assert not missing, f"add rows to MAY_IMPORT for {', '.join(sorted(missing))}"


def test_engine_does_not_import_the_laboratory() -> None:
    wrong = [
        (file, module)
        for file, module in imports_of("engine")
        if module.startswith("hybridcache.lab")
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ("hybridcache", "engine"))
def test_packages_have_no_import_cycles(package: str) -> None:
    """Imports under TYPE_CHECKING count too."""
    files = files_of(package)
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    if package == "engine":  # imports in __init__.py count too
        dotted = {name.removesuffix(".__init__"): file for name, file in dotted.items()}
    graph = {name: imported_modules(file) & dotted.keys() - {name} for name, file in dotted.items()}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def plugins_named_in(path: Path) -> set[str]:
    """Return the plugins that a file imports or names in a string."""
    strings = {
        node.value
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    names = (name.split(".") for name in imported_modules(path) | strings)
    return {parts[2] for parts in names if parts[:2] == ["engine", "plugins"] and len(parts) > 2}


ROOTS = (
    "engine/build.py",
    "engine/command/cli.py",
    "engine/host.py",
    "engine/hub.py",
    "engine/runner/build.py",
    "engine/server/app.py",
    "engine/server/chat.py",
    "engine/server/schemas.py",
)
"""Files of the core that import plugins by name."""


def test_engine_core_imports_no_plugin() -> None:
    """The registry ``engine.plugins`` loads a plugin on its first use. ``ROOTS`` hand over objects
    of plugins."""
    found = {
        str(file.relative_to(ROOT)): plugins
        for file in files_of("engine")
        if "plugins" not in file.parts
        and str(file.relative_to(ROOT)) not in ROOTS
        and (plugins := plugins_named_in(file))
    }
    assert found == {}


def test_plugins_import_no_other_plugin() -> None:
    found = {
        str(file.relative_to(ROOT)): others
        for file in files_of("engine/plugins")
        if file.parent.name != "plugins" and (others := plugins_named_in(file) - {plugin_of(file)})
    }
    assert found == {}


def plugin_of(file: Path) -> str:
    return file.relative_to(ROOT / "engine/plugins").parts[0]


def test_plugins_named_in_finds_plugin_imports() -> None:
    assert plugins_named_in(ROOT / "engine/plugins/tiers/plugin.py") == {"tiers"}
    code = ROOT / "engine/plugins/tensor_parallel/worker_pool.py"
    assert plugins_named_in(code) == {"tensor_parallel"}


SHARED = {
    "engine.models": {"decoder"},
    "hybridcache.geometry.families": {"fields", "by_layer_types"},
}
"""Package of model families -> modules in it that are not families."""


@pytest.mark.parametrize("families", SHARED)
def test_no_code_imports_a_model_family_by_name(families: str) -> None:
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
    """Except in the SGLang plugin."""
    plugin = "hybridcache/export/sglang/"
    tops = ((file, module.split(".")[0]) for file, module in imports_of("hybridcache"))
    torch = [file for file, top in tops if top in ("torch", "sglang")]
    assert torch and all(file.startswith(plugin) for file in torch)
    heavy = (
        "('torch', 'matplotlib', 'scipy', 'triton', 'sglang', 'html', 'hybridcache.watch.drawing')"
    )
    load = "import sys, hybridcache, hybridcache.export.sglang"
    code = f"{load}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_simulation_needs_only_three_packages() -> None:
    """A simulation and its table run without any extra of the distribution."""
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


def test_kernels_package_contains_only_a_docstring() -> None:
    """A Hugging Face distribution has the same import name, so ours must define nothing."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


@pytest.mark.full
def test_transformers_imports_with_our_kernels_package() -> None:
    assert importlib.util.find_spec("kernels") is not None
    code = "from transformers import Qwen3NextForCausalLM; print(Qwen3NextForCausalLM.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "Qwen3NextForCausalLM"


ADAPTERS = ("hybridcache/export", "hybridcache/routing", "hybridcache/watch", "engine")
SELF_NAMES = ("self", "cls")
NAMED_TUPLE_METHODS = {"_asdict", "_fields", "_make", "_replace"}


def private_accesses(tree: ast.AST) -> list[str]:
    """Return every access to a private attribute of an object other than ``self`` and ``cls``.

    Attributes defined by a class of the same file are allowed.
    """
    nodes = list(ast.walk(tree))
    defined = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in SELF_NAMES
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
        and not (isinstance(node.value, ast.Name) and node.value.id in SELF_NAMES)
        and node.attr not in defined | NAMED_TUPLE_METHODS
    ]


def test_private_accesses_finds_private_attributes() -> None:
    source = "class A:\n    def f(self, other):\n        self._a = other._a\n        self._b._c()\n"
    assert private_accesses(ast.parse(source)) == ["line 4: self._b._c"]
    assert private_accesses(ast.parse("cache._tree.root(node)")) == ["line 1: cache._tree"]


@pytest.mark.parametrize("folder", ADAPTERS)
def test_adapters_use_only_public_names_of_the_cache(folder: str) -> None:
    """The SGLang adapter and the engine need no access that other users lack."""
    core = {"_tree", "_pages", "_slots", "_gathered", "_step", "_rows", "_plan"}
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
    "hybridcache/export/namespaces.py",
    "hybridcache/export/mirror.py",
    "hybridcache/lab/trace.py",
)
READING = ("load", "_build", "unpack", "recall", "_recall", "_check", "_share", "_states")


def asserts_in(node: ast.AST) -> list[int]:
    return [one.lineno for one in statements(node) if isinstance(one, ast.Assert)]


def test_readers_of_external_data_contain_no_assert() -> None:
    """``python -O`` removes assert statements, so they must not validate input."""
    files = [*(ROOT / name for name in READERS), *files_of("hybridcache/lab/traces")]
    found = {str(file): lines for file in files if (lines := asserts_in(parsed(file)))}
    assert found == {}
    for name in ("warm_state",):  # functions that write may assert invariants
        reading = [
            node
            for node in statements(parsed(ROOT / "hybridcache/export" / f"{name}.py"))
            if isinstance(node, ast.FunctionDef) and node.name.startswith(READING)
        ]
        assert len(reading) >= 3
        found = {node.name: lines for node in reading if (lines := asserts_in(node))}
        assert found == {}


def test_public_names_are_few_and_have_docstrings() -> None:
    import hybridcache

    assert sorted(hybridcache.__all__) == hybridcache.__all__
    assert len(hybridcache.__all__) <= 25
    for name in hybridcache.__all__:
        assert (getattr(hybridcache, name).__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.full
def test_only_public_names_are_imported_from_the_package() -> None:
    import hybridcache

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        hybridcache.__getattr__("Nothing")
    used = {
        f"{file.relative_to(ROOT)}: {alias.name}"
        for file in files_of(*PACKAGES, "tests", "examples")
        for node in statements(parsed(file))
        if isinstance(node, ast.ImportFrom) and node.module == "hybridcache"
        for alias in node.names
        if alias.name not in hybridcache.__all__
        and not (ROOT / "hybridcache" / alias.name).exists()
    }
    assert used == set()
