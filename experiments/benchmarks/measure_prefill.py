"""Measure prefill times t(reused, computed) in the engine.

The result is a table for `hybridcache simulate --times`.

    python -m experiments.benchmarks.measure_prefill --output prefill_times.json
        [--model DIR] [--device cuda]

A prompt of ``start + 1`` tokens leaves a checkpoint at ``start``. Then the time of ``length`` more
tokens is measured. Steps in which 1, 4 and 16 requests decode are measured for closed-loop
simulations. All times are means of several runs, because waiting times add up. The default is the
built-in model, which only shows the shape of the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine import Engine, EngineConfig, SamplingParams
from engine.interfaces import StepReport
from experiments.provenance import provenance

STARTS = (0, 512, 2048, 8192)
LENGTHS = (64, 256, 1024, 4096)
DECODES = (1, 4, 16)
DECODE_STEPS = 32
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def prefill_seconds(engine: Engine, tokens: np.ndarray, start: int) -> float:
    """Return the seconds from submission to end of a request for ``tokens`` and one output token.

    Raises RuntimeError unless exactly ``tokens[:start]`` is reused.
    """
    engine.reset_prefix_cache()
    if start:
        engine.generate([tokens[: start + 1].tolist()], ONE_TOKEN)
    start_s = engine.clock()
    [output] = engine.generate([tokens], ONE_TOKEN)
    end_s = engine.clock()
    if output.cached_len != start:
        raise RuntimeError(f"{output.cached_len} tokens were reused, expected {start}")
    return end_s - start_s


def decode_step_seconds(engine: Engine, num_requests: int, context: int) -> float:
    """Return the mean seconds of a step in which ``num_requests`` requests decode after ``context``
    tokens, with the steps that save a checkpoint or end a request."""
    engine.reset_prefix_cache()
    rng, reports = np.random.default_rng(1), list[StepReport]()
    engine.observe(reports.append)
    sampling = SamplingParams(max_tokens=DECODE_STEPS, temperature=0.0, ignore_eos=True)
    prompts = [rng.integers(0, 256, context, dtype=np.int32).tolist() for _ in range(num_requests)]
    engine.generate(prompts, sampling)
    return statistics.mean(
        step.schedule_s + step.forward_s + step.sample_s + step.wait_s + step.commit_s
        for step in reports
        if step.num_decode_tokens == num_requests and not step.num_prefill_tokens
    )


def measure(engine: Engine, longest: int, repeats: int) -> dict[str, Any]:
    """Return the tables for ``MeasuredTimes.load``, for prompts of up to ``longest`` tokens."""
    starts = [start for start in STARTS if start < longest]
    lengths = [length for length in LENGTHS if length <= longest]
    rng, table = np.random.default_rng(0), []
    for start in tqdm(starts, disable=None):
        row = []
        for length in lengths:
            tokens = rng.integers(0, 256, start + length, dtype=np.int32)
            times = [prefill_seconds(engine, tokens, start) for _ in range(repeats)]
            row.append(statistics.fmean(times))
        table.append(row)
    decodes = [count for count in DECODES if count <= engine.config.max_running]
    seconds = [
        statistics.fmean(decode_step_seconds(engine, count, longest // 2) for _ in range(repeats))
        for count in decodes
    ]
    return {
        "starts": starts,
        "lengths": lengths,
        "table_s": table,
        "decodes": decodes,
        "decode_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="model directory (default: the built-in model)")
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest", type=int, default=4096, help="longest prompt, in tokens")
    options = parser.parse_args()
    longest = options.longest
    budget = max(longest, 64)
    engine = Engine(
        EngineConfig(
            model=options.model,
            device=options.device,
            token_budget=budget,
            checkpoints=("backoff",),
        )
    )
    record = measure(engine, longest, options.repeats) | {"provenance": provenance()}
    options.output.write_text(json.dumps(record) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
