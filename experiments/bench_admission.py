"""How long a step takes to order 1,000 waiting requests: python -m experiments.bench_admission

Each has a prompt of 8,000 to 12,000 tokens, of which most is cached for one in ten. First the cache
has not changed since the last step, then it has. Milliseconds of processor time, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.closed_loop import SimulatedRequest
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.admission.session_gate import SessionGate
from hybridcache.policies.words import make_admission, parse_placement
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.memory import MemorySizes
from hybridcache.scheduling.planner import StepPlanner

ROW, STATE = 100, 100 * 300
NUM_ROWS = 3_000_000
POLICIES = (
    "oldest",
    "cached-first",
    "longest-match",
    "window:64",
    "live:64",
    "sessions",
    "sessions, in debt",
)


def order_ms(name: str, num_waiting: int, repeats: int) -> tuple[float, float]:
    """Milliseconds to order, while the cache stays as it is and after each change."""
    word, _, is_in_debt = name.partition(", ")
    rng = np.random.default_rng(0)
    cache = build_prefix_cache(
        CacheConfig(
            memory="arena",
            total_bytes=NUM_ROWS * ROW,
            num_kv_tokens=0,
            num_slots=0,
            kv_bytes_per_token=ROW,
            state_bytes=STATE,
        )
    )
    placement = parse_placement("branch,boundary,backoff,end")
    manager = CacheManager(cache, placement, num_rows=4, stateful=True)
    planner: StepPlanner[SimulatedRequest] = StepPlanner(
        manager,
        max_running=4,
        token_budget=8192,
        memory=MemorySizes("arena", NUM_ROWS, NUM_ROWS // 300, ROW, STATE),
        admission=make_admission(word),
        clock=time.process_time,
    )

    def publish(tokens: np.ndarray) -> None:
        lease = Lease.begin(cache, placement, LeaseRequest(tokens=tokens, stateful=True))
        assert lease is not None and lease.extend(len(tokens))
        lease.take_checkpoint_slots(lease.cached_len, len(tokens))
        lease.finish(tokens, len(tokens), donate=True)

    for number in range(num_waiting):
        text = rng.integers(0, 50_000, rng.integers(8000, 12_000), dtype=np.int32)
        if number % 10 == 0:
            publish(text[:-500])
        planner.add(
            SimulatedRequest(
                text, len(text) - 1, number, 0, arrival=number, arrival_s=0.0, max_len=len(text)
            )
        )
    waiting = tuple(planner._waiting)
    if is_in_debt:
        assert isinstance(planner.admission, SessionGate)
        planner.admission._debt_s = 1e9

    def timed() -> float:
        began_s = time.process_time()
        for _ in planner.admission.order(waiting, planner._load):
            pass
        return 1e3 * (time.process_time() - began_s)

    timed()
    same = statistics.median(timed() for _ in range(repeats))
    changed = []
    for _ in range(repeats):
        publish(rng.integers(0, 50_000, 200, dtype=np.int32))
        changed.append(timed())
    return same, statistics.median(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=51)
    options = parser.parse_args()
    rows = []
    for word in POLICIES:
        same, changed = order_ms(word, options.waiting, options.repeats)
        rows.append([word, f"{same:.3f}", f"{changed:.3f}"])
    print(text_table(["policy", "cache unchanged, ms", "cache changed, ms"], rows))


if __name__ == "__main__":
    main()
