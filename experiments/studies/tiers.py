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
from experiments.tables import Cell, Column, Table
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.runs.simulate import run_cell
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.intervals import interval
from hybridcache.lab.traces.trace import Trace

OURS, HITS = "survival", "token_hit_rate"
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
    cells = [
        (label, memory, {"policy": policy, "checkpoints": "adaptive"} | sizes)
        for label, policy in ((OURS, "survival"), (common.LRU_ADAPTIVE, "lru"))
        for memory, sizes in memories.items()
    ]
    cells += [(peer, GOAL_CELL, {"baseline": peer, "gib": GOAL_GIB}) for peer in common.REBUILT]
    for label, memory, settings in cells:
        result = run_cell(trace, replace(base, **settings))
        record = {"trace": name, "seed": seed, "policy": label, "cell": memory}
        for field in ("requests", "token_hit_rate", "seconds", "seconds_saved", "copy_seconds"):
            record[field] = getattr(result, field)
        records.append(common.rounded(record))
    [bound] = common.bounds(trace, workload.geometry, [GOAL_GIB])
    place = {"trace": name, "seed": seed, "policy": common.BOUND, "cell": GOAL_CELL}
    return [*records, place | {"token_hit_rate": common.rounded(bound)}]


def over_seeds(records: common.Records) -> Table:
    """Return seconds saved relative to those of 20 GiB, in percent, per trace, and
    token hit rates as means over seeds.

    Traces are left out if nothing can be saved with some seed.
    """
    found = common.grouped(records, "trace", "policy", "cell")
    device_cell, host_cell = (f"device {DEVICE_GIB}", f"host {HOST_GIB}")
    rows = []
    for name in common.grouped(records, "trace"):

        def values(policy: str, cell: str, field: str) -> list[float]:
            cells = found.get((name, policy, cell), ())  # noqa: B023
            return [one[field] for one in cells if field in one]

        def best(field: str) -> list[float]:
            peers = [values(peer, GOAL_CELL, field) for peer in common.REBUILT]
            return [max(of) for of in zip(*peers, strict=True)]

        whole, computed = (values(OURS, GOAL_CELL, of) for of in ("seconds_saved", "seconds"))
        if any(one <= 1e-3 * (one + other) for one, other in zip(whole, computed, strict=True)):
            continue
        row: list[Cell] = [name]
        of_ours = (values(OURS, cell, "seconds_saved") for cell in (device_cell, host_cell))
        for saved in (*of_ours, best("seconds_saved")):
            parts = [part / one for part, one in zip(saved, whole, strict=bool(saved))]
            row.append(interval(parts).scaled(100) if parts else None)
        rates = [values(policy, host_cell, HITS) for policy in (OURS, common.LRU_ADAPTIVE)]
        rates += [best(HITS), values(common.BOUND, GOAL_CELL, HITS)]
        rows.append([*row, *map(common.percent, rates)])
    both, whole_gib = f"{DEVICE_GIB} GiB and {HOST_GIB} GiB of host memory", f"{GOAL_GIB} GiB"
    peer, bound = (f"{name}, {whole_gib}" for name in common.YARDSTICKS[1:])
    references = zip((common.LRU_ADAPTIVE, peer, bound), common.YARDSTICKS, strict=True)
    columns = [Column(name, "%") for name in (f"{DEVICE_GIB} GiB", both, peer, f"hits: {both}")]
    columns += [Column(f"hits: {name}", "%", reference=of) for name, of in references]
    return Table([Column("trace"), *columns], rows)


def main() -> None:
    options = common.command_line(__doc__, *common.WORKLOADS).parse_args()
    common.run_study(
        "study_tiers", measure, common.cells_of(options), over_seeds, options.processes
    )


if __name__ == "__main__":
    main()
