"""Plugin of pytest: a report with a line per test, which the next call continues.

    pytest -p experiments.gpu.report --report FILE [--again] -n 1

Tests that passed with the same code and compiler are skipped. A process whose device refuses
further work ends, and another one goes on with the next test: pytest-xdist says that it crashed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.provenance import ROOT, code_hash, known_records, write_json_lines

LOST = 70
"""Exit status of a process whose device refuses further work."""
IS_DRY = os.environ.get("TRITON_INTERPRET") == "1"
"""True for tiny shapes in Triton's interpreter, without times."""
Record = Callable[..., None]
"""Function that adds figures to the line of a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, help="JSON lines, one per test")
    parser.addoption("--again", action="store_true", help="repeat tests that passed")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--report")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(file, config.getoption("--again")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that passed before."""
    passed = set(getattr(config, "workerinput", {}).get("passed", ()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """End the process after an invalid access: every later call would fail."""
    yield
    try:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    except Exception:
        os._exit(LOST)


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Return the function that adds figures to the line of this test."""

    def add(**figures: object) -> None:
        record_property("figures", json.dumps(figures))

    return add


class Report:
    """Outcomes of the tests of this code."""

    def __init__(self, file: Path, again: bool) -> None:
        found = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu, interpreted"
        if found is not None:
            name = torch.get_device_module(found).get_device_name()
        settings = {"code": code_hash(), "device": name, **compiler()}
        known = [] if again else known_records(file, settings)
        self.passed = sorted(one["test"] for one in known if one["outcome"] == "passed")
        write_json_lines(file, known, settings)
        self._file = file

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Let all processes leave out the same tests, also those that begin later."""
        node.workerinput["passed"] = self.passed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"test": report.nodeid.partition("@")[0], "outcome": report.outcome}
        line["seconds"] = round(report.duration, 2)
        figures = [json.loads(one) for name, one in report.user_properties if name == "figures"]
        line |= {name: value for one in figures for name, value in one.items()}
        if not report.passed:
            line["reason"] = str(report.longrepr)[-1000:]
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if figures:
            print(f"\n{line}", flush=True)


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
