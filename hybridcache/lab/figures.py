"""Figures of results: panels over the memory size, one legend below, a caption. matplotlib is
loaded only when one is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcache.api import Losses
from hybridcache.geometry.units import GIB
from hybridcache.lab.report import (
    LOSSES_NOTE,
    METRICS,
    Metric,
    find_metric,
    hindsight_percent,
    notes_on,
    size_label,
)
from hybridcache.lab.simulation.result import RunResult, SweepRuns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybridcache.lab.optimum import Optimum
    from hybridcache.lab.simulation.closed_loop import ClosedLoopRun

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8a5a9e", "#d99a1c", "#555555", "#46a5b5", "#a83250")
"""Told apart in print and by most colour-blind readers; lines repeat them with other dashes."""
_DASHES = ("-", "--", ":", "-.")
PLAN = "best plan with hindsight"
"""How figures call what the optimum reaches."""


def sweep_figure(
    results: Sequence[SweepRuns],
    path: Path | None,
    words: str | Sequence[str] = "hit",
    *,
    emphasised: Sequence[str] = (),
    caption: str = "",
) -> Figure:
    """A panel a trace and metric: each of ``words`` over memory size on a log axis, a line a
    competitor. Beside the token hit rate stands its share of the best plan with hindsight, where
    that was worked out; the plan and the bounds are black lines.

    ``emphasised`` labels are drawn thick, all others thin.
    """
    words = [words] if isinstance(words, str) else list(words)
    known = any(run.optimum_tokens for result in results for run in result.runs)
    if known and "hit" in words and "optimum" not in words:
        words.insert(words.index("hit") + 1, "optimum")
    in_a_row = next((count for count in (4, 3, 2) if count % len(words) == 0), 3)
    figure, axes = panels(len(words) * len(results), columns=in_a_row)
    for number, result in enumerate(results):
        for word, axis in zip(words, axes[number * len(words) :], strict=False):
            metric = find_metric(word)
            _draw_lines(axis, result, metric, emphasised)
            size_axis(axis)
            axis.set_ylabel(metric.title)
            axis.set_title(title(result), fontsize=9)
            if word == "hit":
                draw_limits(axis, result)
    return save(figure, axes, path, " ".join(filter(None, [caption, *_notes(results, words)])))


def _notes(results: Sequence[SweepRuns], words: Sequence[str]) -> list[str]:
    """What the numbers that are drawn rest on: each trace's sentences, each once."""
    found = {note: None for result in results for note in notes_on(result, words)}
    return [
        note[:1].upper() + note[1:].replace("* above", "Above 100: above") + "." for note in found
    ]


def bins_figure(
    results: Sequence[SweepRuns],
    path: Path | None,
    gib: float | None = None,
    caption: str = "",
) -> Figure:
    """Two panels a trace, at the size nearest to ``gib`` (None: the middle one): token hit rate by
    prompt length and by how many requests of the session came before."""
    figure, axes = panels(2 * len(results), columns=4 if len(results) > 1 else 2)
    for number, result in enumerate(results):
        for axis, by, words in zip(
            axes[2 * number :],
            ("length", "turn"),
            ("prompt tokens", "earlier requests of the session"),
            strict=False,
        ):
            starts: set[int] = set()
            for place, (label, runs) in enumerate(result.by_label().items()):
                run = _nearest(runs, gib)
                bins = run.by_length if by == "length" else run.by_turn
                starts.update(bin_.start for bin_ in bins)
                axis.plot(
                    [bin_.start for bin_ in bins],
                    [100 * bin_.cached_tokens / bin_.prompt_tokens for bin_ in bins],
                    color=COLOURS[place % len(COLOURS)],
                    linestyle=_DASHES[place // len(COLOURS) % len(_DASHES)],
                    marker="o",
                    markersize=3,
                    linewidth=1.3,
                    label=label,
                )
            axis.set_xscale("symlog", base=2, linthresh=256 if by == "length" else 1)
            axis.set_xticks(sorted(starts))
            axis.xaxis.set_major_formatter("{x:,g}")
            axis.xaxis.set_minor_formatter("")
            axis.set_ylim(0, 100)
            axis.set_xlabel(f"{words}, from")
            axis.set_ylabel(METRICS["hit"].title)
            size = _nearest(result.runs, gib)
            axis.set_title(f"{title(result)}, {size_label(size)} GiB", fontsize=8.5)
    return save(figure, axes, path, caption)


def _nearest(runs: Sequence[RunResult], gib: float | None) -> RunResult:
    if gib is None:
        return sorted(runs, key=lambda run: run.gib or 0.0)[len(runs) // 2]
    return min(runs, key=lambda run: abs((run.gib or 0.0) - gib))


LOSSES = dict(
    zip(
        Losses._fields,
        ("#d9d9d9", "#1b6ca8", "#c8553d", "#d99a1c", "#8a5a9e", "#555555", "#6a9a5b"),
        strict=True,
    )
)
"""Causes of lost tokens and their colours."""


def losses_figure(results: Sequence[SweepRuns], path: Path | None, caption: str = "") -> Figure:
    """A panel a trace and competitor that knows: the causes stacked over the size; what is white
    was reused. ValueError: none knows."""
    shown = [
        (result, label, runs)
        for result in results
        for label, runs in result.by_label().items()
        if all(run.losses is not None for run in runs)
    ]
    if not shown:
        raise ValueError("none of these runs says why tokens were lost: rebuilt peers do not")
    figure, axes = panels(len(shown), 4.2, 3.2, columns=4)
    for axis, (result, label, runs) in zip(axes, shown, strict=True):
        stack_losses(axis, runs)
        draw_limits(axis, result)
        size_axis(axis)
        axis.set_ylim(0, 100)
        axis.set_ylabel("prompt tokens, %")
        axis.set_title(f"{title(result)}\n{label}", fontsize=8)
    return save(figure, axes, path, f"{caption} {LOSSES_NOTE}".strip())


def stack_losses(axis: Any, runs: Sequence[RunResult]) -> None:
    """Lost tokens by cause over the sizes of ``runs``, from the top."""
    sizes = [run.gib or 0.0 for run in runs]
    top = [100.0] * len(runs)
    for cause, colour in LOSSES.items():
        words = cause.replace("kv_", "KV ").replace("_", " ")
        lost = [100 * (run.losses or {}).get(cause, 0) / run.prompt_tokens for run in runs]
        floor = [high - part for high, part in zip(top, lost, strict=True)]
        if max(lost) > 0.05:
            axis.fill_between(sizes, floor, top, color=colour, linewidth=0, label=words)
        top = floor
    axis.plot(sizes, top, color="black", linewidth=1.4, label="reused: below the line")


def title(result: SweepRuns) -> str:
    """What a panel shows: the trace, how many of its requests, and the model."""
    num_requests = f"{result.runs[0].requests:,} requests" if result.runs else "no requests"
    return f"{result.trace}, {num_requests} ({result.geometry.name})"


def _draw_lines(axis: Any, result: SweepRuns, metric: Metric, emphasised: Sequence[str]) -> None:
    for number, (label, runs) in enumerate(result.by_label().items()):
        points = [(run.gib, metric.value(run)) for run in runs]
        kept = [(gib, value) for gib, value in points if gib is not None and value is not None]
        axis.plot(
            [gib for gib, _ in kept],
            [value for _, value in kept],
            color=COLOURS[number % len(COLOURS)],
            linestyle=_DASHES[number // len(COLOURS) % len(_DASHES)],
            linewidth=2.4 if label in emphasised else 1.3,
            marker="o" if len(kept) == 1 else None,
            label=label,
        )


def draw_limits(axis: Any, result: SweepRuns) -> None:
    """What bounds a panel of token hit rates: the best plan with hindsight, what no plan can pass,
    the infinite cache."""
    plans = sorted(
        {(run.gib, hindsight_percent(run)) for run in result.runs if run.optimum_tokens and run.gib}
    )
    if plans:
        axis.plot(*zip(*plans, strict=True), "k.-", linewidth=1.0, markersize=4, label=PLAN)
    if result.plan_bounds:
        sizes, rates = zip(*sorted(result.plan_bounds.items()), strict=True)
        percents = [100 * rate for rate in rates]
        axis.plot(sizes, percents, color="black", linewidth=0.6, label="no plan passes (LP)")
    if result.bound_rate is not None:
        bound = 100 * result.bound_rate
        axis.axhline(bound, color="black", linewidth=0.8, linestyle=":", label="infinite cache")


def size_axis(axis: Any, label: str = "memory for KV and checkpoints, GiB") -> None:
    """A logarithmic x axis in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(label)


def panels(
    count: int, width: float = 4.6, height: float = 3.5, columns: int = 3
) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` panels, at most ``columns`` in a row, and their axes. It belongs to no
    window and no notebook: their backend stays as it is."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = [axis for row in grid for axis in row]
    for spare in axes[count:]:
        spare.set_visible(False)
    for axis in axes:
        axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def save(figure: Figure, axes: Sequence[Any], path: Path | None, caption: str = "") -> Figure:
    """Finish the figure, and write it where there is a ``path``: one legend below for all panels,
    the caption under it; the figure grows by both."""
    entries = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    width, height = figure.get_size_inches()
    widest = max(map(len, entries), default=0)
    columns = max(1, min(len(entries), 6, int(width / (0.6 + 0.068 * widest))))
    rows = -(-len(entries) // columns)
    lines = textwrap.wrap(caption, int(width * 15))
    below = 0.17 * len(lines) + 0.1  # inches that the caption takes
    added = below + 0.22 * rows + 0.1
    height += added
    figure.set_size_inches(width, height)
    figure.tight_layout(rect=(0, added / height, 1, 1))
    if entries:
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="lower center",
            bbox_to_anchor=(0.5, below / height),
            ncol=columns,
            fontsize=8,
            frameon=False,
        )
    figure.text(0.5, 0.08 / height, "\n".join(lines), ha="center", va="bottom", fontsize=8.5)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def optimum_figure(found: Sequence[Optimum], path: Path | None) -> Figure:
    """Left the plan's hit rate and the bound over the size; right the price of memory over the
    trace at some of the sizes, where the LP told it."""
    priced = [best for best in found if best.prices is not None]
    figure, axes = panels(1 + bool(priced), columns=2)
    sizes = [best.capacity_bytes / GIB for best in found]
    axes[0].plot(sizes, [100 * best.reached for best in found], "k.-", label=PLAN)
    if priced:
        bounds = [100 * (best.bound or 0) for best in priced]
        priced_sizes = [best.capacity_bytes / GIB for best in priced]
        axes[0].plot(priced_sizes, bounds, "k-", linewidth=0.6, label="no plan passes")
        step = -(-len(priced) // len(COLOURS))
        for colour, best in zip(COLOURS, priced[::step], strict=False):
            assert best.prices is not None
            label = f"{best.capacity_bytes / GIB:.3g} GiB"
            prices = GIB * best.prices
            axes[1].step(range(len(prices)), prices, color=colour, linewidth=1.0, label=label)
        axes[1].set_xlabel("request")
        axes[1].set_ylabel("tokens that one more GiB would save")
    axes[0].set_ylim(0, 100)
    size_axis(axes[0])
    axes[0].set_ylabel(METRICS["hit"].title)
    for axis in axes:
        axis.set_title(f"{found[0].trace}, {found[0].num_requests:,} requests", fontsize=9)
    caption = (
        "Right: the dual of the capacity, the price of a byte between two requests; memory is "
        "worth most where it stands highest."
        if priced
        else ""
    )
    return save(figure, axes, path, caption)


CLOSED_LOOP_PANELS: dict[str, Callable[[ClosedLoopRun], float]] = {
    "token hit rate, %": lambda run: 100 * run.token_hit_rate,
    "mean TTFT, s": lambda run: run.ttft_mean_s,
    "p99 TTFT, s": lambda run: run.ttft_p99_s,
    "makespan, s": lambda run: run.makespan_s,
}


def closed_loop_figure(
    runs: Sequence[ClosedLoopRun], path: Path | None, caption: str = ""
) -> Figure:
    """A row of panels for each trace and cache: hits, times to first token and makespan over the
    rate of sessions, a line for each admission policy. Points are means over seeds, bars reach from
    the least to the most."""
    cells = list(dict.fromkeys((run.trace, run.label, run.gib) for run in runs))
    admissions = list(dict.fromkeys(run.admission for run in runs))
    figure, axes = panels(len(CLOSED_LOOP_PANELS) * len(cells), 3.9, 3.0, columns=4)
    for row, cell in enumerate(cells):
        here = [run for run in runs if (run.trace, run.label, run.gib) == cell]
        for column, (name, value) in enumerate(CLOSED_LOOP_PANELS.items()):
            axis = axes[row * len(CLOSED_LOOP_PANELS) + column]
            for place, admission in enumerate(admissions):
                points = _over_rates([run for run in here if run.admission == admission], value)
                if not points:
                    continue
                rates, means, lows, highs = zip(*points, strict=True)
                axis.errorbar(
                    rates,
                    means,
                    yerr=(lows, highs),
                    color=COLOURS[place % len(COLOURS)],
                    linestyle=_DASHES[place // len(COLOURS) % len(_DASHES)],
                    marker="o",
                    markersize=3,
                    linewidth=2.0 if admission == "sessions" else 1.1,
                    elinewidth=0.6,
                    label=admission,
                )
            size_axis(axis, "sessions a second")
            axis.set_ylabel(name)
            if name.endswith("TTFT, s"):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            size = "" if cell[2] is None else f", {cell[2]:.3g} GiB"
            axis.set_title(f"{cell[0]}{size}", fontsize=9)
    return save(figure, axes, path, caption)


def _over_rates(
    runs: Sequence[ClosedLoopRun], value: Callable[[ClosedLoopRun], float]
) -> list[tuple[float, float, float, float]]:
    """(rate, mean over seeds, mean - least, most - mean), by rate."""
    points = []
    for rate in sorted({run.rate for run in runs}):
        values = [value(run) for run in runs if run.rate == rate]
        mean = sum(values) / len(values)
        points.append((rate, mean, mean - min(values), max(values) - mean))
    return points
