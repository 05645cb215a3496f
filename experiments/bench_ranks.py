"""One model computed by two processes of one thread each (``--tp 2``) beside one of two threads.

    python -m experiments.bench_ranks                     # on two quiet cores
    python -m experiments.bench_ranks --clock cpu --sizes 7m --share 0.3

Both compute the same seeded weights and take turns, so that a noisy machine is noisy for both. With
``--clock cpu`` seconds are the process's own, and one process of one thread is taken to halve its
time with two: that leaves out what a rank waits for the other, and is what a busy machine can tell.
``exchange_s`` is what the first rank spends in the exchanges of a step, by the same clock;
``without`` is the ratio that would be left if they took no time: what a fast link could give at
most. Writes results/bench_ranks.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

from engine.config import EngineConfig
from engine.run.model_runner import ModelRunner
from engine.run.ranks.group import TorchGroup
from engine.run.ranks.leader import LeadingRunner
from experiments.bench_engine import NUM_SLOTS, SIZES, Decode, Result, Turns, compare, prefill
from experiments.provenance import RESULTS, write_json_lines

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
GOAL = 0.8
RANKS = 2
STEPS = 5
"""Of which exchanges are timed."""


@dataclass(frozen=True, slots=True)
class Exchanges:
    """What a step's exchanges cost."""

    measure: str
    size: str
    count: int
    sent_bytes: int
    """By one rank."""
    exchange_s: float
    without: float


def with_threads(count: int, work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(count)
        work()

    return run


def step(
    name: str, runner: ModelRunner, prompt: npt.NDArray[np.int32], streams: int
) -> Callable[[], object]:
    if name == "prefill":
        return partial(prefill, runner, prompt)
    return Decode(runner, prompt, streams).step


def exchanges(
    name: str,
    size: str,
    group: TorchGroup,
    work: Callable[[], object],
    times: tuple[list[float], list[float]],
    clock: Clock,
) -> Exchanges:
    """Of a few steps more; ``times`` as ``Turns.time`` gives them."""
    gather = group.gather
    sent: list[int] = []
    seconds: list[float] = []

    def metered(x: torch.Tensor) -> list[torch.Tensor]:
        began = clock()
        parts = gather(x)
        seconds.append(clock() - began)
        sent.append(x.nbytes)
        return parts

    shares = []
    with patch.object(group, "gather", metered):
        for _ in range(STEPS):
            before, began = sum(seconds), clock()
            work()
            shares.append((sum(seconds) - before) / (clock() - began))
    ours, theirs = (statistics.median(each) for each in times)
    exchange_s = statistics.median(shares) * ours
    return Exchanges(
        name, size, len(sent) // STEPS, sum(sent) // STEPS, exchange_s, theirs / (ours - exchange_s)
    )  # fmt: skip


def measure(size: str, clock: Clock, share: float) -> Iterator[Result | Exchanges]:
    turns, is_wall = Turns(clock, share), clock is time.perf_counter
    with tempfile.TemporaryDirectory() as directory:
        whole = {"linear_conv_kernel_dim": 4} | SIZES[size].config
        (Path(directory) / "config.json").write_text(json.dumps(whole))
        config = EngineConfig(
            model=directory, load_format="dummy", dtype="float32", device="cpu",
            max_running=NUM_SLOTS, cache_gib=0.5, tp=1,
        )  # fmt: skip
        alone = ModelRunner(config)
        shared = LeadingRunner(EngineConfig(**(asdict(config) | {"tp": RANKS})))
    length = SIZES[size].prefill_len
    tokens = np.random.default_rng(0).integers(0, 256, length).astype(np.int32)
    for name, count, num_turns in (
        ("prefill", length, SIZES[size].prefill_turns),
        ("decode, one stream", 1, SIZES[size].decode_turns),
        ("decode, 8 at once", 8, SIZES[size].decode_turns),
    ):
        prompt = tokens if name == "prefill" else tokens[: length // 4]
        one = with_threads(RANKS if is_wall else 1, step(name, alone, prompt, count))
        two = with_threads(1, step(name, shared, prompt, count))
        ours, theirs = turns.time(two, one, num_turns)
        theirs = theirs if is_wall else [taken / RANKS for taken in theirs]
        yield compare(name, size, "float32", ours, theirs, tokens=count, goal=GOAL)
        yield exchanges(name, size, shared.group, two, (ours, theirs), clock)
    shared.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="7m,530m")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of turns")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_ranks.jsonl")
    arguments = parser.parse_args()
    clock, records = CLOCKS[arguments.clock], []
    for size in arguments.sizes.split(","):
        for record in measure(size, clock, arguments.share):
            print(record, flush=True)
            records.append(asdict(record))
    write_json_lines(arguments.out, records)


if __name__ == "__main__":
    main()
