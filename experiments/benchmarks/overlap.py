"""Measure the overlap of host and device work that is lost with drafts.

A step with drafts is committed before the next one is prepared. On an independent device, the
host's work is then not hidden.

A clock replaces the device and is busy for 5 ms with every step. Cache, scheduler, sampler and
drafting are the engine's own. Drafts are always accepted (five tokens per step), never accepted and
therefore rarely tried, or not found in the tree. The baseline has no drafts. On a CPU nothing is
lost, because steps do not overlap there (``--overlap auto``).

    python -m experiments.benchmarks.overlap    # about a minute

Losses are CPU time of the host's thread, which excludes other programs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.engine import StepReport
from engine.plugins.speculation.draft_length import DraftLength
from engine.plugins.speculation.draft_manager import Drafting, Source
from engine.requests.request import Request
from engine.schedule.batch import Batch
from engine.text.tokenizer import ByteTokenizer
from experiments.benchmarks.overhead import (
    PROMPT_LEN,
    STAGES,
    Clock,
    ClockedRunner,
    ClockedSampler,
    IdleRunner,
)
from experiments.provenance import RESULTS, write_json_lines
from hybridcache.tokens import Tokens

NUM_DRAFTS = 4
CHOSEN, OTHER = 7, 8
"""The token that is always chosen, and a token that is never chosen."""


class IdleClock(Clock):
    """Clock that measures the host's CPU time while the device is idle."""

    def __init__(self, step_s: float) -> None:
        super().__init__(step_s)
        self.idle_s: list[float] = []
        """Idle time before each step."""
        self._idle_since: float | None = None

    def launch(self) -> None:
        since, self._idle_since = self._idle_since, None
        self.idle_s.append(0.0 if since is None else time.thread_time() - since)
        super().launch()

    def wait(self, until: float) -> None:
        super().wait(until)
        if until >= self.free_at:
            self._idle_since = time.thread_time()


class SameRunner(ClockedRunner):
    """Runner that always chooses the same token."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        row = torch.zeros(self.vocab_size)
        row[CHOSEN] = 9.0
        self._logits = row.expand(1024, -1)

    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        pass


class Guesser:
    """Draft source that proposes one token everywhere, or nothing."""

    name = "guesser"

    def __init__(self, token: int | None) -> None:
        self._token = token

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens]:
        token = self._token
        return [
            np.empty(0, np.int32) if token is None else np.full(most, token, np.int32)
            for _, most in wanted
        ]

    def forget(self, request: Request) -> None:
        pass

    def reset(self) -> None:
        pass


GUESSES: dict[str, int | None] = {"always right": CHOSEN, "never right": OTHER, "nothing": None}


def measure(num_running: int, guess: str, step_ms: float, num_steps: int) -> dict[str, Any]:
    """Return the times of a step in microseconds, and its number of tokens.

    ``lost_us`` is the host's work while the device is idle, a mean, because not every step waits.
    ``host_us`` is all of the host's work, a median.
    """
    clock, hosts = IdleClock(step_ms / 1e3), list[float]()
    drafting = None
    if guess != "none":
        source = Source(Guesser(GUESSES[guess]), partial(DraftLength, NUM_DRAFTS))
        drafting = Drafting([source], max_verified=num_running * (1 + NUM_DRAFTS))

    def observe(report: StepReport) -> None:
        hosts.append(sum(getattr(report, stage) for stage in STAGES))

    engine = Engine(
        EngineConfig(max_running=num_running, token_budget=num_running * 1_024),
        runner=SameRunner(clock),
        sampler=ClockedSampler(IdleRunner.vocab_size, clock),
        tokenizer=ByteTokenizer(),
        observer=observe,
        drafting=drafting,
    )
    sampling = SamplingParams(max_tokens=6_000, temperature=0, ignore_eos=True)
    draw = np.random.default_rng(0)
    for _ in range(num_running):
        engine.submit(draw.integers(0, 256, PROMPT_LEN), sampling)
    while len(hosts) < 60:
        engine.step()
    hosts.clear()
    first = sum(request.num_tokens for request in engine.requests)
    clock.idle_s.clear()
    while len(clock.idle_s) < num_steps:
        engine.step()
    tokens = sum(request.num_tokens for request in engine.requests) - first
    return {
        "running": num_running,
        "guesses": guess,
        "device_us": clock.step_s * 1e6,
        "lost_us": statistics.fmean(clock.idle_s) * 1e6,
        "host_us": statistics.median(hosts) * 1e6,
        "tokens_per_step": tokens / num_steps / num_running,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="measured steps per row")
    parser.add_argument("--step-ms", type=float, default=5.0, help="device time of a step")
    parser.add_argument("--out", type=Path, default=RESULTS / "overlap.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for num_running in (1, 8, 64):
        for guess in ("none", *GUESSES):
            record = measure(num_running, guess, arguments.step_ms, arguments.steps)
            records.append(record)
            print(
                f"{num_running:7} running, {guess:12}: {record['lost_us']:5.0f} µs lost "
                f"per step, of {record['host_us']:5.0f} µs of host work, "
                f"{record['tokens_per_step']:.2f} tokens per request"
            )
    write_json_lines(arguments.out, records, {"step_ms": arguments.step_ms})


if __name__ == "__main__":
    main()
