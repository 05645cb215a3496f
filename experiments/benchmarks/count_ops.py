"""Count the operations that PyTorch dispatches for one decode step, and per layer.

Compares the reference kernels, the native kernels, and a recorded step of the native kernels.

    python -m experiments.benchmarks.count_ops

Uses the built-in model on the CPU. Views and allocations are included. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import engine_config
from engine.runner.backends import all_plain
from engine.runner.build import load_runner
from experiments.benchmarks.engine import Decode
from experiments.provenance import RESULTS, write_json_lines
from kernels.native import recorded

BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"kernels": all_plain()},
    "native": {"graphs": "off"},
    "native, recorded": {},
}
CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts for one kernel backend and number of streams."""

    way: str
    streams: int
    dispatched: int
    """PyTorch operations per step."""
    per_layer: float
    native_calls: int
    """Calls of C++ kernels from Python. A recorded step repeats them without Python."""
    most: str
    """The three most frequent operations."""


class Counting(TorchDispatchMode):
    """Dispatch mode that counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(way: str, streams: int) -> Counted:
    """Count one step in which ``streams`` requests of the built-in model decode."""
    runner = load_runner(
        engine_config(device="cpu", max_running=9, cache_gib=0.25, **BACKENDS[way])
    )
    with torch.inference_mode():
        decode = Decode(runner, np.arange(CONTEXT, dtype=np.int32), streams)
        decode.step()
        calls: list[Callable[[], object]] = []
        with Counting() as counting, recorded(calls.append):
            decode.step()
    names = counting.names
    return Counted(
        way,
        streams,
        names.total(),
        names.total() / len(runner.model.mixers),
        len(calls),
        ", ".join(f"{name} {number}" for name, number in names.most_common(3)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "count_ops.jsonl")
    args = parser.parse_args()
    results = [count(way, streams) for way in BACKENDS for streams in (1, 8)]
    write_json_lines(args.out, map(asdict, results))
    print(f"{'kernels':18} {'streams':>7} {'dispatched':>10} {'per layer':>9} {'native':>7} most")
    for r in results:
        print(
            f"{r.way:18} {r.streams:7} {r.dispatched:10} {r.per_layer:9.1f} {r.native_calls:7} "
            f"{r.most}"
        )


if __name__ == "__main__":
    main()
