"""``hybridcache simulate``: replay traces through caches of many sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcache.lab.command.shared import (
    TRACE_HELP,
    Once,
    add_settings,
    check_figure,
    given_settings,
    opened,
    share,
)

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands
    from hybridcache.lab.scenario import Scenario


def add_simulate(commands: Commands) -> None:
    """Add the command's parser. Its settings are the fields of ``Scenario``."""
    from hybridcache.lab.report import METRICS
    from hybridcache.lab.scenario import LOAD, MEMORY, MOST_USED, TIERS, settings_of

    parser = commands.add_parser(
        "simulate", help="replay a trace through caches of many sizes", input_flag="--trace"
    )
    parser.register("action", None, Once)
    group = parser.add_argument_group(MOST_USED)
    add = group.add_argument
    add("--trace", action="append", help=TRACE_HELP + "; may be repeated")
    add_settings(group, *settings_of(MOST_USED))
    add("--figure", type=Path, help="PNG, SVG or PDF to draw; losses get a file next to it")
    add("--output", type=Path, help="JSON lines, one per run; a repeated command continues")
    add("--scenario", type=Path, help="TOML file of settings; flags replace those of the file")
    add(
        "--write-scenario", type=Path, help="new TOML file to write the settings to; nothing is run"
    )
    share(group, "--processes")
    add("--ray", help="address of a Ray cluster for the runs (auto: this machine's)")
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
        help="also compute a plan with hindsight at each size",
    )
    known = ", ".join(METRICS)
    add("--metric", default="hit", help=f"metrics of tables and figure, joined by commas: {known}")
    add("--losses", action="store_true", help="also print the tokens by loss cause")
    share(group, "--skip-bad")
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
    parser.set_defaults(run=_simulate, goes_on=True, parser=parser)


ALONE = ("optimum", "losses", "metric", "bound")
"""Options of replays alone that are no settings."""


def _scenarios(options: argparse.Namespace) -> list[Scenario]:
    """Return a scenario per trace, from the file and the flags."""
    from hybridcache.lab.scenario import Scenario

    given = given_settings(options)
    base = Scenario.load(options.scenario) if options.scenario else None
    specs = options.trace or ([] if base is None else [base.trace])
    if not specs:
        options.parser.error("the following arguments are required: --trace")
    for spec in specs:
        if specs.count(spec) > 1:
            raise ValueError(f"--trace {spec} is given twice: give each once")
    return [Scenario.of(replace(base, trace=spec) if base else spec, given) for spec in specs]


def _simulate(options: argparse.Namespace) -> int:
    """Replay every trace, or serve it in closed loop, and print tables."""
    scenarios = _scenarios(options)
    if not options.closed_loop:
        for scenario in scenarios:
            scenario.refuse_load()
    if options.write_scenario:
        return _write_scenario(options, scenarios)
    metrics = options.metric.split(",")
    if options.closed_loop:
        for flag in _given_flags(options, ALONE):
            raise ValueError(f"{flag} has no meaning with --closed-loop: leave it out")
    else:
        _check_metrics(metrics, options)
    check_figure(options)
    results: list[Any] = []
    drawn: list[Path] = []
    traces = [opened(str(scenario.trace), options) for scenario in scenarios]
    for scenario, trace in zip(scenarios, traces, strict=True):
        result, texts = _run(replace(scenario, trace=trace), options, metrics)
        results.append(result)
        if options.figure:  # before anything is printed: a pipe that reads it may close early
            drawn = _draw(results, options, metrics)
        for text in filter(None, texts):
            print(text, end="\n\n")
    for path in drawn:
        print(f"figure: {path}")
    return 1 if any(result.failures for result in results) else 0


def _check_metrics(metrics: Sequence[str], options: argparse.Namespace) -> None:
    """Raise ValueError for a metric that does not exist or is not computed."""
    from hybridcache.lab.report import find_metric

    for word in metrics:
        find_metric(word)
    known = options.optimum or (options.output and options.output.exists())
    if "optimum" in metrics and not known:
        raise ValueError("--metric optimum needs a plan: add --optimum")
    if "bound" in metrics and not options.bound:
        raise ValueError("--metric bound needs the infinite cache: leave --no-bound out")


def _run(
    scenario: Scenario, options: argparse.Namespace, metrics: Sequence[str]
) -> tuple[Any, list[str]]:
    """Return the result of one trace, and its texts."""
    from hybridcache.lab.report import losses_table
    from hybridcache.lab.simulation.closed_loop import closed_loop
    from hybridcache.lab.simulation.simulate import simulate

    place = {"processes": options.processes, "ray": options.ray, "resume_from": options.output}
    if options.closed_loop:
        served = closed_loop(scenario, **place)
        return served, [served.table()]
    result = simulate(scenario, bound=options.bound, optimum=options.optimum, **place)
    losses = losses_table(result.runs) if options.losses else ""
    return result, [*map(result.table, metrics), losses, result.verdict()]


def _write_scenario(options: argparse.Namespace, scenarios: Sequence[Scenario]) -> int:
    """Write the settings to a new file, and name the flags that are not part of it."""
    from dataclasses import fields

    from hybridcache.lab.scenario import Scenario

    path: Path = options.write_scenario
    if len(scenarios) > 1:
        raise ValueError("--write-scenario writes the settings of one trace: name one")
    if path.exists():
        raise ValueError(f"--write-scenario {path}: the file exists: remove it, or name another")
    text = scenarios[0].to_toml()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"scenario: {path}")
    known = {one.name for one in fields(Scenario)} | {"scenario", "write_scenario"}
    others = _given_flags(options, [name for name in vars(options) if name not in known])
    if others:
        print(f"not part of a scenario, so give them with it: {' '.join(others)}")
    return 0


def _given_flags(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return the flags of the options ``names`` that have another value than their default."""
    return [
        "--no-bound" if name == "bound" else f"--{name.replace('_', '-')}"
        for name in names
        if getattr(options, name) != options.parser.get_default(name)
    ]


def _draw(
    results: Sequence[Any], options: argparse.Namespace, metrics: Sequence[str]
) -> list[Path]:
    """Draw the figures that were asked for, of the traces so far."""
    from hybridcache.lab.figures import closed_loop_figure, losses_figure, sweep_figure

    path: Path = options.figure
    if options.closed_loop:
        closed_loop_figure([run for result in results for run in result.runs], path)
        return [path]
    sweep_figure(results, path, metrics)
    if not options.losses:
        return [path]
    losses_path = path.with_name(f"{path.stem}-losses{path.suffix}")
    losses_figure(results, losses_path)
    return [path, losses_path]
