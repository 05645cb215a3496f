"""Does SGLang's scheduler ever lose a row or a state on our cache, or resume from a wrong one?

python -m experiments.system.soak_sglang [--requests 10000] [--strategy "extra_buffer overlapped"]

Wants SGLang 0.5.23 (`make sglang`). Its own scheduler, unchanged, on a CPU, over a model that only
records its inputs (`experiments/system/sglang/serve.py`): conversations go on, fork, are repeated
and are cut off, in pools so small that KV and states are always short; every 61st decode retracts.
After every step SGLang's own checks of its pools, after every eighth and when idle all invariants
of our tree recomputed, which remembers more and more; every prefix and state that is resumed
from is compared with what it should be, every answer with the one without a cache. Each strategy
of SGLang for states gets its share of the requests, in a process of its own. Writes
results/soak_sglang.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.provenance import RESULTS, write_json_lines
from experiments.system.sglang import cpu

STRATEGIES = {
    "no_buffer": 12,
    "extra_buffer": 24,
    "extra_buffer_lazy": 24,
    "extra_buffer overlapped": 24,
}
"""And the state slots: what six running requests hold at most, or a few more."""
NUM_KV_TOKENS = 1800


def soak(strategy: str, eviction: str, num_requests: int, seed: int) -> dict[str, object]:
    """Serve ``num_requests`` in this process; AssertionError names what is wrong."""
    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
    os.environ["SGLANG_CHECK_KV_PAGE_INVARIANTS"] = "1"
    os.environ["SGLANG_TEST_RETRACT"] = "1"
    os.environ["SGLANG_TEST_RETRACT_INTERVAL"] = "61"
    cpu.stand_in()
    from experiments.system.sglang.random_load import RandomLoad
    from experiments.system.sglang.serve import new_scheduler

    word, _, overlapped = strategy.partition(" ")
    with tempfile.TemporaryDirectory() as folder:
        scheduler = new_scheduler(
            Path(folder),
            NUM_KV_TOKENS,
            STRATEGIES[strategy],
            strategy=word,
            overlap=bool(overlapped),
            radix_eviction_policy=eviction,
            chunked_prefill_size=256,
            mamba_track_interval=64,
        )
        served = RandomLoad(scheduler, seed).run(num_requests, check_every=8)
    return {"strategy": strategy, "eviction": eviction, "seed": seed, **served._asdict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="of all strategies together")
    parser.add_argument("--strategy", choices=list(STRATEGIES), help="only this one, here")
    parser.add_argument("--eviction", default="plain-lru", help="SGLang's --radix-eviction-policy")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="write no results")
    options = parser.parse_args()
    if options.strategy:
        records = [soak(options.strategy, options.eviction, options.requests, options.seed)]
    else:
        records = []
        for strategy in STRATEGIES:
            share = str(options.requests // len(STRATEGIES))
            command = [sys.executable, "-m", "experiments.system.soak_sglang", "--no-record"]
            command += ["--strategy", strategy, "--requests", share, "--seed", str(options.seed)]
            command += ["--eviction", options.eviction]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            records.append(json.loads(done.stdout.splitlines()[-1]))
    if not options.no_record:
        path = RESULTS / "soak_sglang.jsonl"
        write_json_lines(path, records, {"sglang": cpu.VERSION, "kv": NUM_KV_TOKENS} | STRATEGIES)
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
