"""Measure the gap between bound and plan of the offline optimum, and its time on one core.

The MILP runs on ShareGPT-like traces of 250 to 600 requests, the relaxation on 1,500 requests. The
greedy plan runs on the Mooncake conversation trace if ``data/traces`` contains it.

    python -m experiments.benchmarks.optimum
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tqdm import tqdm

from experiments.provenance import RESULTS, write_json_lines
from experiments.studies.common import GB, MARCONI_7B, QWEN3_NEXT, WORKLOADS
from hybridcache import ModelGeometry, Trace
from hybridcache.geometry.units import GIB
from hybridcache.lab.generators import sharegpt_like
from hybridcache.lab.optimum import Method, best_plan

Case = tuple[Trace, ModelGeometry, float, Method]


def cases() -> Iterator[Case]:
    for requests in (250, 400, 600):
        yield sharegpt_like(requests=requests), MARCONI_7B, 5.0, "milp"
    for gigabytes in (2.0, 5.0, 10.0):
        yield sharegpt_like(requests=1_500), MARCONI_7B, gigabytes, "lp"
    mooncake = WORKLOADS["mooncake"]
    if mooncake.is_available:
        for gigabytes in (80.0, 320.0):
            yield mooncake.open("mooncake", full=True), QWEN3_NEXT, gigabytes, "greedy"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    records = []
    print(
        f"{'trace':<14} {'requests':>8} {'GB':>5} {'method':>7} {'reached':>8} {'bound':>7} "
        f"{'gap':>7} {'s':>6}"
    )
    for trace, geometry, gigabytes, method in tqdm(list(cases()), unit="optimum"):
        best = best_plan(
            trace,
            capacity_bytes=round(gigabytes * GB * GIB),
            kv_bytes_per_token=geometry.kv_bytes_per_token,
            state_bytes=geometry.state_bytes,
            method=method,
            limit_s=58.0 if method == "milp" else 120.0,
        )
        records.append({**best.record(), "geometry": geometry.name})
        bound = "unknown" if best.bound is None else f"{best.bound:.4f}"
        gap = "" if best.gap is None else f"{best.gap:.2%}"
        tqdm.write(
            f"{trace.name:<14} {best.num_requests:>8} {gigabytes:>5.0f} {method:>7} "
            f"{best.reached:>8.4f} "
            f"{bound:>7} {gap:>7} {best.wall_s:>6.1f}"
        )
        write_json_lines(RESULTS / "bench_optimum.jsonl", records)
    print(f"wrote {RESULTS / 'bench_optimum.jsonl'}")


if __name__ == "__main__":
    main()
