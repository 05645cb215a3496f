"""Mutation tests of half of the product; fail if an unlisted mutant survives.

python -m tests.mutation [FILE ...]         or `make mutate MUTANTS=FILE`
python -m tests.mutation --sample 200       that many mutants of all groups, for at most 10 minutes
python -m tests.mutation --list             lines, files and tests of each group

mutmut changes one expression at a time, in a copy of the repository, and runs the tests that
execute it. Each file has a separate copy in ``out/mutation``, so that mutmut slows down only the
functions of that file. A run continues where the last one stopped. After a change of the repository
the tests are measured again, and survivors are tried again with the tests that execute them now.

A sample has one copy per group. Its mutants depend on the sources only, so it also continues.

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


class Group(NamedTuple):
    """Files to mutate, and the tests that must detect the mutants."""

    mutated: tuple[str, ...]
    tests: tuple[str, ...]
    """Folders and files of ``tests``."""
    level: str = "quick"
    """Level of the tests (``selection.level``). At "quick" most model families have none."""


SERVER = "engine/front/server"
CALLS = f"{SERVER}/tool_calls", f"{SERVER}/test_tools.py"
DRAFTS = "engine/plugins/speculation"
RUNNER = "devices graphs head_loading memory running_states verify"
MATRICES = "blocks eight_bits formats grouped groups int8 words"
GROUPS = {
    "cache": Group(
        ("hybridcache/radix/*", "hybridcache/allocators/*"),
        (
            *("allocators", "radix", "adapters/test_events.py", "adapters/test_events_machine.py"),
            "policies/test_promises.py",
        ),
    ),
    "requests": Group(
        ("hybridcache/radix/lease.py", "hybridcache/scheduling/*", "engine/schedule/scheduler.py"),
        (
            *("radix/test_lease.py", "radix/test_lease_machine.py", "radix/test_arena.py"),
            *("radix/test_tiers.py", "radix/test_refusals.py", "scheduling", "engine/schedule"),
            *("policies/test_failing.py", "lab/runs/test_closed_loop.py"),
            *("engine/plugins/speculation/test_drafts.py", "engine/test_failing_alone.py"),
        ),
    ),
    # A file's last group counts. These tests are enough: a minute instead of ten.
    "near": Group(("hybridcache/allocators/pools.py",), ("allocators", "radix/test_arena.py")),
    "policies": Group(
        ("hybridcache/policies/*", "hybridcache/policies/eviction/*"),
        (
            *("policies", "radix/test_rules.py", "radix/test_ghosts_above.py"),
            *("radix/test_span.py", "engine/test_policy_state.py", "lab/rivals/test_textbook.py"),
        ),
    ),
    "learned state": Group(
        ("hybridcache/radix/warm_state.py",),
        (
            *("engine/test_policy_state.py", "policies/test_regret.py"),
            *("radix/test_lease.py", "radix/test_operations.py"),
        ),
    ),
    "adapters": Group(
        ("hybridcache/adapters/*", "hybridcache/adapters/*/*"),
        ("adapters", "lab/runs/test_fleet.py"),
    ),
    "SGLang": Group(("hybridcache/sglang/*",), ("sglang",)),
    "geometry": Group(
        ("hybridcache/geometry/*", "hybridcache/geometry/families/*"),
        (
            *("geometry", "engine/models/test_published_configs.py", "test_doctests.py"),
            "engine/test_checkpoint_dtype.py",
        ),
        level="all",
    ),
    "GGUF": Group(
        ("hybridcache/geometry/gguf*", "engine/weights/gguf*"),
        tuple(f"engine/weights/test_{name}.py" for name in ("gguf", "gguf_files", "weights")),
    ),
    "simulator": Group(
        ("hybridcache/lab/*", "hybridcache/lab/r*/*", "hybridcache/lab/board/*"),
        (
            *("lab/test_cli.py", "lab/board", "lab/runs", "lab/traces/test_generators.py"),
            *("lab/traces/test_intervals.py", "lab/rivals/test_optimum.py", "geometry"),
        ),
    ),
    "traces": Group(("hybridcache/lab/traces/**/*",), ("lab/traces",)),
    "vLLM": Group(("hybridcache/vllm/*",), ("vllm",)),
    "rebuilt systems": Group(("hybridcache/lab/rivals/*",), ("lab/rivals",)),
    "answers": Group(
        ("engine/text/answers.py", "engine/text/bounded.py"),
        ("engine/text/test_outputs.py", "engine/requests/test_thoughts.py", *CALLS),
    ),
    "chat prompt": Group(
        ("engine/front/chat_prompt.py", "engine/text/sandbox.py", "hybridcache/adapters/client*"),
        (
            *("engine/front/test_templates.py", f"{SERVER}/endpoints/test_labelled.py"),
            *(f"{SERVER}/test_tenants.py", f"{SERVER}/test_dialects.py"),
            *(f"{SERVER}/endpoints/test_messages.py", "lab/traces/test_texts.py"),
        ),
    ),
    "tool calls": Group(("engine/front/server/tool_calls/*",), CALLS),
    "texts": Group(
        ("engine/text/tokenizer.py", "engine/text/gguf_tokenizer.py", "engine/text/grammar.py"),
        (
            *("engine/text/test_tokenizer.py", "engine/plugins/guided"),
            f"{SERVER}/tool_calls/test_strict_tools.py",
        ),
    ),
    "weights": Group(
        ("engine/weights/[!g]*",),
        (
            *("engine/runner/test_head_loading.py", "engine/runner/test_fused.py"),
            *(f"engine/weights/test_{name}.py" for name in ("hub", "weights", "ranks")),
            *("engine/weights/forms", "engine/plugins/tiers/test_records.py"),
        ),
    ),
    "weight forms": Group(
        ("engine/weights/forms/*", "engine/weights/scheme.py"),
        ("engine/weights/forms", "engine/front/command/test_convert.py"),
    ),
    "formats of matrices": Group(
        tuple(f"kernels/linear/{name}.py" for name in MATRICES.split()),
        ("kernels/linear", "engine/weights/forms"),
    ),
    "runner": Group(
        ("engine/runner/*",),
        (
            *("engine/test_engine.py", "engine/plugins/speculation/test_head_drafts.py"),
            *(f"engine/runner/test_{name}.py" for name in RUNNER.split()),
        ),
    ),
    "samplers": Group(
        ("engine/runner/sampler.py", "engine/requests/*"),
        (
            *("engine/runner/test_sampler.py", "engine/requests", "engine/text/test_outputs.py"),
            *("engine/plugins/speculation/test_drafts.py", "engine/schedule/test_batch.py"),
            "engine/schedule/test_scheduler_machine.py",
        ),
    ),
    "drafts": Group((f"{DRAFTS}/*", "engine/schedule/drafting.py"), (DRAFTS,)),
    "stores": Group(("engine/plugins/tiers/*",), ("engine/plugins/tiers",)),
    "layers": Group(
        ("engine/layers/*", "engine/models/*"),
        (
            *("engine/models/test_parity.py", "engine/plugins/speculation/test_head_drafts.py"),
            # The other tests of this file take minutes at level "all".
            "engine/runner/test_fused.py::test_rows_quantised_by_norms_and_experts_change_no_bit",
        ),
        level="all",
    ),
    "engine": Group(
        ("engine/config.py", "engine/core.py", "engine/engine.py", "engine/messages.py"),
        (
            *("engine/test_engine.py", "engine/schedule/test_schedule.py"),
            *("engine/test_failing_alone.py", "engine/test_plugins.py"),
            *("engine/front/test_async_engine.py", "engine/runner/test_memory.py"),
            *(f"engine/plugins/disaggregation/test_{name}.py" for name in ("loading", "transfers")),
        ),
    ),
    "server": Group(
        (
            *("engine/front/async_engine.py", "engine/front/cache_watch.py"),
            *("engine/front/server/*", "engine/front/server/endpoints/*"),
        ),
        (*(SERVER, "engine/front/test_async_engine.py", "adapters/watch/test_page.py"),),
    ),
}
EXCLUDED = (
    "test_warm_state",
    "test_every_format_is_a_small_file",
    "test_an_error_in_a_custom_policy_is_one_line",
    "test_a_dropped_lock_warns_and_fails_the_check",
    "test_pictures_show_the_present_page",
)
"""Slow tests that detect no mutant that other tests do not detect, and tests of sources or of lines
in tracebacks, which differ in mutmut's copy."""
CONFIG = """
[tool.mutmut]
source_paths = ["hybridcache", "engine", "kernels"]
only_mutate = {mutated}
do_not_mutate_patterns = ['raise \\w+', 'assert ', 'logger']
also_copy = ["tests", "experiments", "docs", "README.md"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:xdist", "-p", "no:cacheprovider", "-p", "tests.mutation",
    "--timeout=0", "-k", "{excluded}"]
"""
MAKE = """
from mutmut import __main__ as mutmut
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


def files_of(group: Group) -> list[str]:
    """Return the files to mutate, smallest first."""
    files = [file for pattern in group.mutated for file in ROOT.glob(pattern)]
    wanted = [file for file in files if file.suffix == ".py" and file.stem != "__init__"]
    return [str(file.relative_to(ROOT)) for file in sorted(wanted, key=lambda f: f.stat().st_size)]


def groups_of_files() -> dict[str, str]:
    """Return the name of the group of each file to mutate."""
    return {file: name for name, group in GROUPS.items() for file in files_of(group)}


def prepare(files: Sequence[str], tests: Sequence[str], work: Path) -> bool:
    """Copy the repository, with mutmut's settings, to ``work``. Keeps earlier results.

    Return whether a file was copied.
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
    options: Sequence[str] = ("-m", "mutmut"),
) -> str:
    """Run mutmut in the copy, for at most ``limit_s`` seconds, and return its output.

    Results of mutants are kept when the time ends.
    """
    environment = {"HYPOTHESIS_PROFILE": "mutate", "OMP_NUM_THREADS": "1"}
    environment["HYBRIDCACHE_TESTS"] = level
    paths = [Path(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = os.pathsep.join(str(path.resolve()) for path in paths if path.resolve() != ROOT)
    running = subprocess.Popen(
        [sys.executable, *options, *arguments],
        cwd=work,
        env=os.environ | environment | {"PYTHONPATH": kept},
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


def try_file(file: str, group: Group, processes: int) -> int:
    """Mutate one file. Return the number of survivors that are not listed."""
    work = ROOT / "out" / "mutation" / file.removesuffix(".py").replace("/", ".")
    is_changed = prepare([file], group.tests, work)
    before = outcomes(work)
    children = "--max-children", str(processes)
    if is_changed or not before or NOT_TRIED in before.values():
        mutmut(work, "run", *children, level=group.level, quiet=False)
    survived = [name for name, status in before.items() if status not in (*KILLED, NOT_TRIED)]
    if is_changed and survived:
        mutmut(work, "run", *children, *survived, level=group.level, quiet=False)
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
    """Try drawn mutants of one group until a time. Return the number of unlisted survivors."""
    work, group = ROOT / "out" / "mutation" / "sample" / re.sub(r"\W", "_", name), GROUPS[name]
    is_changed, output = prepare(list(drawn), group.tests, work), ""
    if is_changed or not outcomes(work):
        output = mutmut(work, options=("-c", MAKE))
    known, chosen = outcomes(work), list[str]()
    for file, places in drawn.items():
        start = file.removesuffix(".py").replace("/", ".") + "."
        names = [one for one in known if one.startswith(start) and "." not in one[len(start) :]]
        chosen += [names[int(place * len(names))] for place in places if names]
    wanted = again({one: known[one] for one in chosen}, is_changed)
    for _ in range(2):  # Twice, because mutmut discards all results after a change of the settings.
        if wanted and (left_s := end_s - time.monotonic()) > 0:
            run = "run", "--max-children", "1", *wanted
            output = mutmut(work, *run, level=group.level, limit_s=left_s)
            known = outcomes(work)
            wanted = [one for one in chosen if known[one] == NOT_TRIED]
    is_late = time.monotonic() >= end_s
    if not is_late and (wanted or not chosen):
        lines = [line for line in output.splitlines() if not SPINNER.match(line)]
        print(f"{name}: mutmut failed:\n" + "\n".join(lines[-LAST_LINES:]))
    num_unlisted = judge(name, work, {one: known[one] for one in chosen})
    return num_unlisted if is_late or chosen else 1


def try_samples(count: int, seed: int, end_s: float, processes: int, names: list[str]) -> int:
    """Try mutants of all groups, a group per process. Return the number of unlisted survivors."""
    print(f"--seed {seed} draws the same mutants again.", flush=True)
    groups = groups_of_files()
    drawn: dict[str, dict[str, list[float]]] = {}
    for file, places in draw(list(groups), count, seed).items():
        drawn.setdefault(groups[file], {})[file] = places
    chosen = [name for name in drawn if not names or name in names]
    with ThreadPoolExecutor(processes) as pool:
        return sum(pool.map(lambda name: try_sample(name, drawn[name], end_s), chosen))


def print_groups() -> None:
    """Print the lines of code that each group mutates, and their share of the product's."""
    from tests import budget  # imports the engine, which mutants do not need

    counts = Counter[str]()
    for file, name in groups_of_files().items():
        counts[name] += budget.code_lines(ROOT / file)
    for name, lines in counts.items():
        print(f"{lines:7,}  {name}: {' '.join(GROUPS[name].mutated)}")
        print(f"         tests: {' '.join(GROUPS[name].tests)}")
    total = budget.num_lines()["lines of the product"]
    print(f"{counts.total():7,}  of {total:,} lines of the product: {counts.total() / total:.0%}")


def main(arguments: Sequence[str] | None = None) -> int:
    groups = groups_of_files()
    parser = argparse.ArgumentParser(prog="tests.mutation", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="FILE", help="files, or groups of --sample (default: all)")
    add("--processes", type=int, default=os.cpu_count())
    add("--sample", type=int, metavar="N", help="try N mutants drawn from all groups")
    add("--seed", type=int, help="draw of a sample (default: another one each time; it is printed)")
    add("--minutes", type=float, default=10.0, help="limit of a sample (default: 10)")
    add("--list", action="store_true", help="print groups, their lines of code, files and tests")
    options = parser.parse_args(arguments)
    choices = list(groups) if options.sample is None else list(GROUPS)
    if unknown := sorted(set(options.names) - set(choices)):
        parser.error(f"{', '.join(unknown)} cannot be mutated; choose from {', '.join(choices)}.")
    if options.list:
        print_groups()
        return 0
    if options.sample is not None:
        seed = randrange(10**6) if options.seed is None else options.seed
        end_s, processes = time.monotonic() + 60 * options.minutes, options.processes
        unlisted = try_samples(options.sample, seed, end_s, processes, options.names)
    else:
        files = options.names or list(groups)
        unlisted = sum(try_file(file, GROUPS[groups[file]], options.processes) for file in files)
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
