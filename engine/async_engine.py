"""Engine in a separate thread: the loop of the thread, and its form for callers in asyncio.

The loop runs commands of other threads between steps, and delivers outputs. It shares only an inbox
of commands with callers, and a step never waits for a caller. In asyncio, outputs are queued in the
caller's event loop, so a slow reader delays neither the engine nor other readers.

If a step fails, for lack of memory for example, the requests that ran fail and the engine goes on.
If the next step fails too, or the runner is lost, the engine ends and all waiting callers get an
error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from engine.config import EngineConfig
from engine.errors import (
    DuplicateId,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    RequestError,
    StepFailed,
)
from engine.interfaces import EngineCore, Losable, RunnerLost
from engine.plugins import provided
from engine.requests.grammar import Grammar
from engine.requests.spec import Prompt, RequestSpec, SamplingParams
from engine.text.outputs import FinishReason, RequestOutput

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.requests.request import Request
    from engine.schedule.report import CacheReport
    from engine.text.tokenizer import Tokenizer
    from hybridcache.watch.recorder import Record

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
    """Steps an ``Engine`` while there is work, and waits for commands otherwise. One thread calls
    ``run``."""

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

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request before the next step. Does nothing if it has ended. Safe to call from any
        thread."""

        def leave() -> None:
            output = self._engine.abort(request_id, reason)
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


Result = TypeVar("Result")


class NoSingleEngine(RuntimeError):
    """A view of one engine's tree was requested from several engines."""


class RequestStream:
    """Outputs of one request: ``async for output in stream``. Belongs to the event loop it was made
    in."""

    def __init__(self, request_id: str, on_abort: Callable[[str, FinishReason], None]) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._on_abort = on_abort
        self._outputs: asyncio.Queue[RequestOutput | RequestError] = asyncio.Queue()
        self._has_all = self._has_ended = self._was_aborted = False
        """``_has_all``: the last output was put. ``_has_ended``: the last output was read."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        """Return the next output; the last one has a ``finish_reason``. Raises RequestError if the
        request failed; no output follows."""
        if self._has_ended:
            raise StopAsyncIteration
        output = await self._outputs.get()
        if isinstance(output, RequestError):
            self._has_ended = True
            raise output
        self._has_ended = output.is_finished
        return output

    def abort(self, reason: FinishReason = "abort") -> None:
        """End the request with ``reason``; its memory is free before the next step. Does nothing
        if it has ended."""
        if not (self._has_all or self._was_aborted):
            self._was_aborted = True
            self._on_abort(self.request_id, reason)

    def put(self, output: RequestOutput | RequestError) -> None:
        """Queue ``output`` for the reader. Must be called in the stream's event loop."""
        self._has_all = isinstance(output, RequestError) or output.is_finished
        self._outputs.put_nowait(output)


Question = Literal[
    "report",
    "cache_view",
    "reset_prefix_cache",
    "end_session",
    "stop_accepting",
    "watch",
    "take",
    "whole",
    "node",
    "close",
]
"""Methods of ``Engine``; ``watch`` opens a view, and those after it are questions to a view."""


class Answers:
    """Answers questions to an engine, in its thread between two steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watches: dict[int, Any] = {}
        self._numbers = itertools.count()

    def answer(self, what: Question, *arguments: Any) -> Any:
        """Call a method of the engine, or of a view, with the number of the view as the first
        argument."""
        match what:
            case "watch":
                number = next(self._numbers)
                self._watches[number] = provided("Watch")(self._engine)
                return number
            case "take" | "whole" | "node" | "close":
                number, *arguments_of_view = arguments
                watch = self._watches[number]
                if what == "whole":
                    return watch.take(), watch.whole()
                if what == "close":
                    del self._watches[number]
                return getattr(watch, what)(*arguments_of_view)
        return getattr(self._engine, what)(*arguments)


class Watching:
    """View of one engine for an event loop; see ``observe.cache_watch.Watch``. Raises
    EngineStopped."""

    def __init__(self, ask: Callable[..., Awaitable[Any]], number: int) -> None:
        self._ask, self._number = ask, number

    async def take(self) -> list[Record]:
        return cast("list[Record]", await self._ask("take", self._number))

    async def whole(self) -> tuple[list[Record], dict[str, Any]]:
        """Return (changes not yet taken, the state with them)."""
        changes, state = await self._ask("whole", self._number)
        return changes, state

    async def node(self, id_: int) -> dict[str, Any] | None:
        return cast("dict[str, Any] | None", await self._ask("node", self._number, id_))

    async def close(self) -> None:
        await self._ask("close", self._number)


class ServedEngine(ABC):
    """Engine as a server uses it: in a thread, in another process, or replicas.

    Coroutines raise EngineStopped after its end.
    """

    config: EngineConfig
    tokenizer: Tokenizer | None
    """Tokenizer, or None if the model has none."""
    sampling_defaults: dict[str, float]
    """Sampling parameters that the model's files recommend."""
    model_name: str
    max_model_len: int
    """Longest request in tokens, prompt and answer together."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """True from ``start`` until the engine ends or fails."""

    @abstractmethod
    def start(self) -> None:
        """Begin to serve. Called once, in the event loop."""

    @abstractmethod
    def compile(self, grammar: Grammar) -> None:
        """See ``Engine.compile``. Call it from a separate thread, because it may take long."""

    @abstractmethod
    def submit(self, prompt: Prompt | RequestSpec) -> RequestStream:
        """Queue a prompt; see ``Engine.submit``. Returns at once.

        Raises a RequestError such as QueueFull or EngineStopped, or a ValueError, before anything
        is queued.
        """

    @abstractmethod
    async def ask(self, what: Question, *arguments: Any) -> Any:
        """Return the result of ``Answers.answer``."""

    @abstractmethod
    async def drain(self) -> None:
        """Accept no more requests, finish those in progress, and end the engine."""

    @abstractmethod
    def stop(self) -> None:
        """Accept no more requests and end the engine after its step. Unfinished requests fail with
        EngineStopped. Safe to call from any thread."""

    async def report(self) -> CacheReport:
        """See ``Engine.report``."""
        return cast("CacheReport", await self.ask("report"))

    async def cache_view(self) -> dict[str, Any]:
        """See ``Engine.cache_view``."""
        return cast("dict[str, Any]", await self.ask("cache_view"))

    async def reset_prefix_cache(self) -> None:
        """See ``Engine.reset_prefix_cache``."""
        await self.ask("reset_prefix_cache")

    async def end_session(self, request_id: str) -> None:
        """See ``Engine.end_session``."""
        await self.ask("end_session", request_id)

    async def stop_accepting(self) -> None:
        """See ``Engine.stop_accepting``."""
        await self.ask("stop_accepting")

    async def watch(self) -> Watching:
        """Return a view of the cache and its requests. Raises ValueError if the tree is too large
        to show, and NoSingleEngine for replicas."""
        return Watching(self.ask, await self.ask("watch"))


Delivery = tuple[RequestStream, RequestOutput | RequestError]


class AsyncEngine(EngineLoop[RequestStream], ServedEngine):
    """Runs an ``Engine`` in a thread, from ``start`` until ``drain`` or ``stop``."""

    _engine: Engine

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, _post)
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self.sampling_defaults = engine.sampling_defaults
        self.model_name, self.max_model_len = engine.model_name, engine.max_model_len
        self._answers = Answers(engine)
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """True while the thread runs: after ``start``, until it ends or fails."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(
        self,
        prompt: Prompt | RequestSpec,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> RequestStream:
        """See ``ServedEngine``. ``sampling`` and ``options`` are those of ``Engine.submit``."""
        request = self._engine.prepare(RequestSpec.of(prompt, sampling, options))
        stream = RequestStream(request.request_id, self.abort)
        self.enqueue(request, stream)
        return stream

    def compile(self, grammar: Grammar) -> None:
        self._engine.compile(grammar)

    async def generate(
        self,
        prompt: Prompt | RequestSpec,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the outputs of one prompt. The request ends if the iterator is closed or
        cancelled."""
        stream = self.submit(prompt, sampling, **options)
        try:
            async for output in stream:
                yield output
        finally:
            stream.abort()

    async def call(self, function: Callable[[Engine], Result]) -> Result:
        """Return ``function(engine)``, called in the engine's thread between two steps. Raises
        EngineStopped if it has ended."""
        answer: Future[Result] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function(self._engine))
            except Exception as error:
                answer.set_exception(error)
            except BaseException as error:
                # For example SystemExit, which would end this thread and then the caller's event
                # loop.
                answer.set_exception(RuntimeError(f"a call to the engine raised {error!r}"))

        self.call_soon(run)
        return await asyncio.wrap_future(answer)

    async def ask(self, what: Question, *arguments: Any) -> Any:
        return await self.call(lambda _: self._answers.answer(what, *arguments))

    async def drain(self) -> None:
        self.end(at_once=False)
        await asyncio.to_thread(self._join)

    def stop(self) -> None:
        self.end(at_once=True)
        self._join()

    def _join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()
        else:  # It never started, so its loop cannot end the streams.
            self._engine.disconnect()
            self._close()


def _post(deliveries: Sequence[Delivery]) -> None:
    """Deliver outputs in the event loops of their streams, with one call per loop. Closed loops are
    skipped."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
    for delivery in deliveries:
        by_loop.setdefault(delivery[0].loop, []).append(delivery)
    for loop, theirs in by_loop.items():
        if not loop.is_closed():
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_deliver, theirs)


def _deliver(deliveries: Sequence[Delivery]) -> None:
    for stream, output in deliveries:
        stream.put(output)
