"""Tests of the kernel benchmark: wrong kernels are not timed, and no candidate is wrong. `make
gpu-dry` runs all cases."""

from __future__ import annotations

import time

import pytest
import torch

from experiments.gpu.kernel_cases import Case, Setup, plans
from experiments.gpu.kernel_tuning import tune
from experiments.gpu.kernels import DeviceTimer, Machine, measure
from kernels.tuning import using
from tests.kernels import interpreter

MACHINE = Machine("a machine", copy_bytes_s=1e9, gemm_flops_s=1e12)


class _Wall:
    """Fake of a torch device module, with events that read the wall clock."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time_s = time.perf_counter()

        def elapsed_time(self, end: _Wall.Event) -> float:
            return (end.time_s - self.time_s) * 1e3

    stream = "main"

    @staticmethod
    def synchronize() -> None:
        pass

    @classmethod
    def current_stream(cls) -> str:
        return cls.stream

    @classmethod
    def set_stream(cls, stream: str) -> None:
        cls.stream = stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> DeviceTimer:
    monkeypatch.setattr(torch, "get_device_module", lambda device: _Wall)
    return DeviceTimer("cpu", scratch_bytes=8)


def _case(ours: float, rival: float) -> Case:
    return Case(
        run=lambda: torch.full((4,), ours),
        expected=lambda: torch.ones(4),
        num_bytes=1000,
        num_flops=10**9,
        rivals={"rival": lambda: torch.full((4,), rival)},
    )


def test_only_correct_kernels_are_timed(clock: DeviceTimer) -> None:
    record = measure(_case(ours=1.001, rival=1.0), clock, MACHINE)
    assert set(record["device_s"]) == {"ours", "rival"}
    assert record["limit_s"] == pytest.approx(1e-3)
    assert record["share_of_limit"] == pytest.approx(1e-3 / record["device_s"]["ours"])
    assert record["speedup"].keys() == {"rival"}
    record = measure(_case(ours=1.5, rival=1.0), clock, MACHINE)
    assert record["errors"] == {"ours": 0.5, "rival": 0.0} and "speedup" not in record
    assert set(record["device_s"]) == {"rival"}


def test_cases_of_square_states_differ_in_their_launches(monkeypatch) -> None:
    """A table of the device does not change them."""
    triton_interpreter = pytest.importorskip("triton.runtime.interpreter")
    launched = []
    monkeypatch.setattr(
        triton_interpreter.GridExecutor,
        "__call__",
        lambda self, *_, num_warps, num_stages, **sizes: launched.append((num_warps, num_stages)),
    )
    square = [plan for plan in plans(False, "recurrences") if plan.build.__name__ == "square"]
    with using({("mamba2.scan_kernel", (torch.bfloat16, 64, 64)): {"num_stages": 3}}):
        for plan in square:
            plan.case(Setup("cpu", is_dry=False)).run()
    # The interpreter has one stage for a scan.
    assert launched == [(4, 2), (4, 1), (2, 2), (2, 1), (4, 1), (4, 1)]


@pytest.mark.full
def test_candidates_of_the_tuner_are_correct() -> None:
    """Only kernels tuned by the number of tokens are run here; their results must be bit-identical.
    `make gpu-dry` runs the others."""
    pytest.importorskip("triton")
    interpreter.repair()
    setup = Setup("cpu", is_dry=True)
    trials = tune((plan.case(setup) for plan in plans(True, "linear")), None)
    copies = [plan for plan in plans(True, "pointwise") if "state copy" in plan.name]
    trials += tune((plan.case(setup) for plan in copies), None)
    records = [trial.record() for trial in trials]
    assert {r["kernel"] for r in records} == {"linear.linear_kernel", "state_copy.copy_kernel"}
    assert all(r["refused"] == [] and r["right"] > 1 and r["chosen"] is None for r in records)
