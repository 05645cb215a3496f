"""Measure the worth of a byte of each tier, compared with a byte of the device.

Twelve traces, the device with 4 GiB for KV and states, host memory and disk below it. Seconds saved
are those of prefill that a cache without any memory would have computed, less the copies that
requests waited for: over PCIe 5.0 (50 GB/s a device) and from one drive (6 GB/s). That counts a
copy as if the device stood still for it. While one request's prefix is fetched the engine computes
others: *beside others*, copies cost the device nothing and only the request its time. Requests that
4 GiB can not hold at all are left out: no device of that size runs them. Two clocks:

- *shared*: prefills share their steps, as in a busy engine, so a token costs its arithmetic and
  nothing else. All comparisons but one use it.
- *alone*: the roofline of a prefill that has the device to itself, and waits for the weights
  however short it is (`Roofline.fitting`): there, few tokens cost what many do, and little is
  saved.

Questions, all with the policies that are served:

- the goal: 4 GiB and 16 GiB of host memory save at least 95 % of the seconds that 20 GiB save;
- how many GiB of device memory 4, 16 and 64 GiB of host memory are worth, and 64 GiB of disk;
- states alone, or states with the KV under them; KV alone can not be resumed from;
- on eviction, or written through: what is written through has a twin below all that is on the
  device, so it leaves 16 - 4 GiB for the rest; and what is copied for either;
- when fetching loses to computing: other bandwidths, and fetching whatever there is.

    python -m experiments.studies.tiers [--traces chat,agent] [--few]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.provenance import read_json_lines, write_json_lines
from experiments.studies.common import STATIC_PLACEMENT, WORKLOADS, figure_path, keep, rounded
from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import PrefillTimes, Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.result import RunResult, summarise
from hybridcache.lab.simulation.serving import Serving, serve
from hybridcache.lab.simulation.target import LeaseTarget, RunConfig, build_target
from hybridcache.lab.trace import Trace
from hybridcache.offload import OffloadTiers
from hybridcache.radix.tree import Checkpoint, RadixNode
from hybridcache.tokens import Indices
from hybridcache.variants import TieredRadixCache

DEVICE_GIB = 4
CURVE = (4, 5, 6, 8, 10, 14, 20, 36, 68)
"""Device memory alone, GiB: what the tiers are compared with."""
HOSTS = (4, 16, 64)
GOAL = (16, 20)
RATES = (1e9, 4e9, 12e9, 25e9, 200e9)
"""Bytes a second from host to device, beside PCIe 5.0."""
SHORT = {
    "tau-bench": 250,
    "mooncake": 1000,
    "coding-agent": 400,
    "conversations": 1200,
    "sharegpt-like": 300,
    "sharegpt": 1000,
}
"""Requests of the traces that take long, with --few."""
ALL_CELLS = "regret"
"""The policy that is asked everything; others, the goal alone."""
Change = Callable[[LeaseTarget], None]


class StatesAlone(OffloadTiers):
    """States of which the KV stays on the device, and nothing else."""

    def offload_checkpoint(self, node: RadixNode, checkpoint: Checkpoint) -> None:
        if node.children is not None:
            super().offload_checkpoint(node, checkpoint)

    def offload_kv(self, ghost: RadixNode, rows: Indices) -> bool:
        self._prune(ghost)
        return False


class Whatever:
    """Fetches the deepest state, whatever it costs."""

    def __init__(self, target: LeaseTarget) -> None:
        assert target.exchange is not None
        self.copy_seconds = target.exchange.copy_seconds

    def seconds_saved(self, cached_len: int, position: int, prompt_len: int, _: object) -> float:
        return position - cached_len


def states_alone(target: LeaseTarget) -> None:
    cache = target.cache
    assert isinstance(cache, TieredRadixCache)
    cache.attach(cache.offload.tiers, cache.offload.state_rows, StatesAlone)


def fetch_whatever(target: LeaseTarget) -> None:
    target.exchange = Whatever(target)  # type: ignore[assignment]


def servable(trace: Trace, geometry: ModelGeometry) -> Trace:
    """In memory, without the requests that no device of ``DEVICE_GIB`` can run, whatever lies below
    it: their KV and two states are larger."""
    room = (DEVICE_GIB * GIB - 2 * geometry.state_bytes) // geometry.kv_bytes_per_token
    sizes = (
        (request, request.num_tokens(trace.unit) + len(request.output) * trace.unit)
        for request in trace
    )
    return replace(trace, source=[one for one, size in sizes if size <= room].__iter__)


def run(
    trace: Trace, config: RunConfig, times: PrefillTimes, change: Change | None = None
) -> RunResult:
    """One replay, in turn."""
    target = build_target(config, trace.unit, times)
    if change is not None:
        assert isinstance(target, LeaseTarget)
        change(target)
    serving = Serving(times)
    log = serve(target, trace, trace.unit, serving)
    return summarise(config, serving, log, target, trace.name)


def cells(config: RunConfig) -> dict[str, tuple[RunConfig, str, Change | None]]:
    """Return the runs by name: (config, clock, change from the served configuration)."""

    def tiered(host: float, disk: float = 0, rate: float = PCIE_BYTES_PER_S) -> RunConfig:
        return replace(
            config,
            budget_bytes=DEVICE_GIB * GIB,
            host_bytes=int(host * GIB),
            disk_bytes=int(disk * GIB),
            host_bytes_per_s=rate,
        )

    found: dict[str, tuple[RunConfig, str, Change | None]] = {}
    for gib in (DEVICE_GIB, GOAL[1]):
        found[f"device {gib}"] = replace(config, budget_bytes=gib * GIB), "shared", None
        found[f"device {gib}, alone"] = replace(config, budget_bytes=gib * GIB), "alone", None
    found["host 16"] = tiered(GOAL[0]), "shared", None
    found["host 16, alone"] = tiered(GOAL[0]), "alone", None
    if config.policy != ALL_CELLS:
        return found
    for gib in CURVE:
        found[f"device {gib}"] = replace(config, budget_bytes=gib * GIB), "shared", None
    for host in HOSTS:
        found[f"host {host}"] = tiered(host), "shared", None
    found["host 16, disk 64"] = tiered(16, 64), "shared", None
    found["disk 64"] = tiered(0, 64), "shared", None
    found["through"] = tiered(GOAL[0] - DEVICE_GIB), "shared", None
    found["states alone"] = tiered(GOAL[0]), "shared", states_alone
    for rate in RATES:
        found[f"rate {rate / 1e9:g}"] = tiered(GOAL[0], rate=rate), "shared", None
        if rate < PCIE_BYTES_PER_S:
            found[f"whatever {rate / 1e9:g}"] = (
                tiered(GOAL[0], rate=rate),
                "shared",
                fetch_whatever,
            )
    return found


def measure(word: str, policy: str, few: bool, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """A record a cell."""
    workload = WORKLOADS[word]
    trace = workload.open(word, False)
    if few and word in SHORT:
        trace = trace.head(SHORT[word])
    trace = servable(trace, workload.geometry)
    alone = Roofline.fitting(workload.geometry)
    clocks = {"alone": alone, "shared": replace(alone, bytes_per_s=1e30, overhead_s=0.0)}
    config = RunConfig(
        workload.geometry,
        policy=policy,
        checkpoints="regret" if policy == ALL_CELLS else STATIC_PLACEMENT,
        grid=max(workload.grid, trace.unit),
    )
    records = []
    for name, (cell, clock, change) in cells(config).items():
        bar.set_postfix_str(name)
        result = run(trace, cell, clocks[clock], change)
        records.append(
            {
                "trace": word,
                "policy": policy,
                "cell": name,
                "requests": result.requests,
                "prompt_tokens": result.prompt_tokens,
                "token_hit_rate": result.token_hit_rate,
                "seconds": result.seconds,
                "seconds_saved": result.seconds_saved,
                "copy_seconds": result.copy_seconds,
                "not_fetched": getattr(result.losses, "not_fetched", 0),
                "tier_bytes": result.tier_bytes,
                "written_bytes": (result.written_kv_bytes or 0)
                + (result.checkpoints_made or 0) * workload.geometry.state_bytes,
            }
        )
    return [rounded(record) for record in records]


Table = dict[tuple[str, str], dict[str, dict[str, Any]]]


def by_cell(records: Sequence[dict[str, Any]]) -> Table:
    """(trace, policy) to cells by name."""
    found: Table = {}
    for record in records:
        found.setdefault((record["trace"], record["policy"]), {})[record["cell"]] = record
    return found


def share(
    known: dict[str, dict[str, Any]], cell: str, of: str, beside_others: bool = False
) -> float | None:
    """Seconds that ``cell`` saves, of those that ``of`` does; None where nothing can be saved, or
    it was not run. ``beside_others``: copies cost the device nothing."""
    if cell not in known:
        return None
    whole = known[of]["seconds_saved"]
    total = whole + known[of]["seconds"]
    saved = known[cell]["seconds_saved"] + beside_others * known[cell]["copy_seconds"]
    return saved / whole if whole > 1e-3 * total else None


def worth_gib(known: dict[str, dict[str, Any]], cell: str) -> float | None:
    """GiB of device memory beyond ``DEVICE_GIB`` that save what ``cell`` does; None: no size tried
    saves more than the smallest, or it was not run."""
    if cell not in known or f"device {CURVE[1]}" not in known:
        return None
    saved = [known[f"device {gib}"]["seconds_saved"] for gib in CURVE]
    rising = np.maximum.accumulate(saved)
    if rising[-1] < 1.01 * rising[0] or rising[-1] <= 0:
        return None
    reached = known[cell]["seconds_saved"]
    return max(float(np.interp(reached, rising, CURVE)) - DEVICE_GIB, 0.0)


def shares(
    table: Table, policy: str, cell: str, of: str, beside_others: bool = False
) -> list[float]:
    """Over the traces where something can be saved."""
    found = (
        share(known, cell, of, beside_others)
        for (_, name), known in table.items()
        if name == policy
    )
    return [one for one in found if one is not None]


def text(table: Table) -> str:
    """The goal and the worth of each tier, a row a trace."""
    header = ["trace", "policy", "4 GiB, %", "4 + 16, % of 20", "beside others", "alone"]
    header += [f"host {host} = GiB" for host in HOSTS]
    header += ["+ disk 64 = GiB", "states alone, %", "through, %"]
    goal = f"device {GOAL[1]}"
    rows = []
    for (word, policy), known in table.items():
        figures = [
            share(known, f"device {DEVICE_GIB}", goal),
            share(known, "host 16", goal),
            share(known, "host 16", goal, beside_others=True),
            share(known, "host 16, alone", f"{goal}, alone"),
        ]
        worth = [worth_gib(known, f"host {host}") for host in HOSTS]
        worth.append(worth_gib(known, "host 16, disk 64"))
        others = [share(known, cell, goal) for cell in ("states alone", "through")]
        rows.append(
            [word, policy]
            + ["-" if one is None else f"{100 * one:.1f}" for one in figures]
            + ["-" if one is None else f"{one:.1f}" for one in worth]
            + ["-" if one is None else f"{100 * one:.1f}" for one in others]
        )
    return text_table(header, rows)


def draw(table: Table, policy: str) -> None:
    """Four panels: the goal, a byte's worth, what lies below, and bandwidths."""
    figure, axes = panels(4, 5.0, 3.6, columns=2)
    words = [word for word, name in table if name == policy]
    _draw_goal(axes[0], table, policy, words)
    _draw_worth(axes[1], table, policy, words)
    _draw_kinds(axes[2], table, policy)
    _draw_rates(axes[3], table, policy)
    caption = (
        "A device with 4 GiB for KV and states, and what lies below it: eviction and placement "
        f"`{policy}`. Left above: each trace beside 20 GiB on the device; dashed: the goal, 95 %. "
        f"Right above: what a GiB of host memory replaces, of up to {CURVE[-1] - DEVICE_GIB} GiB; "
        "1: as good as the device's own. Left below: points are traces, diamonds means. Right "
        "below: 16 GiB of host memory at other bandwidths, mean of the traces. Prefills share "
        "their steps; copies are waited for, but for the third bars."
    )
    save(figure, axes, figure_path("study_tiers"), caption)


SAVED = "prefill seconds saved,\n% of what 20 GiB save"
GOAL_CELL = f"device {GOAL[1]}"


def _draw_goal(axis: Any, table: Table, policy: str, words: list[str]) -> None:
    places = np.arange(len(words))
    cells = {
        (f"device {DEVICE_GIB}", False): "4 GiB",
        ("host 16", False): "and 16 GiB of host memory",
        ("host 16", True): "copies beside others",
    }
    bars = []
    for number, (cell, beside) in enumerate(cells):
        found = [share(table[word, policy], cell, GOAL_CELL, beside) for word in words]
        heights = [100 * (one or 0) for one in found]
        bars.append(axis.bar(places + 0.27 * number, heights, width=0.25, color=COLOURS[number]))
    axis.axhline(95, color="#555555", linewidth=0.8, linestyle="--")
    axis.set_xticks(places + 0.27, words, rotation=60, ha="right", fontsize=6)
    axis.set_ylim(0, 122)
    axis.set_ylabel(SAVED)
    axis.legend(bars, cells.values(), fontsize=6, loc="upper left", ncol=3)


def _draw_worth(axis: Any, table: Table, policy: str, words: list[str]) -> None:
    lines: dict[str, Any] = {}
    for word in words:
        worth = [worth_gib(table[word, policy], f"host {host}") for host in HOSTS]
        if None not in worth:
            number = len(lines)
            values = [(one or 0) / host for one, host in zip(worth, HOSTS, strict=True)]
            (lines[word],) = axis.plot(
                HOSTS,
                values,
                "-" if number < len(COLOURS) else ":",
                color=COLOURS[number % len(COLOURS)],
                marker="o",
                markersize=3,
            )
    axis.set_xscale("log", base=2)
    axis.set_xticks(HOSTS, [str(host) for host in HOSTS])
    axis.set_xlabel("GiB of host memory below 4 GiB")
    axis.set_ylabel("GiB of device memory\nthat a GiB of it is worth")
    axis.legend(lines.values(), lines.keys(), fontsize=6, ncol=2, loc="upper right")
    axis.set_ylim(-0.05, 2.1)


def _draw_kinds(axis: Any, table: Table, policy: str) -> None:
    kinds = {
        "host 16": "host 16,\non eviction",
        "through": "host 16,\nwritten through",
        "states alone": "host 16,\nstates alone",
        "disk 64": "disk 64",
        "host 16, disk 64": "host 16\nand disk 64",
    }
    for number, cell in enumerate(kinds):
        found = [100 * one for one in shares(table, policy, cell, GOAL_CELL)]
        axis.plot([number] * len(found), found, "o", color="#9aa5b1", markersize=3)
        axis.plot([number], [float(np.mean(found))], "D", color=COLOURS[0], markersize=6)
    axis.set_xticks(range(len(kinds)), kinds.values(), fontsize=6)
    axis.set_ylabel(SAVED)


def _draw_rates(axis: Any, table: Table, policy: str) -> None:
    rates = sorted((*RATES, PCIE_BYTES_PER_S))
    slow = [rate for rate in rates if rate < PCIE_BYTES_PER_S]
    drawn = {}
    for number, (label, word, tried) in enumerate(
        (("where it is sooner", "rate", rates), ("whatever there is", "whatever", slow))
    ):
        (drawn[f"fetch {label}"],) = axis.plot(
            [rate / 1e9 for rate in tried],
            [_mean(table, policy, rate, word) for rate in tried],
            color=COLOURS[number],
            marker="o",
            markersize=3,
        )
    alone = 100 * float(np.mean(shares(table, policy, f"device {DEVICE_GIB}", GOAL_CELL)))
    drawn["no host memory"] = axis.axhline(alone, color="#555555", linewidth=0.8, linestyle="--")
    axis.set_xscale("log")
    axis.set_xlabel("GB/s from host memory to a device")
    axis.set_ylabel(SAVED)
    axis.legend(drawn.values(), drawn.keys(), fontsize=6)


def _mean(table: Table, policy: str, rate: float, word: str) -> float:
    cell = "host 16" if rate == PCIE_BYTES_PER_S else f"{word} {rate / 1e9:g}"
    return 100 * float(np.mean(shares(table, policy, cell, GOAL_CELL)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(WORKLOADS), help="words of WORKLOADS")
    parser.add_argument("--policy", default="regret,lru", help="evictions, commas between")
    parser.add_argument("--few", action="store_true", help="the beginnings of long traces")
    parser.add_argument("--resume", type=Path, help="folder of finished runs")
    options = parser.parse_args()
    if options.resume:
        options.resume.mkdir(parents=True, exist_ok=True)
    words = [word for word in options.traces.split(",") if WORKLOADS[word].is_available]
    policies = options.policy.split(",")
    records: list[dict[str, Any]] = []
    for word in (bar := tqdm(words, disable=None)):
        bar.set_description(word)
        for policy in policies:
            path = options.resume and options.resume / f"{word}-{policy}.jsonl"
            if path is None or not path.exists():
                found = measure(word, policy, options.few, bar)
                if path is not None:
                    write_json_lines(path, found)
                records += found
            else:
                records += read_json_lines(path)[1]
    table = by_cell(records)
    if words == list(WORKLOADS):
        keep("study_tiers", records)
        draw(table, policies[0])
    print(text(table))
    for policy in policies:
        for clock in ("", ", alone"):
            reached = shares(table, policy, f"host 16{clock}", f"device {GOAL[1]}{clock}")
            if not reached:
                continue
            print(
                f"{policy}{clock}: 4 GiB and 16 GiB of host memory save "
                f"{100 * np.mean(reached):.1f} % of what 20 GiB do, mean of {len(reached)} traces; "
                f"least {100 * min(reached):.1f} %; disk at {DISK_BYTES_PER_S / 1e9:g} GB/s"
            )
        beside = shares(table, policy, "host 16", GOAL_CELL, beside_others=True)
        print(
            f"{policy}, copies beside others: {100 * np.mean(beside):.1f} %, "
            f"least {100 * min(beside):.1f} %"
        )
        spilled = [
            (known["host 16"]["tier_bytes"] or {}).get("device_to_host_bytes", 0)
            / known["host 16"]["written_bytes"]
            for (_, name), known in table.items()
            if name == policy
        ]
        print(
            f"{policy}: on eviction {100 * np.mean(spilled):.0f} % of what the cache is given goes "
            f"to host memory, mean of the traces ({100 * min(spilled):.0f} to "
            f"{100 * max(spilled):.0f} %); written through, all of it does"
        )


if __name__ == "__main__":
    main()
