"""Measure the parts of the default pair: rules, numeric constants, and the cost of learning.

    python -m experiments.studies.ablation [--seeds 2] [--processes 2]

Cells are those of the tuning split. *Rules*: `adaptive` without one of its rules. *Constants*: each
constant of `survival` and `adaptive` times 0.5 and 2. *Learning*: the token hit rate of pairs in
windows of requests since the start of a cell, and since a change to the next cell's workload.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np

from experiments.studies import common, default
from experiments.tables import Cell, Column, Table
from hybridcache import open_trace
from hybridcache.lab.runs.serving import serve
from hybridcache.lab.runs.target import build_target
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.trace import Held, Trace
from hybridcache.policies import placement
from hybridcache.policies.eviction import survival
from hybridcache.policies.placement import Adaptive, Positions
from hybridcache.radix.protocol import Item, Placed, Prefill

NAME = "study_ablation"
LEARNERS = (common.DEFAULT, "lru@adaptive", "gdsf@adaptive", "lhd@adaptive", "lru@backoff")
WINDOWS = (0, 50, 100, 200, 400)
"""First requests of the windows of the learning curve, and the end of the last."""
BOUNDS = {"NUM_BINS", "GENERAL_FROM", "SAMPLE"}
"""Numbers that are no choices: sizes of arrays, a place in a key, a bound of an eviction's cost."""
CONSTANTS = tuple(
    name
    for module in (placement, survival)
    for name, value in vars(module).items()
    if isinstance(value, int | float) and name.isupper() and name[0] != "_" and name not in BOUNDS
    and not (module is survival and hasattr(placement, name))
)  # fmt: skip
"""Names of all other numbers of `adaptive` and `survival`; both have some of them."""


class Without(Adaptive):
    """`adaptive` without one rule."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule

    def _choose(
        self, prefill: Prefill, positions: Positions, bars: placement.Bars
    ) -> tuple[list[Placed], bool]:
        changes: dict[str, dict[str, Any]] = {
            "head": {"evicted": ()},
            "spare slots": {"shares_memory": True},
            "room": {"num_checkpoints": 1 << 30},
        }
        prefill = prefill._replace(**changes.get(self.rule, {}))
        return super()._choose(prefill, positions, bars)

    def _end(self, prefill: Prefill) -> tuple[str, int] | None:
        if self.rule == "turnover" and not placement.resumes_from_tip(prefill):
            return None
        return super()._end(
            prefill._replace(resumed=None) if self.rule == "succession" else prefill
        )

    def _wants(self, rule: tuple[str, int], free_slots: float, bars: placement.Bars) -> bool:
        free_slots = float("inf") if self.rule == "free memory" else free_slots
        return super()._wants(rule, free_slots, bars)

    def _bars(self) -> placement.Bars:
        earned, of_forks, displaced = super()._bars()
        return earned, float("inf") if self.rule == "rank" else of_forks, displaced


class WithoutPace(survival.Survival):
    """`survival` without the pace of sessions."""

    def _enter(self, item: Item, memo: Any, used: bool | None) -> None:
        memo.pace = 0
        super()._enter(item, memo, used)


RULES = ("head", "succession", "turnover", "rank", "free memory", "spare slots", "room")


PAIRS = {
    f"without the rule *{rule}*": f"survival@{__name__}:Without('{rule}')" for rule in RULES
} | {
    "without the fact *pace*": f"{__name__}:WithoutPace@adaptive",
    "`survival` with LRU's placement": f"survival@{common.STATIC_PLACEMENT}",
}


def measure(work: tuple[default.TraceJob, default.TraceJob]) -> list[dict[str, Any]]:
    """Return the records of one trace and seed; the second job has the workload of the change."""
    job, after = work
    trace = open_trace(job.spec).kept()
    fields = {"trace": job.trace, "seed": job.seed}

    def record(variant: str, factor: float = 1.0, pair: str = common.DEFAULT) -> dict[str, Any]:
        runs = common.replay(trace, job.gib, pair, model="qwen3-next")
        rates = common.rounded([run.token_hit_rate for run in runs])
        return fields | {"variant": variant, "factor": factor, "token_hit_rates": rates}

    found = [record("all"), *(record(name, pair=pair) for name, pair in PAIRS.items())]
    for name in CONSTANTS:
        modules = [module for module in (placement, survival) if hasattr(module, name)]
        value = getattr(modules[0], name)
        for factor in (0.5, 2.0, 1.0):
            for module in modules:
                setattr(module, name, type(value)(value * factor))
            if factor != 1.0:
                found.append(record(f"`{name}`", factor))
    for since, requests in (("start", trace), ("change", changed(trace, open_trace(after.spec)))):
        first = 0 if since == "start" else len(list(trace))
        for gib, pair in product(job.gib, LEARNERS):
            hits = windows(requests, first, gib, pair)
            found.append(fields | {"since": since, "gib": gib, "pair": pair, "windows": hits})
    return found


def changed(before: Trace, after: Trace) -> Trace:
    """Return both traces in turn, without shared texts."""
    first = list(before.in_order())
    begin = first[-1].timestamp_s + 1.0
    later = (
        one._replace(namespace="after", session=f"after {one.session}",
                     timestamp_s=begin + one.timestamp_s)
        for one in after.in_order()
    )  # fmt: skip
    return replace(before, source=Held((*first, *later)), recipe=None)


def windows(trace: Trace, first: int, gib: float, pair: str) -> list[float | None]:
    """Return the token hit rate in each window of requests from number ``first`` on, or None for an
    empty one."""
    policy, _, checkpoints = pair.partition("@")
    cell = Scenario(trace, model="qwen3-next", gib=gib, policy=policy, checkpoints=checkpoints)
    log = serve(build_target(cell, 1), trace.in_order(), 1, cell)
    found = []
    for begin, end in pairwise(first + number for number in WINDOWS):
        total = sum(log.prompt_tokens[begin:end])
        found.append(sum(log.cached_tokens[begin:end]) / total if total else None)
    return common.rounded(found)


def table(records: common.Records) -> Table:
    """Return the change of the mean hit rate by variant, and the worst cell, in points."""
    variants = common.grouped([one for one in records if "variant" in one], "variant", "factor")
    rates = {key: np.concatenate([one["token_hit_rates"] for one in of])
             for key, of in variants.items()}  # fmt: skip
    whole, rows = rates.pop(("all", 1.0)), []
    for (variant, factor), found in rates.items():
        changes = 100 * (found - whole)
        times = "" if factor == 1.0 else f" times {factor:g}"
        rows.append([variant + times, float(changes.mean()), float(changes.min())])
    columns = [Column("variant"), Column("mean change", "points", "+.2f")]
    return Table([*columns, Column("worst cell", "points", "+.1f")], rows)


def learning_table(records: common.Records) -> Table:
    """Return the regret of pairs by window: points below the best pair of each cell and window.
    Windows that are empty in one of the cell's runs do not count."""
    rows: list[list[Cell]] = []
    of_since = common.grouped([one for one in records if "since" in one], "since")
    for since, runs in of_since.items():
        cells = common.grouped(runs, "trace", "seed", "gib").values()
        rates = np.array([[run["windows"] for run in cell] for cell in cells], float)
        regrets = np.ma.masked_invalid(100 * (rates.max(axis=1, keepdims=True) - rates))
        pairs = dict.fromkeys(run["pair"] for run in runs)
        by_pair = zip(pairs, regrets.mean(axis=0).tolist(), strict=True)
        rows += [[since, f"`{pair}`", *means] for pair, means in by_pair]
    columns = [Column("since"), Column("pair")]
    columns += [Column(f"regret to request {number}", "points") for number in WINDOWS[1:]]
    return Table(columns, rows)


def main() -> None:
    options = common.command_line(__doc__, seeds=2).parse_args()
    jobs = list(default.jobs_of("tuning", default.splits_file(), options.seeds))
    work = list(zip(jobs, [*jobs[options.seeds :], *jobs[: options.seeds]], strict=True))
    common.run_study(NAME, measure, work, table, options.processes)


if __name__ == "__main__":
    main()
