"""Check and time each kernel, next to flash-linear-attention's, PyTorch's and the device's limit.

    python -m experiments.gpu --part check bench tune [--only gdn] [--dry]

Tests of each case, or of each group of kernels:

- right: one call against the reference, in float64 where the reference can
- repeats: 50 calls, which must give equal bits
- times: ours, rivals and the limit of the device
- tuning: tries other launch parameters (`experiments.gpu.kernel_tuning`) and writes the fast ones
  to kernels/tuned.json. Without a device it only checks that each candidate is correct.

A contender is captured into a device graph, and its replays are timed, so the host's launches do
not count. A contender that cannot be captured is called while the device is busy with other work,
which hides the host's time. The record says so. If the host took longer than that work, the case is
``host_bound`` and its time is not the kernel's.

Ours, the rivals and the limit alternate in one run. The limit is bytes over the measured copy
bandwidth or FLOPs over the measured GEMM rate, whichever takes longer. A wrong contender is not
timed; if ours is wrong, the test fails. A rival that raises is reported. Without a device it also
fails the test, unless Triton's interpreter cannot run it. `find_rivals` finds
flash-linear-attention.

With ``TRITON_INTERPRET=1``, tiny shapes run in Triton's interpreter, and nothing is timed.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from engine.runner.device import Device
from experiments.gpu import kernel_tuning
from experiments.gpu.kernel_cases import Case, Plan, Setup, error, find_rivals, plans
from experiments.gpu.report import IS_DRY, Record
from experiments.provenance import provenance
from kernels import tuning
from tests.kernels import interpreter

ROUNDS = 5
"""Turns of every contender of a case."""
CALLS = 8
"""Timed calls per turn."""
REPEATS = 2 if IS_DRY else 50
"""Calls of a kernel whose bits are compared."""
PLANS = [*plans(IS_DRY)]
# A dry run checks and times all cases. Other tests of it only try the script.
FIRST = [*{plan.group: plan for plan in reversed(PLANS)}.values()] if IS_DRY else PLANS
EVERY = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
SOME = pytest.mark.parametrize("plan", FIRST, ids=lambda plan: plan.name)


@pytest.fixture(scope="session")
def setup() -> Setup:
    if IS_DRY:
        interpreter.repair()
        return Setup("cpu", True)
    find_rivals()
    return Setup(torch.accelerator.current_accelerator().type, False)


@pytest.fixture(scope="session")
def clock(setup: Setup) -> DeviceTimer | None:
    return None if setup.is_dry else DeviceTimer(setup.device)


@pytest.fixture(scope="session")
def machine(clock: DeviceTimer | None) -> Machine | None:
    return clock and clock.machine()


@EVERY
def test_right(plan: Plan, setup: Setup, record: Record) -> None:
    case = plan.case(setup)
    result = case.first_call()
    found = error(result, case.expected())
    record(error=found, digest=digest(result))
    assert found <= case.tolerance


@SOME
def test_right_in_float32(plan: Plan, setup: Setup, record: Record) -> None:
    test_right(plan, replace(setup, is_float32=True), record)


@SOME
def test_repeats(plan: Plan, setup: Setup) -> None:
    case = plan.case(setup)
    first = bits(case.first_call())
    others = [torch.equal(bits(case.first_call()), first) for _ in range(REPEATS)]
    assert others.count(False) == 0


@EVERY
def test_times(
    plan: Plan, setup: Setup, clock: DeviceTimer | None, machine: Machine | None, record: Record
) -> None:
    found = measure(plan.case(setup), clock, machine)
    record(**found)
    assert found["errors"]["ours"] <= found["tolerance"]
    if setup.is_dry:
        failed = found["failures"].values()
        assert all(reason.startswith("InterpreterError") for reason in failed), failed


@pytest.mark.parametrize("group", sorted({plan.group for plan in PLANS}))
def test_tuning(group: str, setup: Setup, clock: DeviceTimer | None, record: Record):
    seconds = clock and (lambda run: clock.seconds(clock.prepare(run).run))
    trials = kernel_tuning.tune((plan.case(setup) for plan in plans(IS_DRY, group)), seconds)
    record(trials=[trial.record() for trial in trials])
    if clock:
        table = kernel_tuning.table_of(trials)
        tuning.write(tuning.PATH, clock.machine_name, table, provenance())
    else:
        assert not any(trial.refused for trial in trials)


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

    @property
    def machine_name(self) -> str:
        return str(self._device.get_device_name())

    def machine(self) -> Machine:
        """Measure the copy bandwidth on 1 GiB and the bfloat16 GEMM rate on 8,192 cubed."""
        device = self._scratch.device
        source = torch.empty(2**29, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        left, right = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
        copy_s = statistics.median(self.seconds(lambda: target.copy_(source), 3 * CALLS)[CALLS:])
        gemm_s = statistics.median(self.seconds(lambda: left @ right, 3 * CALLS)[CALLS:])
        return Machine(self.machine_name, 2 * source.nbytes / copy_s, 2 * 8192**3 / gemm_s)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, which are equal for equal NaN too."""
    return tensor.contiguous().view(torch.uint8)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bits(tensor).cpu().numpy().tobytes()).hexdigest()[:16]


def measure(case: Case, clock: DeviceTimer | None, machine: Machine | None) -> dict[str, Any]:
    """Return errors, and on a device the times of all correct contenders."""
    expected = case.expected()
    contenders = {"ours": case.run, **case.rivals}
    tolerance = case.tolerance if case.rival_tolerance is None else case.rival_tolerance
    errors, failures = {"ours": error(case.run(), expected)}, {}
    for name, run in case.rivals.items():
        try:
            errors[name] = error(run(), expected)
        except Exception as failure:  # A fault of a rival must not end the run.
            failures[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    limits = {name: case.tolerance if name == "ours" else tolerance for name in errors}
    right = {name: contenders[name] for name, found in errors.items() if found <= limits[name]}
    record: dict[str, Any] = {
        "errors": errors,
        "tolerance": case.tolerance,
        "failures": failures,
        "bytes": case.num_bytes,
        "flops": case.num_flops,
    }
    if case.moved_bytes is not None:
        record["moved_over_least"] = case.moved_bytes / case.num_bytes
    if clock is None or machine is None:
        return record
    turns: dict[str, list[float]] = {name: [] for name in right}
    prepared = {name: clock.prepare(run) for name, run in right.items()}
    for _ in range(ROUNDS):
        for name, contender in prepared.items():
            turns[name] += clock.seconds(contender.run)
    medians = {name: statistics.median(times) for name, times in turns.items()}
    called = [name for name, contender in prepared.items() if not contender.is_captured]
    limit_s = machine.limit_s(case)
    record |= {
        "device_s": medians,
        "spread_s": {name: statistics.quantiles(of, n=10)[::8] for name, of in turns.items()},
        "limit_s": limit_s,
        "host_s": {name: contender.host_s for name, contender in prepared.items()},
        "cover_s": clock.cover_s,
        "not_captured": called,
        "host_bound": [name for name in called if prepared[name].host_s > clock.cover_s],
        "machine": machine._asdict(),
    }
    if ours := medians.get("ours"):
        record["share_of_limit"] = limit_s / ours
        record["speedup"] = {name: of / ours for name, of in medians.items() if name != "ours"}
    return record
