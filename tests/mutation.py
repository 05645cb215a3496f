"""Mutation tests of the product's logic; fail if an unlisted mutant survives.

python -m tests.mutation [FILE ...]         or `make mutate MUTANTS=FILE`
python -m tests.mutation --sample 200       that many mutants of all rooms, for at most 10 minutes
python -m tests.mutation --list             lines and tests of each room

A room is a folder of the product. mutmut changes one expression or deletes one statement at a time,
in a copy of the repository, and runs the tests of the room that execute it. No text is changed.
Each file has a separate copy in ``out/mutation``, so that mutmut slows down only the functions of
that file. A run continues where the last one stopped. After a change of the repository the tests
are measured again, and survivors are tried again with the tests that execute them now.

A sample has one copy per room. Its mutants depend on the sources only, so it also continues.

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
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random, randrange
from typing import NamedTuple

import pytest

from tests.selection import ROOT

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")


class Room(NamedTuple):
    """Files of a folder to mutate, and the tests that must detect the mutants."""

    files: list[str]
    tests: tuple[str, ...]
    """Folders and files of ``tests``."""
    level: str
    """Level of the tests (``selection.level``)."""


MUTATED = "hybridcache/**/*.py", "engine/**/*.py", "kernels/linear/*.py"
LEFT = "__init__ __main__ fused native"
"""Names of mutated files that are left out: kernels of Triton, whose functions are decorated, and
those that a compiler judges."""
SERVER = "engine/front/server"
SCHEDULED = "engine/schedule scheduling radix policies/test_failing.py engine/test_failing_alone.py"
DRAFTED = "engine/plugins/speculation"
TOOLS = f"{SERVER}/tool_calls {SERVER}/test_tools.py"
FORMS = "engine/weights/forms engine/front/command/test_convert.py"
TESTS = {
    "hybridcache": "lab/runs/test_simulate.py radix/test_refusals.py",
    "hybridcache/command": "lab/test_cli.py lab/runs/test_simulate.py",
    "hybridcache/allocators": "allocators radix scheduling",
    "hybridcache/radix": f"{SCHEDULED} allocators adapters/test_events.py policies "
    "adapters/test_events_machine.py engine/test_policy_state.py",
    "hybridcache/scheduling": f"{SCHEDULED} lab/runs/test_closed_loop.py {DRAFTED}/test_drafts.py",
    "hybridcache/policies": "policies radix engine/test_policy_state.py "
    "lab/rivals/test_textbook.py",
    "hybridcache/adapters": "adapters lab/runs/test_fleet.py lab/traces/test_texts.py "
    f"engine/front/test_templates.py {SERVER}/endpoints {SERVER}/test_dialects.py",
    "hybridcache/geometry": "geometry engine/models/test_published_configs.py test_doctests.py "
    "engine/test_checkpoint_dtype.py engine/weights/test_gguf.py engine/weights/test_gguf_files.py",
    "hybridcache/lab": "lab geometry",
    # The others need a worker.
    "hybridcache/vllm": "vllm/test_scheduler.py vllm/test_connectors.py vllm/test_seams.py",
    "engine": "engine/test_engine.py engine/schedule/test_schedule.py engine/test_failing_alone.py "
    "engine/test_plugins.py engine/front/test_async_engine.py engine/runner/test_memory.py "
    "engine/plugins/disaggregation",
    "engine/schedule": f"{SCHEDULED} {DRAFTED}",
    "engine/requests": f"engine/requests engine/runner/test_sampler.py engine/text {SCHEDULED}",
    "engine/text": f"engine/text engine/requests {TOOLS} engine/plugins/guided",
    "engine/weights": "engine/weights engine/runner/test_head_loading.py "
    "engine/runner/test_fused.py engine/plugins/tiers/test_records.py",
    "engine/weights/forms": FORMS,
    "engine/runner": f"engine/runner engine/test_engine.py {DRAFTED}/test_head_drafts.py",
    # The other tests of the last file take minutes at level "all".
    "engine/models": f"engine/models/test_parity.py {DRAFTED}/test_head_drafts.py engine/runner/"
    "test_fused.py::test_rows_quantised_by_norms_and_experts_change_no_bit",
    "engine/front": f"{SERVER} engine/front/test_async_engine.py engine/front/test_templates.py "
    "adapters/watch/test_page.py",
    "engine/front/server/tool_calls": TOOLS,
    "kernels/linear": f"kernels/linear {FORMS}",
}
"""Tests of rooms that are not those of the mirrored folder alone. They hold for the rooms below,
unless these have a folder of tests, or an entry."""
LIKE = {
    "engine/layers": "engine/models",
    "engine/plugins": "engine",
    "engine/front/server/endpoints": "engine/front",
    "hybridcache/adapters/routing": "hybridcache/adapters",
    "hybridcache/lab/results": "hybridcache/lab",
    "hybridcache/policies/eviction": "hybridcache/policies",
}
TESTS |= {room: TESTS[other] for room, other in LIKE.items()}
ALL_CASES = "hybridcache/geometry", "engine/layers", "engine/models"
"""Rooms whose tests run at level "all", because most model families have none at "quick"."""
HOSTS = {"hybridcache.vllm": "out/vllm-0.33", "hybridcache.sglang": "out/sglang"}
"""Folders of the packages that tests of a room need (`make vllm-scheduler sglang`)."""
EXCLUDED = (
    "test_warm_state",
    "test_every_format_is_a_small_file",
    "test_an_error_in_a_custom_policy_is_one_line",
    "test_a_dropped_lock_warns_and_fails_the_check",
    "test_pictures_show_the_present_page",
    "test_the_rebuilt_cache_hits_as_sglang",
    "test_soak_finds_prefixes",
    "test_scheduler_serves_random_requests",
    "test_hits_with_multi_token_prediction",
    "test_decisions_do_not_depend_on_the_hash_seed",
)
"""Slow tests that detect no mutant that other tests do not detect, tests of sources or of lines in
tracebacks, which differ in mutmut's copy, and tests in other processes, whose calls mutmut does not
see."""
CONFIG = """
[tool.mutmut]
source_paths = ["hybridcache", "engine", "kernels"]
only_mutate = {mutated}
do_not_mutate_patterns = ['raise \\w+', 'assert ', 'logger', 'linewidth=']
also_copy = ["tests", "experiments", "docs", "README.md", "Dockerfile", "Dockerfile.cuda"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:xdist", "-p", "no:cacheprovider", "-p", "tests.mutation",
    "--timeout=0", "-k", "{excluded}"]
"""
OPERATORS = """
import libcst as cst
from mutmut import __main__ as mutmut
from mutmut.mutation.mutators import mutation_operators

def deleted(node):
    is_kept = isinstance(node, cst.Assign) and not isinstance(node.targets[0].target, cst.Name)
    is_done = isinstance(node, cst.Expr) and isinstance(node.value, cst.Call | cst.Await)
    if is_kept or is_done or isinstance(node, cst.AugAssign):
        yield cst.Pass()

def num_texts(node):
    values = [one.value for one in getattr(node, "args", [node]) if hasattr(one, "value")]
    quoted = cst.SimpleString | cst.ConcatenatedString | cst.FormattedString
    texts = [one for one in values if isinstance(one, quoted)]
    return sum(" " in cst.Module([]).code_for_node(one) for one in texts)

def keeping_texts(operator):
    return lambda node: (one for one in operator(node) if num_texts(one) >= num_texts(node))

mutation_operators[:] = [
    (kind, keeping_texts(operator) if kind in (cst.Assign, cst.Call) else operator)
    for kind, operator in mutation_operators if kind is not cst.BaseString
] + [(cst.BaseSmallStatement, deleted)]
"""
"""Changes of mutmut's operators: statements are deleted that call a function, or assign to anything
but a name; texts, which are strings with a blank, are neither changed nor taken away."""
RUN = f"""{OPERATORS}
from mutmut.workers import isolation
isolation.ForkRunner.run_clean_tests = lambda runner, tests: 0
mutmut.run_forced_fail_test = lambda runner: None
mutmut.cli()
"""
"""A run of mutmut. It measures the tests, which must pass, and does not run them a second time."""
MAKE = f"""{OPERATORS}
mutmut.set_mutant_under_test("mutant_generation")
mutmut.makedirs("mutants", exist_ok=True)
mutmut.copy_src_dir()
mutmut.copy_also_copy_files()
mutmut.setup_source_paths()
mutmut.store_lines_covered_by_tests()
mutmut.create_mutants(1)
"""
"""The beginning of ``mutmut run``: the mutants and their names, before the tests are measured."""
END_S = 10
"""Seconds in which mutmut must end after an interrupt."""
KILLED = ("killed", "timeout", "caught by type check", "segfault")
NOT_TRIED = "not checked"
SPINNER = re.compile(r"[\u2800-\u28ff] |$")
LAST_LINES = 25
"""Number of lines to print of mutmut's output if it fails."""


class Mutant(NamedTuple):
    """A change of the source that no test detected."""

    function: str
    changes: tuple[str, ...]
    """Lines of the diff, each after ``-`` or ``+``."""

    def __str__(self) -> str:
        return "\n".join((self.function, *self.changes))


def room_of(folder: str, files: list[str]) -> Room:
    """Return the room of a folder of the product: its files with the tests in the same place, or
    of the nearest folder above that has tests."""
    place = Path(folder)
    while str(place) not in TESTS:
        mirrored = str(place).removeprefix("hybridcache/")
        if list((ROOT / "tests" / mirrored).glob("test_*.py")):
            return Room(files, (mirrored,), "quick")
        place = place.parent
    return Room(
        files, tuple(TESTS[str(place)].split()), "all" if str(place) in ALL_CASES else "quick"
    )


def rooms() -> dict[str, Room]:
    """Return the rooms by their folders. Smaller files are first."""
    found: dict[str, list[str]] = {}
    files = {file for pattern in MUTATED for file in ROOT.glob(pattern)}
    for file in sorted(files, key=lambda file: (file.stat().st_size, file)):
        if file.stem not in LEFT.split():
            path = file.relative_to(ROOT)
            found.setdefault(str(path.parent), []).append(str(path))
    return {folder: room_of(folder, found[folder]) for folder in sorted(found)}


def prepare(files: Sequence[str], tests: Sequence[str], work: Path) -> bool:
    """Copy the repository, with mutmut's settings, to ``work``. Keeps earlier results.

    Return whether a file was copied, or removed because the repository does not have it.
    """
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    is_changed = False
    for name in listed.splitlines():
        source, target = ROOT / name, work / name
        is_known = target.exists() and source.is_file()
        if name == "pyproject.toml":  # the copy's has settings of mutmut too
            continue
        if source.is_file() and not (is_known and filecmp.cmp(source, target, shallow=False)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            is_changed = True
    for package in ("hybridcache", "engine", "kernels", "tests", "experiments"):
        for old in {*(work / package).rglob("*.py"), *(work / "mutants" / package).rglob("*.py")}:
            if not (ROOT / old.relative_to(work).as_posix().removeprefix("mutants/")).exists():
                old.unlink()
                is_changed = True
    config = CONFIG.format(
        mutated=list(files),
        tests=[f"tests/{one}" for one in tests],
        excluded=" and ".join(f"not {test}" for test in EXCLUDED),
    )
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + config)
    if is_changed:  # An old test may execute more functions now.
        (work / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    return is_changed


def mutmut(
    work: Path,
    *arguments: str,
    level: str = "quick",
    limit_s: float | None = None,
    quiet: bool = True,
    program: str = RUN,
) -> str:
    """Run mutmut in the copy, for at most ``limit_s`` seconds, and return its output.

    Results of mutants are kept when the time ends.
    """
    environment = {"HYPOTHESIS_PROFILE": "mutate", "OMP_NUM_THREADS": "1"}
    environment["HYBRIDCACHE_TESTS"] = level
    paths = [Path(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = [str(path.resolve()) for path in paths if path.resolve() != ROOT]
    hosts = [str(ROOT / folder) for name, folder in HOSTS.items() if name in work.name]
    path = os.pathsep.join(hosts + kept)
    running = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=work,
        env=os.environ | environment | {"PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )
    try:
        return running.communicate(timeout=limit_s)[0] or ""
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)  # mutmut then ends its own processes.
    try:
        return running.communicate(timeout=END_S)[0] or ""
    except subprocess.TimeoutExpired:
        running.kill()
        return running.communicate()[0] or ""


def outcomes(work: Path) -> dict[str, str]:
    """Map the names of the mutants to their outcomes, or to "not checked"."""
    return dict(re.findall(r"^\s+(\S+): (.+)$", mutmut(work, "results", "--all", "true"), re.M))


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


def judge(title: str, work: Path, found: dict[str, str]) -> int:
    """Print the outcomes of mutants. Return the number of survivors that are not listed."""
    equivalent = set(listed(EQUIVALENT.read_text(encoding="utf-8")))
    tried = {name: status for name, status in found.items() if status != NOT_TRIED}
    survivors = [mutant(work, name) for name, status in tried.items() if status not in KILLED]
    unlisted = [one for one in survivors if one not in equivalent]
    shown = ", ".join(f"{n} {status}" for status, n in Counter(tried.values()).most_common())
    text = "".join(f"\n{one}\n" for one in unlisted) + f"\n{title}: {len(tried)} mutants: {shown}; "
    text += f"{len(survivors) - len(unlisted)} are listed as equivalent."
    if len(tried) < len(found):
        text += f" {len(found) - len(tried)} were not tried."
    print(text, flush=True)
    return len(unlisted)


def again(found: dict[str, str], is_changed: bool) -> list[str]:
    """Return the mutants to try: new ones, and survivors after a change of the repository."""
    wanted = (lambda status: status not in KILLED) if is_changed else NOT_TRIED.__eq__
    return [name for name, status in found.items() if wanted(status)]


def try_file(file: str, room: Room, processes: int) -> int:
    """Mutate one file. Return the number of survivors that are not listed."""
    work = ROOT / "out" / "mutation" / file.removesuffix(".py").replace("/", ".")
    is_changed = prepare([file], room.tests, work)
    before = outcomes(work)
    children = "--max-children", str(processes)
    if is_changed or not before or NOT_TRIED in before.values():
        mutmut(work, "run", *children, level=room.level, quiet=False)
    survived = [name for name, status in before.items() if status not in (*KILLED, NOT_TRIED)]
    if is_changed and survived:
        mutmut(work, "run", *children, *survived, level=room.level, quiet=False)
    found = outcomes(work)
    if not found:
        print(f"{file}: no mutant was tried; see the output of mutmut above.")
        return 1
    return judge(file, work, found)


def draw(files: Sequence[str], count: int, seed: int) -> dict[str, list[float]]:
    """Return places of mutants in files, from 0 to 1, ``count`` in all, in proportion to sizes."""
    random = Random(seed)
    drawn: dict[str, list[float]] = {}
    for file in random.choices(files, [(ROOT / one).stat().st_size for one in files], k=count):
        drawn.setdefault(file, []).append(random.random())
    return drawn


def try_sample(name: str, drawn: dict[str, list[float]], end_s: float) -> int:
    """Try drawn mutants of one room until a time. Return the number of unlisted survivors."""
    work, room = ROOT / "out" / "mutation" / "sample" / name.replace("/", "."), rooms()[name]
    is_changed, output = prepare(list(drawn), room.tests, work), ""
    if is_changed or not outcomes(work):
        output = mutmut(work, program=MAKE)
    known, chosen = outcomes(work), list[str]()
    for file, places in drawn.items():
        start = file.removesuffix(".py").replace("/", ".") + "."
        names = [one for one in known if one.startswith(start) and "." not in one[len(start) :]]
        chosen += [names[int(place * len(names))] for place in places if names]
    wanted = again({one: known[one] for one in chosen}, is_changed)
    for _ in range(2):  # Twice, because mutmut discards all results after a change of the settings.
        if wanted and (left_s := end_s - time.monotonic()) > 0:
            run = "run", "--max-children", "1", *wanted
            output = mutmut(work, *run, level=room.level, limit_s=left_s)
            known = outcomes(work)
            wanted = [one for one in chosen if known[one] == NOT_TRIED]
    is_late = time.monotonic() >= end_s
    if not is_late and (wanted or not chosen):
        lines = [line for line in output.splitlines() if not SPINNER.match(line)]
        print(f"{name}: mutmut failed:\n" + "\n".join(lines[-LAST_LINES:]))
    num_unlisted = judge(name, work, {one: known[one] for one in chosen})
    return num_unlisted if is_late or chosen else 1


def try_samples(count: int, seed: int, end_s: float, processes: int, names: list[str]) -> int:
    """Try mutants of all rooms, a room per process. Return the number of unlisted survivors."""
    print(f"--seed {seed} draws the same mutants again.", flush=True)
    drawn: dict[str, dict[str, list[float]]] = {}
    wanted = [
        file for name, room in rooms().items() if name in names or not names for file in room.files
    ]
    for file, places in draw(wanted, count, seed).items():
        drawn.setdefault(str(Path(file).parent), {})[file] = places
    with ThreadPoolExecutor(processes) as pool:
        return sum(pool.map(lambda name: try_sample(name, drawn[name], end_s), drawn))


def share() -> tuple[dict[str, int], int]:
    """Return the lines of code in each room, and in all Python files of the product."""
    from tests import budget  # imports the engine, which mutants do not need

    counts = {
        name: sum(budget.code_lines(ROOT / file) for file in room.files)
        for name, room in rooms().items()
    }
    files = (file for package in budget.PRODUCT for file in (ROOT / package).rglob("*.py"))
    return counts, sum(map(budget.code_lines, files))


def print_rooms() -> None:
    """Print the lines of code and the tests of each room."""
    counts, total = share()
    for name, room in rooms().items():
        print(f"{counts[name]:7,}  {name}: {' '.join(room.tests)}")
    lines = sum(counts.values())
    print(f"{lines:7,}  of {total:,} lines of the product in Python: {lines / total:.0%}")


def main(arguments: Sequence[str] | None = None) -> int:
    found = rooms()
    room_of_file = {file: room for room in found.values() for file in room.files}
    parser = argparse.ArgumentParser(prog="tests.mutation", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="FILE", help="files, or rooms of --sample (default: all)")
    add("--processes", type=int, default=os.cpu_count())
    add("--sample", type=int, metavar="N", help="try N mutants drawn from all rooms")
    add("--seed", type=int, help="draw of a sample (default: another one each time; it is printed)")
    add("--minutes", type=float, default=10.0, help="limit of a sample (default: 10)")
    add("--list", action="store_true", help="print rooms, their lines of code and their tests")
    options = parser.parse_args(arguments)
    choices = list(room_of_file) if options.sample is None else list(found)
    if unknown := sorted(set(options.names) - set(choices)):
        parser.error(f"{', '.join(unknown)} cannot be mutated; choose from {', '.join(choices)}.")
    if options.list:
        print_rooms()
        return 0
    if options.sample is not None:
        seed = randrange(10**6) if options.seed is None else options.seed
        end_s, processes = time.monotonic() + 60 * options.minutes, options.processes
        unlisted = try_samples(options.sample, seed, end_s, processes, options.names)
    else:
        files = options.names or list(room_of_file)
        unlisted = sum(try_file(file, room_of_file[file], options.processes) for file in files)
    if unlisted:
        print(f"{unlisted} mutants survive that are not listed in {EQUIVALENT.name}.")
    return 1 if unlisted else 0


# --- The plugin ---------------------------------------------------------------------------------

CPU_SECONDS = 5.0
"""Lower bound of the CPU time limit of a test with a mutant."""
CPU_FACTOR = 5.0
"""CPU time limit of a test with a mutant, as a multiple of its usual duration."""
WALL_SECONDS, WALL_FACTOR = 20.0, 15.0
"""The same of the time on the clock, for a test that waits for ever."""
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
    signal.signal(signal.SIGALRM, _stop)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the shortest tests first: the first that fails ends the run."""
    known = config.stash[DURATIONS]
    items.sort(key=lambda item: known.get(item.nodeid, USUAL_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Limit the CPU time of a test. Time on the clock depends on the load of the machine."""
    usual = item.config.stash[DURATIONS].get(item.nodeid, USUAL_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, max(CPU_SECONDS, CPU_FACTOR * usual))
    signal.setitimer(signal.ITIMER_REAL, max(WALL_SECONDS, WALL_FACTOR * usual))
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    raise SystemExit(main())
