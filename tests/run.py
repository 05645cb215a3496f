"""Run all tests, the tests of a change, or the tests in difficult environments.

python -m tests.run all [PART ...]          everything, part by part (`make test-all`)
python -m tests.run changed [--base REV]    tests that a change can affect (`make test-changed`)
python -m tests.run environments [NAME ...] the suite without a terminal, under load, ...

Each part or environment writes its output to a file in ``out/`` and one line to the screen.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests import mutation
from tests.endurance.__main__ import PARTS as ENDURANCE
from tests.selection import ROOT, TOUCHY, closure, has_torch_fixtures

PYTEST = (sys.executable, "-m", "pytest", "--processes", "2")
OUT = ROOT / "out"
LAST_LINES = 25
"""Number of output lines to print of a failed part."""


@dataclass(frozen=True)
class Part:
    """A command that passes or fails."""

    name: str
    command: Sequence[str | Path]
    env: dict[str, str] = field(default_factory=dict)
    missing: str | None = None
    """Reason why the part cannot run here, or None if it can."""
    cwd: Path = ROOT


def run(parts: Sequence[Part], folder: Path) -> int:
    """Run parts one after another. Return 0 if all passed, else 1."""
    folder.mkdir(parents=True, exist_ok=True)
    failed, width = [], max(len(part.name) for part in parts)
    for number, part in enumerate(parts, 1):
        head = f"{number:2}/{len(parts)}  {part.name:{width}}  "
        print(head, end="", flush=True)
        if part.missing is not None:
            print(f"not run: {part.missing}")
            continue
        log = folder / f"{re.sub(r'[^a-z0-9.]+', '-', part.name.lower())}.txt"
        begin, before = time.monotonic(), os.times()
        with log.open("w") as file:
            done = subprocess.run(
                [str(word) for word in part.command],
                cwd=part.cwd,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | part.env,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        seconds, after = time.monotonic() - begin, os.times()
        cpu = after.children_user + after.children_system
        cpu -= before.children_user + before.children_system
        lines = log.read_text(errors="replace").splitlines()
        verdict = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"{verdict}  {seconds:6.0f} s, {cpu:6.0f} s of CPU  {_last_line(lines)}", flush=True)
        if done.returncode != 0:
            failed.append(part.name)
            print("\n".join(f"    {line}" for line in lines[-LAST_LINES:]), flush=True)
    ran = sum(part.missing is None for part in parts)
    outcome = f"failed: {', '.join(failed)}" if failed else "all passed"
    print(f"{ran} of {len(parts)} ran, {outcome}. Output is in {folder.relative_to(ROOT)}.")
    return 1 if failed else 0


def _last_line(lines: Sequence[str]) -> str:
    """Return pytest's counts, or the last line."""
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|error).* in [\d.]+s", line)]
    return (counts or [line for line in lines if line.strip()] or [""])[-1].strip("= ")[:100]


# --- make test-all ------------------------------------------------------------------------------


def test_parts() -> dict[str, list[Path]]:
    """Return every test file once, grouped by folder."""
    found: dict[str, list[Path]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = file.relative_to(ROOT / "tests").parent.as_posix()
        found.setdefault("whole project" if folder == "." else folder, []).append(file)
    return found


def all_parts() -> list[Part]:
    """Return all parts of `make test-all`."""
    everything = {"HYBRIDCACHE_TESTS": "all"}
    parts = [
        Part(name, [*PYTEST, *(file.relative_to(ROOT) for file in files)], everything)
        for name, files in test_parts().items()
    ]
    python = sys.executable, "-m"
    return [
        *parts,
        *(Part(f"endurance: {name}", [*python, "tests.endurance", name]) for name in ENDURANCE),
        mutation_part(),
    ]


def mutation_part(sample: str = "3") -> Part:
    """Return a tenth of the mutants of the files that differ from main."""
    known = {file for group in mutation.GROUPS.values() for file in mutation.files_of(group)}
    files = sorted(known & set(changed_files(None)))
    command = ["make", "mutate", f"MUTANTS={' '.join(files)} --sample {sample}"]
    return Part("mutation", command, missing=None if files else "no mutated file has changed")


def run_all(names: Sequence[str]) -> int:
    """Run all parts, or those with a name that begins with one of ``names``."""
    parts = [part for part in all_parts() if not names or part.name.startswith(tuple(names))]
    if not parts:
        choices = ", ".join(part.name for part in all_parts())
        print(f"tests.run all: no part matches {', '.join(names)}; choose from {choices}.")
        return 2
    return run(parts, OUT / "test-all")


# --- make test-changed --------------------------------------------------------------------------


def _git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def changed_files(base: str | None) -> list[str]:
    """Return the files that differ from the merge base with ``base``, untracked files included.

    ``base`` is the remote's main branch or main by default, and the previous commit on main itself.
    """
    if base is None:
        branches = set(_git("for-each-ref", "--format=%(refname:short)", "refs"))
        base = next((name for name in ("origin/main", "main") if name in branches), "HEAD~1")
        if _git("rev-parse", base) == _git("rev-parse", "HEAD"):
            base = "HEAD~1"
    [fork] = _git("merge-base", base, "HEAD")
    untracked = _git("ls-files", "--others", "--exclude-standard")
    return sorted({*_git("diff", "--name-only", fork), *untracked})


def affected(changed: Sequence[str], tests: Sequence[Path] | None = None) -> list[Path]:
    """Return the test files, of ``tests`` or of all, that changed files can affect.

    Python files affect the tests that import them. Data (JSON, C++, JavaScript ...) affects tests
    that import a module of its folder. A page affects tests that name it. The configuration of the
    tests affects all. Tests directly in ``tests/`` read files of any kind and are always returned.
    """
    if tests is None:
        tests = [file for files in test_parts().values() for file in files]
    if {"tests/conftest.py", "tests/selection.py", "pyproject.toml"} & set(changed):
        return list(tests)
    paths = {ROOT / name for name in changed}
    pages = {path.name for path in paths if path.suffix == ".md"}
    data = {path.parent for path in paths if path.suffix not in (".py", ".md")} - {ROOT}
    found = []
    for test in tests:
        needed = closure(test)
        text = test.read_text(encoding="utf-8")
        if (
            test.parent == ROOT / "tests"
            or paths & needed
            or any(page in text for page in pages)
            or any(file.parent in data for file in needed)
        ):
            found.append(test)
    return found


def run_changed(base: str | None) -> int:
    """Run the tests that a change can affect."""
    changed = changed_files(base)
    if not changed:
        print("No file has changed.")
        return 0
    tests = affected(changed)
    print(f"{len(changed)} files changed; {len(tests)} test files may be affected.", flush=True)
    command = [*PYTEST, *(str(test.relative_to(ROOT)) for test in tests)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


# --- make test-environments ---------------------------------------------------------------------


def touchy_tests() -> list[Path]:
    """Return the test files that start processes, open sockets or write files."""
    found = []
    for files in test_parts().values():
        for file in files:
            fixtures = [file, *file.parent.glob("conftest.py")]
            if any(TOUCHY.search(one.read_text(encoding="utf-8")) for one in fixtures):
                found.append(file.relative_to(ROOT))
    return found


def _sh(script: str, command: Sequence[str | Path]) -> list[str]:
    """Return a shell command that runs ``script`` with ``command`` as its arguments."""
    return ["sh", "-c", script, "sh", *map(str, command)]


def _needs(*programs: str, root: bool = False) -> str | None:
    """Return a message about missing programs or rights, or None if nothing is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found"
    return "needs root rights" if root and os.geteuid() != 0 else None


def without_root_rights(command: Sequence[str | Path], folder: Path) -> list[str]:
    """Return a command that runs without root rights, in a copy of the repository in ``folder``.

    If a parent folder of the interpreter is not accessible to other users (``/root``), a mount
    namespace replaces it by a folder that contains only the interpreter.
    """
    for name in _git("ls-files", "--cached", "--others", "--exclude-standard"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["chown", "-R", "65534:65534", str(folder)], check=True)
    script = ["set -e"]
    needed = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    for path in sorted(needed):
        closed = [parent for parent in path.parents if not parent.stat().st_mode & 0o001]
        if closed:
            hold = shlex.quote(f"/tmp/.hold-{path.name}")
            at, cover = shlex.quote(str(path)), shlex.quote(str(closed[-1]))
            script.append(f"mkdir -p {hold}; mount --bind {at} {hold}")
            script.append(f"mount -t tmpfs -o mode=755 none {cover}")
            script.append(f"mkdir -p {at}; mount --bind {hold} {at}")
    rights = "--reuid=65534 --regid=65534 --clear-groups --inh-caps=-all --no-new-privs"
    script.append(f'exec setpriv {rights} -- "$@"')
    return ["unshare", "--mount", *_sh("\n".join(script), command)]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep ``count`` processes busy during the context."""
    spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spin:
            process.kill()
            process.wait()


def requirements_without_torch() -> list[str]:
    """Return the requirements of the tests without torch, which not every Python has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["dev"]]
    for extra in ("engine", "lab", "serve-extras"):
        named += extras[extra]
    return [one for one in named if not one.startswith(("torch", "triton"))]


def find_python(version: str) -> str | None:
    """Return an interpreter of ``version`` from the PATH or pyenv, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    runs = (p for p in found if p and not subprocess.run([p, "-V"], capture_output=True).returncode)
    return next(map(str, runs), None)


def python_part(version: str, command: Sequence[str | Path]) -> Part:
    """Return the suite under another Python, in a new environment without torch."""
    name, python = f"Python {version}", find_python(version)
    if python is None:
        return Part(name, (), missing=f"python{version} not found")
    home = OUT / "environments" / f"python{version}"
    pip = [home / "bin" / "pip", "install", "-q"]
    steps = [
        [python, "-m", "venv", home],
        [*pip, "-c", "constraints.txt", *requirements_without_torch()],
        [*pip, "--no-build-isolation", "--no-deps", "-e", "."],
        ["touch", home / ".made"],
    ]
    make = " && ".join(shlex.join(map(str, step)) for step in steps)
    usable = [word for word in command[1:] if not has_torch_fixtures(ROOT / word)]
    own = [home / "bin" / "python", *usable]
    return Part(name, _sh(f'test -e {home}/.made || {{ {make}; }} && exec "$@"', own))


NUMERICS = (Path("tests/kernels"), Path("tests/engine/numerics"))
COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+)(-[\d.]+)?")
INSTRUCTIONS = ("AVX512_CORE", "AVX2")
"""Limits of oneDNN's instructions that are tested: each selects other kernels."""


def link_programs(folder: Path) -> None:
    """Link all programs of the PATH except compilers into ``folder``."""
    for directory in os.get_exec_path():
        for program in sorted(Path(directory).glob("*")):
            link = folder / program.name
            if not COMPILER.fullmatch(program.name) and not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(program)


def environments(tests: Sequence[Path]) -> Iterator[Part]:
    """Yield the suite in each environment. An environment exists until the next iteration.

    ``tests`` are files or folders, or none for the tests that an environment may affect.
    """
    command = [*PYTEST, "-p", "no:cacheprovider", *(tests or touchy_tests())]
    numerics = [*PYTEST, "-p", "no:cacheprovider", *(tests or NUMERICS)]
    with tempfile.TemporaryDirectory() as folder:
        link_programs(Path(folder))
        yield Part("no compiler", numerics, {"PATH": folder})
        for limit in INSTRUCTIONS:
            env = {"PATH": folder, "ONEDNN_MAX_CPU_ISA": limit}
            yield Part(f"no compiler, {limit}", numerics, env)
    home = {"HOME": "/proc", "XDG_CACHE_HOME": "/proc/none", "TRITON_HOME": "/proc"}
    yield Part("SIGINT ignored", _sh("trap '' INT; exec \"$@\" < /dev/null", command))
    yield Part("nohup", ["nohup", *command], missing=_needs("nohup"))
    yield Part("no terminal", ["setsid", "--wait", *command], {"TERM": ""}, _needs("setsid"))
    yield Part("closed stdin", _sh('exec "$@" <&-', command))
    with busy(8):
        yield Part("load of 8", command)
    yield _on_tmpfs(command)
    yield Part("read-only HOME", command, home)
    yield Part("LANG=C", command, {"LANG": "C", "LC_ALL": "C"})
    net = 'ip link set lo up && sysctl -qw net.ipv6.conf.all.disable_ipv6=1 && exec "$@"'
    missing = _needs("unshare", "ip", "sysctl", root=True)
    yield Part("no IPv6", ["unshare", "--net", *_sh(net, command)], missing=missing)
    missing = _needs("unshare", "setpriv", root=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        env = {"HOME": folder, "TMPDIR": folder, "PYTHONPATH": str(copy)}
        if missing is None:
            Path(folder).chmod(0o777)
            part = without_root_rights(command, copy)
            yield Part("user without root rights", part, env, cwd=copy)
        elif os.geteuid() != 0:
            yield Part("user without root rights", command)
        else:
            yield Part("user without root rights", (), missing=missing)
    for version in ("3.11", "3.12", "3.13"):
        if sys.version.startswith(f"{version}."):
            yield Part(f"Python {version}", command)
        else:
            yield python_part(version, command)


def _on_tmpfs(command: Sequence[str | Path]) -> Part:
    """Return the suite with its temporary files in memory."""
    memory = Path("/dev/shm")
    missing = None if os.access(memory, os.W_OK) else "no /dev/shm"
    return Part("TMPDIR on tmpfs", command, {"TMPDIR": str(memory)}, missing)


def run_environments(names: Sequence[str], tests: Sequence[Path]) -> int:
    """Run tests in each environment, or in those with a name that begins with one of ``names``."""
    codes = []
    for part in environments(tests):
        if not names or part.name.lower().startswith(tuple(name.lower() for name in names)):
            codes.append(run([part], OUT / "test-environments"))
    return max(codes, default=2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.run", description=__doc__.splitlines()[0])
    ways = parser.add_subparsers(dest="way", required=True)
    ways.add_parser("all").add_argument("parts", nargs="*", metavar="PART")
    ways.add_parser("changed").add_argument("--base", metavar="REV")
    environment = ways.add_parser("environments")
    environment.add_argument("names", nargs="*", metavar="NAME")
    environment.add_argument(
        "--tests",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="files or folders (default: tests that start processes, use sockets or write files; "
        "for processors and compilers, those of kernels and numbers)",
    )
    options = parser.parse_args(arguments)
    runs: dict[str, Callable[[], int]] = {
        "all": lambda: run_all(options.parts),
        "changed": lambda: run_changed(options.base),
        "environments": lambda: run_environments(options.names, options.tests or ()),
    }
    return runs[options.way]()


if __name__ == "__main__":
    raise SystemExit(main())
