"""What one arena costs beside two pools of the same model, and what moving one of its slabs takes.

    python -m experiments.bench_arena                     # two minutes on a quiet core
    python -m experiments.bench_arena --dtypes float32 --share 0.3

Both memories serve the same weights and take turns, so that a noisy machine is noisy for both.
Seconds are the process's own, one thread, so that who else runs counts little. Medians and their
ratio are reported, with the spread. Writes results/bench_arena.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.runner.model_runner import ModelRunner
from engine.runner.sampler import Sampler
from engine.schedule.batch import Batch
from experiments.bench_engine import NUM_SLOTS, Decode, Result, Turns, compare, kv_rows, prefill
from experiments.provenance import RESULTS, write_json_lines
from hybridcache.allocators.arena import slab_rows
from hybridcache.allocators.moves import Move
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from kernels.cache_write.reference import move_rows

LENGTH = 1024
DECODES = 3
"""How often decoding begins anew: a step is short, and takes many turns to compare."""
GOAL = 0.97
MEMORY: dict[str, dict[str, Any]] = {
    "arena": {"cache_gib": 0.25},
    "pools": {"kv_gib": 0.125, "state_gib": 0.125},
}


def beside_pools(dtype: str, turns: Turns) -> Iterator[Result]:
    """Prefill, decode of one stream and of eight, and the engine with hits: tokens a second of
    both."""
    configs = {
        name: EngineConfig(dtype=dtype, device="cpu", max_running=NUM_SLOTS, **memory)
        for name, memory in MEMORY.items()
    }
    arena, pools = (ModelRunner(configs[name]) for name in ("arena", "pools"))
    tokens = np.random.default_rng(0).integers(0, 256, LENGTH).astype(np.int32)
    ours, theirs = turns.time(lambda: prefill(arena, tokens), lambda: prefill(pools, tokens), 21)
    yield compare("prefill", "7m", dtype, ours, theirs, tokens=LENGTH, goal=GOAL)
    for streams in (1, 8):
        ours, theirs = [], []
        for _ in range(DECODES):
            steps = [Decode(runner, tokens[:256], streams) for runner in (arena, pools)]
            for all_, some in zip(
                (ours, theirs), turns.time(steps[0].step, steps[1].step, 100), strict=True
            ):
                all_ += some
        name = "decode, one stream" if streams == 1 else f"decode, {streams} at once"
        yield compare(name, "7m", dtype, ours, theirs, tokens=streams, goal=GOAL)
    engines = [
        Engine(configs[name], runner=runner, sampler=Sampler(runner.vocab_size))
        for name, runner in (("arena", arena), ("pools", pools))
    ]
    answers = [answer(engine) for engine in engines]
    assert answers[0] == answers[1], "the same prompts, hits and tokens"
    ours, theirs = turns.time(lambda: answer(engines[0]), lambda: answer(engines[1]), 9)
    num_tokens = answers[0][1]
    yield compare("engine, 8 at once", "7m", dtype, ours, theirs, tokens=num_tokens, goal=GOAL)


def answer(engine: Engine) -> tuple[int, int, list[list[int]]]:
    """Two turns of eight conversations from an empty cache: (tokens that hit, tokens in all,
    answers)."""
    engine.reset_prefix_cache()
    random = np.random.default_rng(1)
    stem = random.integers(0, 256, 320).tolist()
    prompts = [stem + random.integers(0, 256, 100).tolist() for _ in range(8)]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    num_cached = num_tokens = 0
    for _ in range(2):
        outputs = engine.generate(prompts, params)
        num_cached += sum(output.cached_len for output in outputs)
        num_tokens += sum(len(o.prompt_token_ids) + len(o.output) for o in outputs)
        prompts = [[*o.prompt_token_ids.tolist(), *o.token_ids] for o in outputs]
    return num_cached, num_tokens, [output.token_ids for output in outputs]


def moving(dtype: str, turns: Turns) -> dict[str, Any]:
    """A slab full of KV moves to rows scattered over others, beside a prefill chunk."""
    runner = ModelRunner(EngineConfig(dtype=dtype, device="cpu", **MEMORY["arena"]))
    slab = runner.memory.slab_rows
    src = kv_rows(runner, 0, slab)
    scattered = np.random.default_rng(2).permutation(kv_rows(runner, slab, 8 * slab))
    move = Move(NUM_SLOTS, src, np.sort(scattered[:slab]), src)
    tokens = np.random.default_rng(0).integers(0, 256, LENGTH).astype(np.int32)
    moved, computed = turns.time(
        lambda: runner.forward(Batch((), moves=(move,))), lambda: prefill(runner, tokens), 21
    )
    seconds, chunk_s = statistics.median(moved), statistics.median(computed)
    num_bytes = 2 * slab * runner.memory.row_bytes
    return {
        "measure": "moving one slab",
        "size": "7m",
        "dtype": dtype,
        "slab_rows": slab,
        "row_bytes": runner.memory.row_bytes,
        "bytes_read_and_written": num_bytes,
        "ms": 1e3 * seconds,
        "gib_per_s": num_bytes / seconds / GIB,
        "ms_of_a_prefill_chunk": 1e3 * chunk_s,
        "chunk_tokens": LENGTH,
        "part_of_a_chunk": seconds / chunk_s,
        "goal": "<= 1",
        "reached": seconds <= chunk_s,
    }


def bandwidth(turns: Turns) -> dict[str, Any]:
    """A slab of Qwen3-Next's, too large for any cache, beside a plain copy of as many bytes: what
    the memory allows."""
    geometry = ModelGeometry.preset("qwen3-next")
    row_bytes = geometry.kv_bytes_per_token
    slab = slab_rows(geometry.state_bytes, row_bytes)
    rows = torch.zeros(4 * slab, row_bytes, dtype=torch.uint8)
    rows.fill_(1)
    src = torch.arange(slab, dtype=torch.int32)
    dst = torch.randperm(3 * slab)[:slab].sort().values.int() + slab
    moved, copied = turns.time(
        lambda: move_rows(rows, src, dst), lambda: rows[2 * slab : 3 * slab].copy_(rows[:slab]), 15
    )
    seconds, copy_s = statistics.median(moved), statistics.median(copied)
    return {
        "measure": "moving one slab, beside a plain copy of its bytes",
        "size": "qwen3-next",
        "slab_rows": slab,
        "row_bytes": row_bytes,
        "bytes_read_and_written": 2 * slab * row_bytes,
        "ms": 1e3 * seconds,
        "ms_of_a_plain_copy": 1e3 * copy_s,
        "ratio": seconds / copy_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--share", type=float, default=1.0, help="of the turns")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_arena.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    turns = Turns(time.process_time, options.share)
    records = [bandwidth(turns)]
    print(json.dumps(records[-1]), flush=True)
    for dtype in options.dtypes:
        for result in beside_pools(dtype, turns):
            records.append(asdict(result))
            print(json.dumps(records[-1]), flush=True)
        records.append(moving(dtype, turns))
        print(json.dumps(records[-1]), flush=True)
    write_json_lines(options.out, records)


if __name__ == "__main__":
    main()
