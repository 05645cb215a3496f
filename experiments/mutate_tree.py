"""Would the tests notice? Breaks the cache in small ways, one at a time, and runs its tests against each.

python -m experiments.mutate_tree [--only WORD] [--timeout 240] [--machines]

Each mutation is one edit of one file in a copy of the package; a mutation that no test catches ("survived") makes the script
fail. Writes results/mutate_tree.jsonl: what was broken, and the first test that said so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiments.provenance import RESULTS, ROOT, write_json_lines
from experiments.tree_mutations import KEY, MUTATIONS, Mutation

TESTS = (
    "tests/cache/test_eviction.py",
    "tests/cache/test_operations.py",
    "tests/cache/test_scenarios.py",
    "tests/cache/test_refusals.py",
    "tests/cache/test_check.py",
    "tests/cache/test_gathers.py",
    "tests/cache/test_losses.py",
    "tests/allocators",
    "tests/radix",
    "tests/export/test_events.py",
    "tests/export/test_snapshot.py",
    "tests/cache/test_churn.py",
    "tests/cache/test_machine.py",
)
MACHINES = ("tests/cache/test_machine.py", "tests/cache/test_radix_machine.py")
COPIED = ("hybridcache", "tests", "pyproject.toml")


class Outcome(NamedTuple):
    """What the tests said to one mutation."""

    what: str
    path: str
    caught_by: str
    """The first test that failed; "nothing" if all passed."""
    seconds: float


def try_mutation(mutation: Mutation, timeout_s: float, suite: Sequence[str] = TESTS) -> Outcome:
    """Break a copy, run the tests against it until the first fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        target = copy / mutation.path
        text = target.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation.what}: stands {text.count(mutation.old)} times, not once")
        target.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        begin = time.monotonic()
        caught = _first_failure(copy, timeout_s, suite)
        return Outcome(mutation.what, mutation.path, caught, round(time.monotonic() - begin, 1))


def _first_failure(copy: Path, timeout_s: float, suite: Sequence[str]) -> str:
    tests = [name for name in suite if (copy / name).exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    settings = {"PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "ci"}
    settings["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return "the time limit (it never ends)"
    if done.returncode == 0:
        return "nothing"
    failed = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED tests", "ERROR tests"))
    ]
    return failed[0].split()[1] if failed else f"exit code {done.returncode}"


def chosen(word: str) -> Iterator[Mutation]:
    return (mutation for mutation in MUTATIONS if word in mutation.what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only mutations whose description has this")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds a mutation may take")
    parser.add_argument("--machines", action="store_true", help="the state machines alone")
    options = parser.parse_args()
    suite = MACHINES if options.machines else TESTS
    unbroken = try_mutation(
        Mutation("nothing", KEY, "TOKEN_BYTES = 4\n", "TOKEN_BYTES = 4\n"), 600, suite
    )
    if unbroken.caught_by != "nothing":
        sys.exit(f"the tests fail without any mutation: {unbroken.caught_by}")
    mutations = list(chosen(options.only))
    outcomes = [try_mutation(mutation, options.timeout, suite) for mutation in tqdm(mutations)]
    if not options.only and not options.machines:
        write_json_lines(RESULTS / "mutate_tree.jsonl", [o._asdict() for o in outcomes])
    for outcome in outcomes:
        print(f"{outcome.what:62} {outcome.seconds:6.1f} s  {outcome.caught_by}")
    survived = [outcome for outcome in outcomes if outcome.caught_by == "nothing"]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} mutations caught")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
