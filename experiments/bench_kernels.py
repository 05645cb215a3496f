"""How fast is each kernel beside flash-linear-attention's, PyTorch's and what the machine could do at best?

    python -m experiments.bench_kernels [--kernels gdn,conv1d] [--out DIR] [--dry]

Ours, the rivals and the limit (bytes over the measured copy bandwidth, FLOPs over the measured GEMM rate, whichever takes
longer) are timed in one run, in alternation. A contender that computes something wrong gets no time; where that is ours,
the run fails. Rivals from flash-linear-attention join if `fla` can be imported: best in an environment of its own, with
torch, triton, numpy and fla-core beside a checkout of this repository.

One JSON Lines file per kernel folder goes to DIR (default experiments/results), so that a run can be made in parts. With
--dry, or without a GPU, tiny shapes run in Triton's interpreter, nothing is written unless DIR is given, and every time
reads "not measured".
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from experiments import interpreter
from experiments.provenance import RESULTS, write_json_lines

if TYPE_CHECKING:
    from experiments.kernel_cases import Case, Setup

ROUNDS = 5
"""Turns that every contender of a case gets."""
CALLS = 8
"""Timed calls in a turn."""


class Machine(NamedTuple):
    """What the device does at best."""

    name: str
    copy_bytes_s: float
    gemm_flops_s: float

    def limit_s(self, case: Case) -> float:
        """The least time in which a case's bytes can be moved and its FLOPs computed."""
        return max(case.num_bytes / self.copy_bytes_s, case.num_flops / self.gemm_flops_s)


class Clock:
    """Times calls on a device, each with a cold L2 cache."""

    def __init__(self, device: str, scratch_bytes: int = 2**28) -> None:
        self._device = torch.get_device_module(device)
        # Writing this also keeps the device busy while a call and its launches are queued.
        self._scratch = torch.empty(scratch_bytes, dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], object], calls: int = CALLS) -> list[float]:
        """Device time of each of ``calls`` calls."""
        marks = []
        for _ in range(calls):
            self._scratch.zero_()
            start, end = (self._device.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            marks.append((start, end))
        self._device.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in marks]

    def machine(self, device: str) -> Machine:
        """The copy bandwidth on 1 GiB and the bfloat16 GEMM rate on 8,192 cubed."""
        source = torch.empty(2**29, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        left, right = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
        copy_s = statistics.median(self.seconds(lambda: target.copy_(source), 3 * CALLS)[CALLS:])
        gemm_s = statistics.median(self.seconds(lambda: left @ right, 3 * CALLS)[CALLS:])
        name = self._device.get_device_name()
        return Machine(name, 2 * source.nbytes / copy_s, 2 * 8192**3 / gemm_s)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square error over the root mean square of what is expected; NaN counts as infinite."""
    result, expected = (x.detach().to("cpu", torch.float64) for x in (result, expected))
    ratio = (result - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(
        1e-30
    )
    return float(ratio.nan_to_num(nan=float("inf"), posinf=float("inf")))


def measure(case: Case, clock: Clock | None, machine: Machine | None) -> dict[str, Any]:
    """A case's record: the gate first, then, on a device, the times of all that passed it."""
    expected = case.expected()
    contenders, errors = {"ours": case.run, **case.rivals}, {}
    for word, run in list(contenders.items()):
        errors[word] = error(run(), expected)
        if errors[word] > case.tolerance:
            del contenders[word]
    record: dict[str, Any] = {
        "case": case.name,
        "is_right": "ours" in contenders,
        "errors": errors,
        "bytes": case.num_bytes,
        "flops": case.num_flops,
    }
    if clock is None or machine is None:
        return record | {"seconds": "not measured"}
    turns: dict[str, list[float]] = {word: [] for word in contenders}
    for run in contenders.values():
        clock.seconds(run)  # compiles and tunes what is compiled or tuned on first use
    for _ in range(ROUNDS):
        for word, run in contenders.items():
            turns[word] += clock.seconds(run)
    medians = {word: statistics.median(times) for word, times in turns.items()}
    spread = {word: statistics.quantiles(times, n=10)[::8] for word, times in turns.items()}
    limit_s = machine.limit_s(case)
    record |= {"seconds": medians, "spread_s": spread, "limit_s": limit_s}
    if "ours" in medians:
        record["share_of_limit"] = limit_s / medians["ours"]
        record["speedup"] = {w: s / medians["ours"] for w, s in medians.items() if w != "ours"}
    return record


def row(record: dict[str, Any]) -> str:
    """A record as a line of the table."""
    gate = "right" if record["is_right"] else f"WRONG ({record['errors']['ours']:.1e})"
    if isinstance(record["seconds"], str):
        return f"{record['case']:<34} {gate:<7} {record['seconds']}"
    if not record["is_right"]:
        return f"{record['case']:<34} {gate}"
    speedup = record["speedup"] | {
        word: None for word in record["errors"] if word not in record["seconds"]
    }
    versus = "  ".join(f"{w} {'WRONG' if x is None else f'{x:.2f}x'}" for w, x in speedup.items())
    microseconds, limit = record["seconds"]["ours"] * 1e6, record["share_of_limit"]
    return f"{record['case']:<34} {gate:<7} {microseconds:10.1f} us  {limit:6.1%} of the limit  {versus}"


def folders() -> list[str]:
    """The kernel folders that have cases."""
    package = importlib.import_module("experiments.kernel_cases")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def cases(folder: str, setup: Setup) -> Iterator[Case]:
    """The cases of one kernel folder, built one at a time."""
    return importlib.import_module(f"experiments.kernel_cases.{folder}").cases(setup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", help="folders, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, help="where the JSON lines go")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter")
    args = parser.parse_args()
    is_dry = args.dry or not torch.accelerator.is_available()
    if is_dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module imports triton
        interpreter.repair()
    device = "cpu" if is_dry else torch.accelerator.current_accelerator().type
    setup = importlib.import_module("experiments.kernel_cases").Setup(device, is_dry)
    clock = None if is_dry else Clock(device)
    machine = clock and clock.machine(device)
    if machine:
        print(
            f"{machine.name}: copies {machine.copy_bytes_s:.3g} B/s, GEMM {machine.gemm_flops_s:.3g} FLOP/s"
        )

    counts = {"right": 0, "wrong": 0}
    for folder in args.kernels.split(",") if args.kernels else folders():
        torch.manual_seed(0)
        records, start = [], time.monotonic()
        for case in cases(folder, setup):
            records.append(measure(case, clock, machine))
            counts["right" if records[-1]["is_right"] else "wrong"] += 1
            print(row(records[-1]), flush=True)
        print(f"-- {folder}: {len(records)} cases in {time.monotonic() - start:.0f} s", flush=True)
        out = args.out or (None if is_dry else RESULTS)
        if out:
            header = {"machine": machine._asdict() if machine else "not measured"}
            write_json_lines(out / f"bench_kernels_{folder}.jsonl", [header, *records])
    print(json.dumps(counts))
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
