"""What a step costs beside the forward pass: scheduling, sampling and committing, with 1, 8 and 64 requests decoding.

A runner stands in that returns the same logits at once; cache, scheduler, sampler and tokenizer are the engine's own.

    python -m experiments.bench_overhead
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.batch import Batch
from engine.engine import StepReport
from engine.sampler import Sampler
from engine.tokenizer import ByteTokenizer
from experiments.provenance import RESULTS, write_json_lines
from hybridcache.costs import ModelGeometry

PROMPT_LEN = 1_000
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=None, temperature=0, ignore_eos=True),
    "temperature 0.8": SamplingParams(max_tokens=None, temperature=0.8, ignore_eos=True),
}
STAGES = ("schedule_s", "sample_s", "commit_s")


class IdleRunner:
    """Memory that nobody reads, and logits that are always the same."""

    num_kv_tokens = 1_000_000
    num_slots = 512
    max_model_len = 8_192
    vocab_size = 320
    is_asynchronous = False

    def __init__(self) -> None:
        self.geometry = ModelGeometry.preset("qwen3-next")
        self._logits = torch.randn(256, self.vocab_size)

    def forward(self, batch: Batch, drawn: Any = None) -> torch.Tensor:
        return self._logits[: sum(segment.num_logits for segment in batch.segments)]


def measure(num_running: int, sampling: SamplingParams, num_steps: int) -> dict[str, float]:
    """Median microseconds per stage of steps in which all requests decode, and their 99th percentile together."""
    reports: list[StepReport] = []
    engine = Engine(
        EngineConfig(max_running=num_running, token_budget=num_running * 1_024),
        runner=IdleRunner(),
        sampler=Sampler(IdleRunner.vocab_size),
        tokenizer=ByteTokenizer(),
        observer=reports.append,
    )
    for i in range(num_running):
        engine.submit([i % 256] * PROMPT_LEN, sampling)
    while len(reports) < 50 + num_steps:
        engine.step()
    steps = [report for report in reports[50:] if report.num_decode_tokens == num_running]
    found = {
        stage.removesuffix("_s") + "_us": statistics.median(getattr(r, stage) for r in steps) * 1e6
        for stage in STAGES
    }
    totals = [sum(getattr(report, stage) for stage in STAGES) * 1e6 for report in steps]
    return found | {
        "total_us": statistics.median(totals),
        "p99_us": statistics.quantiles(totals, n=100)[98],
    }


def run(num_steps: int) -> Iterator[dict[str, Any]]:
    for name, sampling in SAMPLINGS.items():
        for num_running in (1, 8, 64):
            yield {"running": num_running, "sampling": name} | measure(
                num_running, sampling, num_steps
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="steps measured for each row")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    print(
        f"{'running':>7}  {'sampling':16}{'schedule':>9}{'sample':>9}{'commit':>9}{'all':>9}{'p99':>9}  µs"
    )
    for record in run(arguments.steps):
        records.append(record)
        numbers = [
            record[key] for key in ("schedule_us", "sample_us", "commit_us", "total_us", "p99_us")
        ]
        print(
            f"{record['running']:7}  {record['sampling']:16}"
            + "".join(f"{n:9.0f}" for n in numbers)
        )
    write_json_lines(arguments.out, records)


if __name__ == "__main__":
    main()
