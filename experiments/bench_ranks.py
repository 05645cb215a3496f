"""One model computed by two processes of one thread each (``--tp 2``) beside one of two threads.

    python -m experiments.bench_ranks                     # on two quiet cores
    python -m experiments.bench_ranks --sizes 7m --share 0.3

Both compute the same seeded weights and take turns, so that a noisy machine is noisy for both.
``exchange_s`` is what the first rank spends in the exchanges of a step, waiting for the other one
included; ``without`` is the ratio that would be left if they took no time: what a faster link could
give at most. Writes results/bench_ranks.jsonl.
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

import numpy as np
import numpy.typing as npt
import torch

from engine.config import EngineConfig
from engine.layers.rank import Group
from engine.plugins.tensor_parallel.coordinator import LeadingRunner
from engine.plugins.tensor_parallel.shared_memory import SharedGroup
from engine.runner.model_runner import ModelRunner
from experiments.bench_engine import NUM_SLOTS, SIZES, Decode, Result, Turns, compare, prefill
from experiments.provenance import RESULTS, write_json_lines

GOAL = 0.8
RANKS = 2
TURNS = 5
"""In which exchanges are counted."""
DECODED = 8
"""Steps of decode in a turn: threads of the other side look for work for a while after theirs."""


@dataclass(frozen=True, slots=True)
class Exchanges:
    """What the exchanges of a turn's steps cost, a step."""

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
    decode = Decode(runner, prompt, streams)

    def decode_some() -> None:
        for _ in range(DECODED):
            decode.step()

    return decode_some


def exchanges(
    name: str,
    size: str,
    group: Group,
    work: Callable[[], object],
    times: tuple[list[float], list[float]],
    steps: int,
) -> Exchanges:
    """Of a few turns of so many ``steps`` more; ``times`` as ``Turns.time`` gives them."""
    assert isinstance(group, SharedGroup)
    shares = []
    first = group.exchange.totals
    for _ in range(TURNS):
        before, began = group.exchange.totals.seconds, time.perf_counter()
        work()
        spent = group.exchange.totals.seconds - before
        shares.append(spent / (time.perf_counter() - began))
    last = group.exchange.totals
    ours, theirs = (statistics.median(each) for each in times)
    exchange_s = statistics.median(shares) * ours
    return Exchanges(
        name,
        size,
        (last.rounds - first.rounds) // TURNS // steps,
        (last.bytes - first.bytes) // TURNS // steps,
        exchange_s / steps,
        theirs / (ours - exchange_s),
    )


def measure(size: str, share: float) -> Iterator[Result | Exchanges]:
    turns = Turns(time.perf_counter, share)
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
        one = with_threads(RANKS, step(name, alone, prompt, count))
        two = with_threads(1, step(name, shared, prompt, count))
        ours, theirs = turns.time(two, one, num_turns)
        steps = 1 if name == "prefill" else DECODED
        yield compare(name, size, "float32", ours, theirs, tokens=count * steps, goal=GOAL)
        yield exchanges(name, size, shared.group, two, (ours, theirs), steps)
    shared.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="7m,530m")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of turns")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_ranks.jsonl")
    arguments = parser.parse_args()
    records = []
    for size in arguments.sizes.split(","):
        for record in measure(size, arguments.share):
            print(record, flush=True)
            records.append(asdict(record))
    write_json_lines(arguments.out, records)


if __name__ == "__main__":
    main()
