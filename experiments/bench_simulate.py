"""How fast the simulator is, and how much memory a million requests take. One core.

    python -m experiments.bench_simulate            # every policy, some minutes
    python -m experiments.bench_simulate --quick    # LRU and regret

Chat-like traces: conversations over shared system prompts, 64 live at a time. The median of three runs is quoted, generating the trace
excluded; the garbage collector is left as it is.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from time import process_time
from typing import Any

from tqdm import tqdm

from experiments.provenance import RESULTS, write_json_lines
from hybridcache.costs import ModelGeometry, Roofline
from hybridcache.generators import GENERATORS
from hybridcache.policies.eviction import EVICTION
from hybridcache.simulation.serving import Serving, serve
from hybridcache.simulation.target import GIB, RunConfig, build_target
from hybridcache.trace import Trace

GEOMETRY = ModelGeometry.preset("qwen3-next")
SERVING = Serving(Roofline.fitting(GEOMETRY))
TRACES = ("chat", "short", "few-shot", "agent", "conversations")
REPEATS = 3


def requests_per_s(trace: Trace, config: RunConfig) -> float:
    """Requests served per second of processor time, median of ``REPEATS``."""
    kept = tuple(trace)
    rates = []
    for _ in range(REPEATS):
        target = build_target(config, trace.unit)
        start = process_time()
        serve(target, kept, trace.unit, SERVING)
        rates.append(len(kept) / (process_time() - start))
    return statistics.median(rates)


def many_requests(count: int) -> None:
    """Serve ``count`` requests of three-turn chats and print (requests/s, peak MiB); run in a process of its own."""
    trace = GENERATORS["conversations"](num_conversations=count // 3, turns=3)
    config = RunConfig(GEOMETRY, budget_bytes=40 * GIB)
    start = process_time()
    log = serve(build_target(config, 1), trace, 1, SERVING)
    seconds = process_time() - start
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(len(log.turns) / seconds, peak_mib)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two policies")
    parser.add_argument("--million", type=int, default=1_000_000, help="requests of the memory run")
    parser.add_argument("--only-million", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_million:
        many_requests(options.million)
        return
    policies = [word for word in ("lru", "regret") if word in EVICTION]
    if not options.quick:
        policies = sorted(EVICTION)
    records: list[dict[str, Any]] = []
    jobs = [(policy, trace) for policy in policies for trace in TRACES]
    for policy, word in tqdm(jobs, unit=" runs", disable=None):
        config = RunConfig(GEOMETRY, budget_bytes=12 * GIB, policy=policy)
        rate = requests_per_s(GENERATORS[word](), config)
        records.append({"policy": policy, "trace": word, "requests_per_s": round(rate)})
    command = [sys.executable, "-m", "experiments.bench_simulate", "--only-million"]
    done = subprocess.run(
        [*command, "--million", str(options.million)], capture_output=True, text=True, check=True
    )
    rate, peak_mib = map(float, done.stdout.split())
    records.append(
        {
            "policy": "lru",
            "trace": f"{options.million} requests, generated as they are served",
            "requests_per_s": round(rate),
            "peak_mib": round(peak_mib),
        }
    )
    write_json_lines(RESULTS / "bench_simulate.jsonl", records)
    for record in records:
        print(record)


if __name__ == "__main__":
    main()
