"""The results page: a finding, a figure and a folded table per section, all from result files.

``results_page.md`` is the template. Each ``<!-- result: NAME -->`` becomes the section of that
name: the finding in one sentence, the figure, the command, and the table in ``<details>``. The
figures are SVG files with colours for light and dark pages. They are drawn from the same tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple

from experiments import provenance
from experiments.benchmarks import second_turn
from experiments.provenance import ROOT
from experiments.studies import (
    ablation,
    admission,
    capacity,
    closed_loop,
    compare,
    default,
    leaderboard,
    overload,
    router,
    tiers,
    yardsticks,
)  # fmt: skip
from experiments.studies.common import (
    BEST_REBUILT,
    BOUND,
    DEFAULT,
    LRU_ADAPTIVE,
    SEEDS,
    YARDSTICKS,
    Records,
    grouped,
    references,
)
from experiments.tables import Cell, Column, Table
from hybridcache.lab.board import BUILT_IN, Split
from hybridcache.lab.intervals import Interval, interval, paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = ROOT / "experiments" / "results_page.md"
RIVAL = " beside llama.cpp"
SHAREGPT_CAUSES = ("never_seen", "kv_evicted", "checkpoint_evicted", "never_checkpointed")
SHAREGPT_POLICIES = ("survival", "lru", "marconi")
HITS = Column("token hit rate", "%")
RATIO = Column("TTFT", "ratio", ".2f")
VERBS = ("match", "insert")
"""Operations of the tree whose growth is shown."""
SLASH = 1.0
"""Points within which policies share one row of a figure."""
SIZES = {"small memory": 0.2, "medium": 0.4, "large": 0.6}
"""Places on the axis of memory of the sizes in the table of capacity."""

# --- Tables -------------------------------------------------------------------------------------


def records_of(name: str) -> Records:
    """Return the records of a result file without its provenance."""
    return provenance.read_json_lines(provenance.RESULTS / f"{name}.jsonl")[1]


def default_speed_table() -> Table:
    """Return the comparison of the default policies with LRU, at sizes where both evict."""
    columns = [Column("trace"), Column("GiB", form="g"), Column("hits: default pair", "%")]
    columns += [Column("LRU with fixed rules", "%"), Column("CPU time", "ratio", ".2f")]
    return Table(columns, [
        [one["trace"], one["gib"], 100 * one["default_token_hit_rate"],
         100 * one["lru_token_hit_rate"], one["ratio"]]
        for one in records_of("bench_simulate_default")
    ])  # fmt: skip


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
            (default.Job("", cell.spec, None, (gib,), rate=rate).label, gib)
            for cell in split.cells
            for gib, rate in cell.loops
        ]
    if any((trace, seed, gib) not in cells for trace, gib in wanted for seed in split.seeds):
        return {}
    return {
        name: [
            fmean(cells[trace, seed, gib][name] for trace, gib in wanted) for seed in split.seeds
        ]
        for name in (BEST_REBUILT, BOUND)
    }


def hints_table() -> Table:
    """Return the gain from hints, with systems that do not get them and the bound."""
    table = compare.hints_table(records_of("study_hints"))
    found = yardstick_rates(Split.load().subset(num_seeds=SEEDS))
    more = [[name, interval(of), None] for name, of in found.items()]
    return Table(table.columns, [*table.rows, *more])


def leaderboard_table() -> Table:
    """Return the leaderboard of the built-in policies, with the best rebuilt systems and the
    bound."""
    board = leaderboard.board_of(records_of("leaderboard"), Split.load().subset(num_seeds=SEEDS))
    rows: list[list[Cell]] = [
        [one.name, one.served, one.served_difference, one.ttft_ratio, one.hit_rate, one.difference,
         None if one.worst is None else one.worst[0], None if one.lost is None else one.lost[0],
         one.of_plan]
        for one in board.rows()
        if one.name in BUILT_IN
    ]  # fmt: skip
    reference = board.split.reference
    loops, replays = (yardstick_rates(board.split, is_closed) for is_closed in (True, False))
    served = board.loops(reference, "token_hit_rate")
    assert served is not None
    own = [of.mean(axis=1).tolist() for of in (100 * served, board.replays(reference))]
    for name in loops | replays:
        row: list[Cell] = [name]
        for found, rates_of_first in zip((loops, replays), own, strict=True):
            rates = found.get(name)
            row += [interval(rates), paired(rates, rates_of_first)] if rates else [None] * 2
            row += [None]
        rows.append([*row, None, None])
    less = f"less {reference}"
    columns = [Column("policy"), Column("closed loop: hits", "%"), Column(less, "points")]
    columns += [Column("mean TTFT", "ratio", ".2f"), Column("replay: hits", "%")]
    columns += [Column(f"replay: {less}", "points"), Column("worst cell", "points")]
    return Table([*columns, Column("cells lost", form="d"), Column("% of plan")], rows)


def pairs_table(split: str = "evaluation") -> Table:
    """Return the pairs in replays, or in the ``closed loop``, with the best rebuilt systems and the
    bound."""
    records = [one for one in records_of(default.NAME) if one["split"] == split]
    table = default.pairs_table(records, split)
    compared = Split.load().subset(num_seeds=SEEDS)
    ours = grouped([one for one in records if one["pair"] == DEFAULT], "seed")
    more: list[list[Cell]] = []
    for name, rates in yardstick_rates(compared, split == "closed loop").items():
        own = [fmean(100 * one["token_hit_rate"] for one in ours[seed]) for seed in compared.seeds]
        more.append([name, interval(rates), paired(rates, own)])
        more[-1] += [None] * (len(table.columns) - 3)
    return Table(table.columns, [*table.rows, *more])


def published_table() -> Table:
    """Return both pairs on published traces, with LRU under the default placement, the best rebuilt
    system and the bound."""
    records, cells = records_of(default.NAME), yardstick_cells()
    table = default.published_table(records)
    files = grouped([one for one in records if one["seed"] is None], "trace", "gib")
    return Table([*table.columns, *references()], [
        [*row, *(cells.get((trace, None, gib), {}).get(name) for name in YARDSTICKS)]
        for (trace, gib), row in zip(files, table.rows, strict=True)
    ])  # fmt: skip


def losses_table() -> Table:
    """Return the losses in both memories, as far as they were run."""
    records = [*records_of(default.NAME)]
    if (provenance.RESULTS / f"{default.MEMORIES}.jsonl").exists():
        records += records_of(default.MEMORIES)
    return default.losses_table(records, yardstick_cells())


def capacity_table() -> Table:
    """Return the gain of the default pair over LRU with fixed rules, at three sizes, and hit rates
    at the middle one."""
    rows: list[list[Cell]] = []
    cells = yardstick_cells(yardsticks.CAPACITY)
    for one in records_of("study_capacity"):
        if "gain" in one:
            places = [round(part * (len(one["gib"]) - 1)) for part in SIZES.values()]
            middle = places[1]
            gains = [{f"{one['gib'][at]:.3g} GiB": Interval(*one["gain"][at])} for at in places]
            rates = cells.get((one["trace"], 0, one["gib"][middle]), {})
            row = [one["trace"], one["seeds"], *gains, 100 * one["token_hit_rate"][middle]]
            rows.append([*row, *map(rates.get, YARDSTICKS)])
    if not rows:
        raise FileNotFoundError("study_capacity.jsonl has no intervals")
    columns = [
        Column("trace"),
        Column("seeds", form="d"),
        *(Column(f"gain, {name}", "points") for name in SIZES),
    ]
    return Table([*columns, Column("hits, medium: default pair", "%"), *references()], rows)


def tree_table() -> Table:
    """Return the time of each operation over the size of the tree, in microseconds."""
    rows: list[list[Cell]] = []
    for one in records_of("bench_tree"):
        if "us_without_allocation" in one:
            size, kind = one["measure"].replace(",", "").split(" ", 1)
            times = [one["verb_us_median"][verb] for verb in VERBS] + [one["eviction_us_per_item"]]
            rows.append([f"by {kind}", int(size) / 1000, times])
    times_of = Column(f"{', '.join(VERBS)}, eviction: microseconds")
    return Table([Column("growth"), Column("thousands", form="g"), times_of], rows)


def linear_layers_table() -> Table:
    """Return the speed of the CPU's linear layers, one row per method, dtype and threads."""
    records = [one for one in records_of("bench_cpu_kernels") if "layer" in one]
    counts = sorted({one["rows"] for one in records})
    rows = []
    for key, of in grouped(records, "layer", "dtype", "threads").items():
        speeds = {one["rows"]: one["gflop_s"] for one in of}
        rows.append([*key, *(speeds[count] for count in counts)])
    columns = [Column(name, form="d") for name in ("kernel", "dtype", "threads")]
    return Table([*columns, *(Column(f"rows: {n}", "GFLOP/s", ".0f") for n in counts)], rows)


def decays_table() -> Table:
    """Return the time per token of each recurrence by mean decay, and the largest ratio."""
    records = [one for one in records_of("bench_cpu_kernels") if "kernel" in one]
    rows = []
    for kernel, of in grouped(records, "kernel").items():
        times = [one["us_per_token"] for one in of]
        rows.append([kernel, *times, max(times) / times[0]])
    columns = [Column("microseconds per token")]
    columns += [Column(f"{decay:g}") for decay in dict.fromkeys(one["decay"] for one in records)]
    return Table([*columns, Column("worst / first", form=".2f")], rows)


def llama_table() -> Table:
    """Return the speed of the engine and of llama.cpp."""
    columns = [Column(name) for name in ("measure", "model", "dtype", "unit")]
    columns += [Column(name, form=".4g") for name in ("engine", "llama.cpp")]
    return Table([*columns, Column("ratio", form=".2f")], [
        [one["measure"].removesuffix(RIVAL), one["size"], one["dtype"], one["unit"],
         one["ours"], one["theirs"], one["ratio"]]
        for one in records_of("bench_llama")
        if one.get("measure", "").endswith(RIVAL)
    ])  # fmt: skip


def sharegpt_table() -> Table:
    """Return hits and times of each cache of the engine on conversations."""
    columns = [Column("cache"), Column("GiB", form="g"), HITS, Column("hit tokens", form=",")]
    columns += [Column(cause.replace("_", " "), form=",") for cause in SHAREGPT_CAUSES]
    return Table([*columns, Column("mean TTFT", "ms", ".0f"), Column("p95", "ms", ".0f")], [
        [one["cache"], one["gib"], 100 * one["saved_share"], one["hit_tokens"],
         *(one["lost_tokens"][cause] for cause in SHAREGPT_CAUSES),
         *(1000 * one[name] for name in ("ttft_mean_s", "ttft_p95_s"))]
        for one in records_of("sharegpt")
    ])  # fmt: skip


def sharegpt_simulated_table() -> Table:
    """Return token hit rates on ShareGPT's lengths, one row per size."""
    rates = Column(f"{', '.join(SHAREGPT_POLICIES)}: {HITS.head}")
    return Table([Column("trace"), Column("GiB", form=".3g"), rates], [
        ["ShareGPT", gib, [100 * one["saved_share"] for one in of]]
        for gib, of in grouped(records_of("sharegpt_simulated"), "gib").items()
    ])  # fmt: skip


def checkpoint_dtype_table() -> Table:
    """Return the cost of each format on two kinds of text."""
    records = [one for one in records_of("study_checkpoint_dtype") if "text" in one]
    columns = [Column("format"), Column("KL on code", "millionths of a nat", ".0f")]
    return Table([*columns, Column("KL on problems", "millionths of a nat", ".0f")], [
        [dtype, *(1e6 * one["kl_mean"] for one in of)]
        for dtype, of in grouped(records, "checkpoint_dtype").items()
        if dtype != "auto"
    ])  # fmt: skip


def speculation_table() -> Table:
    """Return the speed of each drafter in times of no drafts, for each number of streams."""
    records = [one for one in records_of("speculation") if one["draft"] != "none"]
    columns = [Column("workload"), Column("drafter")]
    for streams in ("1 stream", "8 streams"):
        columns += [Column(streams, "ratio", ".2f"), Column("acceptance length")]
    return Table(columns, [
        [*cell, *(of for one in found for of in (one["ratio"], one["acceptance_len"] or 1))]
        for cell, found in grouped(records, "workload", "draft").items()
    ])  # fmt: skip


def second_turn_records(plans: Sequence[second_turn.Plan]) -> Records:
    """Return the records of ``plans`` in their order. Raises FileNotFoundError if there is none."""
    records = records_of("second_turn")
    wanted = [
        plan.fields | {"case": case, "side": side}
        for plan in plans
        for case in plan.cases
        for side in second_turn.RIVALS
    ]
    found = [one for fields in wanted for one in records if fields.items() <= one.items()]
    if not found:
        raise FileNotFoundError("second_turn.jsonl has no records of these plans")
    return found


def not_run(plans: Sequence[second_turn.Plan]) -> str:
    """Return a sentence with the cases of ``plans`` that a server has not run, or an empty text."""
    absent = []
    records = second_turn_records(plans)
    for plan in plans:
        of_plan = [one for one in records if plan.fields.items() <= one.items()]
        ran = {(one["case"], one["side"]) for one in of_plan}
        sides = second_turn.RIVALS
        if cases := [c for c in plan.cases if not all((c, side) in ran for side in sides)]:
            size = f"{plan.model}, {plan.num_tokens} tokens, {plan.at_once} at once"
            absent.append(f"{', '.join(cases)} ({size})")
    return f" Not run yet on both servers: {'; '.join(absent)}." if absent else ""


def second_turn_table(
    plans: Sequence[second_turn.Plan] = second_turn.PUBLISHED[:1], without: str = "hits"
) -> Table:
    """Return tokens read again and times of both servers. One plan has no columns of its size."""
    table = second_turn.table(second_turn_records(plans), without)
    kept = [i for i in range(len(table.columns)) if len(plans) > 1 or not 1 <= i <= 3]
    columns = [table.columns[i] for i in kept]
    times = (table.values(f"{side}: TTFT") for side in second_turn.RIVALS)
    ratios = [ours.mean / theirs.mean for ours, theirs in zip(*times, strict=True)]
    return Table([*columns, RATIO], [
        [*(row[i] for i in kept), None if math.isnan(ratio) else ratio]
        for row, ratio in zip(table.rows, ratios, strict=True)
    ])  # fmt: skip


def processor(name: str) -> str:
    """Return the name of the processor that a result file was measured on."""
    found, _ = provenance.read_json_lines(provenance.RESULTS / f"{name}.jsonl")
    return str(found["machine"]["cpu"])


# --- Figures ------------------------------------------------------------------------------------

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
        close = [name for name, of, _ in rows if abs(of[0].mean - centre) <= SLASH]
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
                marker=MARKS[place] * (len(x) <= 8), markersize=2 * width,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        if len(x) <= 8:
            axis.set_xticks(x[::2])
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


class CapacityCurves:
    """Token hit rate over memory: the default pair and LRU with bands, LRU with the default
    placement, the best rebuilt system, and the bound."""

    axis = HITS.head

    def draw(self, table: Table) -> Figure:
        """Return the figure of the traces in the table."""
        runs = grouped(records_of("study_capacity"), "trace", "label")
        panels: dict[str, list[list[Point]]] = {}
        for name in map(str, (row[0] for row in table.rows)):
            panels[name] = []
            for [run] in (runs[name, capacity.OURS], runs[name, "lru"]):
                low, high = ([100 * rate for rate in run[limit]] for limit in ("low", "high"))
                means = [sum(limits) / 2 for limits in zip(low, high, strict=True)]
                panels[name].append(list(zip(run["gib"], means, low, high, strict=True)))
        series = ["default pair", "LRU, fixed rules"]
        cells = yardstick_cells(yardsticks.CAPACITY)
        for name, lines in panels.items() if cells else ():
            sizes = [gib for trace, _, gib in cells if trace == name]
            for one in YARDSTICKS:
                rates = [cells[name, 0, gib][one] for gib in sizes]
                lines.append(list(zip(sizes, rates, rates, rates, strict=True)))
        series += [*YARDSTICKS] * bool(cells)
        return panel_lines(panels, series, ("memory, GiB", self.axis))


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


# --- Sections -----------------------------------------------------------------------------------


class Section(NamedTuple):
    """One result: its table, finding and figure."""

    part: str
    """Name of the part in ``parts.toml``."""
    table: Callable[[], Table]
    finding: Callable[[Table], str]
    """Returns the sentence with the result."""
    figure: Dots | Curves | CapacityCurves


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


def _ranking(table: Table) -> str:
    hits, replay = table.named("closed loop: hits"), table.named("replay: hits")
    [first, second, *_] = hits
    close = sum(abs(one.mean - hits["lru"].mean) <= SLASH for one in hits.values()) - 1
    return (
        f"`{first}` hits {hits[first].mean:.1f} % in closed loops and {replay[first].mean:.1f} % "
        f"in replays; `{second}` follows with {hits[second].mean:.1f} and "
        f"{replay[second].mean:.1f} %, and {close} rules are within a point of `lru` "
        f"({hits['lru'].mean:.1f} %)."
    )


def _pairs(table: Table) -> str:
    hits = table.named(HITS.name)
    [first, second, *_] = hits
    gap = hits[first].mean - hits[second].mean
    return f"`{first}` has the most hits, {gap:.1f} points more than `{second}`."


def _ablation(table: Table) -> str:
    names = (str(row[0]) for row in table.rows)
    changes = dict(zip(names, table.means("mean change"), strict=True))
    worst = min(changes, key=lambda name: changes[name])
    constants = {name.partition(" times")[0] for name in changes if " times" in name}
    idle = sum(
        all(abs(of) < 0.1 for name, of in changes.items() if name.startswith(f"{one} "))
        for one in constants
    )
    return (
        f"The largest change is {changes[worst]:+.1f} points ({worst}). Of {len(constants)} "
        f"constants, {idle} change the mean by less than 0.1 points at 0.5 and 2 times their value."
    )


def _learning(table: Table) -> str:
    rows = {(row[0], row[1]): (row[2], row[5]) for row in table.texts()}
    [begin, change], [lru, after] = (
        [rows[since, f"`{pair}`"] for since in ("start", "change")]
        for pair in (DEFAULT, LRU_ADAPTIVE)
    )
    return (
        f"In the first 50 requests the default pair is {begin[0]} points below the best of five "
        f"pairs, from 200 to 400 {begin[1]} (`lru@adaptive` {lru[0]} and {lru[1]}). After a change "
        f"of the workload it is {change[0]} and {change[1]} points below (`lru@adaptive` "
        f"{after[0]} and {after[1]})."
    )


def _admission(table: Table) -> str:
    ratios = table.means("mean TTFT to best of `oldest` and limits")
    worst = table.texts()[ratios.index(max(ratios))]
    return (
        f"The mean TTFT of `sessions` is within 5 % of the best limit in "
        f"{sum(ratio <= 1.05 for ratio in ratios)} of {len(ratios)} cells, and at most "
        f"{max(ratios):.2f} times it ({worst[0]}, {worst[1]} sessions/s)."
    )


def _sharegpt(table: Table) -> str:
    none, *_, best = table.texts()
    return (
        f"In the engine, checkpoints save {best[2]} % of the prompt tokens of conversations, and "
        f"the mean TTFT is {best[-2]} instead of {none[-2]} ms; KV alone saves nothing."
    )


def _sharegpt_simulated(table: Table) -> str:
    rates = table.numbers("survival")
    gain, at = max((of[0].mean - of[1].mean, row[1])
                   for of, row in zip(rates, table.texts(), strict=True))  # fmt: skip
    return f"`survival` hits up to {gain:.1f} points more than `lru` (at {at} GiB)."


def _router(table: Table) -> str:
    best: dict[str, Sequence[str]] = {}
    for row in table.texts():
        best[row[0]] = max(best.get(row[0], row), row, key=lambda row: float(row[2]))
    names = [row[1] for row in best.values()]
    most = max(names, key=names.count)
    return f"{most} has the most hits in {names.count(most)} of {len(names)} conditions."


def _speculation(table: Table) -> str:
    best = max(table.texts(), key=lambda row: float(row[2]))
    slower = sum(ratio < 1 for ratio in table.means("8 streams"))
    return (
        f"Drafts decode up to {best[2]} times as fast (`{best[1]}` on {best[0]}, one stream); with "
        f"eight streams, where most steps have no drafts, {slower} of {len(table.rows)} cells are "
        "slower than without a drafter."
    )


def _capacity(table: Table) -> str:
    gains = [gain for size in SIZES for gain in table.means(f"gain, {size}")]
    return (
        f"The default pair gains up to {max(gains):.1f} points over LRU with fixed rules where "
        f"memory is short, and loses at most {max(-min(gains), 0):.1f}."
    )


def _overload(table: Table) -> str:
    hits, seconds = ([table.means(f"{name}: `{policy}`")[-1] for policy in overload.POLICIES]
                     for name in ("hits, %", "mean TTFT, s"))  # fmt: skip
    return (
        f"In the last window of {table.rows[-1][0]}, `sessions` hits {hits[1]} % and `oldest` "
        f"{hits[0]} %; the mean TTFT is {seconds[1]} and {seconds[0]} s "
        f"(`{overload.POLICIES[-1]}`: {hits[-1]} %, {seconds[-1]} s)."
    )


def _tree(table: Table) -> str:
    growth: dict[Cell, list[float]] = {}
    for row, us in zip(table.rows, table.means("match"), strict=True):
        growth.setdefault(row[0], []).append(us)
    ratios = [of[-1] / of[0] for of in growth.values()]
    return f"A match in a tree 100 times as large takes at most {max(ratios):.1f} times as long."


def _second_turn(table: Table) -> str:
    ours, theirs = (table.named(f"{side}: read again") for side in second_turn.RIVALS)
    top = max(ours, key=lambda row: ours[row].mean)
    ratios = table.means(RATIO.name)
    found = (
        f"On one {processor('second_turn')}, the engine reads up to {ours[top].mean:.0f} tokens of "
        f"a request again ({top}), {median(one.mean for one in ours.values()):.0f} in the median "
        f"row, and llama-server up to {max(one.mean for one in theirs.values()):.0f}."
    )
    if ratios:
        low, high = min(ratios), max(ratios)
        found += f" Its first token takes {low:.2f} to {high:.2f} times as long as llama-server's."
    if missing := len(table.rows) - len(ratios):
        found += f" {missing} of {len(table.rows)} rows have no times yet."
    return found + not_run(second_turn.PUBLISHED[:1])


def _second_turns(table: Table) -> str:
    ours, theirs = (max(table.means(f"{side}: read again")) for side in second_turn.RIVALS)
    return (
        "With experts, more clients, scarce memory and longer prompts, the engine reads up to "
        f"{ours:.0f} tokens of a request again, and llama-server up to {theirs:.0f}."
        + not_run(second_turn.PUBLISHED[1:])
    )


def study(name: str, table: Callable[[Records], Table]) -> Callable[[], Table]:
    """Return the function that makes the table of a result file."""
    return lambda: table(records_of(name))


SHOWN = {LRU_ADAPTIVE: LRU_ADAPTIVE, "best rebuilt": BEST_REBUILT, BOUND: BOUND}
"""Columns of references in figures."""
POINTS = "{gain.low:.1f} to {gain.high:.1f} points"
READ_AGAIN = {side: f"{side}: read again" for side in second_turn.RIVALS}
SECTIONS = {
    "leaderboard": Section(
        "leaderboard", leaderboard_table, _ranking,
        Dots({"closed loop": "closed loop: hits", "replay": "replay: hits"}, HITS.head, near="lru"),
    ),
    "default": Section("default", pairs_table, _pairs, Dots({"replay": HITS.name}, HITS.head)),
    "pairs in closed loop": Section(
        "default", partial(pairs_table, "closed loop"),
        _pairs, Dots({"closed loop": HITS.name}, HITS.head),
    ),
    "losses": Section(
        "default", losses_table,
        says("The default pair loses {mean.low:.1f} to {mean.high:.1f} points on average to the "
             "best pair of each cell, and {worst.high} at most.",
             mean="mean loss", worst="worst cell"),
        Dots({"mean": "mean loss", "worst cell": "worst cell"},
             "loss to the best pair of a cell, points"),
    ),
    "ablation": Section(
        "ablation", study(ablation.NAME, ablation.table), _ablation,
        Dots({"mean": "mean change", "worst cell": "worst cell"},
             "change of the token hit rate, points", log="symlog", least=0.1),
    ),
    "learning": Section(
        "ablation", study(ablation.NAME, ablation.learning_table), _learning,
        Dots({"first 50": "regret to request 50", "200 to 400": "regret to request 400"},
             "points below the best pair of a cell", (0, 1)),
    ),
    "published": Section(
        "default", published_table,
        says(f"On published traces the default pair gains {POINTS} over LRU with fixed rules.",
             gain="gain"),
        Dots({"default pair": "hits: default pair", "LRU, fixed rules": "LRU with fixed rules"}
             | SHOWN, HITS.head, (0, 1)),
    ),
    "default speed": Section(
        "default-speed", default_speed_table,
        says("The default pair takes {time.low:.2f} to {time.high:.2f} times the CPU time of LRU "
             "per simulated request.", time="CPU time"),
        Dots({"default pair": "CPU time"}, "CPU time of a simulated request, times that of LRU",
             (0, 1)),
    ),
    "admission": Section(
        "admission", study("admission", admission.table), _admission,
        Curves("mean TTFT, s", ("oldest", "sessions", "best fixed limit", "best rebuilt"),
               "sessions/s", "mean TTFT, s"),
    ),
    "overload": Section(
        "overload", study("overload", overload.table), _overload,
        Dots({policy: f"mean TTFT, s: `{policy}`" for policy in overload.POLICIES}
             | {"best rebuilt": "mean TTFT, s: best rebuilt system"}, "mean TTFT, s", (0, 1)),
    ),
    "tree": Section(
        "tree", tree_table, _tree,
        Curves("match", (*VERBS, "eviction"), "thousands", "microseconds", log_y=False),
    ),
    "closed loop": Section(
        "closed-loop", study("closed_loop", closed_loop.table),
        says("The simulator forecasts the engine's hit rate within {hits.most:.1f} points and its "
             "mean TTFT within {ttft.most:.0f} %.",
             hits="forecast less engine", ttft="mean TTFT of the forecast"),
        Dots({"forecast less engine": "forecast less engine"}, "points of token hit rate", (0, 1)),
    ),
    "conditions": Section(
        "conditions", study("study_conditions", compare.conditions_table),
        says(f"The default pair gains {POINTS} over LRU with fixed rules.", gain="gain"),
        Dots({"default pair": "default pair", LRU_ADAPTIVE: LRU_ADAPTIVE,
              "LRU, fixed rules": "lru, fixed rules"} | SHOWN, HITS.head, (1,)),
    ),
    "capacity": Section("capacity", capacity_table, _capacity, CapacityCurves()),
    "hints": Section(
        "hints", hints_table, says(f"Boundary hints raise the hit rate by {POINTS}.", gain="gain"),
        Dots({"with hints": HITS.name}, HITS.head),
    ),
    "tiers": Section(
        "tiers", study("study_tiers", tiers.over_seeds),
        says("4 GiB on the device with 16 GiB of host memory save {both.mean:.1f} % of the prefill "
             "time that 20 GiB on the device save, on average over the traces; 4 GiB alone save "
             "{alone.mean:.1f} %.",
             both="4 GiB and", alone="4 GiB"),
        Dots({"4 GiB + 16 GiB host": "4 GiB and", "4 GiB alone": "4 GiB",
              "best rebuilt, 20 GiB": f"{BEST_REBUILT}, "}, "saved prefill time, % of 20 GiB"),
    ),
    "grid": Section(
        "grid", study("study_grid", compare.grid_table),
        says(f"A grid of 16 in place of 64 changes the hit rate by {POINTS}, most for "
             "`{gain.top[0]}`.", gain="gain of 16"),
        Dots({"grid of 16": "gain of 16", "grid of 32": "gain of 32"},
             "gain over a grid of 64, points", (0, 1)),
    ),
    "arena": Section(
        "arena", study("study_arena", compare.arena_table),
        says("One arena changes the hit rate of a workload by {change.low:+.2f} to "
             "{change.high:+.2f} points.", change="arena"),
        Dots({"mean": "arena"}, "arena less ideal, points"),
    ),
    "sharegpt": Section(
        "sharegpt", sharegpt_table, _sharegpt,
        Dots({"saved": HITS.name}, "saved prompt tokens, %", (0, 1)),
    ),
    "sharegpt simulated": Section(
        "sharegpt-simulated", sharegpt_simulated_table, _sharegpt_simulated,
        Curves("survival", SHAREGPT_POLICIES, "memory, GiB", HITS.head, log_y=False),
    ),
    "router": Section(
        "router", study("study_router", router.table), _router,
        Dots({"hits": HITS.name}, HITS.head, (0, 1)),
    ),
    "checkpoint dtype": Section(
        "checkpoint-dtype", checkpoint_dtype_table,
        says("No format of checkpoints changes the distribution of the next token by more than "
             "{kl.high:.0f} millionths of a nat on code (`{kl.top[0]}`).", kl="KL on code"),
        Dots({"code": "KL on code", "problems": "KL on problems"},
             "KL, millionths of a nat per token"),
    ),
    "speculation": Section(
        "speculation", speculation_table, _speculation,
        Dots({"1 stream": "1 stream", "8 streams": "8 streams"}, "speed, times no drafts", (0, 1)),
    ),
    "linear layers": Section(
        "cpu-kernels", linear_layers_table,
        says("On one {cpu}, the fastest linear layer (8,192 x 2,048, rows: 512, threads: "
             "{speed.top[2]}) is `{speed.top[0]}` with {speed.high:.0f} GFLOP/s.",
             "bench_cpu_kernels", speed="rows: 512"),
        Dots({"512 rows": "rows: 512", "1 row": "rows: 1"}, "GFLOP/s (logarithmic)", (0, 1, 2),
             log=True),
    ),
    "decays": Section(
        "cpu-kernels", decays_table,
        says("On one {cpu}, no decay takes more than {worst.high:.2f} times as long as -0.01 "
             "(`{worst.top[0]}`).", "bench_cpu_kernels", worst="worst / first"),
        Dots({"ratio": "worst / first"}, "slowest decay, times the first"),
    ),
    "second turn": Section(
        "second-turn", second_turn_table, _second_turn,
        Dots(READ_AGAIN, "tokens read again per request"),
    ),
    "second turn sizes": Section(
        "second-turn", partial(second_turn_table, second_turn.PUBLISHED[1:], "memory"),
        _second_turns, Dots(READ_AGAIN, "tokens read again per request", (0, 1, 2, 3)),
    ),
    "llama": Section(
        "llama", llama_table,
        says("On one {cpu}, the engine has {ratio.low:.2f} to {ratio.high:.2f} times the speed of "
             "llama.cpp in 16, 8 and 4 bits.", "bench_llama", ratio="ratio"),
        Dots({"ratio": "ratio"}, "speed, times llama.cpp", (1, 2, 0)),
    ),
}  # fmt: skip


def render(name: str, section: Section, figures: dict[Path, str], origin: str) -> str:
    """Return a section as Markdown with the ``origin`` of its results, and add its figure to
    ``figures``."""
    try:
        table = section.table()
    except FileNotFoundError as error:
        return f"No results yet: `{Path(error.filename or str(error)).name}`."
    path = provenance.FIGURES / f"results_{name.replace(' ', '_')}.svg"
    alt = f"Figure of {section.figure.axis}, by {table.columns[0].name}."
    figures[path] = svg(section.figure.draw(table))
    return "\n\n".join(
        (
            f"**{section.finding(table)}**",
            f"![{alt}](../experiments/figures/{path.name})",
            f"`python -m experiments.reproduce --part {section.part}` (commit {origin})",
            f"<details><summary>Table</summary>\n\n{table.markdown()}\n\n</details>",
        )
    )


def page(template: Path, parts: Table, origin: Callable[[str], str]) -> tuple[str, dict[Path, str]]:
    """Return the page and its figures by path. ``parts`` is the table of all parts, and ``origin``
    returns commit and date of a part's results by its name."""
    text = template.read_text(encoding="utf-8")
    figures: dict[Path, str] = {}
    for name, section in SECTIONS.items():
        mark = f"<!-- result: {name} -->"
        if mark in text:
            text = text.replace(mark, render(name, section, figures, origin(section.part)))
    return text.replace("<!-- result: parts -->", parts.markdown()), figures
