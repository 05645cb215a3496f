"""Loop of the engine's thread: runs commands of other threads between steps, and delivers outputs.

One thread calls ``run``. It shares only an inbox of commands with callers, and a step never waits
for a caller.

If a step fails, for lack of memory for example, the requests that ran fail and the engine goes on.
If the next step fails too, or the runner is lost, the engine ends and all waiting callers get an
error.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from engine.errors import (
    DuplicateId,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    RequestError,
    StepFailed,
)
from engine.interfaces import EngineCore, Losable, RunnerLost
from engine.text.outputs import RequestOutput

if TYPE_CHECKING:
    from engine.requests.request import Request

Reader = TypeVar("Reader")
"""Receiver of a request's outputs."""
STOPPED = "The engine stopped before the answer was done."
STOPPING = "The engine is stopping and takes no more requests."
FAILED = "The engine has failed; see its log for the reason, and restart it."
logger = logging.getLogger(__name__)


def failed(output: RequestOutput) -> RequestError:
    """Return the ``error`` of ``output``, the last output of its request."""
    assert output.error is not None
    return (InvalidRequest if output.is_refused else StepFailed)(output.error)


class EngineLoop(Generic[Reader]):
    """Steps an ``Engine`` while there is work, and waits for commands otherwise."""

    def __init__(
        self,
        engine: EngineCore,
        deliver: Callable[[Sequence[tuple[Reader, RequestOutput | RequestError]]], None],
    ) -> None:
        """Prepare the loop; ``deliver`` is called in the engine's thread after every step, even
        without outputs."""
        self._engine = engine
        self._deliver = deliver
        self._streams: dict[str, Reader] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._arriving: set[str] = set()
        self.num_arrived = 0
        """Number of requests queued so far. Written by the engine's thread only."""
        self._wake = threading.Condition()
        self._is_open = True
        self._must_stop = False
        self._is_closed = False
        self.has_failed = self._last_step_failed = False
        """``has_failed``: the loop ended because the engine failed."""
        engine.on_work(self._notify)

    def enqueue(self, request: Request, reader: Reader) -> None:
        """Queue a prepared request before the next step. Safe to call from any thread.

        Raises QueueFull, EngineStopped if the engine is stopping, or DuplicateId if a request of
        the same id is in progress.
        """
        request_id = request.request_id

        def arrive() -> None:
            self._streams[request_id] = reader
            self._engine.enqueue(request)
            self.num_arrived += 1
            with self._wake:
                self._arriving.remove(request_id)

        with self._wake:
            if self.has_failed:
                raise EngineStopped(FAILED)
            if not self._is_open:
                raise EngineStopped(STOPPING)
            if request_id in self._streams or request_id in self._arriving:
                raise DuplicateId(request_id)
            if self._engine.num_waiting + len(self._arriving) >= self._engine.config.max_queue:
                raise QueueFull(self._engine.config.max_queue)
            self._arriving.add(request_id)
            self._queue(arrive)

    def call_soon(self, command: Callable[[], None]) -> None:
        """Run ``command`` before the next step. Safe to call from any thread. Raises
        EngineStopped if the loop has ended."""
        with self._wake:
            if self._is_closed:
                raise EngineStopped("The engine has stopped.")
            self._queue(command)

    def abort(self, request_id: str) -> None:
        """End a request before the next step. Does nothing if it has ended. Safe to call from any
        thread."""

        def leave() -> None:
            output = self._engine.abort(request_id)
            if output is not None:
                self._deliver_outputs([output])

        with self._wake:
            if not self._is_closed:
                self._queue(leave)

    def end(self, *, at_once: bool) -> None:
        """Accept no more requests. ``run`` returns when those in progress have finished, or with
        ``at_once`` after its current step. Safe to call from any thread."""
        with self._wake:
            self._is_open = False
            self._must_stop = self._must_stop or at_once
            self._wake.notify()

    def _queue(self, command: Callable[[], None]) -> None:
        """Queue ``command`` for the thread, before its next step. The caller holds ``_wake``."""
        self._commands.append(command)
        self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def run(self) -> None:
        """Step until ``end``, or until the engine fails. All callers have an answer or an error
        afterwards."""
        if isinstance(self._engine.runner, Losable):
            self._engine.runner.when_lost(self.call_soon)
        try:
            while self._run_commands():
                self._step()
            for request_id in tuple(self._streams):
                self._engine.abort(request_id)
            self._engine.close()
        except RunnerLost as error:
            self.has_failed = True
            logger.error("The engine ended: %s", error)
        except BaseException:
            self.has_failed = True
            logger.exception("The engine failed; it answers nothing from here on.")
        finally:
            try:
                self._engine.disconnect()
            finally:
                self._close()

    def _step(self) -> None:
        """Run one step and deliver its outputs. Raises if this step and the previous one both
        failed."""
        try:
            outputs = self._engine.step()
        except RunnerLost:
            raise
        except Exception:
            if self._last_step_failed:
                raise
            self._last_step_failed = True
            logger.exception(
                "A step failed, and the requests that ran with it; the engine goes on."
            )
            self._deliver_outputs(self._engine.take_outputs())
            self._fail(self._engine.interrupted)
        else:
            self._last_step_failed = False
            self._deliver_outputs(outputs)

    def _fail(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)
            reader = self._streams.pop(request_id, None)
            if reader is not None:
                self._deliver([(reader, StepFailed("the step that computed it failed"))])

    def _run_commands(self) -> bool:
        """Run all queued commands, and wait for one if there is nothing to compute. Returns False
        if the thread must end."""
        engine = self._engine
        while True:
            rest_s = None if engine.has_work() else engine.run_idle_tasks()
            with self._wake:
                if not self._commands and not engine.has_work() and self._is_open:
                    self._wake.wait(rest_s)
                num_commands = len(self._commands)
                is_open, must_stop = self._is_open, self._must_stop
            if not is_open:
                engine.stop_accepting()
            for _ in range(num_commands):
                self._commands.popleft()()  # If it raises, _close runs the commands after it.
            if must_stop:
                return False
            if engine.has_work():
                return True
            if not is_open and not self._commands:
                return False

    def _deliver_outputs(self, outputs: Sequence[RequestOutput]) -> None:
        deliveries: list[tuple[Reader, RequestOutput | RequestError]] = []
        for output in outputs:
            reader = self._streams.get(output.request_id)
            if reader is not None:
                deliveries.append((reader, output if output.error is None else failed(output)))
            if output.is_finished:
                self._streams.pop(output.request_id, None)
        self._deliver(deliveries)

    def _close(self) -> None:
        """End all streams with an error."""
        with self._wake:
            self._is_open, self._is_closed = False, True
            commands, self._commands = self._commands, deque()
        for command in commands:
            try:
                command()
            except Exception:
                logger.exception("A command failed that was left when the engine ended.")
        ended = EngineStopped(FAILED if self.has_failed else STOPPED)
        self._deliver([(reader, ended) for reader in self._streams.values()])
        self._streams.clear()
