"""Would the tests notice? Breaks cache, arena, engine or native kernels in small ways, and runs
their tests.

python -m experiments.mutate [cache] [arena] [engine] [native] [tiers] [routing] [peers]
    [--only WORD]
    [--timeout 240] [--machines]

Each mutation is one edit of one file in a copy of the packages; a mutation that no test catches
("survived") makes the script fail. Writes results/mutate_cache.jsonl and so on: what
was broken, and the first test that said so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiments.mutations import Mutation
from experiments.mutations.arena import ARENA
from experiments.mutations.cache import CACHE
from experiments.mutations.engine import ENGINE
from experiments.mutations.native import NATIVE
from experiments.mutations.peers import PEER_TIERS
from experiments.mutations.routing import ROUTING
from experiments.mutations.tiers import TIERS
from experiments.provenance import RESULTS, ROOT, write_json_lines

LISTS = {
    "cache": CACHE,
    "arena": ARENA,
    "engine": ENGINE,
    "native": NATIVE,
    "tiers": TIERS,
    "routing": ROUTING,
    "peers": PEER_TIERS,
}


class Outcome(NamedTuple):
    """What the tests said to one mutation."""

    what: str
    path: str
    caught_by: str
    """The first test that failed; "nothing" if all passed."""
    seconds: float


def try_mutation(
    mutation: Mutation | None, copied: Sequence[str], tests: Sequence[str], timeout_s: float
) -> Outcome:
    """Break a copy, or copy what is there, and run the tests against it until the first fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in copied:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        what, path = (mutation.what, mutation.path) if mutation else ("nothing", "")
        if mutation:
            _break(copy / path, mutation)
        begin = time.monotonic()
        caught = _first_failure(copy, timeout_s, tests)
        return Outcome(what, path, caught, round(time.monotonic() - begin, 1))


def _break(target: Path, mutation: Mutation) -> None:
    text = target.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.what}: stands {text.count(mutation.old)} times, not once")
    target.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def _first_failure(copy: Path, timeout_s: float, tests: Sequence[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "pytest_timeout", "--timeout=60", "--timeout-method=thread", *tests]
    settings = {"PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "mutate"}
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
    said = (done.stdout + done.stderr).splitlines()
    failed = [line for line in said if line.startswith(("FAILED tests", "ERROR tests"))]
    if failed:
        return failed[0].split()[1]
    if any("Timeout" in line for line in said):
        return "a test's time limit (it never ends)"
    raise RuntimeError("\n".join(said[-20:]))


def try_all(name: str, only: str, machines: bool, timeout_s: float) -> list[Outcome]:
    """Every breakage of a list whose description has ``only``; RuntimeError: the tests fail without
    any."""
    breakages, tests, machine_tests, copied = LISTS[name]
    tests = machine_tests if machines else tests
    unbroken = try_mutation(None, copied, tests, 1200)
    if unbroken.caught_by != "nothing":
        raise RuntimeError(f"the tests fail without any mutation: {unbroken.caught_by}")
    outcomes = []
    for one in tqdm([mutation for mutation in breakages if only in mutation.what], unit="mutation"):
        own = tests if machines else one.tests or tests
        outcomes.append(try_mutation(one, copied, own, timeout_s))
    if not only and not machines:
        write_json_lines(RESULTS / f"mutate_{name}.jsonl", [o._asdict() for o in outcomes])
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "lists", nargs="*", metavar="LIST", help="cache, arena, engine, native; none: all"
    )
    parser.add_argument("--only", default="", help="only mutations whose description has this")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds a mutation may take")
    parser.add_argument("--machines", action="store_true", help="the state machines alone")
    options = parser.parse_args()
    names = options.lists or list(LISTS)
    if unknown := set(names) - set(LISTS):
        parser.error(f"no list of mutations is called {', '.join(sorted(unknown))}")
    has_survivors = False
    for name in names:
        outcomes = try_all(name, options.only, options.machines, options.timeout)
        for outcome in outcomes:
            print(f"{outcome.what:62} {outcome.seconds:6.1f} s  {outcome.caught_by}")
        caught = [outcome for outcome in outcomes if outcome.caught_by != "nothing"]
        print(f"{name}: {len(caught)} of {len(outcomes)} mutations caught")
        has_survivors |= len(caught) < len(outcomes)
    sys.exit(has_survivors)


if __name__ == "__main__":
    main()
