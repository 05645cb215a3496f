"""Run all tests, or the tests in difficult environments.

python -m tests.run all [PART ...]          everything, part by part (`make test-all`)
python -m tests.run environments [PART ...] the suite without a compiler, without a terminal, ...
python -m tests.run newest PACKAGE ...      the quick tests, and which newest release breaks one

Each part or environment writes its output to a file in ``out/`` and one line to the screen. A part
of ``all`` that passed on this commit, without changes of it, is not run again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest

from kernels import library
from tests.endurance.__main__ import PARTS as ENDURANCE
from tests.selection import NUMERICS, ROOT, TOUCHY

PYTEST = (sys.executable, "-m", "pytest", "--processes", "2")
EVERYTHING = {"HYBRIDCACHE_TESTS": "all"}
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


def commit() -> str:
    """Return the commit of the working tree; "" if tracked files differ from it."""
    git = ("git", "-C", str(ROOT))
    changes = [*git, "status", "--porcelain", "--untracked-files=no"]
    if subprocess.run(changes, capture_output=True, text=True).stdout:
        return ""
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    return head.stdout.strip()


def run(parts: Sequence[Part], folder: Path, of: str = "") -> int:
    """Run parts one after another. Return 0 if all passed, else 1.

    Parts that passed before on the commit ``of`` are left out, unless it is "".
    """
    folder.mkdir(parents=True, exist_ok=True)
    passed = folder / "passed.txt"
    done_before = set(passed.read_text().splitlines()) if of and passed.exists() else set()
    failed, width = [], max(len(part.name) for part in parts)
    for number, part in enumerate(parts, 1):
        head = f"{number:2}/{len(parts)}  {part.name:{width}}  "
        print(head, end="", flush=True)
        if part.missing is not None:
            print(f"not run: {part.missing}")
            continue
        if f"{of} {part.name}" in done_before:
            print("passed before on this commit")
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
        is_good = done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED)  # All were skipped.
        verdict = "passed" if is_good else f"FAILED ({done.returncode})"
        print(f"{verdict}  {seconds:6.0f} s, {cpu:6.0f} s of CPU  {_last_line(lines)}", flush=True)
        if is_good and of:
            with passed.open("a") as file:
                file.write(f"{of} {part.name}\n")
        if not is_good:
            failed.append(part.name)
            print("\n".join(f"    {line}" for line in lines[-LAST_LINES:]), flush=True)
    ran = sum(part.missing is None for part in parts)
    outcome = f"failed: {', '.join(failed)}" if failed else "all passed"
    print(f"{ran} of {len(parts)} ran, {outcome}. Output is in {folder.relative_to(ROOT)}.")
    return 1 if failed else 0


def run_chosen(parts: Sequence[Part], names: Sequence[str], folder: Path, of: str = "") -> int:
    """Run all parts, or those with a name that begins with one of ``names``; see ``run``."""
    chosen = [part for part in parts if not names or part.name.startswith(tuple(names))]
    if not chosen:
        choices = "; ".join(part.name for part in parts)
        print(f"tests.run: no part matches {', '.join(names)}; choose from {choices}.")
        return 2
    return run(chosen, folder, of)


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
    parts = [
        Part(name, [*PYTEST, *(file.relative_to(ROOT) for file in files)], EVERYTHING)
        for name, files in test_parts().items()
    ]
    python = sys.executable, "-m"
    return [
        *parts,
        *(Part(f"endurance: {name}", [*python, "tests.endurance", name]) for name in ENDURANCE),
    ]


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


COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+)(-[\d.]+)?")
LIMITS = (
    library.LEVEL_VARIABLE,
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Variables that limit the instructions of our kernels, PyTorch, oneDNN and MKL."""
PROCESSORS = {
    "AVX-512 without VNNI": ("avx512", "avx512", "AVX512_CORE", "AVX512"),
    "AVX2": ("avx2", "avx2", "AVX2", "AVX2"),
    "SSE4": ("sse4", "default", "SSE41", "SSE4_2"),
}
"""Imitated processors, by their best instructions: a value of each variable of ``LIMITS``."""
EMULATED: dict[str, dict[str, str]] = {
    "Haswell": {library.MKL_VARIABLE: "AVX2,STRICT"},
    "EPYC-Milan": {},
}
"""Processors with AVX2 that qemu emulates, and what ``library.settle_products`` sets for them: it
would read the real processor's vendor. qemu 7.2 emulates no AVX-512."""
EMULATOR = "qemu-x86_64"
IN_EMULATOR: dict[str, tuple[str, dict[str, str]]] = {
    "": (
        "(native or lanes or tiles or halves or looked_up or together or test_layers"
        " or test_blocks) and not fused and not aot and not amx and not 2048x2048"
        " and not real_sizes and not a_level",
        {},
    ),
    ", all dtypes": (
        "(looked_up or (native and (test_pointwise or test_state_copy or decode))) and not fused",
        EVERYTHING,
    ),
}
"""pytest's expressions for tests of native kernels, and their level. Each exported function is
called, but for two that ``tests/engine`` tests. Emulation is 20 times slower."""
EXACTNESS = [
    f"tests/engine/{name}.py"
    for name in (
        *("models/test_published_sizes", "runner/test_exactness"),
        *("weights/test_gguf_models", "weights/forms/test_quantized_files"),
    )
]
"""Tests that hits are exact, in all families and formats, with 1 and 2 threads."""
NEWEST = "newest", "newest vllm", "newest sglang", "newest ray"
"""Targets of ``tests/Makefile`` that install the newest releases of the index."""
BARE = {"HOME": "/proc", "XDG_CACHE_HOME": "/proc/none", "TRITON_HOME": "/proc"}
BARE |= {"LANG": "C", "LC_ALL": "C", "TERM": ""}
BACKGROUND = "trap '' INT; exec nohup setsid --wait \"$@\" <&-"
"""Script of a shell that ignores SIGINT, with a closed stdin and no terminal."""


def link_programs(folder: Path) -> None:
    """Link all programs of the PATH except compilers into ``folder``."""
    for directory in os.get_exec_path():
        for program in sorted(Path(directory).glob("*")):
            link = folder / program.name
            if not COMPILER.fullmatch(program.name) and not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(program)


def imitated(name: str) -> dict[str, str]:
    """Return the environment in which this processor is one of ``PROCESSORS``."""
    return dict(zip(LIMITS, PROCESSORS[name], strict=True))


def lacks(name: str) -> str | None:
    """Return the reason why this processor cannot imitate one of ``PROCESSORS``, or None."""
    [level] = [one for one in library.LEVELS if one.name == PROCESSORS[name][0]]
    missing = level.needs - library.processor_instructions()
    return f"this processor lacks {', '.join(sorted(missing))}" if missing else None


def run_environments(names: Sequence[str]) -> int:
    """Run the tests of numbers with other instructions, on emulated processors and without a
    compiler, and touchy tests in a bare background shell."""
    numerics = [*PYTEST, "-p", "no:cacheprovider", "tests/kernels", *NUMERICS]
    exactness = [*PYTEST, "-p", "no:cacheprovider", *EXACTNESS]
    command = [*PYTEST, "-p", "no:cacheprovider", *touchy_tests()]
    with tempfile.TemporaryDirectory() as folder:
        link_programs(Path(folder))
        bare = {"PATH": folder}
        parts = [Part("no compiler", numerics, bare)]
        for name in PROCESSORS:
            limits, missing = imitated(name), lacks(name)
            parts += [
                Part(name, numerics, limits, missing),
                Part(f"{name}, no compiler", numerics, limits | bare, missing),
            ]
        name = "AVX2"
        missing = lacks(name) if shutil.which(EMULATOR) else "needs qemu-user"
        for processor, settings in EMULATED.items():
            limits = imitated(name) | settings | {"QEMU_CPU": processor}
            parts += [
                Part(
                    f"{processor}, emulated{kind}",
                    [EMULATOR, *PYTEST[:3], "-k", tests, "tests/kernels"],
                    limits | level,
                    missing,
                )
                for kind, (tests, level) in IN_EMULATOR.items()
            ]
        parts.append(
            Part(f"{name}, exactness", exactness, imitated(name) | EVERYTHING, lacks(name))
        )
        parts.append(Part("background", ["sh", "-c", BACKGROUND, "sh", *command], BARE))
        parts += [Part(name, ["make", name.replace(" ", "-")]) for name in NEWEST]
        return run_chosen(parts, names, OUT / "test-environments")


def run_newest(packages: Sequence[str]) -> int:
    """Run the quick tests with the installed releases, and those that fail with the version of
    ``constraints.txt`` of one package after the other: print whose newest release breaks them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
    now = {one: metadata.version(one) for one in packages}
    print(", ".join(f"{one} {now[one]} (tested with {pins.get(one)})" for one in packages))
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    failed = failures([])
    for one in packages if failed else ():
        if pins.get(one, now[one]) != now[one]:
            subprocess.run([*install, f"{one}=={pins[one]}"], check=True)
            broken = ", ".join(sorted({*failed} - {*failures(failed)}))
            print(f"{one} {now[one]} breaks: {broken or 'nothing alone'}", flush=True)
            subprocess.run([*install, f"{one}=={now[one]}"], check=True)
    return 1 if failed else 0


def failures(tests: Sequence[str]) -> list[str]:
    """Run tests, print pytest's last lines, and return the names of those that fail."""
    done = subprocess.run([*PYTEST, *tests], cwd=ROOT, capture_output=True, text=True)
    print("\n".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:]), flush=True)
    found = re.findall(r"^(?:FAILED|ERROR) ([^\s[]+(?:\[.*?\])?)(?: - .*)?$", done.stdout, re.M)
    return found or ["tests"] * (done.returncode != 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.run", description=__doc__.splitlines()[0])
    ways = parser.add_subparsers(dest="way", required=True)
    for name in ("all", "environments", "newest"):
        ways.add_parser(name).add_argument("parts", nargs="*", metavar="PART")
    options = parser.parse_args(arguments)
    if options.way == "all":
        return run_chosen(all_parts(), options.parts, OUT / "test-all", commit())
    return (run_newest if options.way == "newest" else run_environments)(options.parts)


if __name__ == "__main__":
    raise SystemExit(main())
