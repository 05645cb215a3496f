"""Check and time each kernel, next to flash-linear-attention's, PyTorch's and the device's limit.

    python -m experiments.gpu.kernels [--kernels gdn,conv1d] [--out DIR] [--dry]
    python -m experiments.gpu.kernels --mode check|repeat|ours|tune [--each] [--float32]

Modes:

- bench (default): times of ours and of rivals; ``ours``: without rivals
- check: one call of each kernel against its reference, in float64 where the reference can
- repeat: 50 calls of each kernel, which must give equal bits
- tune: tries other launch parameters (`experiments.gpu.kernel_tuning`) and writes the fast ones to
  kernels/tuned.json. With --dry it only checks that each candidate is correct.

A case that raises costs only its own record. With ``--each``, every folder has a process of its
own. A case that hangs, or after which the device refuses further work, ends that process; it is
recorded, and the next process continues with the next case. Finished cases of the same code,
compiler and mode are not repeated.

A contender is captured into a device graph, and its replays are timed, so the host's launches do
not count. A contender that cannot be captured is called while the device is busy with other work,
which hides the host's time. The record says so. If the host took longer than that work, the row is
``host_bound`` and its time is not the kernel's.

Ours, the rivals and the limit alternate in one run. The limit is bytes over the measured copy
bandwidth or FLOPs over the measured GEMM rate, whichever takes longer. A wrong contender is not
timed; if ours is wrong, the run fails. A rival that raises is reported. Without a device it also
fails the run, unless Triton's interpreter cannot run it. `experiments.gpu.kernel_rivals` finds
flash-linear-attention.

One JSON Lines file per kernel folder is written to DIR (default experiments/results) after every
case. With --dry, or without a GPU, tiny shapes run in Triton's interpreter. Files are then only
written if DIR is given, and every time is "not measured".
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.runner.device import Device
from experiments.gpu import kernel_cases, kernel_rivals
from experiments.gpu.kernel_cases import Case, Setup, error
from experiments.provenance import (
    ROOT,
    WRITTEN,
    code_hash,
    known_records,
    provenance,
    read_json_lines,
    write_json_lines,
)
from tests.kernels import interpreter

ROUNDS = 5
"""Turns of every contender of a case."""
CALLS = 8
"""Timed calls per turn."""
REPEATS = 50
"""Calls of a kernel whose bits are compared."""
CASE_S, FLOAT32_SLOWNESS = 90, 3
"""Most seconds of a case with its compilation, and the factor of them for float32."""
LOST = 70
"""Exit status of a process whose device refuses further work."""


class Machine(NamedTuple):
    """Limits of the device."""

    name: str
    copy_bytes_s: float
    gemm_flops_s: float

    def limit_s(self, case: Case) -> float:
        """Return the shortest time to move a case's bytes and compute its FLOPs."""
        return max(case.num_bytes / self.copy_bytes_s, case.num_flops / self.gemm_flops_s)


class ReadyContender(NamedTuple):
    """Contender that is ready for timing."""

    run: Callable[[], object]
    host_s: float
    """Seconds of the host to launch a call. Does not apply to a replay."""
    is_captured: bool
    """True if ``run`` replays a graph."""


class DeviceTimer:
    """Timer of calls on a device, each with a cold L2 cache."""

    def __init__(self, device: str, scratch_bytes: int = 2**28) -> None:
        self._device = torch.get_device_module(device)
        self._resolved = Device.resolve(device)
        # Writing this also keeps the device busy while a call and its launches are queued.
        self._scratch = torch.empty(scratch_bytes, dtype=torch.int8, device=device)
        self.cover_s = statistics.median(self.seconds(self._scratch.zero_, 3 * CALLS)[CALLS:])
        """Device seconds of writing the scratch memory, which hides that much of the host's
        work."""

    def prepare(self, run: Callable[[], object]) -> ReadyContender:
        """Run ``run`` until it is compiled and tuned, then capture it if the device and ``run``
        allow it."""
        for _ in range(2):
            run()
        self._device.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            run()
        host_s = (time.perf_counter() - begin) / CALLS
        self._device.synchronize()
        if self._resolved.is_cpu:
            return ReadyContender(run, host_s, False)
        stream = self._device.current_stream()
        try:
            replay = self._resolved.recorder()(run)
            replay()
            self._device.synchronize()
        except Exception:  # It reads results on the host, or allocates in a way graphs forbid.
            self._device.set_stream(stream)  # A capture that fails at its end leaves its own.
            self._device.synchronize()
            return ReadyContender(run, host_s, False)
        return ReadyContender(replay, host_s, True)

    def seconds(self, run: Callable[[], object], calls: int = CALLS) -> list[float]:
        """Return the device time of each of ``calls`` calls."""
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
        """Measure the copy bandwidth on 1 GiB and the bfloat16 GEMM rate on 8,192 cubed."""
        source = torch.empty(2**29, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        left, right = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
        copy_s = statistics.median(self.seconds(lambda: target.copy_(source), 3 * CALLS)[CALLS:])
        gemm_s = statistics.median(self.seconds(lambda: left @ right, 3 * CALLS)[CALLS:])
        name = self._device.get_device_name()
        return Machine(name, 2 * source.nbytes / copy_s, 2 * 8192**3 / gemm_s)


def unmeasured(case: str, is_right: bool, error: float, **more: Any) -> dict[str, Any]:
    """Return the record of a case without times."""
    record = {"case": case, "is_right": is_right, "errors": {"ours": error}, "failures": {}}
    return record | more | {"seconds": "not measured"}


def check(case: Case) -> dict[str, Any]:
    """Return the error of one call, and a digest of its bits."""
    result = case.first_call()
    found = error(result, case.expected())
    return unmeasured(case.name, found <= case.tolerance, found, digest=digest(result))


def repeat(case: Case, times: int = REPEATS) -> dict[str, Any]:
    """Return how many further calls give the bits of the first one."""
    first = case.first_call()
    others = sum(not torch.equal(bits(case.first_call()), bits(first)) for _ in range(times))
    counts = {"calls": times, "calls_with_other_bits": others}
    return unmeasured(case.name, not others, others / times, **counts, digest=digest(first))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, which are equal for equal NaN too."""
    return tensor.contiguous().view(torch.uint8)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bits(tensor).cpu().numpy().tobytes()).hexdigest()[:16]


def measure(case: Case, clock: DeviceTimer | None, machine: Machine | None) -> dict[str, Any]:
    """Return a case's record: errors, and on a device the times of all correct contenders."""
    expected = case.expected()
    contenders, errors, failures = {"ours": case.run}, {}, {}
    errors["ours"] = error(case.run(), expected)
    if errors["ours"] > case.tolerance:
        del contenders["ours"]
    tolerance = case.tolerance if case.rival_tolerance is None else case.rival_tolerance
    for name, run in case.rivals.items():
        try:
            errors[name] = error(run(), expected)
        except Exception as failure:  # A fault of a rival must not end the run.
            failures[name] = first_line(failure)
            continue
        if errors[name] <= tolerance:
            contenders[name] = run
    record: dict[str, Any] = {
        "case": case.name,
        "is_right": "ours" in contenders,
        "errors": errors,
        "failures": failures,
        "bytes": case.num_bytes,
        "flops": case.num_flops,
    }
    if case.moved_bytes is not None:
        record["moved_over_least"] = case.moved_bytes / case.num_bytes
    if clock is None or machine is None:
        return record | {"seconds": "not measured"}
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    prepared = {name: clock.prepare(run) for name, run in contenders.items()}
    for _ in range(ROUNDS):
        for name, contender in prepared.items():
            turns[name] += clock.seconds(contender.run)
    medians = {name: statistics.median(times) for name, times in turns.items()}
    spread = {name: statistics.quantiles(times, n=10)[::8] for name, times in turns.items()}
    limit_s = machine.limit_s(case)
    record |= {"seconds": medians, "spread_s": spread, "limit_s": limit_s}
    called = [name for name, contender in prepared.items() if not contender.is_captured]
    record |= {
        "host_s": {name: contender.host_s for name, contender in prepared.items()},
        "cover_s": clock.cover_s,
        "not_captured": called,
        "host_bound": [name for name in called if prepared[name].host_s > clock.cover_s],
    }
    if "ours" in medians:
        record["share_of_limit"] = limit_s / medians["ours"]
        record["speedup"] = {w: s / medians["ours"] for w, s in medians.items() if w != "ours"}
    return record


def row(record: dict[str, Any]) -> str:
    """Return a record as a line of the table."""
    gate = "right" if record["is_right"] else f"WRONG ({record['errors']['ours']:.1e})"
    failed = [f"{name} FAILED" for name in record["failures"]]
    failed += [f"{name} HOST-BOUND" for name in record.get("host_bound", ())]
    start = f"{record['case']:<34} {gate:<7}"
    if isinstance(record["seconds"], str):
        return "  ".join([f"{start} {record['seconds']}", *failed])
    if not record["is_right"]:
        return start
    versus = [
        f"{name} {record['speedup'][name]:.2f}x" if name in record["speedup"] else f"{name} WRONG"
        for name in record["errors"]
        if name != "ours"
    ]
    times = (
        f"{record['seconds']['ours'] * 1e6:10.1f} us  {record['share_of_limit']:6.1%} of the limit"
    )
    if "moved_over_least" in record:
        times += f", {record['moved_over_least']:.2f}x its bytes"
    return "  ".join([f"{start} {times}", *versus, *failed])


def folders() -> list[str]:
    """Return the kernel folders that have cases."""
    return sorted(module.name for module in pkgutil.iter_modules(kernel_cases.__path__))


def cases(folder: str, setup: Setup) -> Iterator[Case]:
    """Yield the cases of one kernel folder, built one at a time."""
    return importlib.import_module(f"experiments.gpu.kernel_cases.{folder}").cases(setup)


def compiler() -> dict[str, str]:
    """Return the versions of Triton and of the assembler that it calls, and its environment.

    TRITON_PTXAS_PATH sets another assembler than Triton's own. Some have faults: with version
    13.5, `gdn.solve_kernel` gave wrong numbers on an H200, and with 12.8 right ones.
    """
    try:
        import triton
    except ImportError:
        return {}
    bundled = ROOT.joinpath(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    path = os.environ.get("TRITON_PTXAS_PATH", str(bundled))
    found = {name: value for name, value in os.environ.items() if name.startswith("TRITON_PTXAS")}
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"V(\d+\.\d+\.\d+)", text)
        found["ptxas"] = version[1] if version else "unknown"
    except OSError:
        found["ptxas"] = "absent"
    return found | {"triton": triton.__version__}


Measure = Callable[[Case], dict[str, Any]]


def run_folder(
    folder: str,
    setup: Setup,
    work: Measure,
    file: Path | None,
    settings: dict[str, Any],
    *,
    only_first: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the record of each case, or of the first one, and write all of them after each case.

    Records in ``file`` with the same settings are not made again. The case in progress is written
    first, so that a process which dies in it leaves its name.
    """
    known = {
        record["case"]: record
        for record in known_records(file, settings)
        if not record.get("begun") and record["case"] != "inputs"
    }
    records: list[dict[str, Any]] = []
    try:
        for case in islice(cases(folder, setup), 1 if only_first else None):
            record = known.get(case.name)
            if record is None:
                if file:
                    write_json_lines(file, [*records, {"case": case.name, "begun": True}], settings)
                if setup.device != "cpu":  # A kernel that hangs ends this process.
                    signal.alarm(CASE_S * (FLOAT32_SLOWNESS if setup.is_float32 else 1))
                record = guarded(case.name, lambda case=case: work(case))
                signal.alarm(0)
            records.append(record)
            if file:
                write_json_lines(file, records, settings)
            yield record
            if record.get("device_lost") and case.name not in known:
                sys.exit(LOST)
    except Exception as failure:  # The inputs of a case could not be made.
        records.append(failed("inputs", failure))
        if file:
            write_json_lines(file, records, settings)
        yield records[-1]


def guarded(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a case, or that of its failure."""
    try:
        return work()
    except Exception as failure:
        traceback.print_exc()
        record = failed(name, failure)
    try:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    except Exception as failure:  # An invalid access: every later call of this process fails.
        record |= {"device_lost": first_line(failure)}
    return record


def failed(name: str, failure: BaseException) -> dict[str, Any]:
    return unmeasured(name, False, float("inf"), failures={"ours": first_line(failure)})


def first_line(failure: BaseException) -> str:
    """Return the kind of a failure and the first line of its message."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def run_each(
    names: list[str], arguments: list[str], prefix: str, out: Path, processes: int = 1
) -> bool:
    """Run a process per folder, ``processes`` of them at once.

    Returns True if all ended with status 0.
    """
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    with ThreadPoolExecutor(processes) as pool:
        files = [out / f"{prefix}_{folder}.jsonl" for folder in names]
        return all([*pool.map(partial(run_one, arguments, environment), names, files)])


def run_one(arguments: list[str], environment: dict[str, str], folder: str, file: Path) -> bool:
    """Run a process for a folder, and another one for the rest of its cases if it dies."""
    command = [sys.executable, "-m", "experiments.gpu.kernels", "--kernels", folder, *arguments]
    lost: set[str | None] = set()
    while True:
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if status in (0, 1):
            return status == 0 and not lost
        in_progress = mark_lost(file, status)
        if in_progress in lost:
            return False
        lost.add(in_progress)


def mark_lost(file: Path, status: int) -> str | None:
    """Record the case in which a process ended with ``status``. Returns its name if there is one,
    else that of the last finished case."""
    try:
        before, records = read_json_lines(file)
    except (OSError, ValueError, KeyError):
        return None
    if not records:
        return None
    name = str(records[-1]["case"])
    if records[-1].get("begun"):
        records[-1] = failed(name, RuntimeError(f"the process ended with status {status}"))
        write_json_lines(file, records, before.get("settings"))
    return name


def bench(
    names: list[str],
    setup: Setup,
    clock: DeviceTimer | None,
    out: Path | None,
    mode: str = "bench",
) -> bool:
    """Check or measure all cases of these folders.

    Returns True if ours is correct everywhere and, with ``is_dry``, every rival ran.
    """
    machine = clock.machine(setup.device) if clock and mode in ("bench", "ours") else None
    if machine:
        print(
            f"{machine.name}: copies {machine.copy_bytes_s:.3g} B/s, GEMM "
            f"{machine.gemm_flops_s:.3g} FLOP/s"
        )

    def times_of(case: Case) -> dict[str, Any]:
        header = {"machine": machine._asdict() if machine else "not measured"}
        chosen = replace(case, rivals={}) if mode == "ours" else case
        return measure(chosen, clock, machine) | header

    by_mode: dict[str, Measure] = {
        "check": check,
        "repeat": partial(repeat, times=2 if setup.is_dry else REPEATS),
    }
    work = by_mode.get(mode, times_of)
    settings = {"mode": mode, "code": code_hash(), "float32": setup.is_float32, **compiler()}
    # Of a dry run, "check" and "bench" interpret all cases; other modes only try the script.
    is_again = setup.is_dry and (mode in ("repeat", "ours") or setup.is_float32)
    counts = {"right": 0, "wrong": 0, "failed rivals": 0}
    for folder in names:
        torch.manual_seed(0)
        start, count = time.monotonic(), 0
        file = out / f"{file_prefix(mode, setup.is_float32)}_{folder}.jsonl" if out else None
        for record in run_folder(folder, setup, work, file, settings, only_first=is_again):
            count += 1
            counts["right" if record["is_right"] else "wrong"] += 1
            counts["failed rivals"] += sum(
                name != "ours" and not reason.startswith("InterpreterError")
                for name, reason in record["failures"].items()
            )
            print(row(record), flush=True)
        print(f"-- {folder}: {count} cases in {time.monotonic() - start:.0f} s", flush=True)
    print(json.dumps(counts))
    return not counts["wrong"] and not (setup.is_dry and counts["failed rivals"])


def file_prefix(mode: str, is_float32: bool) -> str:
    """Return the start of the names of a mode's files."""
    return f"{mode}_float32" if is_float32 else f"{mode}_kernels"


def tune(names: list[str], setup: Setup, clock: DeviceTimer | None, out: Path | None) -> bool:
    """Tune the launch parameters of these folders' kernels. Returns False if a dry run refused a
    candidate."""
    from experiments.gpu import kernel_tuning
    from kernels import tuning

    seconds = clock and (lambda run: clock.seconds(clock.prepare(run).run))
    records = []
    for folder in names:
        torch.manual_seed(0)
        trials = kernel_tuning.tune(cases(folder, setup), seconds)
        for trial in trials:
            records.append(trial.record())
            print(json.dumps(records[-1]), flush=True)
        if clock:
            device = torch.get_device_module(setup.device).get_device_name()
            tuning.write(tuning.PATH, device, kernel_tuning.table_of(trials), provenance())
    if out:
        write_json_lines(out / "tune_kernels.jsonl", records)
    return not setup.is_dry or not any(record["refused"] for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", help="folders, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--mode", choices=("bench", "ours", "check", "repeat", "tune"), default="bench"
    )
    parser.add_argument("--each", action="store_true", help="a process for each folder")
    parser.add_argument("--float32", action="store_true", help="float32 instead of bfloat16")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter")
    args = parser.parse_args()
    is_dry = args.dry or not torch.accelerator.is_available()
    if is_dry:
        os.environ["TRITON_INTERPRET"] = "1"  # Must be set before the first import of triton.
        interpreter.repair()
    kernel_rivals.find()
    device = "cpu" if is_dry else torch.accelerator.current_accelerator().type
    names = args.kernels.split(",") if args.kernels else folders()
    out = args.out or (None if is_dry else WRITTEN)
    if args.each:
        arguments = ["--mode", args.mode, "--out", str(out)]
        arguments += ["--dry"] * args.dry + ["--float32"] * args.float32
        prefix = file_prefix(args.mode, args.float32)
        is_timed = args.mode in ("bench", "ours")
        processes = 1 if is_timed else max(2, (os.cpu_count() or 2) // 2)
        sys.exit(0 if run_each(names, arguments, prefix, out or WRITTEN, processes) else 1)
    setup = Setup(device, is_dry, args.float32)
    clock = None if is_dry or args.mode in ("check", "repeat") else DeviceTimer(device)
    if args.mode == "tune":
        sys.exit(0 if tune(names, setup, clock, out) else 1)
    sys.exit(0 if bench(names, setup, clock, out, args.mode) else 1)


if __name__ == "__main__":
    main()
