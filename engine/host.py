"""Host of one engine: steps it in one thread, and executes the messages of its front end."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from engine.build import watch
from engine.engine import Engine
from engine.errors import (
    FAILED,
    STOPPING,
    DuplicateId,
    EngineStopped,
    QueueFull,
    RequestError,
    StepFailed,
)
from engine.interfaces import RunnerLost
from engine.messages import (
    Abort,
    AskCacheView,
    AskReport,
    CloseView,
    Compile,
    EndEngine,
    EndSession,
    EngineFacts,
    FindNode,
    FromEngine,
    OpenView,
    Outputs,
    Question,
    Reply,
    ResetCache,
    StopAccepting,
    TakeChanges,
    ToEngine,
)
from engine.requests.request import Request, RequestSpec
from engine.text.outputs import RequestOutput

logger = logging.getLogger(__name__)


class EngineHost:
    """Steps an engine while there is work, and waits for messages otherwise.

    One thread calls ``run``; any thread may call ``receive``. A step never waits for a sender. If a
    step fails, for lack of memory for example, the requests that ran fail and the engine goes on.
    If the next step fails too, or the runner is lost, the engine ends and all requests get an
    error.
    """

    def __init__(self, engine: Engine, send: Callable[[FromEngine], None]) -> None:
        """``send`` passes a message to the front end, from any thread and without waiting."""
        self.engine, self._send = engine, send
        self._request_ids: set[str] = set()
        """Requests that were received and have not ended."""
        self._commands: deque[Callable[[], None]] = deque()
        self._arriving: set[str] = set()
        self._num_received = 0
        self._last_counts = (0, 0)
        self._views: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._wake = threading.Condition()
        self._is_open = True
        self._must_stop = False
        self._is_closed = False
        self._last_step_failed = False
        self.failure: str | None = None
        """Reason of an unexpected end, or None."""
        engine.on_work(self._notify)

    @property
    def facts(self) -> EngineFacts:
        """Facts about the engine for a front end."""
        engine, runner = self.engine, self.engine.runner
        return EngineFacts(
            runner.vocab_size, engine.max_model_len, engine.model_name, runner.exactness
        )

    @property
    def num_queued(self) -> int:
        """Number of requests that wait in the engine, or are about to be queued there."""
        return self.engine.num_waiting + len(self._arriving)

    def receive(self, message: ToEngine) -> None:
        """Execute ``message``, or queue it for the time between two steps."""
        match message:
            case RequestSpec():
                self._submit(message)
            case Abort():
                self._abort(message)
            case EndEngine():
                self._end(message)
            case Compile():
                compiling = self.engine.compile
                with suppress(RuntimeError):  # The engine ends, and with it all questions.
                    self._compiler.submit(self._reply, message, lambda: compiling(message.grammar))
            case _:
                try:
                    self.call_soon(lambda: self._reply(message, lambda: self._answer(message)))
                except EngineStopped as error:
                    self._send(Reply(message.number, error=error.to_wire()))

    def call_soon(self, command: Callable[[], None]) -> None:
        """Run ``command`` before the next step. Safe to call from any thread. Raises
        EngineStopped if ``run`` has ended."""
        with self._wake:
            if self._is_closed:
                raise EngineStopped("The engine has stopped.")
            self._queue(command)

    def _submit(self, spec: RequestSpec) -> None:
        assert spec.request_id is not None, "a front end numbers its requests"
        try:
            request = self.engine.make(spec)
            self._enqueue(request)
        except Exception as error:
            if not isinstance(error, ValueError | RequestError):
                logger.exception("The request %s could not be submitted.", spec.request_id)
            failed = RequestOutput.failed(spec.request_id, RequestError.of(error))
            self._num_received += 1
            self._send(Outputs(self._num_received, self.engine.num_waiting, (failed,)))

    def _enqueue(self, request: Request) -> None:
        """Queue a request before the next step. Raises QueueFull, EngineStopped or
        DuplicateId, because the state at a distant front end is older."""
        request_id = request.request_id

        def arrive() -> None:
            with self._wake:
                self._arriving.remove(request_id)
            self._num_received += 1
            self._request_ids.add(request_id)
            self.engine.enqueue(request)

        with self._wake:
            if not self._is_open:
                raise EngineStopped(self.failure or STOPPING)
            if request_id in self._request_ids or request_id in self._arriving:
                raise DuplicateId(request_id)
            if self.num_queued >= self.engine.config.max_queue:
                raise QueueFull(self.engine.config.max_queue)
            self._arriving.add(request_id)
            self._queue(arrive)

    def _abort(self, message: Abort) -> None:
        def leave() -> None:
            output = self.engine.abort(message.request_id, message.reason)
            if output is not None:
                self._deliver([output])

        with self._wake:
            if not self._is_closed:
                self._queue(leave)

    def _end(self, message: EndEngine) -> None:
        with self._wake:
            self._is_open = False
            self._must_stop = self._must_stop or message.at_once
            self._wake.notify()

    def _answer(self, question: Question) -> Any:
        """Return the value of the reply to ``question``."""
        engine, views = self.engine, self._views
        match question:
            case AskReport():
                return engine.report()
            case AskCacheView():
                return engine.cache_view()
            case ResetCache():
                engine.reset_prefix_cache()
            case EndSession():
                engine.end_session(question.request_id)
            case StopAccepting():
                engine.disconnect(at_once=False)
            case OpenView():
                number = next(self._numbers)
                views[number] = watch(engine)
                return number
            case TakeChanges():
                changes = views[question.view].take()
                return (changes, views[question.view].whole()) if question.whole else changes
            case FindNode():
                return views[question.view].node(question.node)
            case CloseView():
                views.pop(question.view).close()
        return None

    def _reply(self, question: Question, work: Callable[[], Any]) -> None:
        try:
            self._send(Reply(question.number, work()))
        except Exception as error:
            if not isinstance(error, ValueError | RequestError):
                logger.exception("A question to the engine failed.")
            self._send(Reply(question.number, error=RequestError.of(error).to_wire()))

    def _queue(self, command: Callable[[], None]) -> None:
        """Queue ``command`` for the thread, before its next step. The caller holds ``_wake``."""
        self._commands.append(command)
        self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def run(self) -> None:
        """Step until ``EndEngine``, or until the engine fails. All requests have an answer or an
        error afterwards."""
        try:
            while self._run_commands():
                self._step()
            for request_id in tuple(self._request_ids):
                self.engine.abort(request_id)
            self.engine.close()
        except RunnerLost as error:
            self.failure = FAILED
            logger.error("The engine ended: %s", error)
        except BaseException:
            self.failure = FAILED
            logger.exception("The engine failed; it answers nothing from here on.")
        finally:
            self.close()

    def _step(self) -> None:
        """Run one step and deliver its outputs. Raises if this step and the previous one both
        failed."""
        try:
            outputs = self.engine.step()
        except RunnerLost:
            raise
        except Exception:
            if self._last_step_failed:
                raise
            self._last_step_failed = True
            logger.exception(
                "A step failed, and the requests that ran with it; the engine goes on."
            )
            self._deliver(self.engine.take_outputs())
            self._fail(self.engine.interrupted)
        else:
            self._last_step_failed = False
            self._deliver(outputs)

    def _fail(self, request_ids: Sequence[str]) -> None:
        error = StepFailed("the step that computed it failed")
        for request_id in request_ids:
            self.engine.abort(request_id)
        self._deliver([RequestOutput.failed(each, error) for each in request_ids])

    def _run_commands(self) -> bool:
        """Run all queued commands, and wait for one if there is nothing to compute. Returns False
        if the thread must end."""
        engine = self.engine
        while True:
            rest_s = None if engine.has_work() else engine.run_idle_tasks()
            with self._wake:
                if not self._commands and not engine.has_work() and self._is_open:
                    self._wake.wait(rest_s)
                num_commands = len(self._commands)
                is_open, must_stop = self._is_open, self._must_stop
            if not is_open:
                engine.disconnect(at_once=False)
            for _ in range(num_commands):
                self._commands.popleft()()  # If it raises, close runs the commands after it.
            if must_stop:
                return False
            if engine.has_work():
                return True
            if not is_open and not self._commands:
                return False

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Send the outputs of a step, except of requests that have ended for the front end."""
        news = tuple(each for each in outputs if each.request_id in self._request_ids)
        self._request_ids.difference_update(each.request_id for each in news if each.is_finished)
        counts = self._num_received, self.engine.num_waiting
        if news or counts != self._last_counts:
            self._last_counts = counts
            self._send(Outputs(*counts, news))

    def close(self) -> None:
        """End the host after ``run``, or in place of it: requests of the front end fail when it
        learns of the end."""
        with suppress(Exception):
            self.engine.disconnect(at_once=True)
        with self._wake:
            self._is_open, self._is_closed = False, True
            commands, self._commands = self._commands, deque()
        for command in commands:
            try:
                command()
            except Exception:
                logger.exception("A command failed that was left when the engine ended.")
        self._compiler.shutdown(wait=False, cancel_futures=True)
