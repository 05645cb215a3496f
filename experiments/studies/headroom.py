"""Measure what the default pair would gain from one fact that no engine knows.

    python -m experiments.studies.headroom [--processes 2]

An oracle tells one fact about the requests that come later, and leaves the rest of ``survival`` and
``adaptive`` as it is. The plan with hindsight (``hybridcache.optimum``) knows all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.studies import common
from experiments.tables import Cell, Column, Table
from hybridcache import Placed, PlacementPolicy, Trace, open_trace
from hybridcache.lab.results.result import RunResult
from hybridcache.lab.rivals.optimum import best_plan
from hybridcache.lab.runs.simulate import run_cell
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.trace import TraceRequest
from hybridcache.policies.eviction.scored import Columns
from hybridcache.policies.eviction.survival import NUM_BINS, TRUSTED_AFTER, Survival
from hybridcache.policies.placement import Adaptive
from hybridcache.radix.protocol import Item, Prefill
from hybridcache.radix.tree import SESSION_END

NAME = "headroom"
CELLS = {
    "toolbench-dfs": (0.25, 0.5, 1.0),
    "oasst-trees": (0.5, 1.0, 2.0),
    "mini-swe-agent?head=500": (1.0, 2.0),
    "live-agents": (2.0,),
    "chat": (2.0,),
}
"""Traces of the package and of its generators, with the sizes, GiB, at which policies differ."""
NOTHING, PLAN = "nothing", "plan with hindsight"
ENDS, AGAIN, TIMES = "end of each session", "whether an item is used again", "next use of each item"
FILTER, PLACES, BOTH = (
    "whether a position is resumed from, when it is saved",
    "positions that are resumed from",
    "positions and next uses",
)
FACTS = (NOTHING, ENDS, AGAIN, TIMES, FILTER, PLACES, BOTH)
NEVER = -1e-12
"""Value of an item without a later use: less than that of all others."""
Counts = npt.NDArray[np.int64]


class Future:
    """All requests of a trace, and the later uses of a prefix. Namespaces are ignored."""

    def __init__(self, requests: Sequence[TraceRequest], grid: int) -> None:
        self.requests, self.grid, self.now = requests, grid, -1
        self.lens = np.array([len(one.tokens) for one in requests])
        texts = [np.concatenate((one.tokens, one.output)).astype(">i4") for one in requests]
        self.order = sorted(range(len(texts)), key=lambda number: texts[number].tobytes())
        self.texts = [texts[number].tobytes() for number in self.order]
        pairs = zip(self.order, self.order[1:], strict=False)
        between = [_num_common(texts[one], texts[two]) for one, two in pairs]
        self._between: Counts = np.array(between, np.int64)
        self._uses: dict[tuple[int, int], list[int]] = {}

    def __iter__(self) -> Iterator[TraceRequest]:
        """Yield the requests. ``now`` is the number of the last one."""
        for number, request in enumerate(self.requests):
            self.now = number
            yield request

    def common(self, number: int) -> Counts:
        """Return how many ids the text of each request, prompt and answer, begins with that the
        text of request ``number`` begins with too: int64[requests]."""
        place, found = self.order.index(number), np.empty(len(self.order), np.int64)
        found[place] = len(self.texts[place])
        found[place + 1 :] = np.minimum.accumulate(self._between[place:])
        found[:place] = np.minimum.accumulate(self._between[:place][::-1])[::-1]
        by_number = np.empty_like(found)
        by_number[self.order] = found
        return by_number

    def next_use(self, number: int, length: int) -> int | None:
        """Return the next request whose prompt goes on after the first ``length`` ids of the text
        of request ``number``, or None."""
        uses = self._uses.get((number, length))
        if uses is None:
            is_use = (self.common(number) >= length) & (self.lens > length)
            uses = self._uses[number, length] = np.flatnonzero(is_use).tolist()
        place = bisect_right(uses, self.now)
        return uses[place] if place < len(uses) else None

    def holder(self, item: Item) -> int | None:
        """Return a request whose text begins with the ids of ``item``, or None."""
        parts, node = list[bytes](), item.node
        while node is not None and node.parent is not None:
            parts.append(node.edge)
            node = node.parent
        ids = np.frombuffer(b"".join(reversed(parts)), np.int32)[: item.position]
        text = ids.astype(">i4").tobytes()
        place = bisect_left(self.texts, text)
        is_found = place < len(self.texts) and self.texts[place].startswith(text)
        return self.order[place] if is_found else None

    @cached_property
    def resumed(self) -> list[set[int]]:
        """Positions that each request should save: those from which a later one would resume with
        an infinite cache."""
        found: list[set[int]] = [set() for _ in self.requests]
        for number in range(1, len(found)):
            lengths = np.minimum(self.common(number)[:number], self.lens[number] - 1)
            if depth := int(lengths.max()) // self.grid * self.grid:
                for earlier in np.flatnonzero(lengths >= depth).tolist():
                    found[earlier].add(depth)
        return found


def _num_common(one: npt.NDArray[Any], two: npt.NDArray[Any]) -> int:
    most = min(len(one), len(two))
    differing = np.flatnonzero(one[:most] != two[:most])
    return int(differing[0]) if len(differing) else most


class Oracle(Survival):
    """``survival`` that knows one fact about each item, and compares all items."""

    def __init__(self, future: Future, fact: str) -> None:
        super().__init__()
        self.future, self.fact = future, fact
        self.holders: dict[Item, int | None] = {}

    def add(self, item: Item) -> None:
        if item not in self.holders and not (item.kind == "kv" and item.dead):
            self.holders[item] = self.future.holder(item)
        super().add(item)

    def _least(self, columns: Columns, fresh: Container[Item]) -> Item | None:
        items = columns.items
        if not items:
            return None
        worths = np.array([span / size for span, size in (one.span_and_size() for one in items)])
        uses = self.hazards.num_uses
        worths **= min(uses / TRUSTED_AFTER, 1.0) if uses else 1.0
        rows, ages = columns.cells // NUM_BINS, self.hazards.now - columns.times
        pairs = zip(rows.tolist(), ages.tolist(), items, strict=False)
        values = [self._rate(self.hazards.index_at(row, age), item) for row, age, item in pairs]
        return items[int((worths * values).argmin())]

    def _rate(self, rate: float, item: Item) -> float:
        """Return the expected uses of ``item`` per request: those of ``survival``, or the fact."""
        number = self.holders[item]
        if self.fact not in (AGAIN, TIMES) or number is None:
            return rate
        use = self.future.next_use(number, item.position)
        if use is None:
            return NEVER
        return rate if self.fact == AGAIN else 1 / (use - self.future.now)


class Filtered(Adaptive):
    """``adaptive`` without the positions that no later request resumes from or passes."""

    def __init__(self, future: Future) -> None:
        super().__init__()
        self.future = future

    def plan(self, prefill: Prefill) -> list[Placed]:
        grid = prefill.grid
        return [one for one in super().plan(prefill) if self._is_used(one.position // grid * grid)]

    def decode_interval(self) -> int | None:
        request = self.future.requests[self.future.now]
        end = (len(request.tokens) + len(request.output) - 1) // self.future.grid
        return super().decode_interval() if self._is_used(end * self.future.grid) else None

    def _is_used(self, position: int) -> bool:
        return self.future.next_use(self.future.now, position) is not None


class Known(PlacementPolicy):
    """Placement at exactly the positions of ``Future.resumed``."""

    def __init__(self, future: Future) -> None:
        self.future = future

    def plan(self, prefill: Prefill) -> list[Placed]:
        now, future = self.future.now, self.future
        found = []
        for position in sorted(future.resumed[now], reverse=True):
            if position <= prefill.prompt_len:
                use = future.next_use(now, position)
                is_own = use is None or future.requests[use].session == future.requests[now].session
                found.append(Placed(position, "back", 1) if is_own else Placed(position, "branch"))
        return found

    def decode_interval(self) -> int | None:
        prompt_len = len(self.future.requests[self.future.now].tokens)
        return 1 if any(one > prompt_len for one in self.future.resumed[self.future.now]) else None


def told(trace: Trace) -> list[TraceRequest]:
    """Return the requests of ``trace``; the last of each session tells that it has ended.
    ValueError for a trace without sessions, of which each request would end."""
    requests = list(trace)
    last = {request.session: number for number, request in enumerate(requests)}
    if len(last) == len(requests):
        problem = "no session has a second request, so that no end of a session is known"
        raise ValueError(f"{trace.full_name}: {problem}: name sessions, or tell another fact")
    for number in last.values():
        requests[number] = requests[number]._replace(stop_reason=SESSION_END)
    return requests


def run_with(fact: str, trace: Trace, gib: float) -> RunResult:
    """Replay ``trace`` with the default pair and one of ``FACTS``. The run has records of its
    requests, so that ``compare`` explains its difference from other runs."""
    future = Future(told(trace) if fact == ENDS else list(trace), max(1, 64 // trace.unit))
    makers: dict[str, Callable[[], PlacementPolicy]] = {
        FILTER: partial(Filtered, future),
        **dict.fromkeys((PLACES, BOTH), partial(Known, future)),
    }
    cell = Scenario(
        trace,
        gib=gib,
        policy=lambda: Oracle(future, TIMES if fact == BOTH else fact),
        checkpoints=makers.get(fact, Adaptive),
        by_request=True,
    )
    [cell] = cell.cells((gib,))
    found = run_cell(replace(trace, source=future.__iter__), cell)
    return replace(found, config=found.config | {"label": fact})


def measure(job: tuple[str, float]) -> list[dict[str, Any]]:
    """Return a record per fact, and one of the plan, for one trace and size."""
    name, gib = job
    trace = open_trace(name).kept()
    rates = {fact: run_with(fact, trace, gib).token_hit_rate for fact in FACTS}
    rates[PLAN] = best_plan(trace, gib, common.QWEN3_NEXT, grid=64).reached
    facts = {"trace": name, "gib": gib}
    return [
        common.rounded(facts | {"fact": fact, "token_hit_rate": rate})
        for fact, rate in rates.items()
    ]


def table(records: common.Records) -> Table:
    """Return a row per fact: the mean over the cells, the gain over no fact in points, the least
    and the most of it, and the gain by trace."""
    hits = {
        fact: {(one["trace"], one["gib"]): 100 * one["token_hit_rate"] for one in of}
        for fact, of in common.grouped(records, "fact").items()
    }
    traces = list(dict.fromkeys(trace for trace, _ in hits[NOTHING]))
    rows: list[list[Cell]] = []
    for fact, found in hits.items():
        gains = {cell: found[cell] - base for cell, base in hits[NOTHING].items()}
        by_trace = ([gain for (of, _), gain in gains.items() if of == trace] for trace in traces)
        ends = [min(gains.values()), max(gains.values())]
        rows.append(
            [fact, fmean(found.values()), fmean(gains.values()), *ends, *map(fmean, by_trace)]
        )
    heads = ("gain", "least gain", "most gain", *traces)
    columns = [Column("fact"), Column("token hit rate", "%")]
    return Table([*columns, *(Column(one, "points") for one in heads)], rows)


def main() -> None:
    options = common.command_line(__doc__).parse_args()
    jobs = [(trace, gib) for trace, sizes in CELLS.items() for gib in sizes]
    common.run_study(NAME, measure, jobs, table, options.processes)


if __name__ == "__main__":
    main()
