"""Pytest plugin that distributes tests over processes forked after collection.

``pytest --processes 3`` imports and collects once, then forks. pytest-xdist would import and
collect in every process, 15 s of CPU time each. A process runs one scope (`selection.scope_of`) at
a time, so the fixtures of a file are built once. It sends its reports to the parent.
"""

from __future__ import annotations

import atexit
import gc
import mmap
import multiprocessing
import pickle
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from tests import selection

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 10
"""Seconds in which processes must finish their tests and fixtures after an interrupt."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("general")
    group.addoption(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="run the tests in N processes forked after collection",
    )


def count(config: pytest.Config) -> int:
    """Return the number of processes, or 1 if the tests run in the main process."""
    return 1 if config.getoption("usepdb") else config.getoption("processes")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort long scopes to the front, so that no process runs one at the end while others idle."""
    if count(config) > 1:
        items.sort(key=selection.rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run all items. Return None, so that pytest runs them, for one process or failed
    collection."""
    config = session.config
    if count(config) < 2 or session.testsfailed or config.option.collectonly:
        return None
    _Run(session).run(count(config))
    return True


class _Run:
    """Parent's side of a run in several processes."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.stop = mmap.mmap(-1, 1)
        """One byte in shared memory: 1 if processes must not start another test."""
        scopes: dict[str, list[int]] = {}
        for number, item in enumerate(session.items):
            scopes.setdefault(selection.scope_of(item.nodeid), []).append(number)
        self.waiting = deque(scopes.values())
        self.workers: dict[Connection, _Worker] = {}
        self.num_started = 0

    def run(self, num_processes: int) -> None:
        self.session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        try:
            for _ in range(min(num_processes, len(self.waiting))):
                self._start()
            while self.workers:
                for connection in wait(list(self.workers)):
                    self._receive(connection)
        finally:
            self.stop[0] = 1
            for worker in self.workers.values():
                worker.process.join(PATIENCE_S)
                worker.process.kill()
        if self.session.shouldfail:
            raise self.session.Failed(self.session.shouldfail)
        if self.session.shouldstop:
            raise self.session.Interrupted(self.session.shouldstop)

    def _start(self) -> None:
        """Fork a process."""
        ours, theirs = FORK.Pipe()
        self.num_started += 1
        arguments = (self.session, self.num_started, theirs, self.stop, [ours, *self.workers])
        process = FORK.Process(target=_serve, args=arguments)
        process.start()
        theirs.close()
        self.workers[ours] = _Worker(process)

    def _receive(self, connection: Connection) -> None:
        """Process one message of a worker, or its exit."""
        worker = self.workers[connection]
        try:
            kind, content = connection.recv()
        except (EOFError, ConnectionError):
            del self.workers[connection]
            worker.process.join()
            if not self.stop[0] and (worker.assigned or worker.process.exitcode != 0):
                self._replace(worker)
            return
        hook, config = self.session.config.hook, self.session.config
        if kind == "more":
            is_over = self.session.shouldfail or self.session.shouldstop or not self.waiting
            numbers = [] if is_over else self.waiting.popleft()
            worker.assigned.extend(numbers)
            connection.send(numbers)
        elif kind == "warning":
            hook.pytest_warning_recorded.call_historic(kwargs=content)
        else:
            worker.last = worker.assigned.popleft()
            item = self.session.items[worker.last]
            hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            for data in content:
                report = hook.pytest_report_from_serializable(config=config, data=data)
                hook.pytest_runtest_logreport(report=report)
            hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if self.session.shouldfail or self.session.shouldstop:
            self.stop[0] = 1

    def _replace(self, worker: _Worker) -> None:
        """Report the last test of a dead process as failed, and run its other tests in a new
        process."""
        if worker.assigned:
            worker.last = worker.assigned.popleft()
        item = self.session.items[worker.last]
        message = f"The process of this test ended with exit code {worker.process.exitcode}."
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")
        self.session.config.hook.pytest_runtest_logreport(report=report)
        if worker.assigned:
            self.waiting.appendleft(list(worker.assigned))
        if self.waiting:
            self._start()


class _Worker:
    """Parent's record of one process."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.assigned: deque[int] = deque()
        """Numbers of the assigned items without a report, in order."""
        self.last = 0
        """Number of the last reported item."""


def _serve(
    session: pytest.Session,
    number: int,
    connection: Connection,
    stop: mmap.mmap,
    others: list[Connection],
) -> None:
    """Run scopes until none is left. Main function of a process."""
    for other in others:  # an open copy would hide the exit of this process or of the parent
        other.close()
    config = session.config
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:  # files inherited from the parent share its file position
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()
    factory = config._tmp_path_factory  # type: ignore[attr-defined]
    factory._basetemp = factory.getbasetemp() / f"process{number}"
    factory._basetemp.mkdir(mode=0o700)
    sender = _Sender(connection)
    config.pluginmanager.register(sender, "forked sender")
    sender.is_registered = True
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        numbers = _numbers(connection)
        this = next(numbers, None)
        while this is not None:
            following = None if stop[0] else next(numbers, None)
            item = session.items[this]
            nextitem = None if following is None else session.items[following]
            config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            this = following
    with suppress(Exception):
        session._setupstate.teardown_exact(None)
    atexit._run_exitfuncs()


def _numbers(connection: Connection) -> Iterator[int]:
    """Yield the numbers of the items to run.

    What earlier scopes left is not searched for garbage again: with imported models, each
    ``gc.collect()`` of a test would take a third of a second.
    """
    while True:
        gc.collect()
        gc.freeze()
        connection.send(("more", None))
        numbers = connection.recv()
        if not numbers:
            return
        yield from numbers


class _Sender:
    """Plugin that sends reports and warnings to the parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.is_registered = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        serialize = item.config.hook.pytest_report_to_serializable
        self.connection.send(
            ("reports", [serialize(config=item.config, report=report) for report in reports])
        )
        return True

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        if not self.is_registered:  # pytest repeats earlier warnings for a new plugin
            return
        warning = warning_message
        plain = warnings.WarningMessage(
            str(warning.message), warning.category, warning.filename, warning.lineno
        )
        content = {"warning_message": plain, "when": when, "nodeid": nodeid, "location": location}
        with suppress(pickle.PicklingError, AttributeError):
            self.connection.send(("warning", content))
