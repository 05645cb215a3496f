"""``hybridcache``: traces, simulations, the optimum and advice on the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcache.build import GRID
from hybridcache.extras import how_to_install
from hybridcache.lab.defaults import GIB_SPEC, LIMIT_S, MODEL, RELATIVE_GAP

if TYPE_CHECKING:
    from hybridcache.lab.simulation.simulate import SimulationResult
    from hybridcache.lab.trace import Trace

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did its work, 2 when it was asked for something impossible, 130
    when it was stopped."""
    options = _parser().parse_args(arguments)
    run: Command = options.run
    try:
        if arguments is None:  # a process of our own, not somebody's call
            from hybridcache.lab.simulation.sweep import collect_seldom

            collect_seldom()
        code = run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough; what is left goes nowhere, at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        kept = getattr(options, "output", None)
        is_kept = kept is not None and kept.exists()
        done = f"what was done is in {kept}, and the same command goes on from there"
        if options.run is not _simulate:
            done = f"what was done is in {kept}"
        print(f"hybridcache: stopped; {done if is_kept else 'nothing is kept'}", file=sys.stderr)
        return 130
    except (ValueError, KeyError, ModuleNotFoundError, OSError, MemoryError) as error:
        print(f"hybridcache: {_sentence(error)}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"this host has too little memory for it ({error})"
    if isinstance(error, ModuleNotFoundError):
        return how_to_install(error)
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hybridcache", description="A laboratory for prefix caches of hybrid LLMs."
    )
    commands = parser.add_subparsers(title="commands", required=True)
    _add_trace(commands)
    _add_simulate(commands)
    _add_optimum(commands)
    _add_advise(commands)
    return parser


_TRACE_HELP = (
    "[word:]file[?option=value&...], or a generator: chat, few-shot, agent, branch, resend, short, "
    "conversations, sharegpt-like ..."
)


_SHARED: dict[str, dict[str, Any]] = {
    "--trace": {"required": True, "help": _TRACE_HELP},
    "--model": {"default": MODEL, "help": "a preset's name, or the path of a config.json"},
    "--gib": {"default": GIB_SPEC, "help": "memory: low:high:points (log-spaced), or a,b,c"},
    "--grid": {
        "type": int,
        "default": GRID,
        "help": "positions of checkpoints are its multiples, tokens",
    },
    "--state-dtype": {
        "help": "precision of states: float32, bfloat16, int8 (default: the model's own)"
    },
    "--checkpoint-dtype": {
        "default": "auto",
        "help": "of checkpoints alone: bfloat16, int8 or fp8, the last two with :head, :row or "
        ":column; running states then lie beside the memory (default: as states are)",
    },
    "--servers": {"type": int, "default": 1, "help": "prefills at the same time, for the TTFT"},
    "--times": {"help": "file of measured prefill times; default: a roofline of H100s"},
    "--processes": {"type": int, "default": 1, "help": "runs at the same time; changes no result"},
    "--ray": {
        "help": "spread the runs over the Ray cluster at this address (auto: this machine's)"
    },
    "--skip-bad": {"action": "store_true", "help": "count records that can not be read"},
}
"""Options of more than one command."""


def _share(parser: argparse.ArgumentParser, *flags: str) -> None:
    for flag in flags:
        parser.add_argument(flag, **_SHARED[flag])


def _add_tiers(parser: argparse.ArgumentParser) -> None:
    from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S

    for word, rate in (("host", PCIE_BYTES_PER_S), ("disk", DISK_BYTES_PER_S)):
        size = f"GiB of {word} memory for what leaves the device; 0: none"
        speed = f"GB/s from {word} to a device, which decide what is fetched (default: %(default)g)"
        parser.add_argument(f"--{word}-gib", type=float, default=0.0, help=size)
        parser.add_argument(f"--{word}-gb-s", type=float, default=rate / 1e9, help=speed)


def _add_trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = commands.add_parser("trace", help="look at a trace, or rewrite it")
    verbs = trace.add_subparsers(title="verbs", required=True)
    stats = verbs.add_parser(
        "stats", help="requests, lengths, ideal hit rate, reuse, sharing by depth"
    )
    stats.add_argument("trace", help=_TRACE_HELP)
    _share(stats, "--skip-bad")
    stats.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    stats.set_defaults(run=_trace_stats)
    convert = verbs.add_parser("convert", help="write any trace as the project's own JSON lines")
    convert.add_argument("trace", help=_TRACE_HELP)
    convert.add_argument("output", type=Path, help="file to write")
    _share(convert, "--skip-bad")
    convert.set_defaults(run=_trace_convert)


def _trace_stats(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hybridcache.lab.report import stats_table
    from hybridcache.lab.trace_stats import trace_stats
    from hybridcache.lab.traces import open_trace

    trace = open_trace(options.trace, skip_bad=options.skip_bad)
    with tqdm(unit=" requests", disable=None, file=sys.stderr) as bar:
        stats = trace_stats(trace, progress=lambda _: bar.update() and None)
    if not stats.num_requests:
        raise ValueError(f"{options.trace}: there is no request in it")
    print(json.dumps(stats.as_record()) if options.json else stats_table(stats))
    return 0


def _trace_convert(options: argparse.Namespace) -> int:
    from hybridcache.lab.traces import open_trace
    from hybridcache.lab.traces.jsonl import write

    trace = open_trace(options.trace, skip_bad=options.skip_bad)
    with options.output.open("w", encoding="utf-8") as file:
        num_requests = write(trace, file)
    print(f"{num_requests} requests to {options.output}, {trace.bad.count} bad records left out")
    return 0


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from hybridcache.lab.baselines import BASELINES
    from hybridcache.lab.replicas.command import add_fleet
    from hybridcache.lab.report import METRICS
    from hybridcache.lab.simulation.target import DEFAULT_CHECKPOINTS, MEMORIES
    from hybridcache.policies.words import eviction_words, placement_words

    parser = commands.add_parser("simulate", help="replay a trace through caches of many sizes")
    add = parser.add_argument
    add("--trace", required=True, action="append", help=_TRACE_HELP + "; may be repeated")
    _share(parser, "--model", "--gib", "--state-dtype", "--checkpoint-dtype", "--grid")
    _share(parser, "--servers", "--times", "--processes", "--ray", "--skip-bad")
    add(
        "--policy",
        default="lru",
        help=f"eviction words, commas between: {', '.join(eviction_words())}, module:Class",
    )
    add(
        "--checkpoints",
        action="append",
        help=f"placement words, commas between; repeat to compare (default {DEFAULT_CHECKPOINTS}): "
        f"{', '.join(placement_words())}, none, module:Class",
    )
    add("--baseline", default="", help=f"rebuilt peers, commas between: {', '.join(BASELINES)}")
    add("--bound", action=argparse.BooleanOptionalAction, default=True, help="the infinite cache")
    add("--optimum", choices=("greedy", "lp", "milp"), help="also the best plan with hindsight")
    known = ", ".join(METRICS)
    add("--metric", default="hit", help=f"what tables and figure show, commas between: {known}")
    add("--losses", action="store_true", help="also where the tokens went, by cause")
    add("--bins", action="store_true", help="also by prompt length and by turn of the session")
    add(
        "--memory",
        choices=MEMORIES,
        default="arena",
        help="one arena for KV and states, as in the engine; an ideal budget of bytes; or two "
        "pools",
    )
    add("--kv-share", type=float, help="with --memory pools: the part that is for KV, 0 to 1")
    _add_tiers(parser)
    add(
        "--tiers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="dead KV, then superseded checkpoints go first; without, each policy orders all",
    )
    add("--page-size", type=int, default=1, help="tokens of a KV page")
    add("--max-running", type=int, help="serve so many requests at once instead of in turn")
    add_fleet(parser)
    add("--output", type=Path, help="JSON lines, a run each; runs it already has are not repeated")
    add("--figure", type=Path, help="PNG or SVG to draw; losses and bins, if asked for, beside it")
    add(
        "--page", type=Path, help="HTML file to write: the runs to look at, side by side, over time"
    )
    parser.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hybridcache.lab.replicas.command import refuse_without_replicas, simulate_fleets

    if options.replicas is not None:
        return simulate_fleets(options, lambda spec: _open(spec, options))
    refuse_without_replicas(options)
    from hybridcache.lab.report import bins_table, find_metric, losses_table
    from hybridcache.lab.simulation.simulate import simulate

    metrics = options.metric.split(",")
    for word in metrics:
        find_metric(word)
    known = options.optimum or (options.output and options.output.exists())
    if "optimum" in metrics and not known:
        raise ValueError("--metric optimum needs a plan: add --optimum greedy, lp or milp")
    _check_figure(options.figure)
    if options.page and len(options.trace) > 1:
        raise ValueError("--page shows the runs of one trace: name one")
    results: list[SimulationResult] = []
    drawn: list[Path] = []
    for spec in options.trace:
        trace = _open(spec, options)
        if options.page:
            _write_page(trace, options)
        with tqdm(unit=" runs", desc=spec, disable=None, file=sys.stderr) as bar:

            def show(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            result = simulate(
                trace,
                **_asked(options),
                bound=options.bound,
                optimum=options.optimum,
                processes=options.processes,
                ray=options.ray,
                resume_from=options.output,
                progress=show,
            )
        results.append(result)
        if options.figure:  # before anything is printed: whoever reads may stop reading
            drawn = _draw(results, options, metrics)
        for word in metrics:
            print(result.table(word), end="\n\n")
        if options.losses:
            print(losses_table(result.runs), end="\n\n")
        if options.bins:
            print(bins_table(result.runs, "length"), end="\n\n")
            print(bins_table(result.runs, "turn"), end="\n\n")
    for path in drawn:
        print(f"figure: {path}")
    return 0


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a ``Sweep`` that say who competes, with what memory and on which machine."""
    from hybridcache.lab.simulation.target import DEFAULT_CHECKPOINTS

    as_they_are = [
        "model",
        "gib",
        "tiers",
        "memory",
        "kv_share",
        "host_gib",
        "disk_gib",
        "host_gb_s",
        "disk_gb_s",
        "state_dtype",
        "checkpoint_dtype",
        "page_size",
        "grid",
        "servers",
        "max_running",
        "times",
    ]
    return {name: getattr(options, name) for name in as_they_are} | {
        "policy": _split(options.policy),
        "checkpoints": options.checkpoints or DEFAULT_CHECKPOINTS,
        "baseline": _split(options.baseline),
    }


def _write_page(trace: Trace, options: argparse.Namespace) -> None:
    from hybridcache.lab.recording import page_of
    from hybridcache.lab.simulation.simulate import Sweep

    options.page.write_text(page_of(trace, Sweep(**_asked(options))), encoding="utf-8")


def _draw(
    results: Sequence[SimulationResult], options: argparse.Namespace, metrics: Sequence[str]
) -> list[Path]:
    """The figures that were asked for, of the traces so far."""
    from hybridcache.lab.figures import bins_figure, losses_figure, sweep_figure

    drawn: list[Path] = [options.figure]
    sweep_figure(results, options.figure, metrics)
    if options.losses:
        drawn.append(_beside(options.figure, "losses"))
        losses_figure(results, drawn[-1])
    if options.bins:
        drawn.append(_beside(options.figure, "bins"))
        bins_figure(results, drawn[-1])
    return drawn


def _check_figure(path: Path | None) -> None:
    if path is not None and path.suffix not in (".png", ".svg"):
        raise ValueError(f"--figure {path}: its name must end in .png or .svg")


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


def _add_optimum(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("optimum", help="the best that any policy could have done")
    add = parser.add_argument
    _share(parser, "--trace", "--model", "--gib", "--state-dtype", "--grid", "--skip-bad")
    add(
        "--method",
        choices=("greedy", "lp", "milp"),
        help="greedy for long traces (default: milp; lp with a tier below the device)",
    )
    add(
        "--placement",
        choices=("shared", "every"),
        default="shared",
        help="where checkpoints may sit",
    )
    add("--gap", type=float, default=RELATIVE_GAP, help="stop when bound and plan are so close")
    add("--limit", type=float, default=LIMIT_S, help="seconds for one size")
    _add_tiers(parser)
    add("--output", type=Path, help="JSON lines, one a size, with the price of memory over time")
    add("--figure", type=Path, help="PNG or SVG to draw: plan and bound, and that price")
    parser.set_defaults(run=_optimum)


def _optimum(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hybridcache.geometry.model import ModelGeometry
    from hybridcache.lab.figures import optimum_figure
    from hybridcache.lab.optimum import lower_budgets, optimum
    from hybridcache.lab.report import optimum_table
    from hybridcache.lab.simulation.sizes import budget_bytes, sizes, tier_bytes

    _check_figure(options.figure)
    geometry = ModelGeometry.load(options.model)
    if options.state_dtype:
        geometry = geometry.with_state_dtype(options.state_dtype)
    trace = _open(options.trace, options).kept()
    lower = lower_budgets(
        geometry,
        (tier_bytes("host", options.host_gib), options.host_gb_s * 1e9),
        (tier_bytes("disk", options.disk_gib), options.disk_gb_s * 1e9),
    )
    found = []
    with tqdm(sizes(options.gib), unit=" sizes", disable=None, file=sys.stderr) as bar:
        for size in bar:
            best = optimum(
                trace,
                capacity_bytes=budget_bytes(size),
                kv_bytes_per_token=geometry.kv_bytes_per_token,
                state_bytes=geometry.state_bytes,
                grid=options.grid,
                method=options.method or ("lp" if lower else "milp"),
                placement=options.placement,
                relative_gap=options.gap,
                limit_s=options.limit,
                lower=lower,
                on_progress=bar.set_postfix_str,
            )
            found.append(best)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    record = best.record(with_prices=True) | {"model": geometry.name}
                    file.write(json.dumps(record) + "\n")
    print(optimum_table(found))
    if options.figure:
        optimum_figure(found, options.figure)
        print(f"figure: {options.figure}")
    return 0


def _add_advise(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from hybridcache.lab.advise import SERVABLE_PRECISIONS

    parser = commands.add_parser(
        "advise", help="the policy, placement, precision and split to use for a trace and a size"
    )
    add = parser.add_argument
    _share(parser, "--trace", "--model", "--servers", "--times", "--processes", "--skip-bad")
    add("--gib", type=float, required=True, help="memory for KV and checkpoints together")
    add("--policy", help="eviction words to choose among, commas between")
    add(
        "--state-dtypes",
        default=",".join(SERVABLE_PRECISIONS),
        help="precisions of states to choose among, commas between (default %(default)s: what the "
        "engine serves)",
    )
    for word in ("host", "disk"):
        add(f"--{word}-gib", type=float, default=0.0, help=f"also what so much {word} is worth")
    add("--json", action="store_true", help="JSON lines instead of a table")
    parser.set_defaults(run=_advise)


def _advise(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hybridcache.lab.advise import DEFAULT_POLICIES, advise

    trace = _open(options.trace, options)
    with tqdm(unit=" runs", disable=None, file=sys.stderr) as bar:
        advice = advise(
            trace,
            model=options.model,
            gib=options.gib,
            policies=_split(options.policy) if options.policy else DEFAULT_POLICIES,
            state_dtypes=_split(options.state_dtypes),
            servers=options.servers,
            times=options.times,
            host_gib=options.host_gib,
            disk_gib=options.disk_gib,
            processes=options.processes,
            progress=lambda done, total: bar.update() and None,
        )
    print(json.dumps(advice.as_record()) if options.json else advice.text())
    return 0


def _open(spec: str, options: argparse.Namespace) -> Trace:
    """The trace; with ``--skip-bad`` it is read once more, to say what is left out of it."""
    from hybridcache.lab.traces import open_trace

    trace = open_trace(spec, skip_bad=options.skip_bad)
    if options.skip_bad:
        num_requests = sum(1 for _ in trace)
        left_out = f"{trace.bad.count} bad records left out"
        print(f"{spec}: {num_requests} requests, {left_out}", file=sys.stderr)
    return trace


def _split(words: str) -> tuple[str, ...]:
    from hybridcache.policies.words import split_words

    return tuple(filter(None, split_words(words)))


if __name__ == "__main__":
    sys.exit(main())
