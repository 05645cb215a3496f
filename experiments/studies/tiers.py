"""Measure the gain from host memory, compared with as much memory on the device.

    python -m experiments.studies.tiers [--traces chat agent] [--seeds 5]

Twelve traces run on a device with 4 GiB for KV and states, with and without 16 GiB of host memory,
and on a device with 20 GiB. Rebuilt systems have no tiers: they have all 20 GiB on the device. The
upper bound counts tokens, not seconds: no cache of 20 GiB in all has more hits.

The goal: both tiers together save at least 95 % of the seconds that 20 GiB save. Seconds saved are
the prefill seconds of an engine without a cache, minus those computed and minus the copies that
requests waited for. Copies run over PCIe 5.0 (50 GB/s per device).

This counts a copy as if the device were idle meanwhile. In fact the engine computes other requests
while it loads a prefix. Requests that exceed 4 GiB are left out, because no device of that size can
run them. Prefills share their steps, as in a busy engine, so a token costs only its arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.studies import common
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.intervals import interval
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.result import summarise
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.target import build_target
from hybridcache.lab.trace import Trace

DEVICE_GIB = 4
HOST_GIB, GOAL_GIB = 16, 20
GOAL_CELL = f"device {GOAL_GIB}"


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


def measure(job: tuple[str, int]) -> list[dict[str, Any]]:
    """Return one record per policy and memory of (trace, seed). One request follows the other."""
    name, seed = job
    workload = common.WORKLOADS[name]
    trace = servable(workload.open(name, seed), workload.geometry)
    alone = Roofline.fitting(workload.geometry)
    base = Scenario(
        trace,
        model=workload.geometry,
        gib=DEVICE_GIB,
        grid=max(workload.grid, trace.unit),
        times=replace(alone, bytes_per_s=1e30, overhead_s=0.0),
    )
    memories: dict[str, dict[str, int]] = {
        f"device {DEVICE_GIB}": {},
        GOAL_CELL: {"gib": GOAL_GIB},
        f"host {HOST_GIB}": {"host_gib": HOST_GIB},
    }
    records = []
    for pair in (common.DEFAULT, common.LRU_ADAPTIVE):
        policy, _, placement = pair.partition("@")
        for memory, sizes in memories.items():
            cell = replace(base, policy=policy, checkpoints=placement, **sizes)
            target = build_target(cell, trace.unit)
            log = serve(target, trace, trace.unit, cell)
            result = summarise(cell, log, target, trace.name)
            record = {"trace": name, "seed": seed, "cell": memory}
            record["policy"] = policy if pair == common.DEFAULT else pair
            for field in ("requests", "token_hit_rate", "seconds", "seconds_saved", "copy_seconds"):
                record[field] = getattr(result, field)
            records.append(common.rounded(record))
    place = {"trace": name, "seed": seed, "cell": GOAL_CELL}
    rates = dict.fromkeys(common.REBUILT, 0.0)
    settings = {"model": workload.geometry, "grid": base.grid}
    for peer in rates:
        rates[peer] = common.replay(trace, [GOAL_GIB], peer, **settings)[0].token_hit_rate
    rates[common.BOUND] = common.bounds(trace, workload.geometry, [GOAL_GIB])[0]
    return records + [
        common.rounded(place | {"policy": one, "token_hit_rate": rate})
        for one, rate in rates.items()
    ]


def share(cells: common.Records, cell: str) -> float | None:
    """Return the seconds that ``cell`` saves, relative to those of ``GOAL_CELL``. None if nothing
    can be saved."""
    by_cell = {record["cell"]: record for record in cells}
    whole = by_cell[GOAL_CELL]["seconds_saved"]
    total = whole + by_cell[GOAL_CELL]["seconds"]
    return by_cell[cell]["seconds_saved"] / whole if whole > 1e-3 * total else None


def shares_by_trace(records: common.Records, policy: str, cell: str) -> dict[str, list[float]]:
    """Return the seconds that ``cell`` saves relative to 20 GiB by trace, one value per seed.

    Traces are left out if nothing can be saved with some seed.
    """
    found: dict[str, list[float]] = {}
    chosen = [record for record in records if record["policy"] == policy]
    for name, of in common.grouped(chosen, "trace").items():
        shares = [share(cells, cell) for cells in common.grouped(of, "seed").values()]
        known = [one for one in shares if one is not None]
        if len(known) == len(shares):
            found[name] = known
    return found


def over_seeds(records: common.Records) -> common.Table:
    """Return header and rows: seconds saved relative to those of 20 GiB, in percent, per trace, and
    token hit rates as means over seeds."""
    host_cell = f"host {HOST_GIB}"
    device, host = (
        shares_by_trace(records, "survival", cell) for cell in (f"device {DEVICE_GIB}", host_cell)
    )
    hits = {
        key: [one["token_hit_rate"] for one in of]
        for key, of in common.grouped(records, "trace", "policy", "cell").items()
    }
    rows = []
    for name in device:
        peers = [hits.get((name, peer, GOAL_CELL), []) for peer in common.REBUILT]
        rates = [
            hits.get((name, policy, host_cell), []) for policy in ("survival", common.LRU_ADAPTIVE)
        ]
        rates += [[max(of) for of in zip(*peers, strict=True)]]
        rates += [hits.get((name, common.BOUND, GOAL_CELL), [])]
        shares = [str(interval(of[name]).scaled(100)) for of in (device, host)]
        rows.append([name, *shares, *map(common.percent, rates)])
    both = f"{DEVICE_GIB} GiB and {HOST_GIB} GiB of host memory"
    whole = f"{GOAL_GIB} GiB"
    header = ["trace", f"{DEVICE_GIB} GiB, %", f"{both}, %", "hits with both: default pair, %"]
    header += [f"{common.LRU_ADAPTIVE}, %", f"{common.BEST_REBUILT} with {whole} on the device, %"]
    return [*header, f"{common.BOUND} of {whole}, %"], rows


def main() -> None:
    options = common.command_line(__doc__, *common.WORKLOADS).parse_args()
    common.run_study(
        "study_tiers", measure, common.cells_of(options), over_seeds, options.processes
    )


if __name__ == "__main__":
    main()
