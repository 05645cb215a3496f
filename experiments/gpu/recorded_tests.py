"""Plugin of pytest that writes a line per test at once and skips tests that passed before.

    pytest -p experiments.gpu.recorded_tests --records FILE

A call that is stopped keeps its records, and the next one continues with the other tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.provenance import code_hash


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="JSON lines, one per test")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--records")
    if file is not None:
        config.pluginmanager.register(Records(file, hasattr(config, "workerinput")), "gpu-records")


class Records:
    """Outcomes of the tests of this code."""

    def __init__(self, file: Path, is_worker: bool) -> None:
        self._file, self._is_worker, self._code = file, is_worker, code_hash()

    def passed(self) -> set[str]:
        """Return the tests that passed with this code."""
        if not self._file.exists():
            return set()
        lines = self._file.read_text("utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.endswith("}")]  # Not one cut by a kill.
        return {r["test"] for r in found if r["outcome"] == "passed" and r["code"] == self._code}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        passed = self.passed()
        left_out = [item for item in items if item.nodeid in passed]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in passed]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # Without a test left to run, all have passed.
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed():
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Workers send their reports to the first process, which writes them.
        if self._is_worker or (report.when != "call" and report.outcome == "passed"):
            return
        notes = dict(report.user_properties)
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "when": report.when,
            "seconds": round(report.duration, 2),
            "device": notes.get("device"),
            "code": self._code,
        }
        if report.failed:
            line["reason"] = str(report.longrepr)[-1000:]
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
