"""The results page: a finding, a figure and a folded table per section, all from result files.

``results_page.md`` is the template. Each ``<!-- result: NAME -->`` becomes the section of that
name: the finding in one sentence, the figure, the command, and the table in ``<details>``. The
figures are SVG files with colours for light and dark pages. They are drawn from the same tables.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from experiments import provenance
from experiments.benchmarks import second_turn
from experiments.provenance import ROOT
from experiments.studies import (
    ablation,
    admission,
    arena,
    capacity,
    closed_loop,
    conditions,
    default,
    grid,
    hints,
    overload,
    router,
    shadows,
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
    Table,
    grouped,
)
from hybridcache.lab.intervals import Interval, interval, paired
from hybridcache.lab.leaderboard import BUILT_IN, Board, Scores, Split

TEMPLATE = ROOT / "experiments" / "results_page.md"
INTERVAL = re.compile(r"(-?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]")
RIVAL = " beside llama.cpp"
SHAREGPT_CAUSES = ("never_seen", "kv_evicted", "checkpoint_evicted", "never_checkpointed")
SHAREGPT_POLICIES = ("survival", "lru", "marconi")
HITS = "token hit rate, %"
VERBS = ("match", "insert")
"""Operations of the tree whose growth is shown."""
RATIO = "TTFT, ratio"
SLASH = 1.0
"""Points within which policies share one row of a figure."""

# --- Tables -------------------------------------------------------------------------------------


def records_of(name: str) -> list[dict[str, Any]]:
    """Return the records of a result file without its provenance."""
    _, records = provenance.read_json_lines(provenance.RESULTS / name)
    return records


def default_speed_table() -> Table:
    """Return the comparison of the default policies with LRU, at sizes where both evict."""
    rows = [
        [
            record["trace"],
            f"{record['gib']:g}",
            f"{100 * record['default_token_hit_rate']:.1f}",
            f"{100 * record['lru_token_hit_rate']:.1f}",
            f"{record['ratio']:.2f}",
        ]
        for record in records_of("bench_simulate_default.jsonl")
    ]
    return (["trace", "GiB", "default, %", "LRU with fixed rules, %", "CPU time, ratio"], rows)


def yardstick_records() -> list[dict[str, Any]]:
    """Return the records of the yardsticks, or none if they were not run."""
    is_known = (provenance.RESULTS / f"{yardsticks.NAME}.jsonl").exists()
    return records_of(f"{yardsticks.NAME}.jsonl") if is_known else []


def yardstick_rates(split: Split, is_closed: bool = False) -> dict[str, list[float]]:
    """Return the rate of the best rebuilt system and the bound, %, as a mean over the replays of
    ``split``, or its closed loops, for each of its seeds; empty unless all of them were run."""
    cells = yardsticks.by_cell(yardstick_records())
    wanted = [(trace, gib) for trace, sizes in split.gib.items() for gib in sizes]
    if is_closed:
        wanted = [
            (default.Job("", trace, None, (gib,), rate=rate).label, gib)
            for trace, loops in split.closed_loop.items()
            for gib, rate in loops
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
    header, rows = hints.table(records_of("study_hints.jsonl"))
    split = Split.load().head(SEEDS)
    return header, [
        *rows,
        *([name, str(interval(of)), "-"] for name, of in yardstick_rates(split).items()),
    ]


def leaderboard_table() -> Table:
    """Return the leaderboard of the built-in policies, with the best rebuilt systems and the
    bound."""
    records = records_of("leaderboard.jsonl")
    scores = tuple(map(Scores.from_record, records))
    board = Board(Split.load().head(SEEDS), records[0]["reference"], scores)
    rows = [row.cells() for row in board.rows() if row.name in BUILT_IN]
    replays, loops = (yardstick_rates(board.split, is_closed) for is_closed in (False, True))
    for name in replays | loops:
        row = [name]
        for found, is_closed in ((loops, True), (replays, False)):
            cells = ["-", "-"]
            if rates := found.get(name):
                own = [
                    100 * fmean(rate for one in scores
                                if (one.rate is not None) is is_closed and one.seed == seed
                                for rate in one.rates[board.reference])
                    for seed in board.split.seeds
                ]  # fmt: skip
                cells = [str(interval(rates)), str(paired(rates, own))]
            row += [*cells, "-"] if is_closed else cells
        rows.append([*row, "-", "-"])
    return board.heads(), rows


def pairs_table(split: str = "evaluation") -> Table:
    """Return the pairs in replays, or in the ``closed loop``, with the best rebuilt systems and the
    bound."""
    records = [record for record in records_of("study_default.jsonl") if record["split"] == split]
    header, rows = default.pairs_table(records, split)
    ours = [
        record for record in records if record["pair"] == DEFAULT and record["seed"] is not None
    ]
    own = [
        fmean(100 * record["token_hit_rate"] for record in of)
        for of in grouped(ours, "seed").values()
    ]
    found = yardstick_rates(Split.load().head(SEEDS), split == "closed loop")
    more = [
        [name, str(interval(of)), str(paired(of, own)), *["-"] * (len(header) - 3)]
        for name, of in found.items()
    ]
    return header, [*rows, *more]


def published_table() -> Table:
    """Return both pairs on published traces, with LRU under the default placement, the best rebuilt
    system and the bound."""
    records = records_of("study_default.jsonl")
    header, rows = default.published_table(records)
    files = grouped([one for one in records if one["seed"] is None], "trace", "gib")
    cells = yardsticks.by_cell(yardstick_records())
    more = [cells.get((trace, None, gib), {}) for trace, gib in files]
    return [*header, *(f"{name}, %" for name in YARDSTICKS)], [
        [*row, *(f"{found[name]:.1f}" if found else "-" for name in YARDSTICKS)]
        for found, row in zip(more, rows, strict=True)
    ]


def losses_table() -> Table:
    """Return the losses in both memories, as far as they were run."""
    records = records_of("study_default.jsonl")
    if (provenance.RESULTS / f"{default.MEMORIES}.jsonl").exists():
        records += records_of(f"{default.MEMORIES}.jsonl")
    return default.losses_table(records, yardsticks.by_cell(yardstick_records()))


def shadows_table() -> Table:
    """Return the losses by choice of the pair, with those of `lru@adaptive`, the best rebuilt
    system and the bound."""
    records = records_of("study_shadows.jsonl")
    header, rows = shadows.table(records)
    cells = yardsticks.by_cell(yardstick_records())
    seeds = {trace: seed for trace, seed, _ in sorted(cells, key=lambda cell: -(cell[1] or 0))}
    more = [[name, "-"] for name in YARDSTICKS]
    for of in grouped(records, "split").values():
        for row in more:
            losses = []
            for one in of:
                found = cells.get((one["trace"], seeds.get(one["trace"]), one["gib"]), {})
                if row[0] == LRU_ADAPTIVE:
                    found = one["rates"]
                if row[0] in found and not (one["kv_share"] and row[0] == BEST_REBUILT):
                    losses.append(max(one["rates"].values()) - found[row[0]])
            row += [f"{fmean(losses):.2f}", f"{max(losses):.1f}"] if losses else ["-", "-"]
    return header, [*rows, *([*row, ""] for row in more)]


def capacity_table() -> Table:
    """Return the gain of the default pair over LRU with fixed rules, at three sizes, and hit rates
    at the middle one."""
    rows = []
    found = yardsticks.by_cell(yardstick_records(), yardsticks.CAPACITY)
    for record in records_of("study_capacity.jsonl"):
        if "gain" in record:
            places = [round(part * (len(record["gib"]) - 1)) for part in (0.2, 0.4, 0.6)]
            cells = [
                f"{record['gib'][at]:.3g} GiB: {Interval(*record['gain'][at])}" for at in places
            ]
            rates = found.get((record["trace"], 0, record["gib"][places[1]]), {})
            row = [record["trace"], str(record["seeds"]), *cells]
            row.append(f"{100 * record['token_hit_rate'][places[1]]:.1f}")
            rows.append([*row, *(f"{rates[name]:.1f}" if rates else "-" for name in YARDSTICKS)])
    if not rows:
        raise FileNotFoundError("study_capacity.jsonl has no intervals")
    header = ["trace", "seeds", "small memory", "medium", "large", "hits, medium: default pair, %"]
    return [*header, *(f"{name}, %" for name in YARDSTICKS)], rows


def tree_table() -> Table:
    """Return the time of each operation over the size of the tree, in microseconds."""
    rows = []
    for one in records_of("bench_tree.jsonl"):
        if "us_without_allocation" in one:
            size, kind = one["measure"].replace(",", "").split(" ", 1)
            times = [one["verb_us_median"][verb] for verb in VERBS] + [one["eviction_us_per_item"]]
            written = ", ".join(f"{time:.1f}" for time in times)
            rows.append([f"by {kind}", f"{int(size) / 1000:g}", written])
    return ["growth", "thousands", f"{', '.join(VERBS)}, eviction: microseconds"], rows


def linear_layers_table() -> Table:
    """Return the speed of the CPU's linear layers, one row per method, dtype and threads."""
    records = [one for one in records_of("bench_cpu_kernels.jsonl") if "layer" in one]
    counts = sorted({one["rows"] for one in records})
    rows = []
    for key, of in grouped(records, "layer", "dtype", "threads").items():
        speeds = {one["rows"]: f"{one['gflop_s']:.0f}" for one in of}
        rows.append([*map(str, key), *(speeds[count] for count in counts)])
    return ["kernel", "dtype", "threads", *(f"rows: {n}, GFLOP/s" for n in counts)], rows


def decays_table() -> Table:
    """Return the time per token of each recurrence by mean decay, and the largest ratio."""
    records = [one for one in records_of("bench_cpu_kernels.jsonl") if "kernel" in one]
    decays = list(dict.fromkeys(one["decay"] for one in records))
    rows = []
    for kernel, of in grouped(records, "kernel").items():
        times = [one["us_per_token"] for one in of]
        rows.append([kernel, *(f"{us:.1f}" for us in times), f"{max(times) / times[0]:.2f}"])
    return ["microseconds per token", *(f"{decay:g}" for decay in decays), "worst / first"], rows


def llama_table() -> Table:
    """Return the speed of the engine and of llama.cpp."""
    header = ["measure", "model", "dtype", "unit", "engine", "llama.cpp", "ratio"]
    return header, [
        [
            *(one["measure"].removesuffix(RIVAL), one["size"], one["dtype"], one["unit"]),
            *(f"{one['ours']:.4g}", f"{one['theirs']:.4g}", f"{one['ratio']:.2f}"),
        ]
        for one in records_of("bench_llama.jsonl")
        if one.get("measure", "").endswith(RIVAL)
    ]


def sharegpt_table() -> Table:
    """Return hits and times of each cache of the engine on conversations."""
    rows = [
        [
            one["cache"],
            f"{one['gib']:g}",
            f"{100 * one['saved_share']:.1f}",
            f"{one['hit_tokens']:,}",
            *(f"{one['lost_tokens'][cause]:,}" for cause in SHAREGPT_CAUSES),
            *(f"{1000 * one[name]:.0f}" for name in ("ttft_mean_s", "ttft_p95_s")),
        ]
        for one in records_of("sharegpt.jsonl")
    ]
    lost = [cause.replace("_", " ") for cause in SHAREGPT_CAUSES]
    return ["cache", "GiB", HITS, "hit tokens", *lost, "mean TTFT, ms", "p95, ms"], rows


def sharegpt_simulated_table() -> Table:
    """Return token hit rates on ShareGPT's lengths, one row per size."""
    rows = []
    for gib, of in grouped(records_of("sharegpt_simulated.jsonl"), "gib").items():
        rates = ", ".join(f"{100 * one['saved_share']:.1f}" for one in of)
        rows.append(["ShareGPT", f"{gib:.3g}", rates])
    return ["trace", "GiB", f"{', '.join(SHAREGPT_POLICIES)}: {HITS}"], rows


def checkpoint_dtype_table() -> Table:
    """Return the cost of each format on two kinds of text."""
    records = [one for one in records_of("study_checkpoint_dtype.jsonl") if "text" in one]
    rows = [
        [dtype, *(f"{1e6 * one['kl_mean']:.0f}" for one in of)]
        for dtype, of in grouped(records, "checkpoint_dtype").items()
        if dtype != "auto"
    ]
    return ["format", "KL on code, millionths of a nat", "KL on problems"], rows


def speculation_table() -> Table:
    """Return the speed of each drafter in times of no drafts, for each number of streams."""
    records = [one for one in records_of("speculation.jsonl") if one["draft"] != "none"]
    rows = []
    for cell, of in grouped(records, "workload", "draft").items():
        figures = [(f"{one['ratio']:.2f}", f"{one['acceptance_len'] or 1:.1f}") for one in of]
        rows.append([*cell, *itertools.chain(*figures)])
    header = ["workload", "drafter", "1 stream, ratio", "acceptance length"]
    return [*header, "8 streams, ratio", "acceptance length"], rows


def second_turn_records(plans: Sequence[second_turn.Plan]) -> list[dict[str, Any]]:
    """Return the records of ``plans`` in their order. Raises FileNotFoundError if there is none."""
    records = records_of("second_turn.jsonl")
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


def second_turn_table() -> Table:
    """Return tokens read again and times of both servers for short prompts of one client."""
    shown = ("read again, tokens", "TTFT, s", "memory, MiB")
    header, rows = second_turn.table(second_turn_records(second_turn.PUBLISHED[:1]), shown)
    rows = [[row[0], *row[4:]] for row in rows]  # Without the size, which is the same.
    return with_ratio(["case", *header[4:]], rows)


def second_turns_table() -> Table:
    """Return the other sizes and models, with hits where memory is scarce."""
    shown = ("read again, tokens", "hits, %", "TTFT, s")
    return with_ratio(*second_turn.table(second_turn_records(second_turn.PUBLISHED[1:]), shown))


def with_ratio(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table with the ratio of the two columns of times, if it has both, as its last
    column."""
    at = [index for index, name in enumerate(header) if name.endswith("TTFT, s")]
    if len(at) < 2:
        return header, rows
    made = []
    for row in rows:
        times = [row[index] for index in at]
        ratio = f"{float(times[0]) / float(times[1]):.2f}" if all(times) else ""
        made.append([*row, ratio])
    return [*header, RATIO], made


def processor(name: str) -> str:
    """Return the name of the processor that a result file was measured on."""
    found, _ = provenance.read_json_lines(provenance.RESULTS / name)
    return str(found["machine"]["cpu"])


# --- Text ---------------------------------------------------------------------------------------


def one_number(text: str) -> str:
    """Return ``text`` with ``67.1 [66.9, 67.4]`` written as ``67.1 ± 0.3``.

    The number after ± is the larger distance of a limit from the mean, so it never narrows an
    interval.

    >>> one_number("67.1 [66.9, 67.4]")
    '67.1 ± 0.3'
    """

    def short(found: re.Match[str]) -> str:
        mean, low, high = map(float, found.groups())
        digits = len(found[1].partition(".")[2])
        return f"{found[1]} ± {max(mean - low, high - mean):.{digits}f}"

    return re.sub(r"-(0\.0+)(?!\d)", r"\1", INTERVAL.sub(short, text))


def markdown(table: Table) -> str:
    """Return a Markdown table, with intervals as one number that does not break."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return one_number(text).replace(" ± ", "\u00a0±\u00a0")


def value(cell: str) -> Interval:
    """Return the number or the interval that a cell begins with."""
    found = INTERVAL.search(cell)
    if found:
        return Interval(*map(float, found.groups()))
    number = re.search(r"-?\d+(\.\d+)?", cell.replace(",", ""))
    return Interval(float(number[0]) if number else math.nan, math.nan, math.nan)


def is_number(cell: str) -> bool:
    """Return whether a cell has a number."""
    return not math.isnan(value(cell).mean)


def shown(cell: str) -> str:
    """Return the number that a cell begins with, and its interval."""
    return one_number((INTERVAL.search(cell) or re.search(r"-?\d+(\.\d+)?", cell) or [cell])[0])


def means(table: Table, index: int) -> list[float]:
    """Return the means of a column, without unknown ones."""
    return [value(row[index]).mean for row in table[1] if row[index] != "-"]


def column(table: Table, index: int) -> dict[str, Interval]:
    """Return the values of a column by the first cell of their row."""
    return {row[0].strip("`"): value(row[index]) for row in table[1]}


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


def drawing(rows: int, columns: int, height: float) -> tuple[Any, Any]:
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


def legend(figure: Any, axis: Any) -> None:
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

    series: Mapping[str, int]
    """Column by name."""
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
        first = next(iter(self.series.values()))
        rows = [
            (
                "\n".join(wrap(", ".join(row[i] for i in self.names).replace("`", ""), NAME_CHARS)),
                [value(row[column]) for column in self.series.values()],
                shown(next(filter(is_number, (row[i] for i in self.series.values())), row[first])),
            )
            for row in table[1]
            if any(is_number(row[i]) for i in self.series.values())
            and abs(value(row[first]).mean) >= self.least
        ]
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

    def draw(self, table: Table) -> Any:
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
                ", ".join(table[0][i] for i in self.names), (0, 1), xycoords="axes fraction",
                xytext=(-4, 1), textcoords="offset points", ha="right", fontsize=6.5, color=TEXT,
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

    column: int
    """Column with one number per series, separated by commas."""
    series: Sequence[str]
    axes: tuple[str, str]
    log_y: bool = True

    def draw(self, table: Table) -> Any:
        """Return the figure."""
        lines: dict[str, list[list[tuple[float, float, float, float]]]] = {}
        for name, x, *cells in table[1]:
            panel = lines.setdefault(name, [[] for _ in self.series])
            for line, y in zip(panel, cells[self.column - 2].split(", "), strict=True):
                line.append((float(x), *[math.nan if y == "-" else float(y)] * 3))
        return panel_lines(lines, self.series, self.axes, log_y=self.log_y)


def panel_lines(
    panels: Mapping[str, Sequence[Sequence[tuple[float, float, float, float]]]],
    series: Sequence[str],
    axes: tuple[str, str],
    log_y: bool = False,
) -> Any:
    """Return a figure with two panels a row; a point is (x, y, low, high)."""
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
            look = {"color": SERIES[place], "linewidth": width, "label": series[place]}
            axis.plot(x, y, marker=MARKS[place] * (len(x) <= 8), markersize=2 * width, **look)
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

    def draw(self, table: Table) -> Any:
        """Return the figure of the traces in the table."""
        runs = grouped(records_of("study_capacity.jsonl"), "trace", "label")
        panels = {}
        for name in column(table, 1):
            panels[name] = []
            for [run] in (runs[name, capacity.OURS], runs[name, "lru"]):
                low, high = ([100 * rate for rate in run[limit]] for limit in ("low", "high"))
                means = [sum(limits) / 2 for limits in zip(low, high, strict=True)]
                panels[name].append(list(zip(run["gib"], means, low, high, strict=True)))
        series = ["default pair", "LRU, fixed rules"]
        cells = yardsticks.by_cell(yardstick_records(), yardsticks.CAPACITY)
        for name, lines in panels.items() if cells else ():
            sizes = [gib for trace, _, gib in cells if trace == name]
            for one in YARDSTICKS:
                rates = [cells[name, 0, gib][one] for gib in sizes]
                lines.append(list(zip(sizes, rates, rates, rates, strict=True)))
        series += [*YARDSTICKS] * bool(cells)
        return panel_lines(panels, series, ("memory, GiB", HITS))


def svg(figure: Any) -> str:
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
    alt: str
    """Description of the figure."""


def _ranking(table: Table) -> str:
    hits, replay = column(table, 1), column(table, 4)
    [first, second, *_] = hits
    close = sum(abs(one.mean - hits["lru"].mean) <= SLASH for one in hits.values()) - 1
    return (
        f"`{first}` hits {hits[first].mean:.1f} % in closed loops and {replay[first].mean:.1f} % "
        f"in replays; `{second}` follows with {hits[second].mean:.1f} and "
        f"{replay[second].mean:.1f} %, and {close} rules are within a point of `lru` "
        f"({hits['lru'].mean:.1f} %)."
    )


def _pairs(table: Table) -> str:
    hits = column(table, 1)
    [first, second, *_] = hits
    gap = hits[first].mean - hits[second].mean
    return f"`{first}` has the most hits, {gap:.1f} points more than `{second}`."


def _losses(table: Table) -> str:
    losses, worst = means(table, 2), max(means(table, 3))
    return (
        f"The default pair loses {min(losses):.1f} to {max(losses):.1f} points on average to the "
        f"best pair of each cell, and {worst} at most."
    )


def _shadows(table: Table) -> str:
    alone, whole = ([float(row[column]) for column in (2, 4)] for row in table[1][:2])
    cost = table[1][1][1]
    return (
        f"Shadows of all sessions lose {whole[0]:.1f} and {whole[1]:.1f} points to the best pair "
        f"(tuning, outside) at {cost} times the work of the cache; the default alone loses "
        f"{alone[0]:.1f} and {alone[1]:.1f}."
    )


def _ablation(table: Table) -> str:
    changes = {row[0]: float(row[1]) for row in table[1]}
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
    rows = {row[1]: (row[2], row[5]) for row in table[1] if row[0] == "start"}
    ours, lru = rows[f"`{DEFAULT}`"], rows["`lru@adaptive`"]
    return (
        f"In the first 50 requests the default pair is {ours[0]} points below the best of five "
        f"pairs, from 200 to 400 {ours[1]}; `lru@adaptive` {lru[0]} and {lru[1]}."
    )


def between(index: int, sentence: str, timed: str = "") -> Callable[[Table], str]:
    """Return the finding with the lowest and the highest mean of a column as ``low`` and ``high``,
    the row of the highest as ``top``, and the processor of the result file ``timed`` as ``cpu``."""

    def finding(table: Table) -> str:
        found = means(table, index)
        top = table[1][found.index(max(found))]
        cpu = processor(timed) if timed else ""
        return sentence.format(low=min(found), high=max(found), top=top, cpu=cpu)

    return finding


def _admission(table: Table) -> str:
    ratios = means(table, 7)
    worst = table[1][ratios.index(max(ratios))]
    return (
        f"The mean TTFT of `sessions` is within 5 % of the best limit in "
        f"{sum(ratio <= 1.05 for ratio in ratios)} of {len(ratios)} cells, and at most "
        f"{max(ratios):.2f} times it ({worst[0]}, {worst[1]} sessions/s)."
    )


def _forecast(table: Table) -> str:
    points, times = (max(map(abs, means(table, index))) for index in (3, 6))
    return (
        f"The simulator forecasts the engine's hit rate within {points:.1f} points and its mean "
        f"TTFT within {times:.0f} %."
    )


def _tiers(table: Table) -> str:
    device, host = (fmean(means(table, index)) for index in (1, 2))
    return (
        f"4 GiB on the device with 16 GiB of host memory save {host:.1f} % of the prefill time "
        f"that 20 GiB on the device save; 4 GiB alone save {device:.1f} %."
    )


def _sharegpt(table: Table) -> str:
    none, *_, best = table[1]
    return (
        f"In the engine, checkpoints save {best[2]} % of the prompt tokens of conversations, and "
        f"the mean TTFT is {best[-2]} instead of {none[-2]} ms; KV alone saves nothing."
    )


def _sharegpt_simulated(table: Table) -> str:
    rates = [[float(one) for one in row[2].split(", ")] for row in table[1]]
    gain, at = max(
        (ours - lru, row[1]) for (ours, lru, _), row in zip(rates, table[1], strict=True)
    )
    return f"`survival` hits up to {gain:.1f} points more than `lru` (at {at} GiB)."


def _router(table: Table) -> str:
    best: dict[str, list[str]] = {}
    for row in table[1]:
        best[row[0]] = max(best.get(row[0], row), row, key=lambda row: float(row[2]))
    names = [row[1] for row in best.values()]
    most = max(names, key=names.count)
    return f"{most} has the most hits in {names.count(most)} of {len(names)} conditions."


def _speculation(table: Table) -> str:
    best = max(table[1], key=lambda row: float(row[2]))
    slower = sum(float(row[4]) < 1 for row in table[1])
    return (
        f"Drafts decode up to {best[2]} times as fast (`{best[1]}` on {best[0]}, one stream); with "
        f"eight streams, where most steps have no drafts, {slower} of {len(table[1])} cells are "
        "slower than without a drafter."
    )


def _capacity(table: Table) -> str:
    gains = [value(cell.partition(": ")[2]).mean for row in table[1] for cell in row[2:5]]
    return (
        f"The default pair gains up to {max(gains):.1f} points over LRU with fixed rules where "
        f"memory is short, and loses at most {max(-min(gains), 0):.1f}."
    )


def _overload(table: Table) -> str:
    last = table[1][-1]
    width = len(overload.POLICIES)
    (hits, *_, worst), (seconds, *_) = last[3 : 2 + width], last[3 + width :]
    return (
        f"In the last window of {last[0]}, `sessions` hits {hits} % and `oldest` {last[2]} %; the "
        f"mean TTFT is {seconds} and {last[2 + width]} s (`{overload.POLICIES[-1]}`: {worst} %, "
        f"{last[1 + 2 * width]} s)."
    )


def _tree(table: Table) -> str:
    growth: dict[str, list[float]] = {}
    for kind, _, times in table[1]:
        growth.setdefault(kind, []).append(float(times.split(", ")[0]))
    ratios = [of[-1] / of[0] for of in growth.values()]
    return f"A match in a tree 100 times as large takes at most {max(ratios):.1f} times as long."


def read_again(table: Table, index: int) -> dict[str, float]:
    """Return the tokens that a server reads again in each row, by its first cell."""
    return {row[0]: float(row[index]) for row in table[1] if row[index]}


def _second_turn(table: Table) -> str:
    cpu = processor("second_turn.jsonl")
    ours, theirs = read_again(table, 1), read_again(table, 2)
    top = max(ours, key=lambda row: ours[row])
    ratios = [float(row[-1]) for row in table[1] if table[0][-1] == RATIO and row[-1]]
    found = (
        f"On one {cpu}, the engine reads up to {ours[top]:.0f} tokens of a request again ({top}), "
        f"{median(ours.values()):.0f} in the median row, and llama-server up to "
        f"{max(theirs.values()):.0f}."
    )
    if ratios:
        low, high = min(ratios), max(ratios)
        found += f" Its first token takes {low:.2f} to {high:.2f} times as long as llama-server's."
    if missing := len(table[1]) - len(ratios):
        found += f" {missing} of {len(table[1])} rows have no times yet."
    return found + not_run(second_turn.PUBLISHED[:1])


def _second_turns(table: Table) -> str:
    ours, theirs = (max(read_again(table, index).values()) for index in (4, 5))
    return (
        "With experts, more clients, scarce memory and longer prompts, the engine reads up to "
        f"{ours:.0f} tokens of a request again, and llama-server up to {theirs:.0f}."
        + not_run(second_turn.PUBLISHED[1:])
    )


def study(name: str, table: Callable[[list[dict[str, Any]]], Table]) -> Callable[[], Table]:
    """Return the function that makes the table of a result file."""
    return lambda: table(records_of(f"{name}.jsonl"))


OVER = {"default pair": 3, "LRU, fixed rules": 4}
SECTIONS = {
    "leaderboard": Section(
        "leaderboard", leaderboard_table, _ranking,
        Dots({"closed loop": 1, "replay": 4}, HITS, near="lru"),
        "Token hit rate of each policy in closed loops and in replays, with intervals.",
    ),
    "default": Section(
        "default", pairs_table,
        _pairs, Dots({"replay": 1}, HITS),
        "Token hit rate of each pair in replays, with intervals.",
    ),
    "pairs in closed loop": Section(
        "default", partial(pairs_table, "closed loop"),
        _pairs, Dots({"closed loop": 1}, HITS),
        "Token hit rate of each pair in closed loops, with intervals.",
    ),
    "losses": Section(
        "default", losses_table, _losses,
        Dots({"mean": 2, "worst cell": 3}, "loss to the best pair of a cell, points"),
        "Mean and largest loss of the default pair in each group of cells.",
    ),
    "ablation": Section(
        "ablation", study(ablation.NAME, ablation.table), _ablation,
        Dots({"mean": 1, "worst cell": 2}, "change of the token hit rate, points", log="symlog",
             least=0.1),
        "Changes of the hit rate by 0.1 points or more, without a rule or with another constant.",
    ),
    "learning": Section(
        "ablation", study(ablation.NAME, ablation.learning_table), _learning,
        Dots({"first 50": 2, "200 to 400": 5}, "points below the best pair of a cell", (0, 1)),
        "Regret of five pairs in the first requests and later, since the start and a change.",
    ),
    "shadows": Section(
        "shadows", shadows_table, _shadows,
        Dots({"tuning": 2, "outside": 4}, "mean loss to the best pair of a cell, points"),
        "Mean loss by choice of the pair, for both splits.",
    ),
    "published": Section(
        "default", published_table,
        between(5, "On published traces the default pair differs from LRU with fixed rules by "
                "{low:.1f} to {high:.1f} points."),
        Dots(OVER | {LRU_ADAPTIVE: -3, "best rebuilt": -2, BOUND: -1}, HITS, (0, 1)),
        "Token hit rate of three pairs on published traces, of the best rebuilt system, and the "
        "bound.",
    ),
    "default speed": Section(
        "default-speed", default_speed_table,
        between(4, "The default pair takes {low:.2f} to {high:.2f} times the CPU time of LRU per "
                "simulated request."),
        Dots({"default pair": 4}, "CPU time of a simulated request, times that of LRU", (0, 1)),
        "CPU time of the default pair in times of LRU's, at one size per trace.",
    ),
    "admission": Section(
        "admission", study("admission", admission.table), _admission,
        Curves(5, ("oldest", "sessions", "best fixed limit", "best rebuilt"),
               ("sessions/s", "mean TTFT, s")),
        "Mean time to first token over the rate of sessions, one panel per workload.",
    ),
    "overload": Section(
        "overload", study("overload", overload.table), _overload,
        Dots(dict(zip(overload.POLICIES, (5, 6, 7), strict=True)) | {"best rebuilt": -1},
             "mean TTFT, s", (0, 1)),
        "Mean time to first token by window and number of sessions.",
    ),
    "tree": Section(
        "tree", tree_table, _tree,
        Curves(2, (*VERBS, "eviction"), ("thousands", "microseconds"), log_y=False),
        "Time of operations over the size of the tree, by cached tokens and by nodes.",
    ),
    "closed loop": Section(
        "closed-loop", study("closed_loop", closed_loop.table), _forecast,
        Dots({"forecast less engine": 3}, "points of token hit rate", (0, 1)),
        "Difference of forecast and engine, by sessions per second and admission.",
    ),
    "conditions": Section(
        "conditions", study("study_conditions", conditions.table),
        between(-1, "The default pair differs from LRU with fixed rules by {low:.1f} to {high:.1f} "
                "points."),
        Dots({"default pair": 2, LRU_ADAPTIVE: 3, "LRU, fixed rules": 4, "best rebuilt": 5,
              BOUND: 6}, HITS, (1,)),
        "Token hit rate of three pairs under each condition, of the best rebuilt system, and the "
        "bound.",
    ),
    "capacity": Section(
        "capacity", capacity_table, _capacity, CapacityCurves(),
        "Token hit rate over memory with bands, one panel per trace.",
    ),
    "hints": Section(
        "hints", hints_table,
        between(2, "Boundary hints raise the hit rate by {low:.1f} to {high:.1f} points."),
        Dots({"with hints": 1}, HITS),
        "Token hit rate with boundary hints, by pair, of the best rebuilt system without, and the "
        "bound.",
    ),
    "tiers": Section(
        "tiers", study("study_tiers", tiers.over_seeds), _tiers,
        Dots({"4 GiB + 16 GiB host": 2, "4 GiB alone": 1, "best rebuilt, 20 GiB": 3},
             "saved prefill time, % of 20 GiB"),
        "Prefill time that host memory saves, by trace.",
    ),
    "grid": Section(
        "grid", study("study_grid", grid.table),
        between(4, "A grid of 16 in place of 64 changes the hit rate by {low:.1f} to {high:.1f} "
                "points, most for `{top[0]}`."),
        Dots({"grid of 16": 4, "grid of 32": 3}, "gain over a grid of 64, points", (0, 1)),
        "Gain of finer grids, by trace and memory in GiB.",
    ),
    "arena": Section(
        "arena", study("study_arena", arena.table),
        between(2, "One arena changes the hit rate of a workload by {low:+.2f} to {high:+.2f} "
                "points."),
        Dots({"mean": 2}, "arena less ideal, points"),
        "Cost of slabs, by trace.",
    ),
    "sharegpt": Section(
        "sharegpt", sharegpt_table, _sharegpt, Dots({"saved": 2}, "saved prompt tokens, %", (0, 1)),
        "Share of prompt tokens that each cache saves, by memory in GiB.",
    ),
    "sharegpt simulated": Section(
        "sharegpt-simulated", sharegpt_simulated_table, _sharegpt_simulated,
        Curves(2, SHAREGPT_POLICIES, ("memory, GiB", HITS), log_y=False),
        "Token hit rate of three eviction policies over memory.",
    ),
    "router": Section(
        "router", study("study_router", router.table), _router, Dots({"hits": 2}, HITS, (0, 1)),
        "Token hit rate of each routing policy, by condition.",
    ),
    "checkpoint dtype": Section(
        "checkpoint-dtype", checkpoint_dtype_table,
        between(1, "No format of checkpoints changes the distribution of the next token by more "
                "than {high:.0f} millionths of a nat on code (`{top[0]}`)."),
        Dots({"code": 1, "problems": 2}, "KL, millionths of a nat per token"),
        "Change of the next token's distribution by format of the checkpoints.",
    ),
    "speculation": Section(
        "speculation", speculation_table, _speculation,
        Dots({"1 stream": 2, "8 streams": 4}, "speed, times no drafts", (0, 1)),
        "Speed of each drafter in times of no drafts, by workload.",
    ),
    "linear layers": Section(
        "cpu-kernels", linear_layers_table,
        between(-1, "On one {cpu}, the fastest linear layer (8,192 x 2,048, rows: 512, threads: "
                "{top[2]}) is `{top[0]}` with {high:.0f} GFLOP/s.", "bench_cpu_kernels.jsonl"),
        Dots({"512 rows": -1, "1 row": 3}, "GFLOP/s (logarithmic)", (0, 1, 2), log=True),
        "Speed of each method with one row and with 512, by precision and threads.",
    ),
    "decays": Section(
        "cpu-kernels", decays_table,
        between(-1, "On one {cpu}, no decay takes more than {high:.2f} times as long as -0.01 "
                "(`{top[0]}`).", "bench_cpu_kernels.jsonl"),
        Dots({"ratio": -1}, "slowest decay, times the first"),
        "Slowest decay of each recurrence in times of the first.",
    ),
    "second turn": Section(
        "second-turn", second_turn_table, _second_turn,
        Dots({"engine": 1, "llama-server": 2}, "tokens read again per request"),
        "Prompt tokens that each server computes a second time, by case.",
    ),
    "second turn sizes": Section(
        "second-turn", second_turns_table, _second_turns,
        Dots({"engine": 4, "llama-server": 5}, "tokens read again per request", (0, 1, 2, 3)),
        "Prompt tokens that each server computes a second time, by case, model and size.",
    ),
    "llama": Section(
        "llama", llama_table,
        between(-1, "On one {cpu}, the engine has {low:.2f} to {high:.2f} times the speed of "
                "llama.cpp in 16, 8 and 4 bits.", "bench_llama.jsonl"),
        Dots({"ratio": -1}, "speed, times llama.cpp", (1, 2, 0)),
        "Speed of the engine in times of llama.cpp, by model and precision.",
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
    figures[path] = svg(section.figure.draw(table))
    return "\n\n".join(
        (
            f"**{section.finding(table)}**",
            f"![{section.alt}](../experiments/figures/{path.name})",
            f"`python -m experiments.reproduce --part {section.part}` (commit {origin})",
            f"<details><summary>Table</summary>\n\n{markdown(table)}\n\n</details>",
        )
    )


def page(template: Path, parts: Table, origin: Callable[[str], str]) -> tuple[str, dict[Path, str]]:
    """Return the page and its figures by path. ``parts`` is the table of all parts, and ``origin``
    returns commit and date of a part's results by its name."""
    text, figures = template.read_text(encoding="utf-8"), {}
    for name, section in SECTIONS.items():
        mark = f"<!-- result: {name} -->"
        if mark in text:
            text = text.replace(mark, render(name, section, figures, origin(section.part)))
    return text.replace("<!-- result: parts -->", markdown(parts)), figures
