"""Figures of results: a panel per trace, one legend below, and notes. matplotlib is imported when
one is drawn."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress, product
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridcache.command.extras import how_to_install
from hybridcache.geometry.units import counted
from hybridcache.lab.results.report import (
    LOSSES_NOTE,
    METRICS,
    Metric,
    find_metric,
    hindsight_percent,
    interval_notes,
    limit_percent,
    notes_on,
)
from hybridcache.lab.results.result import ClosedLoopRun, Difference, RunResult, SweepRuns
from hybridcache.lab.traces.frame import make_folder, written
from hybridcache.radix.api import Losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8a5a9e", "#d99a1c", "#555555", "#46a5b5", "#a83250")
"""Colours that differ in print and for most colour-blind readers."""
_DASHES: tuple[str | tuple[float, tuple[float, ...]], ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
)
_MARKERS = "osD^vPX"
PLAN = "best plan with hindsight"

_FONTS: Any = {"font.size": 9.0, "xtick.labelsize": 8.0, "ytick.labelsize": 8.0, "pdf.fonttype": 42}
Title = bool | str
"""True for the default title and caption, False for none, or a title of one's own."""
Size = tuple[float, float] | None
"""Width and height of a whole figure in inches; None for a size by its panels."""
Target = str | Path | None
"""File of a figure, or None."""
Sweeps = Sequence[SweepRuns]
Loops = Sequence[ClosedLoopRun]
LEAST_PANEL = 1.5, 1.5
"""Smallest panel with its labels in inches, in a figure of a given size."""
TITLE_CHARS, CAPTION_CHARS = 14, 17
"""Characters in an inch of a title, and of a caption."""
MOST_TICKS = 6
"""Sizes that all have a number on their axis."""


def figure_path(path: str | Path) -> Path:
    """Return the path of a figure, and make its folder. ValueError for an unknown ending."""
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: the name of a figure must end in .png, .svg or .pdf")
    return make_folder(path)


@contextmanager
def _fonts() -> Iterator[None]:
    """Use the fonts of this package's own figures."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(how_to_install(error, "lab"), name=error.name) from error
    with matplotlib.rc_context(_FONTS):
        yield


@_fonts()
def sweep_figure(
    results: Sweeps,
    path: Target,
    words: str | Sequence[str] | None = None,
    size: Size = None,
    title: Title = True,
    legend: bool = True,
) -> Figure:
    """Draw metrics over the memory size: a panel per trace and metric, a line per competitor.
    Without ``words``: token hit rates, and shares of the best plan with hindsight if there are
    plans. ``size``, ``title`` and ``legend`` are those of ``save``."""
    if words is None:
        known = any(run.optimum_tokens is not None for result in results for run in result.runs)
        words = ("hit", "optimum") if known else "hit"
    words = [words] if isinstance(words, str) else list(words)
    cells = list(product(results, words))
    usual = (4.6, 3.5) if len(cells) == 1 else (3.4, 2.7)
    figure, axes = panels(len(cells), 3 if len(words) % 2 else 2, usual, size)
    for axis, (result, word) in zip(axes, cells, strict=True):
        metric = find_metric(word)
        draw_curves(axis, result, metric)
        if word == "hit":
            draw_limits(axis, result)
        size_axis(axis, sizes=_sizes(result))
        axis.set_ylabel(metric.title)
    if title:
        set_titles(figure, axes, [_facts(result) for result, _ in cells], title)
    notes = " ".join(_notes(results, words)) if title else ""
    return save(figure, axes, path, notes, size, legend)


def _sizes(result: SweepRuns) -> list[float]:
    return sorted({run.gib for run in result.runs})


def _facts(result: SweepRuns) -> list[str]:
    """Return the parts of a title: trace, number of requests, and model."""
    num_requests = counted(result.runs[0].requests, "request") if result.runs else "no requests"
    return [result.trace, num_requests, result.geometry.name]


class _Titles(textwrap.TextWrapper):
    """Wrapper that ends lines at spaces, options of a trace and arguments of a policy."""

    wordsep_simple_re = re.compile(r"(\s+|(?<=[,&?])|(?=\())")


def set_titles(
    figure: Figure, axes: Sequence[Axes], parts: Sequence[Sequence[str]], title: Title
) -> None:
    """Write the parts that all panels share above the figure, and the others above each panel."""
    shared = [part for part in parts[0] if all(part in others for others in parts)]
    width = figure.get_size_inches()[0]

    def wrapped(found: Sequence[str], inches: float) -> str:
        return _Titles(int(TITLE_CHARS * inches), break_on_hyphens=False).fill(", ".join(found))

    for axis, own in zip(axes, parts, strict=True):
        rest = [part for part in own if part not in shared]
        axis.set_title(wrapped(rest, axis.get_position().width * width), fontsize=9)
    figure.suptitle(title if isinstance(title, str) else wrapped(shared, width), fontsize=9)


def _notes(results: Sequence[SweepRuns], words: Sequence[str]) -> list[str]:
    """Return the notes on the numbers that are drawn, each once."""
    of_hits = interval_notes if "hit" in words else lambda _: []
    found = [note for one in results for note in (*notes_on(one, words), *of_hits(one))]
    return [f"{note[:1].upper()}{note[1:]}." for note in dict.fromkeys(found)]


LOSSES = dict(
    zip(
        Losses._fields,
        ("#ececec", "#a3cfe8", "#dc9a48", "#5f9660", "#84569d", "#7d3230", "#1d2b47"),
        strict=True,
    )
)
"""Colours of the causes, from light to dark, so that neighbours also differ in grey."""


@_fonts()
def losses_figure(
    results: Sweeps, path: Target, size: Size = None, title: Title = True, legend: bool = True
) -> Figure:
    """Draw the loss causes stacked over the size, a panel per trace and competitor. The white area
    was reused; bars have the 95 % interval of its height. ``size``, ``title`` and ``legend`` are
    those of ``save``. ValueError if no run has causes."""
    shown = [
        (result, label, runs)
        for result in results
        for label, runs in result.by_label().items()
        if all(run.losses is not None for run in runs)
    ]
    if not shown:
        raise ValueError("none of these runs has loss causes: rebuilt peers do not record them")
    figure, axes = panels(len(shown), 3, (3.4, 2.7), size)
    for axis, (result, _, runs) in zip(axes, shown, strict=True):
        stack_losses(axis, runs)
        draw_limits(axis, result)
        size_axis(axis, sizes=_sizes(result))
        axis.set_ylim(0, 100)
        axis.set_ylabel("prompt tokens, %")
    titles = [[*_facts(result), label] if title else [label] for result, label, _ in shown]
    notes = [
        f"{note[:1].upper()}{note[1:]}." for result in results for note in interval_notes(result)
    ]
    set_titles(figure, axes, titles, title)
    caption = " ".join([LOSSES_NOTE, *dict.fromkeys(notes)]) if title else ""
    return save(figure, axes, path, caption, size, legend)


@_fonts()
def difference_figure(
    of: Difference, path: Target = None, size: Size = None, title: Title = True, legend: bool = True
) -> Figure:
    """Draw the tokens that one run won and lost against another over the requests, in points of the
    token hit rate: a line per reason, and their sum in black. ``size``, ``title`` and ``legend``
    are those of ``save``."""
    figure, [axis] = panels(1, 1, (4.6, 3.5), size)
    lines = [*of.by_reason().items()]
    lines.sort(key=lambda line: -abs(sum(row["tokens"] for row in line[1])))
    for n, (name, rows) in enumerate([*lines[:6], ("all", of.rows)]):
        points = np.cumsum([0, *(100 * row["tokens"] / of.prompt_tokens for row in rows)])
        look = line_look(n, 7) if rows is not of.rows else {"color": "black", "linewidth": 1.4}
        look |= {"drawstyle": "steps-post", "label": name, "markevery": -(-len(rows) // 8)}
        axis.plot([0, *(row["request"] for row in rows)], points, **look)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xlabel("request")
    axis.set_ylabel("token hit rate, points")
    if title:
        set_titles(figure, [axis], [[of.title]], title)
    return save(figure, [axis], path, "", size, legend)


def stack_losses(axis: Axes, runs: Sequence[RunResult]) -> None:
    """Stack the lost tokens by cause over the sizes of ``runs``, from the top."""
    sizes = [run.gib for run in runs]
    if len(sizes) == 1:  # an area needs two points
        sizes, runs = [sizes[0] / 1.1, sizes[0] * 1.1], [*runs, *runs]
    top = [100.0] * len(runs)
    for cause, colour in LOSSES.items():
        words = cause.replace("kv_", "KV ").replace("_", " ")
        lost = [100 * getattr(run.losses, cause, 0) / run.prompt_tokens for run in runs]
        floor = [high - part for high, part in zip(top, lost, strict=True)]
        if max(lost) > 0.05:
            axis.fill_between(sizes, floor, top, color=colour, linewidth=0, label=words)
        top = floor
    axis.plot(sizes, top, color="black", linewidth=1.4, label="reused: below the line")
    lows, highs = zip(*(run.interval.scaled(100)[1:] for run in runs), strict=True)
    axis.vlines(sizes, lows, highs, "white", linewidth=3.6)
    axis.vlines(sizes, lows, highs, "black", linewidth=1.2)


def line_look(place: int, count: int) -> dict[str, Any]:
    """Return colour, marker, dashes and widths for line ``place`` of ``count``. Earlier lines are
    wider, so that all are visible where lines coincide."""
    behind = (count - 1 - place) / max(1, count - 1)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": _DASHES[(place + place // len(COLOURS)) % len(_DASHES)],
        "linewidth": 1.2 + 1.3 * behind,
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 4 + 2 * behind,
        "markerfacecolor": "none",
        "zorder": 2 + place / max(1, count),
    }


def draw_curves(axis: Axes, result: SweepRuns, metric: Metric[RunResult]) -> None:
    """Draw a metric over the sizes, a line per competitor with a marker at each simulated size.
    Token hit rates have bars of their 95 % intervals."""
    by_label = result.by_label()
    for number, (label, runs) in enumerate(by_label.items()):
        values = {run.gib: metric.value(run) for run in runs}
        kept = {gib: value for gib, value in values.items() if value is not None}
        look = line_look(number, len(by_label))
        axis.plot(list(kept), list(kept.values()), label=label, **look)
        if metric is METRICS["hit"]:
            lows, highs = zip(*(run.interval.scaled(100)[1:] for run in runs), strict=True)
            wide, place = 3 * look["linewidth"], look["zorder"]  # Bars of later lines lie on these.
            bars = {"linewidth": wide, "alpha": 0.35, "zorder": place - 1}
            axis.vlines(list(values), lows, highs, look["color"], **bars)


def draw_limits(axis: Axes, result: SweepRuns) -> None:
    """Draw the limits of token hit rates: the best plan with hindsight, the upper bound, and the
    infinite cache."""
    planned = [run for run in result.runs if run.optimum_tokens is not None]
    if planned:
        plans = sorted({(run.gib, hindsight_percent(run)) for run in planned})
        axis.plot(*zip(*plans, strict=True), "k.-", linewidth=1.0, markersize=4, label=PLAN)
        limits = sorted({(run.gib, limit_percent(run)) for run in planned})
        axis.plot(*zip(*limits, strict=True), "k--", linewidth=0.8, label="upper bound")
    if result.bound_rate is not None:
        bound = 100 * result.bound_rate
        axis.axhline(bound, color="black", linewidth=0.8, linestyle=":", label="infinite cache")


def size_axis(axis: Axes, label: str = "", sizes: Sequence[float] = ()) -> None:
    """Make the x axis logarithmic, with plain numbers. ``sizes`` are its ticks; the numbers of more
    than ``MOST_TICKS`` are round ones."""
    from matplotlib.ticker import FixedLocator

    width = axis.get_position().width * axis.figure.get_size_inches()[0]  # type: ignore[union-attr]
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis, (1, 2, 5))
    if 0 < len(sizes) <= MOST_TICKS:
        axis.xaxis.set_major_locator(FixedLocator(sizes))
    if sizes:
        axis.xaxis.set_minor_locator(FixedLocator(sizes))
    long = "memory for KV and checkpoints, GiB"
    axis.set_xlabel(label or (long if width > 2.6 else "memory, GiB"))


def _plain_ticks(axis: Axis, multiples: Sequence[int]) -> None:
    """Write plain numbers on a logarithmic axis, at ``multiples`` of the powers of ten, or at some
    powers only if there is no room for all of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    class Places(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
            self.set_params(subs=multiples)
            places = super().tick_values(vmin, vmax)
            if len(places) == 0:  # Powers need strides, which other multiples do not support.
                self.set_params(subs=(1,))
                places = super().tick_values(vmin, vmax)
            return places

    axis.set_major_locator(Places(10))
    axis.set_major_formatter(lambda value, _: _number(value))
    axis.set_minor_formatter(NullFormatter())


def _number(size: float) -> str:
    return f"{size:.3g}" if size < 100 else f"{size:,.0f}"


def panels(
    count: int, columns: int, panel: tuple[float, float] = (4.6, 3.5), size: Size = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its ``count`` axes: panels of the size ``panel`` (inches), at most
    ``columns`` in a row, and fewer if a figure of ``size`` is narrow. Rows have no empty cells:
    panels of a row with fewer are wider. The figure belongs to no window and no notebook, so their
    backend is not changed."""
    from matplotlib.figure import Figure

    width, height = panel
    if size is not None:
        if np.shape(size) != (2,) or not all(0 < one < math.inf for one in size):
            raise ValueError(f"size must be (width, height) in inches, above 0 (got {size!r})")
        columns = max(1, min(columns, int(size[0] / LEAST_PANEL[0])))
    num_rows = -(-count // columns)
    # Rows of nearly equal numbers of panels, the first rows with one more.
    rows = [count // num_rows + (row < count % num_rows) for row in range(num_rows)]
    whole = math.lcm(*rows)
    figure = Figure(figsize=size or (width * rows[0], height * num_rows))
    grid = figure.add_gridspec(num_rows, whole)
    axes = []
    for row, in_row in enumerate(rows):
        step = whole // in_row
        for place in range(in_row):
            axes.append(figure.add_subplot(grid[row, step * place : step * (place + 1)]))
    for axis in axes:
        axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(
    figure: Figure,
    axes: Sequence[Axes],
    path: str | Path | None,
    caption: str = "",
    size: Size = None,
    legend: bool | None = None,
) -> Figure:
    """Add one legend for all panels, unless ``legend`` is False, with the caption as its title, and
    write the figure to ``path`` (None for no file). The figure grows by the height of both, or has
    ``size`` (inches). Functions with ``title=False`` draw neither title nor caption. ValueError if
    panels do not fit into ``size``, and for another ``legend``."""
    if not isinstance(legend, bool | None):
        raise ValueError(f"legend must be True (below the panels) or False (got {legend!r})")
    entries = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        if legend is not False
    }
    given, height = figure.get_size_inches()
    width = max(given, LEAST_PANEL[0])  # The error names a size that fits.
    longest = max(map(len, entries), default=0)
    columns = max(1, min(6, int(width / (0.5 + 0.06 * longest))))
    lines = textwrap.wrap(caption, int(CAPTION_CHARS * width))
    below = 0.14 * len(lines) + 0.17 * -(-len(entries) // columns) + 0.15
    if size is None:
        figure.set_size_inches(width, height + below)
    else:
        num_rows = axes[0].get_gridspec().nrows  # type: ignore[union-attr]
        least = num_rows * LEAST_PANEL[1] + below
        if given < width or height < least:
            fit = max(0, int((height - below) / LEAST_PANEL[1])) * int(given / LEAST_PANEL[0])
            shorter = ["draw fewer"] if len(axes) > 1 else []
            shorter += ["leave out the caption (title=False)"] * bool(caption)
            shorter += ["leave out the legend (legend=False), give short names (labelled)"] * bool(
                legend
            )
            raise ValueError(
                f"size=({given:g}, {height:g}) has room for {counted(fit, 'panel')} and the legend "
                f"of {counted(len(entries), 'name')} (got {len(axes)}): {', '.join(shorter)}, or "
                f"make it {math.ceil(10 * least) / 10:g} inches high and {width:g} wide."
            )
    figure.set_layout_engine("constrained")
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncol=columns,
        fontsize=8,
        frameon=False,
        title="\n".join(lines),
        title_fontsize=8,
    )
    if path:
        with written(figure_path(path)) as file:
            figure.savefig(file, dpi=130)
    return figure


CLOSED_LOOP_PANELS: dict[str, Callable[[ClosedLoopRun], float]] = {
    "token hit rate, %": lambda run: 100 * run.token_hit_rate,
    "mean TTFT, s": attrgetter("ttft_mean_s"),
    "p99 TTFT, s": attrgetter("ttft_p99_s"),
    "makespan, s": attrgetter("makespan_s"),
}


@_fonts()
def closed_loop_figure(
    runs: Loops, path: Target, size: Size = None, title: Title = True, legend: bool = True
) -> Figure:
    """Draw hits, times to first token and makespan over the rate of sessions: four panels per
    trace and size, a line per cache and admission policy. Points are means over seeds; bars reach
    from the smallest to the largest. ``size``, ``title`` and ``legend`` are those of ``save``."""
    names = {run.config["trace"]: run.trace_name for run in runs}
    is_clear = len(set(names.values())) == len(names)
    cells = list(dict.fromkeys((run.config["trace"], run.gib) for run in runs))
    lines = list(dict.fromkeys((run.label, run.admission) for run in runs))
    # The legend has the parts that differ, and the title the others.
    differ = [len(set(part)) > 1 for part in zip(*lines, strict=True)]
    differ[1] |= not differ[0]
    columns, usual = (2, (3.4, 2.7)) if len(cells) == 1 else (4, (2.8, 2.5))
    drawn = list(product(cells, CLOSED_LOOP_PANELS.items()))
    figure, axes = panels(len(drawn), columns, usual, size)
    titles = []
    for axis, (cell, (name, value)) in zip(axes, drawn, strict=True):
        here = [run for run in runs if (run.config["trace"], run.gib) == cell]
        for place, line in enumerate(lines):
            by_rate: dict[float, list[float]] = {}
            for run in sorted(here, key=lambda run: run.rate):
                if (run.label, run.admission) == line:
                    by_rate.setdefault(run.rate, []).append(value(run))
            if not by_rate:
                continue
            look, rates = line_look(place, len(lines)), list(by_rate)
            label = ", ".join(compress(line, differ))
            axis.plot(rates, list(map(fmean, by_rate.values())), label=label, **look)
            lows, highs = (list(map(end, by_rate.values())) for end in (min, max))
            axis.vlines(rates, lows, highs, look["color"], linewidth=0.6)
        size_axis(axis, "sessions/s", sorted({run.rate for run in here}))
        axis.set_ylabel(name)
        if name.endswith("TTFT, s"):
            axis.set_yscale("log")
            low, high = map(math.log10, axis.get_ylim())
            axis.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
            _plain_ticks(axis.yaxis, (1, 3))
        else:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
            axis.yaxis.set_major_formatter(lambda value, _: _number(value))
        trace = names[cell[0]] if is_clear else cell[0]
        same = [part for part, is_own in zip(lines[0], differ, strict=True) if not is_own]
        titles.append([trace, here[0].config["model"], f"{cell[1]:.3g} GiB", *same])
    if title:
        set_titles(figure, axes, titles, title)
    has_bars = bool(title) and len({run.seed for run in runs}) > 1
    note = "Bars: the smallest to the largest of all seeds." * has_bars
    return save(figure, axes, path, note, size, legend)
