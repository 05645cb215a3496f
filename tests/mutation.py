"""Mutate the cache, the scheduler and the lease with mutmut; fail if an unlisted mutant survives.

python -m tests.mutation [cache|requests] [PATTERN ...]      `make mutate`; a pattern is as in
'hybridcache.radix.*'

mutmut changes one expression at a time, in a copy of the tree, and runs the tests that reach it.
Mutants that no test can tell from the original are listed in ``equivalent_mutants.txt``, by
function and changed lines: a block of the function's name, the lines of the diff, and a reason. A
line that changes makes its entry void, and is judged anew.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.selection import ROOT

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")


class Group(NamedTuple):
    """Files that are mutated, and the tests that must notice."""

    mutated: tuple[str, ...]
    tests: tuple[str, ...]


GROUPS = {
    "cache": Group(
        (
            "hybridcache/radix/*",
            "hybridcache/allocators/*",
            "hybridcache/residency.py",
            "hybridcache/offload.py",
            "hybridcache/hybrid.py",
            "hybridcache/variants.py",
        ),
        (
            *("tests/allocators", "tests/radix", "tests/cache"),
            *("tests/export/test_snapshot.py", "tests/export/test_events.py"),
            "tests/policies/test_ghosts_above.py",
        ),
    ),
    "requests": Group(
        (
            "hybridcache/lease.py",
            "hybridcache/scheduling/*",
            "engine/schedule/scheduler.py",
        ),
        (
            "tests/cache/test_lease.py",
            "tests/cache/test_lease_machine.py",
            "tests/lab/test_closed_loop.py",
            "tests/cache/test_arena_machine.py",
            "tests/engine/test_schedule.py",
            "tests/engine/test_scheduler_machine.py",
            "tests/engine/test_fairness.py",
        ),
    ),
}
NOT_MUTATED = ("*/radix/check.py", "*/radix/render.py")
"""Checks, which only tests call, and pictures."""
SLOW = ("test_remembered", "test_second_sighting", "gathered_is_weighed")
"""Tests that find nothing here that others do not, in much more time."""
CONFIG = """
[tool.mutmut]
source_paths = ["hybridcache", "engine"]
only_mutate = {mutated}
do_not_mutate = {not_mutated}
do_not_mutate_patterns = ['raise \\w+', 'assert ']
also_copy = ["kernels", "tests", "experiments"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:xdist", "-p", "no:cacheprovider", "--timeout=0", "-k", "{slow}"]
"""
KILLED = ("killed", "timeout", "caught by type check", "segfault")


class Mutant(NamedTuple):
    """A change that the tests did not notice."""

    function: str
    changes: tuple[str, ...]
    """Lines of the diff, each after ``-`` or ``+``."""

    def __str__(self) -> str:
        return "\n".join((self.function, *self.changes))


def prepare(group: Group, work: Path) -> None:
    """Copy the tree, with mutmut's settings, to where it is mutated; what is known stays."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        source, target = ROOT / name, work / name
        is_known = target.exists() and source.is_file()
        if source.is_file() and not (is_known and filecmp.cmp(source, target, shallow=False)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    config = CONFIG.format(
        mutated=list(group.mutated),
        not_mutated=list(NOT_MUTATED),
        tests=list(group.tests),
        slow=" and ".join(f"not {test}" for test in SLOW),
    )
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + config)


def mutmut(work: Path, *arguments: str, **options: object) -> str:
    """Run mutmut in the copy, and return what it printed."""
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
    """Return what became of each mutant, by mutmut's name for it."""
    found = re.findall(r"^\s+(\S+): (.+)$", mutmut(work, "results", "--all", "true"), re.M)
    return {name: status for name, status in found if status != "not checked"}


def mutant(work: Path, name: str) -> Mutant:
    """Return a mutant by mutmut's name for it, which is a number in its function."""
    shown = mutmut(work, "show", name).splitlines()
    changed = [line for line in shown if re.match(r"[-+](?![-+]{2} )", line)]
    function = re.sub(r"__mutmut_\d+$", "", name)
    function = re.sub(r"x(?:_|ǁ)(?=[^.]+$)", "", function, count=1).replace("ǁ", ".")
    return Mutant(function, tuple(f"{line[0]} {line[1:].strip()}" for line in changed))


def listed(text: str) -> Iterator[Mutant]:
    """Yield the mutants of a list: blocks of a function, the diff and a reason."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if line.strip()[:1] not in ("", "#")]
        if lines:
            yield Mutant(lines[0], tuple(line for line in lines[1:] if line[0] in "-+"))


def try_group(name: str, patterns: Sequence[str], processes: int) -> int:
    """Mutate one group; return how many mutants survive that are not listed."""
    work = ROOT / "out" / "mutation" / name
    prepare(GROUPS[name], work)
    mutmut(work, "run", "--max-children", str(processes), *patterns, capture_output=False)
    found = outcomes(work)
    equivalent = set(listed(EQUIVALENT.read_text(encoding="utf-8")))
    survivors = [mutant(work, one) for one, status in found.items() if status not in KILLED]
    unlisted = [one for one in survivors if one not in equivalent]
    for one in unlisted:
        print(f"\n{one}")
    counts = Counter(found.values()).most_common()
    shown = ", ".join(f"{count} {status}" for status, count in counts)
    num_equivalent = len(survivors) - len(unlisted)
    print(f"\n{name}: {len(found)} mutants: {shown}; {num_equivalent} are listed as equivalent.")
    if not found:
        print("Nothing was tried: what mutmut printed above says why.")
        return 1
    return len(unlisted)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("group", nargs="?", choices=GROUPS, help="default: all")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="mutants of the group")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    names = [options.group] if options.group else list(GROUPS)
    unlisted = sum(try_group(name, options.patterns, options.processes) for name in names)
    if unlisted:
        print(f"{unlisted} mutants survive that {EQUIVALENT.name} does not list.")
    return 1 if unlisted else 0


if __name__ == "__main__":
    raise SystemExit(main())
