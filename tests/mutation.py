"""Mutation tests of the cache, the scheduler and the lease; fail if an unlisted mutant survives.

python -m tests.mutation [FILE ...] [--sample DIGITS]      or `make mutate MUTANTS=FILE`

mutmut changes one expression at a time, in a copy of the repository, and runs the tests that
execute it. Each file has a separate copy in ``out/mutation``, so that mutmut slows down only the
functions of that file. An interrupted run continues in its copy; delete the copy to start again.

Equivalent mutants, which no test can detect, are listed in ``equivalent_mutants.txt``. An entry is
the name of the function, the lines of the diff, and a reason. It is void after a change of one of
these lines.

This module is also a pytest plugin that stops tests of mutants that loop forever.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.selection import ROOT

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")


class Group(NamedTuple):
    """Files to mutate, and the tests that must detect the mutants."""

    mutated: tuple[str, ...]
    tests: tuple[str, ...]


GROUPS = {
    "cache": Group(
        (
            "hybridcache/radix/*",
            "hybridcache/allocators/*",
            "hybridcache/radix/cache.py",
            "hybridcache/radix/offload.py",
            "hybridcache/radix/tiers.py",
        ),
        (
            *("tests/allocators", "tests/radix", "tests/cache"),
            *("tests/export/test_events.py", "tests/export/test_events_machine.py"),
            "tests/policies/test_ghosts_above.py",
        ),
    ),
    "requests": Group(
        (
            "hybridcache/radix/lease.py",
            "hybridcache/scheduling/*",
            "engine/schedule/scheduler.py",
        ),
        (
            *("tests/cache/test_lease.py", "tests/cache/test_lease_machine.py"),
            *("tests/cache/test_arena.py", "tests/cache/test_tiers.py"),
            *("tests/cache/test_scheduling.py", "tests/cache/test_refusals.py"),
            "tests/policies/test_failing.py",
            "tests/lab/test_closed_loop.py",
            *("tests/engine/test_schedule.py", "tests/engine/test_scheduler_machine.py"),
            *("tests/engine/test_fairness.py", "tests/engine/test_batch.py"),
            *("tests/engine/test_drafts.py", "tests/engine/test_failing_alone.py"),
        ),
    ),
    # A file's last group counts. These tests are enough: a minute instead of ten.
    "near": Group(
        ("hybridcache/allocators/pools.py",),
        ("tests/allocators", "tests/cache/test_arena.py"),
    ),
}
SLOW = ("test_remembered",)
"""Slow tests that detect no mutant that other tests do not detect."""
CONFIG = """
[tool.mutmut]
source_paths = ["hybridcache", "engine"]
only_mutate = {mutated}
do_not_mutate_patterns = ['raise \\w+', 'assert ', 'logger']
also_copy = ["kernels", "tests", "experiments"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:xdist", "-p", "no:cacheprovider", "-p", "tests.mutation",
    "--timeout=0", "-k", "{slow}"]
"""
KILLED = ("killed", "timeout", "caught by type check", "segfault")


class Mutant(NamedTuple):
    """A change of the source that no test detected."""

    function: str
    changes: tuple[str, ...]
    """Lines of the diff, each after ``-`` or ``+``."""

    def __str__(self) -> str:
        return "\n".join((self.function, *self.changes))


def files_of(group: Group) -> list[str]:
    """Return the files to mutate, smallest first."""
    files = [file for pattern in group.mutated for file in ROOT.glob(pattern)]
    wanted = [file for file in files if file.suffix == ".py" and file.stem != "__init__"]
    return [str(file.relative_to(ROOT)) for file in sorted(wanted, key=lambda f: f.stat().st_size)]


def prepare(file: str, tests: Sequence[str], work: Path) -> None:
    """Copy the repository, with mutmut's settings, to ``work``. Keeps earlier results."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        source, target = ROOT / name, work / name
        is_known = target.exists() and source.is_file()
        if source.is_file() and not (is_known and filecmp.cmp(source, target, shallow=False)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    config = CONFIG.format(
        mutated=[file],
        tests=list(tests),
        slow=" and ".join(f"not {test}" for test in SLOW),
    )
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + config)


def mutmut(work: Path, *arguments: str, **options: object) -> str:
    """Run mutmut in the copy and return its output."""
    environment = {"HYPOTHESIS_PROFILE": "mutate", "OMP_NUM_THREADS": "1"}
    paths = [Path(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = os.pathsep.join(str(path.resolve()) for path in paths if path.resolve() != ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=work,
        env=os.environ | environment | {"PYTHONPATH": kept},
        text=True,
        check=False,
        **({"capture_output": True} | options),  # type: ignore[call-overload]
    )
    return done.stdout or ""


def outcomes(work: Path) -> dict[str, str]:
    """Map the names of the mutants to their outcomes."""
    found = re.findall(r"^\s+(\S+): (.+)$", mutmut(work, "results", "--all", "true"), re.M)
    return {name: status for name, status in found if status != "not checked"}


def mutant(work: Path, name: str) -> Mutant:
    """Return the mutant that mutmut calls ``name``."""
    shown = mutmut(work, "show", name).splitlines()
    changed = [line for line in shown if re.match(r"[-+](?![-+]{2} )", line)]
    function = re.sub(r"__mutmut_\d+$", "", name)
    function = re.sub(r"x(?:_|ǁ)(?=[^.]+$)", "", function, count=1).replace("ǁ", ".")
    return Mutant(function, tuple(f"{line[0]} {line[1:].strip()}" for line in changed))


def listed(text: str) -> Iterator[Mutant]:
    """Parse a list of mutants: blocks of a function name, a diff and a reason."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if line.strip()[:1] not in ("", "#")]
        if lines:
            yield Mutant(lines[0], tuple(line for line in lines[1:] if line[0] in "-+"))


def try_file(file: str, tests: Sequence[str], processes: int, sample: str) -> int:
    """Mutate one file. Return the number of survivors that are not listed.

    Only mutants whose number ends in a digit of ``sample`` are tried.
    """
    work = ROOT / "out" / "mutation" / file.removesuffix(".py").replace("/", ".")
    prepare(file, tests, work)
    mutmut(work, "run", "--max-children", str(processes), f"*[{sample}]", capture_output=False)
    found = outcomes(work)
    equivalent = set(listed(EQUIVALENT.read_text(encoding="utf-8")))
    survivors = [mutant(work, one) for one, status in found.items() if status not in KILLED]
    unlisted = [one for one in survivors if one not in equivalent]
    for one in unlisted:
        print(f"\n{one}")
    counts = Counter(found.values()).most_common()
    shown = ", ".join(f"{count} {status}" for status, count in counts)
    num_equivalent = len(survivors) - len(unlisted)
    print(f"\n{file}: {len(found)} mutants: {shown}; {num_equivalent} are listed as equivalent.")
    if not found:
        print("No mutant was tried; see the output of mutmut above.")
        return 1
    return len(unlisted)


def main(arguments: Sequence[str] | None = None) -> int:
    tests = {file: group.tests for group in GROUPS.values() for file in files_of(group)}
    parser = argparse.ArgumentParser(prog="tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--sample", default="0-9", metavar="DIGITS", help="last digits of the numbers to try"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.files) - set(tests))
    if unknown:
        parser.error(f"{', '.join(unknown)} cannot be mutated; choose from {', '.join(tests)}.")
    files = options.files or list(tests)
    unlisted = sum(try_file(file, tests[file], options.processes, options.sample) for file in files)
    if unlisted:
        print(f"{unlisted} mutants survive that are not listed in {EQUIVALENT.name}.")
    return 1 if unlisted else 0


# --- The plugin ---------------------------------------------------------------------------------

CPU_SECONDS = 5.0
"""Lower bound of the CPU time limit of a test with a mutant."""
CPU_FACTOR = 5.0
"""CPU time limit of a test with a mutant, as a multiple of its usual duration."""
USUAL_SECONDS = 24.0
"""Duration of a test that mutmut has not measured."""
DURATIONS = pytest.StashKey[dict[str, float]]()


def _stop(signum: int, frame: object) -> None:
    os.kill(os.getpid(), signal.SIGXCPU)  # mutmut counts this as a timeout.


def pytest_configure(config: pytest.Config) -> None:
    """Read the durations measured by mutmut, if there are any."""
    stats = Path("mutmut-stats.json")
    known = json.loads(stats.read_text()) if stats.is_file() else {}
    config.stash[DURATIONS] = known.get("duration_by_test", {})
    signal.signal(signal.SIGPROF, _stop)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Limit the CPU time of a test. Wall time would depend on the load of the machine."""
    usual = item.config.stash[DURATIONS].get(item.nodeid, USUAL_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, max(CPU_SECONDS, CPU_FACTOR * usual))
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    raise SystemExit(main())
