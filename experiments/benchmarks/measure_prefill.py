"""Measure prefill times t(reused, computed) in the engine.

The result is a table for `hybridcache simulate --times`.

    python -m experiments.benchmarks.measure_prefill --output prefill_times.json
        [--model DIR] [--device cuda]

A prompt of ``start + 1`` tokens leaves a checkpoint at ``start``. Then the time of ``length`` more
tokens is measured. Steps in which 1, 4 and 16 requests decode are measured for closed-loop
simulations. Lengths alternate, and prefills come between the decode steps, as in service, because
the processor's caches make repeated equal steps faster. All times are means of several runs,
because waiting times add up. The default is the built-in model, which only shows the shape of the
table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine import Engine, EngineConfig, SamplingParams
from engine.schedule.report import StepReport
from experiments.provenance import provenance
from experiments.studies.common import positive

STARTS = (0, 512, 1024, 2048, 8192)
LENGTHS = (64, 128, 256, 512, 1024, 4096)
DECODES = (1, 4, 16)
MIXED = (64, 128, 256, 512)
"""Lengths of the prompts that are computed while other requests decode."""
ANSWERS = (8, 32)
"""Shortest and longest answer of the requests that decode, in tokens."""
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


class Steps:
    """Steps of an empty engine, with prompts that are drawn from a seed."""

    def __init__(self, engine: Engine, seed: int) -> None:
        engine.reset_prefix_cache()
        self._engine, self.rng = engine, np.random.default_rng(seed)
        self._reports: list[StepReport] = []
        engine.observers[:] = [self._reports.append]

    def submit(self, length: int, max_tokens: int) -> None:
        """Add a request that generates exactly ``max_tokens``."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.submit(self.rng.integers(0, 256, length, dtype=np.int32), sampling)

    def step(self) -> tuple[float, tuple[int, int], int]:
        """Run one step. Returns its seconds, its tokens of prefills and of decodes, and the number
        of requests that ended."""
        self._reports.clear()
        start_s = self._engine.clock()
        outputs = self._engine.step()
        seconds = self._engine.clock() - start_s
        report = self._reports[-1] if self._reports else None
        tokens = (report.num_prefill_tokens, report.num_decode_tokens) if report else (0, 0)
        return seconds, tokens, sum(output.finish_reason is not None for output in outputs)


def decode_step_seconds(engine: Engine, num_requests: int, context: int) -> float:
    """Return the mean seconds of a step in which ``num_requests`` requests decode after ``context``
    tokens. Each request that ends is replaced by a new one, up to four times."""
    steps, times = Steps(engine, 1), list[float]()
    num_new, num_left = num_requests, 5 * num_requests
    while engine.has_work() or num_left:
        for _ in range(min(num_new, num_left)):
            steps.submit(context, int(steps.rng.integers(*ANSWERS, endpoint=True)))
            num_left -= 1
        seconds, tokens, num_new = steps.step()
        if tokens == (0, num_requests):
            times.append(seconds)
    return statistics.fmean(times)


def mixed_step_seconds(engine: Engine, num_decodes: int, context: int) -> dict[int, float]:
    """Return the seconds of steps that compute a prompt while ``num_decodes`` requests decode after
    ``context`` tokens, by length of the prompt."""
    steps, times = Steps(engine, 2), dict[int, float]()
    for _ in range(num_decodes):
        steps.submit(context, 4 * len(MIXED))
    while steps.step()[1][1] < num_decodes:
        pass
    for length in MIXED:
        steps.submit(length, 1)
        seconds, tokens, _ = steps.step()
        if tokens == (length, num_decodes):
            times[length] = seconds
        steps.step()
    while engine.has_work():
        engine.step()
    return times


def without_falls(table_s: np.ndarray) -> np.ndarray:
    """Return ``table_s[start, length]`` with times that do not fall along lengths: a prefill takes
    at most as long as a longer one, because waiting times only add. Warns of large falls."""
    least = np.minimum.accumulate(table_s[:, ::-1], axis=1)[:, ::-1]
    if (table_s > 1.5 * least).any():
        print(
            "measure_prefill: some prefills took more than 1.5 times as long as longer ones: use "
            "an idle machine, or more --repeats.",
            file=sys.stderr,
        )
    return least


def measure(
    engine: Engine, longest: int, repeats: int, context: int | None = None
) -> dict[str, Any]:
    """Return the tables for ``MeasuredTimes.load``, for prompts of up to ``longest`` tokens.

    Requests decode after ``context`` tokens, by default half of ``longest``.
    """
    context = longest // 2 if context is None else context
    starts = [start for start in STARTS if start < longest]
    lengths = [length for length in LENGTHS if length <= longest]
    decodes = [count for count in DECODES if count <= engine.config.max_running]
    rng, prefills = np.random.default_rng(0), np.zeros((repeats, len(starts), len(lengths)))
    seconds = []
    for repeat in tqdm(range(repeats), disable=None):
        for cell in rng.permutation(prefills[0].size).tolist():
            row, column = divmod(cell, len(lengths))
            tokens = rng.integers(0, 256, starts[row] + lengths[column], dtype=np.int32)
            prefills[repeat, row, column] = prefill_seconds(engine, tokens, starts[row])
        seconds.append([decode_step_seconds(engine, count, context) for count in decodes])
    return {
        "starts": starts,
        "lengths": lengths,
        "table_s": without_falls(prefills.mean(axis=0)).tolist(),
        "decodes": decodes,
        "decode_s": np.mean(seconds, axis=0).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="model directory (default: the built-in model)")
    parser.add_argument("--device")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="runs of each prefill (default: 3)"
    )
    parser.add_argument(
        "--longest", type=positive, default=4096, help="longest prompt, in tokens (default: 4096)"
    )
    options = parser.parse_args()
    budget = max(options.longest, 64)
    config = EngineConfig(model=options.model, device=options.device, token_budget=budget)
    engine = Engine(replace(config, checkpoints=("backoff",)))
    record = measure(engine, options.longest, options.repeats) | {"provenance": provenance()}
    options.output.write_text(json.dumps(record) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
