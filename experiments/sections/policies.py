"""Sections of the studies of policies, placements and memories."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from experiments import provenance
from experiments.sections import (
    HITS,
    POINTS,
    SHOWN,
    SLASH,
    Dots,
    Point,
    Section,
    cells_of,
    panel_lines,
    records_of,
    says,
    study,
    yardstick_cells,
    yardstick_rates,
)
from experiments.studies import (
    ablation,
    capacity,
    compare,
    default,
    headroom,
    leaderboard,
    router,
    tiers,
    yardsticks,
)
from experiments.studies.common import (
    BEST_REBUILT,
    DEFAULT,
    LRU_ADAPTIVE,
    SEEDS,
    YARDSTICKS,
    grouped,
    references,
)
from experiments.tables import Cell, Column, Table
from hybridcache.lab.board.ranking import BUILT_IN, Split
from hybridcache.lab.rivals.systems import BASELINES
from hybridcache.lab.traces.intervals import Interval, interval, paired
from hybridcache.policies.registry import DEFAULT_PLACEMENT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _headroom(table: Table) -> str:
    """Return the finding on the facts about later requests."""
    gains = {name: gain.mean for name, gain in table.named("gain").items()}
    rate = table.named("token hit rate")[headroom.NOTHING].mean
    return (
        f"The default pair hits {rate:.1f} %, and the plan with hindsight "
        f"{gains[headroom.PLAN]:.1f} points more. Told whether an item is used again, it gains "
        f"{gains[headroom.AGAIN]:.1f} points at evictions and {gains[headroom.FILTER]:.1f} when "
        f"positions are saved; the end of each session is worth {gains[headroom.ENDS]:.1f}."
    )


SIZES = {"small memory": 0.2, "medium": 0.4, "large": 0.6}
"""Places on the axis of memory of the sizes in the table of capacity."""


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
        [one.name + " (rebuilt)" * (one.name in BASELINES), one.served, one.served_difference,
         one.ttft_ratio, one.hit_rate, one.difference,
         None if one.worst is None else one.worst[0], None if one.lost is None else one.lost[0],
         one.of_plan]
        for one in board.rows()
        if one.name.removesuffix(f"@{DEFAULT_PLACEMENT}") in BUILT_IN
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


def _ranking(table: Table) -> str:
    hits, replay = table.named("closed loop: hits"), table.named("replay: hits")
    [first, second, *_] = hits
    rules = (one.mean for name, one in hits.items() if name != BEST_REBUILT)
    close = sum(abs(mean - hits["lru"].mean) <= SLASH for mean in rules) - 1
    return (
        f"`{first}` hits {hits[first].mean:.1f} % in closed loops and {replay[first].mean:.1f} % "
        f"in replays; `{second}` follows with {hits[second].mean:.1f} and "
        f"{replay[second].mean:.1f} %, and {close} rules are within a point of `lru` "
        f"in closed loops ({hits['lru'].mean:.1f} %)."
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


def _capacity(table: Table) -> str:
    gains = [gain for size in SIZES for gain in table.means(f"gain, {size}")]
    return (
        f"The default pair gains up to {max(gains):.1f} points over LRU with fixed rules where "
        f"memory is short, and loses at most {max(-min(gains), 0):.1f}."
    )


def _router(table: Table) -> str:
    best: dict[str, Sequence[str]] = {}
    for row in table.texts():
        best[row[0]] = max(best.get(row[0], row), row, key=lambda row: float(row[2]))
    names = [row[1] for row in best.values()]
    most = max(names, key=names.count)
    return f"{most} has the most hits in {names.count(most)} of {len(names)} conditions."


def _capacity_cells() -> str:
    runs = [one for one in records_of("study_capacity") if "gain" in one]
    seeds = f"{SEEDS} seeds; lines without a band have one."
    return f"{cells_of((one['trace'], one['gib']) for one in runs)} {seeds}"


def _ranking_cells() -> str:
    split = Split.load().subset(num_seeds=SEEDS)
    loops = cells_of((cell.spec, [gib for gib, _ in cell.loops]) for cell in split.cells)
    replays = cells_of((cell.spec, cell.sizes) for cell in split.cells)
    return f"Replays: {replays} Closed loops: {loops} {SEEDS} seeds."


def _headroom_cells() -> str:
    return f"{cells_of(headroom.CELLS.items())} One draw of each trace."


SECTIONS = {
    "leaderboard": Section(
        "leaderboard", leaderboard_table, _ranking,
        Dots({"closed loop": "closed loop: hits", "replay": "replay: hits"}, HITS.head, near="lru"),
        _ranking_cells,
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
    "conditions": Section(
        "conditions", study("study_conditions", compare.conditions_table),
        says(f"The default pair gains {POINTS} over LRU with fixed rules.", gain="gain"),
        Dots({"default pair": "default pair", LRU_ADAPTIVE: LRU_ADAPTIVE,
              "LRU, fixed rules": "lru, fixed rules"} | SHOWN, HITS.head, (1,)),
    ),
    "headroom": Section(
        "headroom", study(headroom.NAME, headroom.table), _headroom,
        Dots({"mean gain": "gain", "least": "least gain", "most": "most gain"},
             "gain over no fact, points"),
        _headroom_cells,
    ),
    "capacity": Section("capacity", capacity_table, _capacity, CapacityCurves(), _capacity_cells),
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
    "router": Section(
        "router", study("study_router", router.table), _router,
        Dots({"hits": HITS.name}, HITS.head, (0, 1)),
    ),
}  # fmt: skip
