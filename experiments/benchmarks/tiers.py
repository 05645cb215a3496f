"""Measure costs and gains of host memory and disk with the built-in model.

    python -m experiments.benchmarks.tiers

- ``restart``: median time to first token of the next turn of conversations. It alternates between
  an engine that kept running, one restarted on its ``state_dir``, and one without a cache. The
  first request after the restart is reported separately. The fetch rule decides as in serving.
- ``spilling``: tokens per second of entirely new prompts, so that every eviction offloads. Engines
  with a host tier, with a disk and without tiers alternate. Reports the median ratio, by the clock
  and by CPU time of all threads.
- ``records``: a folder with ``--records`` records of 4 KiB of KV and 16 tokens each. Reports
  records written, read and removed per second, and the seconds to open the folder with its index.
- ``memory``: growth of the process's resident memory while host tiers of two sizes are filled,
  relative to those sizes. Reports the part that grows with the tier, and the constant part.
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
    """Return ``count`` random prompts of ``num_tokens`` tokens."""
    draw = np.random.default_rng(seed)
    return [draw.integers(32, 127, num_tokens).tolist() for _ in range(count)]


def first_token_s(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Return (seconds to the first token, reused tokens)."""
    start = time.perf_counter()
    [output] = engine.generate([prompt], ONE)
    return time.perf_counter() - start, output.cached_len


def restart(count: int, num_tokens: int) -> dict[str, float]:
    """Compare the next turn on a running, a restarted and a cacheless engine."""
    prompts = conversations(count, num_tokens)
    turns = [prompt + [40 + number % 50] * 40 for number, prompt in enumerate(prompts)]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        warm, stopped = (Engine(engine_config(cache_gib=0.25, state_dir=x)) for x in (one, other))
        for prompt in prompts:
            first_token_s(warm, prompt)
            first_token_s(stopped, prompt)
        stopped.close()
        start = time.perf_counter()
        restored = Engine(engine_config(cache_gib=0.25, state_dir=other))
        start_s = time.perf_counter() - start
        cold = Engine(EngineConfig(cache_gib=0.25, prefix_cache="none"))
        engines = {"warm": warm, "restored": restored, "cold": cold}
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in engines}
        for turn in turns:
            for name, engine in engines.items():
                found[name].append(first_token_s(engine, turn))
        offload = restored.cache.offload
        fetched_rows = 0 if offload is None else offload.copied_rows.get(("disk", "device"), 0)
        for engine in engines.values():
            engine.close()
    median = {name: statistics.median(s for s, _ in pairs[1:]) for name, pairs in found.items()}
    return {
        **{f"{name}_ttft_s": seconds for name, seconds in median.items()},
        "first_touch_s": found["restored"][0][0],
        "restored_over_warm": median["restored"] / median["warm"],
        "cold_over_warm": median["cold"] / median["warm"],
        **{
            f"reused_{name}": statistics.mean(hit for _, hit in found[name])
            for name in ("warm", "restored")
        },
        "fetched_rows": fetched_rows,
        "start_s": start_s,
    }


def spilling(rounds: int, num_tokens: int) -> dict[str, float]:
    """Compare the throughput of new prompts with and without tiers to offload to."""
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            "without": Engine(EngineConfig(cache_gib=0.01)),
            "host": Engine(engine_config(cache_gib=0.01, host_gib=0.03)),
            "disk": Engine(engine_config(cache_gib=0.01, host_gib=0.03, state_dir=folder)),
        }
        seconds: dict[str, list[float]] = {tier: [] for tier in engines}
        cpu_s: dict[str, list[float]] = {tier: [] for tier in engines}
        for turn in range(-2, rounds):
            for index, (tier, engine) in enumerate(engines.items()):
                prompts = conversations(4, num_tokens, seed=100 + 10 * turn + index + 1000)
                start, start_cpu = time.perf_counter(), time.process_time()
                engine.generate(prompts, ONE)
                if turn >= 0:
                    seconds[tier].append(time.perf_counter() - start)
                    cpu_s[tier].append(time.process_time() - start_cpu)
        moved = {
            tier: sum(engine.cache.offload.copied_rows.values())
            for tier, engine in engines.items()
            if engine.cache.offload is not None
        }
        for engine in engines.values():
            engine.close()
    return {
        "tokens_per_s_without": 4 * num_tokens / statistics.median(seconds["without"]),
        **{
            f"{tier}_{name}": statistics.median(
                without / tiered
                for without, tiered in zip(times["without"], times[tier], strict=True)
            )
            for tier in ("host", "disk")
            for name, times in (("over_without", seconds), ("cpu_over_without", cpu_s))
        },
        **{f"{tier}_rows": float(count) for tier, count in moved.items()},
    }


def records(count: int) -> dict[str, float]:
    """Time a folder of ``count`` records: write, open, read and remove."""
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
        numbers = np.random.default_rng(0).permutation(count)[:10_000].tolist()
        indices = np.arange(num_tokens, dtype=np.int32)

        def read() -> None:
            for number in numbers:
                disk.bind(indices, disk.prefixes.find(*path(number)))
                [(_, found)] = disk.load(indices) or [(0, rows[:0])]
                assert np.array_equal(found, rows)

        read_per_s = per_s(read, len(numbers))
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
    """Compare the growth of the process with the sizes of host tiers, in GiB."""
    grown = {host_gib: grown_bytes(host_gib, num_tokens) for host_gib in sizes}
    found = {f"grown_over_asked_{gib:g}_gib": size / (gib * GIB) for gib, size in grown.items()}
    if len(sizes) > 1:
        least, most = min(sizes), max(sizes)
        found["grown_per_byte"] = (grown[most] - grown[least]) / ((most - least) * GIB)
        found["grown_constant_bytes"] = grown[least] - found["grown_per_byte"] * least * GIB
    return found


def grown_bytes(host_gib: float, num_tokens: int) -> float:
    """Return the growth of the process from the first eviction until 1.2 times the tier's size is
    offloaded.

    Memory for computing, including the device's, is allocated before.
    """
    gc.collect()  # Otherwise an earlier engine could be freed during the measurement.
    engine = Engine(engine_config(cache_gib=0.01, host_gib=host_gib))
    offload, seed = engine.cache.offload, 1000
    assert offload is not None
    before = first_rows = 0
    capacity = offload.tiers[0].pages.capacity
    while (num_rows := offload.copied_rows.get(("device", "host"), 0)) < 1.2 * capacity:
        if not first_rows:
            before, first_rows = resident_bytes(), num_rows
        for prompt in conversations(4, num_tokens, seed=seed):
            first_token_s(engine, prompt)
        seed += 1
    grown = resident_bytes() - before + first_rows * offload.row_bytes
    engine.close()
    return float(grown)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("This system does not report VmRSS in /proc/self/status.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="number of conversations")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens per conversation")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument(
        "--host-gib", default="0.1,1", help="sizes of the host tier for the memory part"
    )
    parser.add_argument("--records", type=int, default=100_000, help="records in one folder")
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
