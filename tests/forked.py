"""Share the tests of one run among processes that are forked after collection.

``pytest --processes 3`` imports and collects once and forks then. pytest-xdist would do both in
every process: 15 s of processor time each. A process takes one scope after another
(`selection.scope_of`), so that a file's fixtures are built once, and sends its reports to the
parent, which prints them.
"""

from __future__ import annotations

import atexit
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
"""Time that processes have to finish their tests and fixtures when the run is interrupted."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("general")
    group.addoption(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="run the tests in N processes, which are forked after collection",
    )


def count(config: pytest.Config) -> int:
    """Return the number of processes; 1 if the tests run in pytest's own."""
    return 1 if config.getoption("usepdb") else config.getoption("processes")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let first run what must not end the run alone."""
    if count(config) > 1:
        items.sort(key=selection.rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run all items. Left to pytest if one process is enough or collection failed."""
    config = session.config
    if count(config) < 2 or session.testsfailed or config.option.collectonly:
        return None
    _Run(session).run(count(config))
    return True


class _Run:
    """A run in several processes, seen from the parent."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.stop = mmap.mmap(-1, 1)
        """One byte in shared memory: 1 if processes must not begin another test."""
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
        """Handle one message of a process, or its end."""
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
        """Fail the test that a process died in, or after, and run its other tests in a new one."""
        if worker.assigned:
            worker.last = worker.assigned.popleft()
        item = self.session.items[worker.last]
        said = f"The process of this test ended with exit code {worker.process.exitcode}."
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")
        self.session.config.hook.pytest_runtest_logreport(report=report)
        if worker.assigned:
            self.waiting.appendleft(list(worker.assigned))
        if self.waiting:
            self._start()


class _Worker:
    """A process, seen from the parent."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.assigned: deque[int] = deque()
        """Numbers of the items that it has been given and has not reported, in their order."""
        self.last = 0
        """Number of the item that it has reported last."""


def _serve(
    session: pytest.Session,
    number: int,
    connection: Connection,
    stop: mmap.mmap,
    others: list[Connection],
) -> None:
    """Run scopes until there are no more: the main function of a process."""
    for other in others:  # so that the end of this process or of the parent is noticed
        other.close()
    config = session.config
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:  # files that are shared with the parent share its position, too
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
    """Yield the numbers of the items to run."""
    while True:
        connection.send(("more", None))
        numbers = connection.recv()
        if not numbers:
            return
        yield from numbers


class _Sender:
    """Plugin that sends to the parent what the terminal and other reporters must know."""

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
        said = warning_message
        plain = warnings.WarningMessage(
            str(said.message), said.category, said.filename, said.lineno
        )
        content = {
            "warning_message": plain,
            "when": when,
            "nodeid": nodeid,
            "location": location,
        }
        with suppress(pickle.PicklingError, AttributeError):
            self.connection.send(("warning", content))
