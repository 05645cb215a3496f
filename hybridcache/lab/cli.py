"""``hybridcache``: traces, simulations, the optimum and both rankings on the command line."""

from __future__ import annotations

import argparse
import csv
import gzip
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from hybridcache.command.extras import how_to_install, version
from hybridcache.command.parser import Parser, with_flags
from hybridcache.command.signals import end_by_exception, prepare_streams, printed_warnings
from hybridcache.geometry.gguf import said_of
from hybridcache.geometry.units import counted
from hybridcache.lab.board import Board, Split, board
from hybridcache.lab.results.figures import (
    closed_loop_figure,
    figure_path,
    losses_figure,
    sweep_figure,
)
from hybridcache.lab.results.report import METRICS, find_metric, losses_table, stats_table
from hybridcache.lab.results.result import RequestRecord
from hybridcache.lab.runs.closed_loop import ClosedLoopResult, closed_loop
from hybridcache.lab.runs.grid import collect_seldom
from hybridcache.lab.runs.simulate import SimulationResult, optimum, simulate
from hybridcache.lab.scenario import (
    LOAD,
    MEMORY,
    MOST_USED,
    TIERS,
    Scenario,
    Settings,
    named_policies,
    settings_of,
)
from hybridcache.lab.traces import open_trace
from hybridcache.lab.traces.frame import written
from hybridcache.lab.traces.own import write_own
from hybridcache.lab.traces.progress import shown_progress
from hybridcache.lab.traces.statistics import trace_stats
from hybridcache.lab.traces.trace import Trace
from hybridcache.policies.registry import make_admission, split_specs

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 if it did its work, 1 if some of its runs failed, 2 if the request
    was impossible or all runs failed, 130 if it was stopped by SIGINT, and 143 by SIGTERM."""
    if arguments is None:
        prepare_streams()
        end_by_exception(signal.SIGINT)
        signal.signal(signal.SIGTERM, _terminate)
    options = argparse.Namespace()
    try:
        _parser().parse_args(arguments, options)
        run: Command = options.run
        if arguments is None:  # only as the main program of a process
            collect_seldom()
        with printed_warnings("hybridcache"):
            code = run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe
        return 0
    except KeyboardInterrupt as interrupt:
        return _stopped(options, interrupt)
    except (ValueError, KeyError, ModuleNotFoundError, OSError, MemoryError) as error:
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
            if isinstance(cause, KeyboardInterrupt):  # A request that it cut could not be ended.
                return _stopped(options, cause)
        said = with_flags(_sentence(error), (one.name for one in fields(Scenario)))
        print(f"hybridcache: {said}", file=sys.stderr)
        return 2


class _Terminated(KeyboardInterrupt):
    """SIGTERM. It cleans up as Ctrl-C does, and no policy's error handler takes it for an exit."""

    number = signal.SIGTERM


def _terminate(*_: object) -> None:
    raise _Terminated


def _stopped(options: argparse.Namespace, interrupt: KeyboardInterrupt) -> int:
    """Say what an interrupted command has kept, and return its exit status."""
    kept = getattr(options, "output", None)
    is_kept = kept is not None and kept.exists()
    done = f"what was done is in {kept}"
    if getattr(options, "goes_on", False):
        done += ", and the same command goes on from there"
    print(f"hybridcache: stopped; {done if is_kept else 'nothing is kept'}", file=sys.stderr)
    return 128 + getattr(interrupt, "number", signal.SIGINT)


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"this host has too little memory for it ({error})".removesuffix(" ()")
    if isinstance(error, ModuleNotFoundError):
        return how_to_install(error, "lab")
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else said_of(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hybridcache", description="A laboratory for prefix caches of hybrid LLMs."
    )
    parser.add_argument("--version", action="version", version=f"hybridcache {version()}")
    commands = parser.add_subparsers(title="commands", required=True)
    for add in (add_trace, add_simulate, add_optimum, add_benchmark, add_leaderboard):
        add(commands)
    return parser


# --- Options of several commands ------------------------------------------------------------------


TRACE_HELP = (
    "[word:]file[?option=value&...], or a generator: chat, few-shot, agent, branch, resend, short, "
    "conversations, sharegpt-like ..."
)


OF_THE_ENGINE = {
    "--placement": "write --checkpoints",
    "--eviction": "write --policy, the name of `engine serve --eviction` here",
    "--cache-gib": "write --gib, the name of `engine serve --cache-gib` here",
}
"""Flags of ``engine serve`` that have another name in the laboratory."""
Option = dict[str, Any]
FILE: Option = {"type": Path, "metavar": "FILE"}
PROCESSES: Option = {"type": int, "default": 1, "metavar": "N"}
PROCESSES["help"] = "runs at the same time; changes no result"
SKIP_BAD: Option = {"action": "store_true", "help": "skip and count records that cannot be read"}
"""Options of more than one command that are no settings of a scenario."""


def add_command(
    commands: Commands,
    name: str,
    help: str,
    run: Command,
    *,
    input_flag: str = "",
    **defaults: object,
) -> Parser:
    """Add and return the parser of a command."""
    parser = commands.add_parser(name, help=help, input_flag=input_flag)
    parser.set_defaults(run=run, parser=parser, **defaults)
    return parser


def add_settings(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add flags for fields of ``Scenario``, without defaults."""
    known = {one.name: one for one in fields(Scenario)}
    for name in names:
        facts = known[name].metadata
        help = facts["help"]
        if facts["names"] is not None:
            help += f": {', '.join(facts['names']())}"
        default = known[name].default
        usual = ",".join(default) if isinstance(default, tuple) else default
        if not (usual in (None, "", 0.0) or usual is True or "default" in help):
            help += f" (default {usual:g})" if isinstance(usual, float) else f" (default {usual})"
        flag = dict(facts["flag"])
        kind = {"int": int, "float": float}.get(str(known[name].type).removesuffix(" | None"))
        if isinstance(default, bool):
            flag["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif kind is not None:
            flag |= {"type": kind, "metavar": "N" if kind is int else "X"}
        elif "choices" not in flag:
            flag.setdefault("metavar", "TEXT")
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=help.replace("%", "%%"),
            **flag,
        )


def given_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of a scenario that were given as flags."""
    names = {one.name for one in fields(Scenario)} - {"trace"}
    return {name: value for name, value in vars(options).items() if name in names}


def opened(spec: str, options: argparse.Namespace) -> Trace:
    """Open the trace. With ``--skip-bad`` it is read once more, to report how many records are
    bad. ValueError if all are."""
    trace = open_trace(spec, skip_bad=options.skip_bad)
    if options.skip_bad:
        num_requests = sum(1 for _ in trace)
        if not num_requests:
            raise ValueError(f"{spec}: {trace.is_empty_because}")
        found = counted(num_requests, "request")
        print(f"{spec}: {found}, {trace.bad.left_out()}", file=sys.stderr)
    return trace


# --- Traces ---------------------------------------------------------------------------------------


def add_trace(commands: Commands) -> None:
    trace = commands.add_parser("trace", help="look at a trace, or rewrite it")
    verbs = trace.add_subparsers(title="verbs", required=True)
    text = "requests, lengths, ideal hit rate, reuse"
    stats = add_command(verbs, "stats", text, _trace_stats)
    stats.add_argument("trace", help=TRACE_HELP)
    stats.add_argument("--skip-bad", **SKIP_BAD)
    convert = add_command(
        verbs, "convert", "write any trace in this project's own form", _trace_convert
    )
    convert.add_argument("trace", help=TRACE_HELP)
    convert.add_argument("target", type=Path, metavar="output", help="new file to write")
    convert.add_argument("--skip-bad", **SKIP_BAD)


def _trace_stats(options: argparse.Namespace) -> int:
    trace = open_trace(options.trace, skip_bad=options.skip_bad)
    with shown_progress(None, "requests") as show:
        stats = trace_stats(trace, progress=lambda done: show(done, 0))
    if trace.bad.count:
        print(f"{options.trace}: {trace.bad.left_out()}", file=sys.stderr)
    print(stats_table(stats))
    return 0


def _trace_convert(options: argparse.Namespace) -> int:
    trace = open_trace(options.trace, skip_bad=options.skip_bad)
    target = options.target
    if target.is_file():
        raise ValueError(f"{target}: the file exists: remove it, or name another")
    with _new_file(target) as file:
        num_requests = write_own(trace, file)
        if not num_requests:
            raise ValueError(f"{options.trace}: {trace.is_empty_because}")
    found, bad = counted(num_requests, "request"), trace.bad.left_out()
    screen = sys.stdout if target.is_file() else sys.stderr  # The target may be standard output.
    print(f"{found} to {target}, {bad}", file=screen)
    return 0


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """Open a file for text, compressed with the ending ``.gz``. A new one is removed if writing
    fails. Pipes and devices are written too."""
    opens = gzip.open if path.suffix == ".gz" else open
    with written(path), opens(path, "wt", encoding="utf-8") as file:
        yield cast("TextIO", file)


# --- Simulations ----------------------------------------------------------------------------------


def add_simulate(commands: Commands) -> None:
    """Add the command's parser. Its settings are the fields of ``Scenario``."""
    text = "replay a trace through caches of many sizes"
    parser = add_command(commands, "simulate", text, _simulate, input_flag="--trace", goes_on=True)
    parser.foreign = OF_THE_ENGINE
    group = parser.add_argument_group(MOST_USED)
    add = group.add_argument
    add("--trace", action="append", help=TRACE_HELP + "; may be repeated")
    add_settings(group, *settings_of(MOST_USED))
    add("--figure", **FILE, help="PNG, SVG or PDF to draw; losses get a file next to it")
    add("--output", **FILE, help="JSON lines, one per run; a repeated command continues")
    text = "CSV of each request of each run; the first policy is compared with the others"
    add("--requests", **FILE, help=text)
    add("--scenario", **FILE, help="TOML file of settings; flags replace those of the file")
    add("--write-scenario", **FILE, help="new TOML file for the settings; nothing is run")
    add("--processes", **PROCESSES)
    add("--ray", metavar="ADDRESS", help="Ray cluster for the runs (auto: this machine's)")
    group = parser.add_argument_group("results")
    add = group.add_argument
    add_settings(group, *settings_of("results"))
    add(
        "--bound",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also simulate an infinite cache",
    )
    add(
        "--optimum",
        action="store_true",
        help="also compute a plan with hindsight and an upper bound at each size",
    )
    known = ", ".join(METRICS)
    help = f"metrics of tables and figure, joined by commas: {known}"
    add("--metric", default="hit", metavar="NAMES", help=help)
    add("--losses", action="store_true", help="also print the tokens by loss cause")
    add("--skip-bad", **SKIP_BAD)
    add_settings(parser.add_argument_group(MEMORY), *settings_of(MEMORY))
    add_settings(parser.add_argument_group(TIERS), *settings_of(TIERS))
    group = parser.add_argument_group(LOAD)
    group.add_argument(
        "--closed-loop",
        action="store_true",
        help="sessions arrive at a rate, and each request follows the answer and the pause before "
        "it; requests are scheduled as in the engine",
    )
    add_settings(group, *settings_of(LOAD))


ALONE = ("optimum", "losses", "metric", "bound", "requests")
"""Options of replays alone that are no settings."""


def _scenarios(options: argparse.Namespace) -> list[Scenario]:
    """Return a scenario per trace, from the file and the flags."""
    given = given_settings(options)
    base = Scenario.load(options.scenario) if options.scenario else None
    specs = options.trace or ([] if base is None else [base.trace])
    if not specs:
        options.parser.error("the following arguments are required: --trace")
    return [Scenario.of(replace(base, trace=spec) if base else spec, given) for spec in specs]


def _simulate(options: argparse.Namespace) -> int:
    """Replay every trace, or serve it in closed loop, and print tables."""
    scenarios = _scenarios(options)
    if options.write_scenario:
        return _write_scenario(options, scenarios)
    metrics = options.metric.split(",")
    for name in ALONE if options.closed_loop else ():
        if getattr(options, name) != options.parser.get_default(name):
            raise ValueError(f"--{name} is not recorded with --closed-loop: leave it out")
    for word in metrics:
        find_metric(word)
    if "optimum" in metrics and not options.optimum:
        raise ValueError("--metric optimum needs a plan: add --optimum")
    if options.figure:
        figure_path(options.figure)
    place = {"processes": options.processes, "ray": options.ray, "resume_from": options.output}
    replayed, served = list[SimulationResult](), list[ClosedLoopResult]()
    drawn: list[Path] = []
    traces = [opened(str(scenario.trace), options) for scenario in scenarios]
    for scenario, trace in zip(scenarios, traces, strict=True):
        asked = replace(scenario, trace=trace, by_request=options.requests is not None)
        if options.closed_loop:
            served.append(closed_loop(asked, **place))
            texts = [served[-1].table()]
        else:
            result = simulate(asked, bound=options.bound, optimum=options.optimum, **place)
            replayed.append(result)
            losses = losses_table(result.runs) if options.losses else ""
            path = Path(str(asked.model))  # the engine reads the folder of a config.json
            folder = path.parent if path.name == "config.json" else path
            model = shlex.quote(str(folder)) if folder.exists() else ""
            texts = [result.table(metrics), losses, result.verdict(model)]
            texts += _compared(result) if options.requests else []
        if options.figure:  # before anything is printed: a pipe that reads it may close early
            drawn = _draw(replayed, served, options, metrics)
        for text in filter(None, texts):
            print(text, end="\n\n")
    for path in drawn:
        print(f"figure: {path}")
    if options.requests:
        _write_requests(options.requests, replayed)
    failures = [one.failures for one in replayed] + [one.failures for one in served]
    return 1 if any(failures) else 0


def _compared(result: SimulationResult) -> list[str]:
    """Return the differences between the first competitor and the others, by size, or the reason
    why there are none."""
    if len(result) and result[0].draws:
        return ["no differences by request: each draw has other requests; leave out --seeds"]
    first, *others = result.by_label().values()
    pairs = [pair for runs in others for pair in product(first, runs) if pair[0].by_request]
    return [one.compare(two).table() for one, two in pairs if one.gib == two.gib]


def _write_requests(path: Path, results: Sequence[SimulationResult]) -> None:
    """Write the requests of all runs."""
    runs = [run for result in results for merged in result for run in merged.draws or (merged,)]
    with written(path), path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trace", "run", "gib", *RequestRecord._fields])
        for run in runs:
            facts = run.config["trace"], run.label, run.gib
            writer.writerows([*facts, *row] for row in run.by_request or ())
    print(f"requests: {path}")


def _write_scenario(options: argparse.Namespace, scenarios: Sequence[Scenario]) -> int:
    """Write the settings to a new file."""
    path: Path = options.write_scenario
    if len(scenarios) > 1:
        raise ValueError("--write-scenario writes the settings of one trace: name one")
    if path.exists():
        raise ValueError(f"--write-scenario {path}: the file exists: remove it, or name another")
    [scenario] = scenarios
    opened(str(scenario.trace), options)  # Raises ValueError for unknown names, as the next lines.
    scenario.competitors()
    for admission in named_policies(scenario.admission, split=True):
        make_admission(admission)
    with written(path):
        path.write_text(scenario.to_toml(), encoding="utf-8")
    print(f"scenario: {path}")
    return 0


def _draw(
    replayed: Sequence[SimulationResult],
    served: Sequence[ClosedLoopResult],
    options: argparse.Namespace,
    metrics: Sequence[str],
) -> list[Path]:
    """Draw the figures that were asked for, of the traces so far."""
    path: Path = options.figure
    if options.closed_loop:
        closed_loop_figure([run for result in served for run in result.runs], path)
        return [path]
    sweep_figure(replayed, path, metrics)
    if not options.losses:
        return [path]
    losses_path = path.with_name(f"{path.stem}-losses{path.suffix}")
    losses_figure(replayed, losses_path)
    return [path, losses_path]


# --- Optimum --------------------------------------------------------------------------------------


def add_optimum(commands: Commands) -> None:
    text = "a plan that knows all requests, and a bound that no cache exceeds"
    parser = add_command(commands, "optimum", text, _optimum)
    add = parser.add_argument
    add("--trace", type=str, required=True, help=TRACE_HELP)
    add("--skip-bad", **SKIP_BAD)
    add_settings(parser, "model", "gib", "state_dtype", "grid")


def _optimum(options: argparse.Namespace) -> int:
    print(optimum(Scenario(opened(options.trace, options), **given_settings(options))).table())
    return 0


# --- Boards ---------------------------------------------------------------------------------------


def add_benchmark(commands: Commands) -> None:
    text = "your policy on the frozen benchmark, next to rebuilt systems and the upper bound"
    parser = add_command(commands, "benchmark", text, _board, goes_on=True, built_in=None)
    parser.set_defaults(split="benchmark", results=None)
    parser.foreign = OF_THE_ENGINE
    add = parser.add_argument
    help = "module:Class of an eviction policy, or eviction@placement; may be repeated"
    add("--policy", action="append", default=[], metavar="POLICY", help=help, dest="policies")
    add("--quick", action="store_true", help="three traces with one seed: 2 min of CPU time")
    add("--data", type=Path, metavar="FOLDER", help="files that are not part of the package")
    _add_board(parser, "five")


def add_leaderboard(commands: Commands) -> None:
    text = "your policy against every built-in one on the evaluation split"
    parser = add_command(commands, "leaderboard", text, _board, goes_on=True)
    parser.set_defaults(quick=False, data=None)
    parser.foreign = {"--policy": "write the policy without a flag"}
    add = parser.add_argument
    add(
        "policies",
        nargs="*",
        metavar="POLICY",
        help="module:Class of an eviction policy, or eviction@placement",
    )
    add("--built-in", metavar="NAMES", help="built-in evictions, commas between (default: all)")
    add("--split", **FILE | {"default": "evaluation"}, help="another split (default: evaluation)")
    help = "rank the systems in these files of --json instead; nothing is run"
    add("--results", nargs="+", **FILE, help=help)
    _add_board(parser, "ten")


def _add_board(parser: Parser, num_seeds: str) -> None:
    """Add the flags that both boards have."""
    add = parser.add_argument
    add("--seeds", type=int, metavar="N", help=f"only the first N seeds (default: all {num_seeds})")
    add("--processes", **PROCESSES)
    add("--json", **FILE, help="new JSON file of all figures, which `leaderboard --results` reads")
    add("--output", **FILE, help="JSON lines of finished runs; a repeated command continues")


def _board(options: argparse.Namespace) -> int:
    if options.results:
        print(Board.read(*options.results).table())
        return 0
    if options.json and options.json.exists():
        raise ValueError(f"--json {options.json}: the file exists: remove it, or name another")
    named = options.built_in
    found = board(
        tuple(filter(None, split_specs(",".join(options.policies)))),
        Split.load(options.split),
        built_in=None if named is None else tuple(filter(None, split_specs(named))),
        quick=options.quick,
        seeds=options.seeds,
        data=options.data,
        processes=options.processes,
        resume_from=options.output,
    )
    print(found.table())
    if options.json:
        found.write(options.json)
        print(f"results: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
