"""What is the loss of a leaf's KV? Three definitions of its ``span``, under every policy that reads
it.

- *edge*: the tokens of its own edge. Depends on where an unrelated fork once split the path.
- *tail*: the tokens whose rows go with it, the extent that ``size_bytes`` weighs.
- *path*: tokens back to the nearest checkpoint above, as a checkpoint's ``span``.

Token hit rate over the generators' workloads at two sizes, both grids, one budget of bytes and two
pools of half of it each; and the goals' conversations in their two pools.

    python -m experiments.study_span      # results/study_span.jsonl; some ten minutes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from tqdm import tqdm

from experiments.lab import QWEN3_NEXT, STATIC_PLACEMENT, keep, rounded
from hybridcache import Item, ScorePolicy, Trace, open_trace
from hybridcache.geometry.times import Roofline
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import RunConfig
from hybridcache.radix.tree import RadixNode, Segment, checkpoint_above, tail_bytes

POLICIES = (
    "gdsf",
    "hyperbolic",
    "class-age",
    "tail-lru",
    "marconi",
    "regret",
    "experiments.study_span:PerByte",
)
"""Every one whose order reads ``span``."""
CELLS = {
    "chat": (4.0, 10.0),
    "few-shot": (2.0, 6.0),
    "agent": (4.0, 10.0),
    "branch": (2.0, 6.0),
    "resend": (2.0, 6.0),
    "short": (2.0, 6.0),
}
"""GiB at which memory is short, by trace."""
LIVE = (64, 128, 256)
GOAL_POOLS = (1_070_000, 320)
"""KV tokens and state slots of the goals' conversations."""
GRIDS = (1, 64)


class PerByte(ScorePolicy):
    """README's example: least tokens lost per byte freed, behind the cache's tiers."""

    orders_tiers = False

    def score(self, item: Item) -> float:
        return item.span / item.size_bytes


def edge_span(segment: Segment) -> int:
    """The segment's own tokens."""
    return len(segment.indices)


def tail_span(segment: Segment) -> int:
    """Tokens whose rows go with it."""
    item_bytes = segment.item_bytes
    return tail_bytes(segment.node, item_bytes) // item_bytes.kv_token


def path_span(segment: Segment) -> int:
    """Tokens back to the nearest checkpoint above; its own where there are no states."""
    if not segment.item_bytes.state:
        return len(segment.indices)
    node: RadixNode = segment.node
    above = checkpoint_above(node)
    return node.end - (0 if above is None else above.node.end)


DEFINITIONS: dict[str, Callable[[Segment], int]] = {
    "edge": edge_span,
    "tail": tail_span,
    "path": path_span,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One trace in one memory."""

    trace: str
    memory: str
    config: RunConfig


def cells(trace: str) -> Iterator[Cell]:
    """All memories and grids that ``trace`` is replayed with."""
    for grid in GRIDS:
        common = RunConfig(
            QWEN3_NEXT, memory="budget", grid=grid, policy="lru", checkpoints=STATIC_PLACEMENT
        )
        if trace.startswith("conversations"):
            tokens, slots = GOAL_POOLS
            yield Cell(trace, "pools", replace(common, num_kv_tokens=tokens, num_slots=slots))
            continue
        for gib in CELLS[trace]:
            size = budget_bytes(gib)
            yield Cell(trace, f"{gib:g} GiB", replace(common, budget_bytes=size))
            tokens = size // 2 // QWEN3_NEXT.kv_bytes_per_token
            slots = size // 2 // QWEN3_NEXT.state_bytes
            halves = replace(common, num_kv_tokens=tokens, num_slots=slots)
            yield Cell(trace, f"{gib:g} GiB in halves", halves)


def measure(trace: Trace, cell: Cell) -> Iterator[dict[str, Any]]:
    """One record a policy: its hit rate under each definition."""
    serving = Serving(Roofline.fitting(QWEN3_NEXT))
    for policy in POLICIES:
        placement = "regret" if policy == "regret" else cell.config.checkpoints
        job = Job(replace(cell.config, policy=policy, checkpoints=placement), serving)
        rates = {}
        for word, span in DEFINITIONS.items():
            with_span(span)
            [run] = run_sweep(trace, [job])
            rates[word] = rounded(run.token_hit_rate)
        yield {
            "trace": cell.trace,
            "memory": cell.memory,
            "grid": cell.config.grid,
            "policy": policy.rpartition(":")[2],
            "requests": run.requests,
        } | rates


def with_span(span: Callable[[Segment], int]) -> None:
    """From now on, in this process, KV's ``span`` is ``span``."""
    Segment.span = property(span)  # type: ignore[assignment,method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = [*CELLS, *(f"conversations?live={live}" for live in LIVE)]
    parser.add_argument("--traces", default=",".join(every), help="commas between")
    parser.add_argument("--head", type=int, default=1500, help="first so many requests of each")
    options = parser.parse_args()
    records = []
    for word in tqdm(options.traces.split(","), disable=None):
        trace = open_trace(word).head(options.head).kept()
        for cell in cells(word):
            records += measure(trace, cell)
    keep("study_span", records)
    print(summary(records))


def summary(records: list[dict[str, Any]]) -> str:
    """The mean hit rate of each policy under each definition, one budget and pools apart."""
    rows = []
    for policy in dict.fromkeys(record["policy"] for record in records):
        for is_split in (False, True):
            found = [
                record
                for record in records
                if record["policy"] == policy and record["memory"].endswith("GiB") != is_split
            ]
            means = [100 * mean(record[word] for record in found) for word in DEFINITIONS]
            name = f"{policy}, {'two pools' if is_split else 'one budget'}"
            rows.append([name, *(f"{value:.1f}" for value in means), str(len(found))])
    return text_table(["mean hit rate, %", *DEFINITIONS, "cells"], rows)


if __name__ == "__main__":
    main()
