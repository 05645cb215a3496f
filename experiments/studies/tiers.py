"""Measure the gain from a byte of each tier, compared with a byte of the device.

    python -m experiments.studies.tiers [--traces chat,agent] [--few] [--seeds 10]

Twelve traces run on a device with 4 GiB for KV and states, and with tiers in host memory and on
disk. Other seeds than 0 run only the cells of the goal. Seconds saved are the prefill seconds of an
engine without a cache, minus those computed and minus the copies that requests waited for. Copies
run over PCIe 5.0 (50 GB/s per device) and from one drive (6 GB/s).

This counts a copy as if the device were idle meanwhile. In fact the engine computes other requests
while it loads a prefix. In the figures for overlapped copies, copies therefore cost no device time,
only time of their request. Requests that exceed 4 GiB are left out, because no device of that size
can run them. There are two clocks:

- *shared*: prefills share their steps, as in a busy engine, so a token costs only its arithmetic.
  All comparisons but one use it.
- *alone*: the roofline of a prefill that has the device to itself and waits for the weights,
  however short it is (`Roofline.fitting`). There a few tokens cost as much as many, and little is
  saved.

Questions, for the served policies:

- Do 4 GiB and 16 GiB of host memory save at least 95 % of the seconds that 20 GiB save? This is the
  goal.
- How many GiB of device memory replace 4, 16 and 64 GiB of host memory, and 64 GiB of disk?
- Are states enough, or is the KV below them needed too? KV without states cannot be resumed from.
- Is it better to offload on eviction, or to write through? Write-through duplicates all of the
  device, so it leaves 16 - 4 GiB for other entries.
- When is loading slower than computing? Other bandwidths, and loading without a cost rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.studies.common import STATIC_PLACEMENT, WORKLOADS, keep, rounded
from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.intervals import interval
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.grid import collect_seldom
from hybridcache.lab.simulation.result import RunResult, summarise
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.target import LeaseTarget, build_target
from hybridcache.lab.trace import Trace
from hybridcache.radix.tree import Checkpoint, RadixNode
from hybridcache.tiers import OffloadTiers, TieredRadixCache
from hybridcache.tokens import Indices

DEVICE_GIB = 4
CURVE = (4, 5, 6, 8, 10, 14, 20, 36, 68)
"""Sizes of a device without tiers, in GiB, for comparison."""
HOSTS = (4, 16, 64)
GOAL = (16, 20)
GOAL_CELL = f"device {GOAL[1]}"
RATES = (1e9, 4e9, 12e9, 25e9, 200e9)
"""Other bandwidths than PCIe 5.0 from host to device, in bytes per second."""
SHORT = {
    "tau-bench": 250,
    "mooncake": 1000,
    "coding-agent": 400,
    "conversations": 1200,
    "sharegpt-like": 300,
    "sharegpt": 1000,
}
"""Number of requests of long traces with --few."""
ALL_CELLS = "survival"
"""Policy with all cells. Others have only those of the goal."""
Change = Callable[[LeaseTarget], None]
Shares = list[float]


class StatesOnly(OffloadTiers):
    """Offload of states only, and only while their KV stays on the device."""

    def offload_checkpoint(self, node: RadixNode, checkpoint: Checkpoint) -> None:
        if node.children is not None:
            super().offload_checkpoint(node, checkpoint)

    def offload_kv(self, ghost: RadixNode, rows: Indices) -> bool:
        self._prune(ghost)
        return False


class AlwaysFetch:
    """Fetch rule that loads the deepest state at any cost."""

    def __init__(self, target: LeaseTarget) -> None:
        assert target.exchange is not None
        self.copy_seconds = target.exchange.copy_seconds

    def seconds_saved(self, cached_len: int, position: int, prompt_len: int, _: object) -> float:
        return position - cached_len


def use_states_only(target: LeaseTarget) -> None:
    cache = target.cache
    assert isinstance(cache, TieredRadixCache)
    cache.attach(cache.offload.tiers, cache.offload.state_rows, StatesOnly)


def use_always_fetch(target: LeaseTarget) -> None:
    target.exchange = AlwaysFetch(target)  # type: ignore[assignment]


def servable(trace: Trace, geometry: ModelGeometry) -> Trace:
    """Return the trace without requests that no device of ``DEVICE_GIB`` can run.

    Their KV and two states are larger than the device. The trace is held in memory.
    """
    room = (DEVICE_GIB * GIB - 2 * geometry.state_bytes) // geometry.kv_bytes_per_token
    sizes = (
        (request, request.num_tokens(trace.unit) + len(request.output) * trace.unit)
        for request in trace
    )
    return replace(trace, source=[request for request, size in sizes if size <= room].__iter__)


def run(trace: Trace, cell: Scenario, change: Change | None = None) -> RunResult:
    """Replay the trace once, one request after the other."""
    target = build_target(cell, trace.unit)
    if change is not None:
        assert isinstance(target, LeaseTarget)
        change(target)
    return summarise(cell, serve(target, trace, trace.unit, cell), target, trace.name)


def cells(base: Scenario, only_goal: bool) -> dict[str, tuple[Scenario, str, Change | None]]:
    """Return the runs by name: (cell, clock, change from the served configuration)."""

    def tiered(host: float, disk: float = 0, rate: float = PCIE_BYTES_PER_S) -> Scenario:
        return replace(base, gib=DEVICE_GIB, host_gib=host, disk_gib=disk, host_gb_s=rate / 1e9)

    found: dict[str, tuple[Scenario, str, Change | None]] = {}
    for gib in (DEVICE_GIB, GOAL[1]):
        found[f"device {gib}"] = replace(base, gib=gib), "shared", None
        found[f"device {gib}, alone"] = replace(base, gib=gib), "alone", None
    found["host 16"] = tiered(GOAL[0]), "shared", None
    found["host 16, alone"] = tiered(GOAL[0]), "alone", None
    if only_goal:
        return found
    for gib in CURVE:
        found[f"device {gib}"] = replace(base, gib=gib), "shared", None
    for host in HOSTS:
        found[f"host {host}"] = tiered(host), "shared", None
    found["host 16, disk 64"] = tiered(16, 64), "shared", None
    found["disk 64"] = tiered(0, 64), "shared", None
    found["through"] = tiered(GOAL[0] - DEVICE_GIB), "shared", None
    found["states alone"] = tiered(GOAL[0]), "shared", use_states_only
    for rate in RATES:
        found[f"rate {rate / 1e9:g}"] = tiered(GOAL[0], rate=rate), "shared", None
        if rate < PCIE_BYTES_PER_S:
            found[f"whatever {rate / 1e9:g}"] = (
                tiered(GOAL[0], rate=rate),
                "shared",
                use_always_fetch,
            )
    return found


def measure(job: tuple[str, int, str, bool]) -> list[dict[str, Any]]:
    """Return one record per cell of (trace, seed, policy, whether long traces are cut)."""
    trace_name, seed, policy, few = job
    workload = WORKLOADS[trace_name]
    trace = workload.open(trace_name, False, seed)
    if few and trace_name in SHORT:
        trace = trace.head(SHORT[trace_name])
    trace = servable(trace, workload.geometry)
    alone = Roofline.fitting(workload.geometry)
    clocks = {"alone": alone, "shared": replace(alone, bytes_per_s=1e30, overhead_s=0.0)}
    base = Scenario(
        trace,
        model=workload.geometry,
        policy=policy,
        checkpoints="adaptive" if policy == ALL_CELLS else STATIC_PLACEMENT,
        grid=max(workload.grid, trace.unit),
    )
    records = []
    for name, (cell, clock, change) in cells(base, seed > 0 or policy != ALL_CELLS).items():
        result = run(trace, replace(cell, times=clocks[clock]), change)
        records.append(
            {
                "trace": trace_name,
                "seed": seed,
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
    """Return the records of seed 0 by (trace, policy), then by cell."""
    found: Table = {}
    for record in records:
        if record["seed"] == 0:
            found.setdefault((record["trace"], record["policy"]), {})[record["cell"]] = record
    return found


def share(
    cells_of: dict[str, dict[str, Any]], cell: str, baseline: str, overlapped: bool = False
) -> float | None:
    """Return the seconds that ``cell`` saves, relative to those of ``baseline``.

    None if nothing can be saved, or the cell was not run. With ``overlapped``, copies cost no
    device time.
    """
    if cell not in cells_of:
        return None
    whole = cells_of[baseline]["seconds_saved"]
    total = whole + cells_of[baseline]["seconds"]
    saved = cells_of[cell]["seconds_saved"] + overlapped * cells_of[cell]["copy_seconds"]
    return saved / whole if whole > 1e-3 * total else None


def worth_gib(cells_of: dict[str, dict[str, Any]], cell: str) -> float | None:
    """Return the GiB of device memory beyond ``DEVICE_GIB`` that save as much as ``cell``.

    None if no size saves more than the smallest, or the cell was not run.
    """
    if cell not in cells_of or f"device {CURVE[1]}" not in cells_of:
        return None
    saved = [cells_of[f"device {gib}"]["seconds_saved"] for gib in CURVE]
    rising = np.maximum.accumulate(saved)
    if rising[-1] < 1.01 * rising[0] or rising[-1] <= 0:
        return None
    reached = cells_of[cell]["seconds_saved"]
    return max(float(np.interp(reached, rising, CURVE)) - DEVICE_GIB, 0.0)


def shares(
    table: Table, policy: str, cell: str, baseline: str, overlapped: bool = False
) -> list[float]:
    """Return the shares of all traces where something can be saved."""
    found = (
        share(cells_of, cell, baseline, overlapped)
        for (_, eviction), cells_of in table.items()
        if eviction == policy
    )
    return [value for value in found if value is not None]


def shares_by_trace(records: Sequence[dict[str, Any]], policy: str, cell: str) -> dict[str, Shares]:
    """Return the seconds that ``cell`` saves relative to 20 GiB by trace, one value per seed.

    Traces are left out if nothing can be saved with some seed.
    """
    found: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for record in records:
        if record["policy"] == policy:
            by_seed = found.setdefault(record["trace"], {})
            by_seed.setdefault(record["seed"], {})[record["cell"]] = record
    shares = {
        name: [share(cells_of, cell, GOAL_CELL) for cells_of in by_seed.values()]
        for name, by_seed in found.items()
    }
    return {
        name: [value for value in values if value is not None]
        for name, values in shares.items()
        if None not in values
    }


def over_seeds(records: Sequence[dict[str, Any]], policy: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: seconds saved relative to those of 20 GiB, in percent, per trace."""
    device, host = (
        shares_by_trace(records, policy, cell) for cell in (f"device {DEVICE_GIB}", "host 16")
    )
    rows = [
        [name, *(str(interval(shares[name]).scaled(100)) for shares in (device, host))]
        for name in device
    ]
    return ["trace", f"{DEVICE_GIB} GiB, %", f"{DEVICE_GIB} GiB and 16 GiB of host memory, %"], rows


def text(table: Table) -> str:
    """Return the goal and the worth of each tier, one row per trace."""
    header = ["trace", "policy", "4 GiB, %", "4 + 16, % of 20", "overlapped", "alone"]
    header += [f"host {host} = GiB" for host in HOSTS]
    header += ["+ disk 64 = GiB", "states only, %", "write-through, %"]
    goal = f"device {GOAL[1]}"
    rows = []
    for (name, policy), cells_of in table.items():
        figures = [
            share(cells_of, f"device {DEVICE_GIB}", goal),
            share(cells_of, "host 16", goal),
            share(cells_of, "host 16", goal, overlapped=True),
            share(cells_of, "host 16, alone", f"{goal}, alone"),
        ]
        worth = [worth_gib(cells_of, f"host {host}") for host in HOSTS]
        worth.append(worth_gib(cells_of, "host 16, disk 64"))
        others = [share(cells_of, cell, goal) for cell in ("states alone", "through")]
        rows.append(
            [name, policy]
            + ["-" if value is None else f"{100 * value:.1f}" for value in figures]
            + ["-" if value is None else f"{value:.1f}" for value in worth]
            + ["-" if value is None else f"{100 * value:.1f}" for value in others]
        )
    return text_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(WORKLOADS), help="names of WORKLOADS")
    parser.add_argument("--policy", default="survival,lru", help="evictions, separated by commas")
    parser.add_argument("--few", action="store_true", help="use only the start of long traces")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    names = [name for name in options.traces.split(",") if WORKLOADS[name].is_available]
    policies = options.policy.split(",")
    jobs = [
        (name, seed, policy, options.few)
        for name in names
        for seed in WORKLOADS[name].seeds(options.seeds)
        for policy in policies
    ]
    with ProcessPoolExecutor(options.processes, initializer=collect_seldom) as pool:
        found = list(tqdm(pool.map(measure, jobs), total=len(jobs), disable=None))
    records = [record for several in found for record in several]
    table = by_cell(records)
    if names == list(WORKLOADS):
        keep("study_tiers", records)
    print(text(table))
    for policy in policies:
        print(policy, text_table(*over_seeds(records, policy)), sep="\n")
        for clock in ("", ", alone"):
            reached = shares(table, policy, f"host 16{clock}", f"device {GOAL[1]}{clock}")
            if not reached:
                continue
            print(
                f"{policy}{clock}: 4 GiB and 16 GiB of host memory save "
                f"{100 * np.mean(reached):.1f} % as much as 20 GiB, mean of {len(reached)} traces; "
                f"minimum {100 * min(reached):.1f} %; disk at {DISK_BYTES_PER_S / 1e9:g} GB/s"
            )
        reached = shares(table, policy, "host 16", GOAL_CELL, overlapped=True)
        print(
            f"{policy}, overlapped copies: {100 * np.mean(reached):.1f} %, "
            f"minimum {100 * min(reached):.1f} %"
        )
        offloaded = [
            (cells_of["host 16"]["tier_bytes"] or {}).get("device_to_host_bytes", 0)
            / cells_of["host 16"]["written_bytes"]
            for (_, name), cells_of in table.items()
            if name == policy
        ]
        print(
            f"{policy}: offloading on eviction copies {100 * np.mean(offloaded):.0f} % of the "
            f"published bytes to host memory, mean of the traces ({100 * min(offloaded):.0f} to "
            f"{100 * max(offloaded):.0f} %); write-through copies all of them"
        )


if __name__ == "__main__":
    main()
