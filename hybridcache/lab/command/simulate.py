"""``hybridcache simulate``: replay traces through caches of many sizes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcache.lab.command.shared import (
    TRACE_HELP,
    add_tiers,
    check_figure,
    opened,
    share,
    split,
    tiers_asked,
)

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands
    from hybridcache.lab.simulation.simulate import SimulationResult
    from hybridcache.lab.trace import Trace


def add_simulate(commands: Commands) -> None:
    """The command's parser."""
    from hybridcache.lab.baselines import BASELINES
    from hybridcache.lab.replicas.command import add_fleet
    from hybridcache.lab.report import METRICS
    from hybridcache.lab.simulation.target import MEMORIES
    from hybridcache.policies.words import (
        DEFAULT_EVICTION,
        DEFAULT_PLACEMENT,
        eviction_words,
        placement_words,
    )

    parser = commands.add_parser("simulate", help="replay a trace through caches of many sizes")
    add = parser.add_argument
    add("--trace", required=True, action="append", help=TRACE_HELP + "; may be repeated")
    share(parser, "--model", "--gib", "--state-dtype", "--checkpoint-dtype", "--grid")
    share(parser, "--servers", "--times", "--processes", "--ray", "--skip-bad")
    add(
        "--policy",
        default=DEFAULT_EVICTION,
        help=f"eviction policies, commas between (default {DEFAULT_EVICTION}): "
        f"{', '.join(eviction_words())}, module:Class",
    )
    add(
        "--checkpoints",
        action="append",
        help=f"placement words, commas between; repeat to compare (default {DEFAULT_PLACEMENT}): "
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
    add_tiers(parser)
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
    parser.set_defaults(run=_simulate, goes_on=True)


def _simulate(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hybridcache.lab.replicas.command import refuse_without_replicas, simulate_fleets

    if options.replicas is not None:
        return simulate_fleets(options, lambda spec: opened(spec, options))
    refuse_without_replicas(options)
    from hybridcache.lab.report import bins_table, find_metric, losses_table
    from hybridcache.lab.simulation.simulate import simulate

    metrics = options.metric.split(",")
    for word in metrics:
        find_metric(word)
    known = options.optimum or (options.output and options.output.exists())
    if "optimum" in metrics and not known:
        raise ValueError("--metric optimum needs a plan: add --optimum greedy, lp or milp")
    check_figure(options.figure)
    if options.page and len(options.trace) > 1:
        raise ValueError("--page shows the runs of one trace: name one")
    results: list[SimulationResult] = []
    drawn: list[Path] = []
    for spec in options.trace:
        trace = opened(spec, options)
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
    from hybridcache.policies.words import DEFAULT_PLACEMENT

    as_they_are = [
        "model",
        "gib",
        "tiers",
        "memory",
        "kv_share",
        "state_dtype",
        "checkpoint_dtype",
        "page_size",
        "grid",
        "servers",
        "max_running",
        "times",
    ]
    return {name: getattr(options, name) for name in as_they_are} | {
        **tiers_asked(options),
        "policy": split(options.policy),
        "checkpoints": options.checkpoints or DEFAULT_PLACEMENT,
        "baseline": split(options.baseline),
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


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.stem}-{word}{path.suffix}")
