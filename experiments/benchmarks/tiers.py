"""Measure costs and gains of host memory and disk with the built-in model.

- ``restart``: the next turn of conversations on an engine that never stopped, on one that was
  started anew on its ``state_dir``, and on one without a cache, in turns; time to first token,
  medians, the first touch of the new engine apart. The fetch rule decides as it does when serving.
- ``spilling``: tokens a second of prompts that are all new, so that every eviction spills, with a
  host tier and without, in turns: the median ratio of a turn, by the clock and by CPU time (of all
  threads of the process).
- ``records``: a folder with as many records as ``--records``, of 4 KiB of KV and 16 tokens each:
  records written a second (until all files are there), seconds to open it (the index of all
  prefixes included), records read a second, and records removed a second.
- ``memory``: what the process's resident memory grew by while host tiers of two sizes were
  filled, over those sizes; the part that grows with the tier, and the part that does not.

    python -m experiments.benchmarks.tiers
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine import Engine, EngineConfig, SamplingParams, engine_config
from engine.plugins.tiers.disk import Disk
from engine.plugins.tiers.records import RecordStore
from experiments.provenance import RESULTS, write_json_lines
from hybridcache.geometry.units import GIB
from hybridcache.tokens import Tokens

ONE = SamplingParams(max_tokens=1, temperature=0)


def conversations(count: int, num_tokens: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(32, 127, num_tokens).tolist() for _ in range(count)]


def first_token_s(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """(seconds to the first token, tokens reused)."""
    start = time.perf_counter()
    [output] = engine.generate([prompt], ONE)
    return time.perf_counter() - start, output.cached_len


def restart(count: int, num_tokens: int) -> dict[str, float]:
    prompts = conversations(count, num_tokens)
    turns = [prompt + [40 + place % 50] * 40 for place, prompt in enumerate(prompts)]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        kept, stopped = (Engine(engine_config(cache_gib=0.25, state_dir=x)) for x in (one, other))
        for prompt in prompts:
            first_token_s(kept, prompt)
            first_token_s(stopped, prompt)
        stopped.close()
        start = time.perf_counter()
        again = Engine(engine_config(cache_gib=0.25, state_dir=other))
        start_s = time.perf_counter() - start
        cold_engine = Engine(EngineConfig(cache_gib=0.25, prefix_cache="none"))
        engines = {"warm": kept, "restored": again, "cold": cold_engine}
        found: dict[str, list[tuple[float, int]]] = {word: [] for word in engines}
        for turn in turns:
            for word, engine in engines.items():
                found[word].append(first_token_s(engine, turn))
        lower = again.cache.offload
        fetched = 0 if lower is None else lower.copied_rows.get(("disk", "device"), 0)
        for engine in engines.values():
            engine.close()
    median = {word: statistics.median(s for s, _ in pairs[1:]) for word, pairs in found.items()}
    return {
        **{f"{word}_ttft_s": seconds for word, seconds in median.items()},
        "first_touch_s": found["restored"][0][0],
        "restored_over_warm": median["restored"] / median["warm"],
        "cold_over_warm": median["cold"] / median["warm"],
        **{
            f"reused_{word}": statistics.mean(hit for _, hit in found[word])
            for word in ("warm", "restored")
        },
        "fetched_rows": fetched,
        "start_s": start_s,
    }


def spilling(rounds: int, num_tokens: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        engines = {
            "without": Engine(EngineConfig(cache_gib=0.01)),
            "host": Engine(engine_config(cache_gib=0.01, host_gib=0.03)),
            "disk": Engine(engine_config(cache_gib=0.01, host_gib=0.03, state_dir=name)),
        }
        seconds: dict[str, list[float]] = {word: [] for word in engines}
        cpu_s: dict[str, list[float]] = {word: [] for word in engines}
        for turn in range(-2, rounds):
            for place, (word, engine) in enumerate(engines.items()):
                prompts = conversations(4, num_tokens, seed=100 + 10 * turn + place + 1000)
                start, start_cpu = time.perf_counter(), time.process_time()
                engine.generate(prompts, ONE)
                if turn >= 0:
                    seconds[word].append(time.perf_counter() - start)
                    cpu_s[word].append(time.process_time() - start_cpu)
        moved = {
            word: sum(engine.cache.offload.copied_rows.values())
            for word, engine in engines.items()
            if engine.cache.offload is not None
        }
        for engine in engines.values():
            engine.close()
    return {
        "tokens_per_s_without": 4 * num_tokens / statistics.median(seconds["without"]),
        **{
            f"{word}_{name}": statistics.median(
                without / with_it for without, with_it in zip(of["without"], of[word], strict=True)
            )
            for word in ("host", "disk")
            for name, of in (("over_without", seconds), ("cpu_over_without", cpu_s))
        },
        **{f"{word}_rows": float(count) for word, count in moved.items()},
    }


def records(count: int) -> dict[str, float]:
    row_bytes, num_tokens = 256, 16
    rows = np.arange(num_tokens * row_bytes, dtype=np.uint8).reshape(num_tokens, row_bytes)

    def path(number: int) -> tuple[None, Tokens]:
        return None, np.arange(number, number + num_tokens, dtype=np.int32)

    def opened(folder: str) -> Disk:
        store = RecordStore.open(Path(folder), {"writer": "experiments.benchmarks.tiers"}, 1 << 40)
        return Disk(store, row_bytes=row_bytes, state_rows=1, num_rows=num_tokens)

    def per_s(work: Callable[[], object], number: int) -> float:
        start = time.perf_counter()
        work()
        return number / (time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as name:
        disk = opened(name)

        def write() -> None:
            for number in range(count):
                disk.write_through("kv", path(number), num_tokens, lambda a, b: lambda: rows[a:b])
                if number % 10_000 == 0:
                    disk.flush()
            disk.flush()

        written_per_s = per_s(write, count)
        assert len(disk.prefixes) == count and not disk.num_skipped
        disk.close()
        start = time.perf_counter()
        disk = opened(name)
        open_s = time.perf_counter() - start
        assert len(disk.prefixes) == count
        asked = np.random.default_rng(0).permutation(count)[:10_000].tolist()
        indices = np.arange(num_tokens, dtype=np.int32)

        def read() -> None:
            for number in asked:
                disk.bind(indices, disk.prefixes.find(*path(number)))
                [(_, found)] = disk.load(indices) or [(0, rows[:0])]
                assert np.array_equal(found, rows)

        read_per_s = per_s(read, len(asked))
        disk.clear()
        removed_per_s = per_s(lambda: disk.flush(float("inf")), count)
        disk.close()
    return {
        "records": count,
        "records_written_per_s": written_per_s,
        "records_open_s": open_s,
        "records_read_per_s": read_per_s,
        "records_removed_per_s": removed_per_s,
    }


def memory(sizes: list[float], num_tokens: int) -> dict[str, float]:
    grown = {host_gib: grown_bytes(host_gib, num_tokens) for host_gib in sizes}
    found = {f"grown_over_asked_{gib:g}_gib": size / (gib * GIB) for gib, size in grown.items()}
    if len(sizes) > 1:
        least, most = min(sizes), max(sizes)
        found["grown_per_byte"] = (grown[most] - grown[least]) / ((most - least) * GIB)
        found["grown_constant_bytes"] = grown[least] - found["grown_per_byte"] * least * GIB
    return found


def grown_bytes(host_gib: float, num_tokens: int) -> float:
    """Return the growth of the process from the first eviction to 1.2 times the size of the tier.
    Memory for computing, including the device's, is allocated before."""
    gc.collect()  # an engine of before frees nothing meanwhile
    engine = Engine(engine_config(cache_gib=0.01, host_gib=host_gib))
    lower, seed = engine.cache.offload, 1000
    assert lower is not None
    before = already = 0
    capacity = lower.tiers[0].pages.capacity
    while (spilled := lower.copied_rows.get(("device", "host"), 0)) < 1.2 * capacity:
        if not already:
            before, already = resident_bytes(), spilled
        for prompt in conversations(4, num_tokens, seed=seed):
            first_token_s(engine, prompt)
        seed += 1
    grown = resident_bytes() - before + already * lower.row_bytes
    engine.close()
    return float(grown)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("there is no VmRSS on this system")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="conversations")
    parser.add_argument("--tokens", type=int, default=1000, help="of a conversation")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument(
        "--host-gib", default="0.1,1", help="sizes of the tier whose memory is measured"
    )
    parser.add_argument("--records", type=int, default=100_000, help="in one folder")
    parser.add_argument("--parts", default="restart,spilling,records,memory")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_tiers.jsonl")
    arguments = parser.parse_args()
    found: dict[str, float] = {}
    parts = arguments.parts.split(",")
    if "restart" in parts:
        found |= restart(arguments.count, arguments.tokens)
    if "spilling" in parts:
        found |= spilling(arguments.rounds, arguments.tokens)
    if "records" in parts:
        found |= records(arguments.records)
    if "memory" in parts:
        sizes = [float(size) for size in arguments.host_gib.split(",")]
        found |= memory(sizes, arguments.tokens)
    rounded = {name: float(f"{value:.4g}") for name, value in found.items()}
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    write_json_lines(arguments.out, [rounded], settings)
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
