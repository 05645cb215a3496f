"""Sections of the results page: the parts of a section, its figures, and readers of result files.

Each module of this package has ``SECTIONS``, by their names in ``results_page.md``. They are apart
from the studies: a change of a sentence or a figure does not make results old.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from experiments import provenance
from experiments.studies import default, yardsticks
from experiments.studies.common import BEST_REBUILT, BOUND, LRU_ADAPTIVE, Records
from experiments.tables import Column, Table
from hybridcache.lab.board import Split
from hybridcache.lab.traces.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HITS = Column("token hit rate", "%")
SLASH = 1.0
"""Points within which policies share one row of a figure."""


def records_of(name: str) -> Records:
    """Return the records of a result file without its provenance. Raises ValueError if it has
    none, because a run that writes it has begun or was stopped."""
    path = provenance.RESULTS / f"{name}.jsonl"
    if not (records := provenance.read_json_lines(path)[1]):
        raise ValueError(f"{path} has no rows: wait for the run that writes it, or run it again.")
    return records


def processor(name: str) -> str:
    """Return the name of the processor that a result file was measured on."""
    found, _ = provenance.read_json_lines(provenance.RESULTS / f"{name}.jsonl")
    return str(found["machine"]["cpu"])


def yardstick_cells(*splits: str) -> yardsticks.Cells:
    """Return the references in the cells of ``splits``, or nothing if they were not run."""
    is_known = (provenance.RESULTS / f"{yardsticks.NAME}.jsonl").exists()
    return yardsticks.by_cell(records_of(yardsticks.NAME) if is_known else [], *splits)


def yardstick_rates(split: Split, is_closed: bool = False) -> dict[str, list[float]]:
    """Return the rate of the best rebuilt system and the bound, %, as a mean over the replays of
    ``split``, or its closed loops, for each of its seeds; empty unless all of them were run."""
    cells = yardstick_cells()
    wanted = [(cell.spec, gib) for cell in split.cells for gib in cell.sizes]
    if is_closed:
        wanted = [
            (default.TraceJob("", cell.spec, None, (gib,), rate=rate).label, gib)
            for cell in split.cells
            for gib, rate in cell.loops
        ]
    if any((trace, seed, gib) not in cells for trace, gib in wanted for seed in split.seeds):
        return {}
    return {
        name: [
            fmean(cells[trace, seed, float(gib)][name] for trace, gib in wanted)
            for seed in split.seeds
        ]
        for name in (BEST_REBUILT, BOUND)
    }


def study(name: str, table: Callable[[Records], Table]) -> Callable[[], Table]:
    """Return the function that makes the table of a result file."""
    return lambda: table(records_of(name))


SHOWN = {LRU_ADAPTIVE: LRU_ADAPTIVE, "best rebuilt": BEST_REBUILT, BOUND: BOUND}
"""Columns of references in figures."""
POINTS = "{gain.low:.1f} to {gain.high:.1f} points"
WIDTH_INCHES = 4.2
"""Width of a figure: that of a phone, so that nothing is scaled down there."""
LIGHT_AND_DARK = {
    "#ffffff": "#14181d",
    "#20242a": "#e4e8ec",
    "#8a9099": "#858d97",
    "#d7dbe0": "#343b44",
    "#1b6ca8": "#62b0f0",
    "#c8553d": "#f0876b",
    "#3a7d44": "#6cc07a",
    "#8a5a9e": "#bf93d4",
    "#5b6168": "#a9b0b8",
}
"""Colour on a light page -> colour on a dark page: ground, text, notes, grid, and five series."""
GROUND, TEXT, NOTE, GRID, *SERIES = LIGHT_AND_DARK
MARKS = "osD^v"
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), "-")
"""Looks of series, which so also differ in grey."""
Point = tuple[float, float, float, float]
"""x, y, and the limits of y."""
NAME_CHARS = 28
"""Characters of a row's name in one line."""


def wrap(name: str, width: int) -> list[str]:
    """Return the lines of a row's name, broken after commas, @ and spaces."""
    lines = [""]
    for word in re.findall(r"[^, @]+(?:, ?|@| )?", name):
        if lines[-1] and len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def drawing(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a matplotlib figure of ``WIDTH_INCHES`` and its axes, one per panel."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH_INCHES, height), layout="constrained", facecolor=GROUND)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_facecolor(GROUND)
        axis.tick_params(which="both", colors=TEXT, labelsize=8, length=0)
        axis.grid(True, color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, list(axes.flat)


def legend(figure: Figure, axis: Axes) -> None:
    """Write the names of the series above the panels."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=min(3, len(labels)), frameon=False,
            fontsize=8, labelcolor=TEXT, handletextpad=0.3, columnspacing=1.2,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dots:
    """A row per line of the table: one dot with its interval per series."""

    series: Mapping[str, str]
    """Name of a column of the table by its name in the figure."""
    axis: str
    """Label of the axis."""
    names: Sequence[int] = (0,)
    """Columns that name a row."""
    near: str = ""
    """Row within ``SLASH`` points of which others are not drawn, but counted."""
    log: bool | str = False
    """True for a logarithmic axis, ``symlog`` for one of both signs."""
    least: float = -1
    """Least absolute value of the first series that is drawn."""

    def rows(self, table: Table) -> list[tuple[str, list[Interval], str]]:
        """Return name, values and written first value of each drawn row."""
        places = [table.place(name) for name in self.series.values()]
        columns = zip(*(table.values(name) for name in self.series.values()), strict=True)
        rows = []
        for texts, values in zip(table.texts(), columns, strict=True):
            known = [at for at, one in zip(places, values, strict=True) if not math.isnan(one.mean)]
            if known and not abs(values[0].mean) < self.least:
                name = ", ".join(texts[i] for i in self.names).replace("`", "")
                rows.append(("\n".join(wrap(name, NAME_CHARS)), [*values], texts[known[0]]))
        if not self.near:
            return rows
        centre = next(values[0].mean for name, values, _ in rows if name == self.near)
        rules = ((name, of[0].mean) for name, of, _ in rows if name != BEST_REBUILT)
        close = [name for name, mean in rules if abs(mean - centre) <= SLASH]
        if len(close) < 3:
            return rows
        return [
            (f"{name} and {len(close) - 1} more" if name == self.near else name, values, written)
            for name, values, written in rows
            if name == self.near or name not in close
        ]

    def draw(self, table: Table) -> Figure:
        """Return the figure."""
        rows = self.rows(table)
        extra = sum(name.count("\n") for name, *_ in rows)
        figure, [axis] = drawing(
            1, 1, 0.75 + (0.16 + 0.07 * len(self.series)) * len(rows) + 0.07 * extra
        )
        for number, name in enumerate(self.series):
            shift = (number - (len(self.series) - 1) / 2) * min(0.28, 0.84 / len(self.series))
            for row, (_, values, _) in enumerate(rows):
                mean, low, high = values[number]
                is_known = not math.isnan(low)
                axis.errorbar(
                    mean, row + shift, xerr=[[mean - low], [high - mean]] if is_known else None,
                    color=SERIES[number], marker=MARKS[number], markersize=4.5, linewidth=1.6,
                    label=name if not row else None,
                )  # fmt: skip
        for row, (*_, written) in enumerate(rows):
            axis.annotate(
                written, (1, row), xycoords=("axes fraction", "data"),
                xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=TEXT,
            )  # fmt: skip
        axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        if len(self.names) > 1:  # Their columns, above the names.
            axis.annotate(
                ", ".join(table.columns[i].head for i in self.names), (0, 1),
                xycoords="axes fraction", xytext=(-4, 1), textcoords="offset points", ha="right",
                fontsize=6.5, color=TEXT,
            )  # fmt: skip
        axis.set_xlabel(self.axis, fontsize=8, color=TEXT)
        if self.log:
            axis.set_xscale("log" if self.log is True else self.log)
            axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.05)
        legend(figure, axis)
        return figure


@dataclass(frozen=True, slots=True)
class Curves:
    """A panel per value of the first column: a line per series over the second column."""

    column: str
    """Column with one number per series."""
    series: Sequence[str]
    x_axis: str
    axis: str
    log_y: bool = True

    def draw(self, table: Table) -> Figure:
        """Return the figure."""
        lines: dict[str, list[list[Point]]] = {}
        places = table.values(table.columns[1].name)
        for row, x, figures in zip(table.rows, places, table.numbers(self.column), strict=True):
            panel = lines.setdefault(str(row[0]), [[] for _ in self.series])
            for line, y in zip(panel, figures, strict=True):
                line.append((x.mean, y.mean, y.mean, y.mean))
        return panel_lines(lines, self.series, (self.x_axis, self.axis), log_y=self.log_y)


def panel_lines(
    panels: Mapping[str, Sequence[Sequence[Point]]],
    series: Sequence[str],
    axes: tuple[str, str],
    log_y: bool = False,
) -> Figure:
    """Return a figure with two panels a row."""
    from matplotlib.ticker import LogLocator, NullLocator

    num_rows = math.ceil(len(panels) / 2)
    figure, places = drawing(num_rows, min(len(panels), 2), 0.6 + 1.3 * num_rows)
    for axis in places[len(panels) :]:
        axis.remove()
    for number, (name, lines) in enumerate(panels.items()):
        axis = places[number]
        for place, points in enumerate(lines):
            x, y, low, high = zip(*points, strict=True)
            axis.fill_between(x, low, high, color=SERIES[place], alpha=0.25, linewidth=0)
            # Earlier lines are wider, so that all are visible where lines coincide.
            width = 1.2 + 1.2 * (len(lines) - 1 - place) / max(1, len(lines) - 1)
            axis.plot(
                x, y, color=SERIES[place], linewidth=width, label=series[place],
                marker=MARKS[place], markevery=-(-len(x) // 8), markersize=2 * width,
                linestyle=DASHES[place],
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        if len(x) <= 8:
            axis.set_xticks(x[:: 1 + (len(x) > 2)])
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.xaxis.set_minor_locator(NullLocator())
        if log_y:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(10, (1, 3)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(name, fontsize=8, color=TEXT, loc="left")
        if number >= len(panels) - 2:
            axis.set_xlabel(axes[0], fontsize=8, color=TEXT)
        if number % 2 == 0:
            axis.set_ylabel(axes[1], fontsize=8, color=TEXT)
        axis.tick_params(which="both", colors=TEXT, labelsize=7, length=0)
    legend(figure, places[0])
    return figure


def svg(figure: Figure) -> str:
    """Return a drawing as SVG whose colours follow those of the page."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "results", "svg.fonttype": "none"}):
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in LIGHT_AND_DARK.items()
        for kind in ("fill", "stroke")
    )
    dark = f"@media (prefers-color-scheme: dark) {{{rules}}}"
    style = f"<style>text{{font-family:sans-serif}}{dark}</style>"
    text = re.sub(r"(<svg [^>]*>)", lambda found: found[1] + style, file.getvalue(), count=1)
    for unused in (
        r"<!DOCTYPE[^>]*>", r"<metadata>.*?</metadata>", r"<!--.*?-->", r"\s*<g id=[^>]*/>",
        r" font-family: [^;]*;", r' transform="rotate\(-0 [^"]*"',
    ):  # fmt: skip
        text = re.sub(unused, "", text, flags=re.S)
    in_hundredths = r' (d|x|y|transform)="[^"]*"'
    text = re.sub(in_hundredths, lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text)


class TableFigure(Protocol):
    """Figure of a table."""

    @property
    def axis(self) -> str:
        """Label of its axis."""

    def draw(self, table: Table) -> Figure:
        """Return the figure of ``table``."""


class Section(NamedTuple):
    """One result: its table, finding and figure."""

    part: str
    """Name of the part in ``parts.toml``."""
    table: Callable[[], Table]
    finding: Callable[[Table], str]
    """Returns the sentence with the result."""
    figure: TableFigure
    cells: Callable[[], str] | None = None
    """Returns traces, sizes and seeds below the figure of a report."""


def cells_of(cells: Iterable[tuple[str, Any]]) -> str:
    """Return the sentence with the sizes, GiB, of each trace, without parameters of generators."""
    kept, found = [cell for cell in cells if cell[1]], dict[str, list[str]]()
    for trace, of in kept:
        found.setdefault(trace.partition("?")[0], []).extend(f"{gib:g}" for gib in of)
    sizes = {name: [*dict.fromkeys(of)] for name, of in found.items()}
    short = (", ".join(of) if len(of) < 5 else f"{of[0]} to {of[-1]}" for of in sizes.values())
    listed = "; ".join(f"`{name}` {text}" for name, text in zip(sizes, short, strict=True))
    num_cells = sum(map(len, found.values()))
    return f"{num_cells} cells of {len(kept)} traces (memory in GiB): {listed}."


class Range(NamedTuple):
    """Means of a column: lowest, highest, largest absolute value, mean, and row of the highest."""

    low: float
    high: float
    most: float
    mean: float
    top: Sequence[str]


def says(sentence: str, timed: str = "", **keys: str) -> Callable[[Table], str]:
    """Return the finding ``sentence``. Each name of ``keys`` is the ``Range`` of that column, and
    ``cpu`` the processor of the result file ``timed``."""

    def of_column(table: Table, key: str) -> Range:
        rows = zip(table.values(key), table.texts(), strict=True)
        known = [(one.mean, row) for one, row in rows if not math.isnan(one.mean)]
        found = [mean for mean, _ in known]
        return Range(min(found), max(found), max(map(abs, found)), fmean(found),
                     max(known, key=lambda one: one[0])[1])  # fmt: skip

    def finding(table: Table) -> str:
        found = {name: of_column(table, key) for name, key in keys.items()}
        return sentence.format(cpu=processor(timed) if timed else "", **found)

    return finding
