"""What it costs to take over what a verification computed, for all layers and sequences.

64 sequences with three drafts each, in 36 layers; of each some tokens count. Compared are a loop
that copies every state of every layer, one launch that copies them all, and the engine's commit,
which leaves them where they are (`engine/runner/state_slots.py`): with the lists it makes before
the next verification, and with the checkpoints that three of these sequences save in a step (a
grid of 64 tokens and three tokens a step). A sequence that stops drafting pays the launch then.

    python -m experiments.bench_commit    # a minute
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.runner.memory import Memory
from engine.runner.model_runner import ModelRunner
from engine.runner.state_mover import Copies
from engine.runner.state_slots import RunningStates
from engine.schedule.batch import Batch, Segment
from experiments.provenance import RESULTS, write_json_lines

LAYERS, SEQUENCES, TOKENS, SAVED = 36, 64, 4, 3
STATE_KIB = (4, 8, 39, 128)
"""Of a sequence and layer; 39: the built-in model's."""


class Commits:
    """A runner's memory and its commits, without a model."""

    def __init__(self, state_kib: int) -> None:
        num_slots = SEQUENCES + SAVED + SEQUENCES * TOKENS
        steps = range(SEQUENCES + SAVED, num_slots)
        self.pool = torch.ones(LAYERS, num_slots, state_kib * 256)
        device = Device.resolve("cpu")
        kernels = Kernels.choose(device)
        memory = Memory((), 0, None, steps, (self.pool,), None)
        runner = SimpleNamespace(
            tensors=memory,
            running=RunningStates(steps),
            _copies=Copies(memory, kernels, device),
        )
        self.copy_states = runner._copies.copy_states
        self.runner = cast(Any, runner)

    def batch(self, num_saved: int) -> Batch:
        tokens = np.zeros(TOKENS, np.int32)
        segments = [
            Segment(
                slot, slot, tokens, 63, True, logits="all", num_drafts=TOKENS - 1,
                exports=((64, SEQUENCES + slot),) if slot < num_saved else (),
            )
            for slot in range(SEQUENCES)
        ]  # fmt: skip
        return Batch(tuple(segments))

    def loop(self, pairs: list[tuple[int, int]]) -> None:
        for layer in self.pool:
            for source, target in pairs:
                layer[target].copy_(layer[source])

    def commit(self, batch: Batch, taken: list[int]) -> float:
        """Seconds of a step's lists and its commit."""
        start = time.perf_counter()
        ModelRunner._place(self.runner, batch)
        ModelRunner.commit(self.runner, batch, taken)
        return time.perf_counter() - start


def measure(state_kib: int, repeats: int) -> dict[str, float]:
    """Medians in microseconds, of turns side by side."""
    commits, rng = Commits(state_kib), random.Random(0)
    plain, saving = commits.batch(0), commits.batch(SAVED)
    times: dict[str, list[float]] = {"loop": [], "launch": [], "commit": [], "saving": []}
    for _ in range(repeats + 1):
        taken = [rng.randint(1, TOKENS) for _ in range(SEQUENCES)]
        first = SEQUENCES + SAVED - 1
        pairs = [(first + TOKENS * rank + count, rank) for rank, count in enumerate(taken)]
        for name, work in (("loop", commits.loop), ("launch", commits.copy_states)):
            start = time.perf_counter()
            work(pairs)
            times[name].append(time.perf_counter() - start)
        times["commit"].append(commits.commit(plain, taken))
        times["saving"].append(commits.commit(saving, taken))
    return {
        f"{name}_us": round(statistics.median(seconds[1:]) * 1e6, 1)
        for name, seconds in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "commit.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for state_kib in STATE_KIB:
        record = {"state_kib": state_kib, **measure(state_kib, arguments.repeats)}
        record["ratio"] = round(record["loop_us"] / record["commit_us"], 1)
        record["ratio_saving"] = round(record["loop_us"] / record["saving_us"], 1)
        records.append(record)
        print("  ".join(f"{name} {value}" for name, value in record.items()))
    settings = {"layers": LAYERS, "sequences": SEQUENCES, "tokens": TOKENS, "saved": SAVED}
    write_json_lines(arguments.out, records, settings)


if __name__ == "__main__":
    main()
