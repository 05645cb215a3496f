"""Measure prefill times t(reused, computed) in the engine, as the table that `hybridcache simulate
--times` reads.

    python -m experiments.measure_prefill --output prefill_times.json [--model DIR] [--device cuda]

A prompt of ``start + 1`` tokens leaves a checkpoint at ``start``; then ``length`` tokens more are
timed, the median of several. Without a model the built-in one is measured, which only shows the
shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine import Engine, EngineConfig, SamplingParams
from experiments.provenance import provenance

STARTS = (0, 512, 2048, 8192)
LENGTHS = (64, 256, 1024, 4096)
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def time_to_first_token(engine: Engine, tokens: np.ndarray, start: int) -> float:
    """Seconds for ``tokens[start:]`` when exactly ``tokens[:start]`` is reused."""
    engine.reset_prefix_cache()
    if start:
        engine.generate([tokens[: start + 1].tolist()], ONE_TOKEN)
    [output] = engine.generate([tokens.tolist()], ONE_TOKEN)
    if output.cached_len != start:
        raise RuntimeError(f"{output.cached_len} tokens were reused, not {start}")
    return output.timings.ttft_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="model directory; default: the built-in model")
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest", type=int, default=4096, help="tokens of the longest prompt")
    options = parser.parse_args()
    longest = options.longest
    starts = [start for start in STARTS if start < longest]
    lengths = [length for length in LENGTHS if length <= longest]
    budget = max(longest, 64)
    engine = Engine(
        EngineConfig(
            model=options.model,
            device=options.device,
            token_budget=budget,
            checkpoints=("backoff",),
        )
    )
    rng = np.random.default_rng(0)
    table = []
    for start in tqdm(starts, disable=None):
        row = []
        for length in lengths:
            tokens = rng.integers(0, 256, start + length, dtype=np.int32)
            times = [time_to_first_token(engine, tokens, start) for _ in range(options.repeats)]
            row.append(statistics.median(times))
        table.append(row)
    record = {"starts": starts, "lengths": lengths, "table_s": table, "provenance": provenance()}
    options.output.write_text(json.dumps(record) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
