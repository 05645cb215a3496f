"""Measure the processor time of HybridScheduler next to vLLM's own scheduler.

`python -m experiments.benchmarks.vllm` writes bench_vllm.jsonl. It needs vLLM, as `make vllm`
installs it. No tokens are computed. Scheduling is
asynchronous. Both engines run in turn, a round each, so that a load of the
machine meets both. A steady decode has 64 requests; a round is 64 steps, two match units. A round
of admissions is 32 prompts of 8,192 tokens with one answer token each; half of each prompt hits.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from experiments.benchmarks.timing import alternate
from experiments.studies.common import keep, plain_table, positive

NUM_DECODING, NUM_ADMITTED, PROMPT = 64, 32, 8192
VARIANTS: dict[str, dict[str, Any]] = {
    "vllm": {"scheduler": "vllm", "unit": 0},
    "vllm, match unit 32": {"scheduler": "vllm", "unit": 32},
    "hybridcache": {},
}


def request(seed: int, prompt_len: int, answer_len: int, shared_len: int = 0) -> Any:
    """Return a request whose first ``shared_len`` tokens are those of all others."""
    common = np.random.default_rng(0).integers(1, 9999, shared_len)
    own = np.random.default_rng(seed).integers(1, 9999, prompt_len - shared_len)
    tokens = np.concatenate([common, own]).astype(np.int32)
    output = np.ones(answer_len, np.int32)
    return SimpleNamespace(tokens=tokens, output=output, namespace=None, boundaries=())


class Idle:
    """Contents of a worker that stores nothing."""

    def copy(self, copies: Any) -> None:
        return None

    compare = compute = lambda self, *_: None


def engine_of(options: dict[str, Any]) -> Any:
    """Return an engine with ample memory."""
    from hybridcache.vllm.check.engine import Options, StubEngine  # Imports vLLM.

    engine = StubEngine(Options(gib=200.0, overlap=True, **options))
    engine.contents = Idle()  # type: ignore[assignment]
    return engine


def run_out(engine: Any) -> None:
    """Serve all requests of ``engine``."""
    while engine.live:
        engine.step()


def decode(engine: Any) -> Callable[[int], float]:
    """Begin a steady decode, and return a function that measures the seconds of a step."""
    for seed in range(NUM_DECODING):
        engine.submit(deque([request(seed + 1, 1000, 100_000)]))
    while any(live.request.num_output_tokens < 2 for live in engine.live.values()):
        engine.step()
    scheduler = engine.scheduler
    engine._deliver()
    output = [scheduler.schedule()]
    result = engine._execute(output[0])
    assert len(result.req_ids) == NUM_DECODING

    def measure(num_steps: int) -> float:
        begun = time.process_time()
        for _ in range(num_steps):
            scheduler.update_from_output(output[0], result)
            output[0] = scheduler.schedule()
        assert len(output[0].num_scheduled_tokens) == NUM_DECODING
        return (time.process_time() - begun) / num_steps

    return measure


def admit(engine: Any) -> Callable[[int], float]:
    """Return a function that measures the seconds of a request of one answer token."""
    engine.submit(deque([request(10**6, PROMPT, 1, PROMPT // 2)]))
    run_out(engine)
    seeds = iter(range(10**6 + 1, 10**7))

    def measure(num_requests: int) -> float:
        for _ in range(num_requests):
            engine.submit(deque([request(next(seeds), PROMPT, 1, PROMPT // 2)]))
        begun = time.process_time()
        run_out(engine)
        return (time.process_time() - begun) / num_requests

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=9)
    rounds = parser.parse_args().rounds
    records = []
    for what, begin, size in (("step", decode, 64), ("request", admit, NUM_ADMITTED)):
        engines = {name: begin(engine_of(options)) for name, options in VARIANTS.items()}
        calls = {name: partial(measure, size) for name, measure in engines.items()}
        times = alternate(calls, rounds)  # Each returns its own seconds.
        for name, seconds in times.items():
            ratios = [one / base for one, base in zip(seconds, times["vllm"], strict=True)]
            records.append(
                {
                    "per": what,
                    "scheduler": name,
                    "us": 1e6 * median(seconds),
                    "ratio": median(ratios),
                    "lowest_ratio": min(ratios),
                    "highest_ratio": max(ratios),
                }
            )
    keep("bench_vllm", records, {"rounds": rounds}, plain_table)


if __name__ == "__main__":
    main()
