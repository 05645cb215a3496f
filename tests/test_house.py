"""The house's own rules: imports point one way, light imports stay light, and our package names harm nobody."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
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


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere in it, type-checking blocks included."""
    package = path.relative_to(ROOT).parent.parts
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names.add(".".join((*base, *(node.module or "").split("."))).strip("."))
    return names


def files_of(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports_of(*folders: str) -> list[tuple[str, str]]:
    """(file, module) for every import under the folders."""
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


def test_the_tree_and_the_allocators_never_import_each_other() -> None:
    for here, there in (("radix", "allocators"), ("allocators", "radix")):
        wrong = [
            pair for pair in imports_of(f"hybridcache/{here}") if f"hybridcache.{there}" in pair[1]
        ]
        assert wrong == []


def test_the_tree_knows_no_pool_no_policy_and_no_model() -> None:
    allowed = {"hybridcache.radix", "hybridcache.interface"}
    wrong = [
        (file, module)
        for file, module in imports_of("hybridcache/radix")
        if module.startswith("hybridcache") and not any(module.startswith(name) for name in allowed)
    ]
    assert wrong == []


def test_the_server_sees_only_the_engine() -> None:
    hidden = (
        "engine.schedule.scheduler",
        "engine.run.memory",
        "engine.run.model_runner",
        "engine.schedule.cache_manager",
    )
    hidden += (
        "engine.run.models",
        "engine.run.layers",
        "hybridcache.radix",
        "hybridcache.hybrid",
        "kernels",
    )
    wrong = [pair for pair in imports_of("engine/server") if pair[1].startswith(hidden)]
    assert wrong == []


def test_hybridcache_never_imports_torch() -> None:
    assert [pair for pair in imports_of("hybridcache") if pair[1].split(".")[0] == "torch"] == []
    code = "import sys, hybridcache; print([m for m in ('torch', 'matplotlib', 'scipy', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engine_imports_no_triton_by_itself() -> None:
    code = "import sys, engine.engine, engine.run.model_runner; print('triton.language' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_kernels_is_a_docstring_and_nothing_else() -> None:
    """A Hugging Face distribution of the same name exists; ours must look like nobody's."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


def test_a_transformers_model_class_imports_beside_our_kernels() -> None:
    assert importlib.util.find_spec("kernels") is not None
    code = "from transformers import Qwen3NextForCausalLM; print(Qwen3NextForCausalLM.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "Qwen3NextForCausalLM"
