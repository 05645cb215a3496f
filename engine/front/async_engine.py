"""Front end of an engine for callers in asyncio, and the host that steps the engine: in a thread of
this process, in another process, or on several replicas, behind an ``EngineChannel``."""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

import msgspec
from msgspec import structs

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import (
    FAILED,
    STOPPED,
    STOPPING,
    DuplicateId,
    EngineStopped,
    QueueFull,
    RequestError,
    RunnerLost,
    StepFailed,
)
from engine.front.cache_watch import Watch
from engine.messages import (
    Abort,
    Alive,
    Ask,
    AskView,
    Compile,
    EndEngine,
    EndSession,
    EngineFacts,
    FromEngine,
    OpenView,
    Outputs,
    Question,
    Reply,
    Seen,
    ToEngine,
)
from engine.requests.request import Intake, Prompt, Request, RequestSpec, SamplingParams
from engine.schedule.report import CacheReport
from engine.text.answers import Answer, FinishReason, RequestOutput
from engine.text.tokenizer import Tokenizer
from hybridcache.radix.protocol import PolicyError
from hybridcache.radix.tokens import Tokens

Result = TypeVar("Result")
logger = logging.getLogger(__name__)
SEEN_EVERY_S, WATCHED_S = 0.1, 600.0
"""Seconds between two reports after steps, each of which takes a tenth of a millisecond, and
seconds after the latest question in which they are sent. Each heartbeat brings a report too."""
FRESH_S = 0.01
"""Seconds after which the last report is used, because the engine computes a long step."""
HEARTBEAT_S = 1.0
"""Interval at which a front end and its engine compare their requests, and a report is sent."""
NO_MEMORY = EngineStopped("The engine has no memory for the request now; send it again later.")
LOST = StepFailed("it was lost between the server and its engine; send the request again")
RESTS_S = (0.1, 0.3, 0.6, 1.0, 1.0)
"""Pauses after the first, second, ... of steps in a row for which memory is short."""
SHEDS_CACHES = 4
"""Number of the step after which caches are emptied. After the next one all requests end."""


def is_shortage(error: Exception) -> bool:
    """Return True if ``error`` is a lack of memory. Torch and the system have no class for it, and
    some functions in C tell it as SystemError."""
    return isinstance(error, MemoryError | SystemError) or os.strerror(errno.ENOMEM) in str(error)


def patiently(call: Callable[[], Result]) -> Result:
    """Return ``call()``, which is repeated after pauses while memory is short for it."""
    for rest_s in RESTS_S[: SHEDS_CACHES - 1]:
        try:
            return call()
        except Exception as error:
            if not is_shortage(error):
                raise
        time.sleep(rest_s)
    return call()


class EngineHost:
    """Steps an engine while there is work, and waits for messages otherwise.

    One thread calls ``run``; any thread may call ``receive``. If a step fails, the requests that
    ran fail and the engine goes on. If the next step fails too, or the runner is lost, the engine
    ends and all requests get an error. A command that fails between two steps ends alone.

    A step for which memory is short is repeated after the pauses ``RESTS_S``, and no request fails.
    If that does not suffice, caches are emptied; then all requests fail with NO_MEMORY; then the
    engine ends.
    """

    def __init__(self, engine: Engine, send: Callable[[FromEngine], None]) -> None:
        """``send`` passes a message to the front end, from any thread and without waiting."""
        self.engine, self._send = engine, send
        self._commands: deque[Callable[[], object]] = deque()
        self._views: dict[int, Watch] = {}
        self._numbers = itertools.count()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._wake = threading.Condition()  # With a lock that its owner may take again.
        self._is_open = True
        self._must_stop = False
        self._seen_s, self._watched_s = -math.inf, -math.inf
        """Times of the last report that was sent without a question, and of the last question."""
        self._num_failed = 0
        """Number of steps that have failed since the last one that did not."""
        self._mailbox = list[RequestOutput]()
        """Outputs of the front end's requests that were not sent yet."""
        self.failure: str | None = None
        """Reason of an unexpected end, or None."""

    @property
    def facts(self) -> EngineFacts:
        """Facts about the engine for a front end."""
        engine, runner = self.engine, self.engine.runner
        return EngineFacts(
            runner.vocab_size, engine.max_model_len, engine.model_name, runner.exactness
        )

    def receive(self, message: ToEngine) -> None:
        """Execute ``message``, or queue it for the time between two steps."""
        match message:
            case RequestSpec():
                self._submit(message)
            case Abort():
                self.call_soon(partial(self.engine.abort, message.request_id, message.reason))
            case EndEngine():
                with self._wake:
                    self._is_open = False
                    self._must_stop |= message.at_once
                    self._wake.notify()
            case Compile():
                work = partial(self.engine.compile, message.grammar, message.namespace)
                with suppress(RuntimeError):  # The engine ends, and with it all questions.
                    self._compiler.submit(self._reply, message, work)
            case _:
                if not isinstance(message, Alive):
                    self._watched_s = time.monotonic()
                self.call_soon(lambda: self._reply(message, lambda: self._answer(message)))

    def call_soon(self, command: Callable[[], object]) -> None:
        """Run ``command`` before the next step, unless the engine ends first."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _submit(self, spec: RequestSpec) -> None:
        """Queue a request before the next step, or send its failure."""
        assert spec.request_id is not None, "a front end numbers its requests"
        try:
            request = self.engine.make(spec)
            with self._wake:
                if not self._is_open:
                    raise EngineStopped(self.failure or STOPPING)
                self.call_soon(partial(self._enqueue, request))
        except Exception as error:
            failed = RequestOutput.failed(spec.request_id, RequestError.of(error))
            self._send(Outputs((failed,)))

    def _enqueue(self, request: Request) -> None:
        request.mailbox = self._mailbox
        try:
            self.engine.enqueue(request)
        except Exception as error:
            is_policy = isinstance(error, PolicyError)
            why = "the admission policy failed" if is_policy else "it could not be queued"
            logger.exception("Request %s is refused: %s.", request.request_id, why)
            if not self._fail(request, StepFailed(why)):  # Nothing was queued.
                failed = RequestOutput.failed(request.request_id, StepFailed(why))
                self._mailbox.append(failed)

    def _fail(self, request: Request, error: RequestError) -> RequestOutput | None:
        """End a request with ``error``. Returns its last output, or None if it had ended."""
        request.error = error
        return patiently(partial(self.engine.abort, request.request_id, "error"))

    def _attempt(self, command: Callable[[], Result]) -> Result | None:
        """Run ``command`` between two steps. Returns None if it fails: the engine goes on."""
        try:
            return patiently(command)
        except (RunnerLost, AssertionError):  # The second one is of ``check``.
            raise
        except Exception:
            logger.exception("A command between two steps failed; the engine goes on.")
            return None

    def _answer(self, question: Question) -> object:
        """Return the value of the reply to ``question``."""
        engine, views = self.engine, self._views
        match question:
            case Ask("cache_view"):
                return engine.cache_view()
            case Ask("reset_cache"):
                engine.reset_prefix_cache()
            case Ask("stop_accepting"):
                engine.disconnect(at_once=False)
            case Alive(request_ids=theirs):
                self._deliver()
                self._tell_view()
                ours = {one.request_id for one in engine.requests if one.mailbox is self._mailbox}
                for orphan in ours.difference(theirs):
                    engine.abort(orphan)
                return [*{*theirs} - ours], len(ours.difference(theirs))
            case EndSession():
                engine.end_session(question.request_id)
            case OpenView():
                number = next(self._numbers)
                views[number] = Watch(engine)
                return number
            case AskView(view, "close"):
                views.pop(view).close()
            case AskView(view, "node", node):
                return views[view].node(node)
            case AskView(view, "whole"):
                return views[view].whole()
            case AskView(view):
                return views[view].take()
        return None

    def _reply(self, question: Question, work: Callable[[], object]) -> None:
        try:
            self._send(Reply(question.number, work()))
        except Exception as error:
            wire = patiently(RequestError.of(error).to_wire)
            patiently(lambda: self._send(Reply(question.number, error=wire)))

    def run(self) -> None:
        """Step until ``EndEngine``, or until the engine fails. The front end fails the rest."""
        try:
            while patiently(self._run_commands):
                self._step()
            self.engine.close()
        except RunnerLost as error:
            self.failure = FAILED
            logger.error("The engine ended: %s", error)
        except BaseException:
            self.failure = FAILED
            logger.exception("The engine ended.")
        finally:
            with suppress(Exception):
                self.engine.disconnect(at_once=True)
            with self._wake:
                self._is_open = False
            self._compiler.shutdown(wait=False, cancel_futures=True)

    def _step(self) -> None:
        """Run one step and send its outputs. Raises if it fails and the engine must end."""
        engine = self.engine
        try:
            engine.step()
            # A report for the time of the next step, if one was asked for lately. It precedes the
            # outputs, so that a client with its answer finds it counted.
            now_s = time.monotonic()
            is_due = now_s > self._seen_s + SEEN_EVERY_S or not engine.requests
            if is_due and now_s < self._watched_s + WATCHED_S:
                self._seen_s = now_s
                self._tell_view()
            self._deliver()
        except RunnerLost:
            raise
        except Exception as error:
            self._num_failed += 1
            is_short = is_shortage(error)
            if self._num_failed > (len(RESTS_S) if is_short else 1):
                raise
            logger.exception("A step failed; the engine goes on.")
            patiently(partial(self._go_on, is_short))
        else:
            self._num_failed = 0

    def _tell_view(self) -> None:
        """Send a report without a question."""
        self._attempt(lambda: self._send(Seen(self.engine.cache_view())))

    def _go_on(self, is_short: bool) -> None:
        """Go on after a failed step. ``is_short``: for lack of memory."""
        engine, number = self.engine, self._num_failed
        if is_short:
            time.sleep(RESTS_S[number - 1])
        engine.take_outputs()
        ended: Iterable[str] = engine.interrupted
        error: RequestError = StepFailed("the step that computed it failed")
        if is_short:
            ended, error = (), NO_MEMORY
            if number == SHEDS_CACHES:
                logger.error("Memory was short for %d steps: caches are emptied.", number)
                engine.reset_prefix_cache()
                gc.collect()
            elif number > SHEDS_CACHES:
                ended = {one.request_id for one in engine.requests}
        for request in [one for one in engine.requests if one.request_id in ended]:
            self._fail(request, error)
        self._deliver()

    def _run_commands(self) -> bool:
        """Run queued commands; wait for one if there is no work. False if the thread must end."""
        engine = self.engine
        while True:
            rest_s = None if engine.has_work() else self._attempt(engine.run_idle_tasks)
            with self._wake:
                has_work = engine.has_work() or self._mailbox
                if not self._commands and not has_work and self._is_open:
                    self._wake.wait(rest_s)
                num_commands = len(self._commands)
                is_open, must_stop = self._is_open, self._must_stop
            if not is_open:
                self._attempt(partial(engine.disconnect, at_once=False))
            for _ in range(num_commands):
                self._attempt(self._commands.popleft())
            self._attempt(self._deliver)
            if must_stop:
                return False
            if engine.has_work():
                return True
            if not is_open and not self._commands:
                return False

    def _deliver(self) -> None:
        """Send the outputs since the last call. They are kept if that fails."""
        if self._mailbox:
            self._send(Outputs(tuple(self._mailbox)))
            self._mailbox.clear()


class RequestStream(AsyncIterator[RequestOutput]):
    """Outputs of the requests of one reader: ``async for output in stream``."""

    def __init__(
        self,
        on_abort: Callable[[str, FinishReason], None],
        on_end: Callable[[RequestOutput], object] = lambda output: None,
        adds: bool = True,
    ) -> None:
        """``on_abort`` ends a request (``AsyncEngine.abort``). ``on_end`` gets the last output of
        each, also if the reader has left. Without ``adds``, outputs go on to the process of their
        reader, which adds them up."""
        self._adds = adds
        self.answers: dict[str, Answer] = {}
        """Answer of each request by its id, in the order of submission."""
        self._on_abort, self._on_end = on_abort, on_end
        self._open: set[str] = set()
        """Requests that have neither ended nor been aborted."""
        self._num_left = 0
        """Number of requests with a last output that was not read."""
        self._unread: deque[RequestOutput] = deque()
        self._arrival: asyncio.Future[None] | None = None
        """Wait of the reader for an output, or None. An ``asyncio.Queue`` takes twice the time."""
        self.is_broken = False
        """True after an exception that has lost an output, or the abort of a request."""
        self.handle: Callable[[RequestOutput], bool] | None = None
        """Called with an output, not the last one, while the reader waits. True if it was handled,
        so that the reader is not woken. An exception is raised in the reader."""

    async def __anext__(self) -> RequestOutput:
        """Return the next output of any request; the last one of each has a ``finish_reason``.
        Raises RequestError if a request failed; no output follows."""
        if not self._num_left:
            raise StopAsyncIteration
        while not self._unread:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        output = self._unread.popleft()
        if output.failure is not None:
            self._num_left = 0
            raise RequestError.from_wire(output.failure)
        self._num_left -= output.finish_reason is not None
        return output

    def abort(self, reason: FinishReason = "abort", request_id: str | None = None) -> None:
        """End all requests, or one, with ``reason``; their memory is free before the next step.
        Does nothing for those that have ended."""
        for each in tuple(self._open) if request_id is None else self._open & {request_id}:
            self._open.discard(each)
            self._on_abort(each, reason)

    def open(self, request_id: str, prompt: Tokens) -> None:
        """Expect outputs of a request."""
        self.answers[request_id] = Answer(prompt)
        self._open.add(request_id)
        self._num_left += 1

    def put(self, output: RequestOutput) -> None:
        """Queue ``output`` for the reader, unless it was queued before. Raises StepFailed if one
        before it was lost."""
        if self._adds:
            answer = self.answers[output.request_id]
            first = output.num_tokens - len(output.new_token_ids)
            if output.failure is None and first != answer.num_tokens:
                if first < answer.num_tokens:
                    return
                raise LOST
            output = answer.add(output)
        arrival = None if self._arrival is None or self._arrival.done() else self._arrival
        if output.finish_reason is not None:
            self._open.discard(output.request_id)
            self._on_end(output)
        elif arrival is not None and self.handle is not None:
            try:
                if self.handle(output):
                    return
            except Exception as error:
                arrival.set_exception(error)
                return
        self._unread.append(output)
        if arrival is not None:
            arrival.set_result(None)


class EngineChannel(ABC):
    """Connection of a front end to an engine."""

    config: EngineConfig
    tokenizer: Tokenizer | None
    facts: EngineFacts
    num_engines: int = 1
    pid: int | None = None
    """Id of the process that computes, or None if there are several."""
    front: AsyncEngine
    """Receives messages of the engine (``receive``) and its end (``closed``)."""

    @abstractmethod
    def send(self, message: ToEngine) -> None:
        """Send a message, which is valid, without waiting."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """True from ``start`` until the engine ends or fails."""

    @abstractmethod
    def start(self) -> None:
        """Begin to serve. Called once, in the event loop."""

    def read(self) -> None:  # noqa: B027  # Channels without a socket have nothing to read.
        """Read messages that have arrived, in the event loop, in case an exception has ended the
        reading."""

    @abstractmethod
    async def drain(self) -> None:
        """Finish the requests in progress, and end the engine."""

    @abstractmethod
    def stop(self) -> None:
        """End the engine after its step. Safe to call from any thread."""


class ThreadChannel(EngineChannel):
    """Connection to an engine in a thread of this process."""

    def __init__(self, engine: Engine, front: AsyncEngine) -> None:
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self.front, self.host = front, EngineHost(engine, front.receive)
        self.facts, self.pid = self.host.facts, os.getpid()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def send(self, message: ToEngine) -> None:
        self.host.receive(message)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self.host.run()
        finally:
            self.front.closed(self.host.failure)

    async def drain(self) -> None:
        self._end(at_once=False)
        await asyncio.to_thread(self._thread.join)

    def stop(self) -> None:
        self._end(at_once=True)
        self._thread.join()

    def _end(self, *, at_once: bool) -> None:
        self.send(EndEngine(at_once))
        if self._thread.ident is None:
            self._thread.start()


class AsyncEngine:
    """Submits requests to an engine, and follows their outputs, in one event loop. Coroutines raise
    EngineStopped after the engine's end."""

    def __init__(self, served: Engine | EngineChannel) -> None:
        """Serve an engine in a thread of this process, or connect to the one behind a channel."""
        self.channel = ThreadChannel(served, self) if isinstance(served, Engine) else served
        self.config, self.tokenizer = self.channel.config, self.channel.tokenizer
        self.facts = facts = self.channel.facts
        self._intake = Intake(
            self.config,
            self.tokenizer,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
        )
        self.check = self._intake.check
        """See ``Intake.check``."""
        self.sampling_defaults = self._intake.sampling_defaults
        """Sampling parameters that the model's files recommend."""
        self._streams: dict[str, RequestStream] = {}
        self._replies: dict[int, asyncio.Future[object]] = {}
        self._numbers = itertools.count()
        self._is_open, self._has_ended = True, False
        self.seen: dict[str, Any] = {}
        """Latest report; empty until the first one, and after the cache was emptied."""
        self._seen_s = -math.inf
        self.on_lost: Callable[[int], None] = lambda number: None
        """Called with the number of requests of which only one side knew, once each has ended."""
        self.on_gap: Callable[[float], None] = lambda seconds: None
        """Called with the seconds between two outputs of an answer."""
        self._told_s: dict[str, float] = {}
        """Time of the last output of each request in progress that has one, by its id."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: str | None = None
        """Reason of an unexpected end of the engine, or None."""
        self.channel.front = self

    @property
    def is_alive(self) -> bool:
        """True from ``start`` until the engine ends or fails."""
        return self.channel.is_alive

    @property
    def num_open(self) -> int:
        """Number of requests in progress."""
        return len(self._streams)

    def start(self) -> None:
        """Begin to serve. Called once, in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.channel.start()
        threading.Thread(target=self._beat_on, name="heartbeat", daemon=True).start()

    def _beat_on(self) -> None:
        """Compare the requests of both sides until the engine ends, in a separate thread, so that a
        beat that fails for lack of memory does not end the others."""
        assert self._loop is not None
        while not (self._has_ended or self._loop.is_closed()):
            with suppress(MemoryError, RuntimeError):  # The loop is closed.
                self._loop.call_soon_threadsafe(self._beat)
            time.sleep(HEARTBEAT_S)

    def _beat(self) -> None:
        self.channel.read()
        for request_id in [name for name, stream in self._streams.items() if stream.is_broken]:
            self._lose(request_id)
        if self.is_alive:
            self._comparing = asyncio.ensure_future(self._compare())

    async def _compare(self) -> None:
        """End the requests that only one side knows. Messages arrive in their order, so each
        request here is known to the engine, or its last output arrives before the reply."""
        with suppress(RequestError):  # The engine has ended, or has no memory for the reply.
            lost, num_orphans = await self.ask(Alive(request_ids=[*self._streams]))
            for request_id in lost:
                self._lose(request_id)
            if num_orphans:
                self.on_lost(num_orphans)

    def _lose(self, request_id: str) -> None:
        """End a request that was lost."""
        if request_id in self._streams:
            logger.error("Request %s was lost between the server and its engine.", request_id)
            self.channel.send(Abort(request_id, "abort"))
            self.receive(Outputs((RequestOutput.failed(request_id, LOST),)))
            self.on_lost(1)

    def submit(
        self, prompt: Prompt | RequestSpec, sampling: SamplingParams | None = None, **options: Any
    ) -> RequestStream:
        """Queue a prompt; see ``Engine.submit``. Raises a RequestError such as QueueFull, or a
        ValueError, before anything is queued."""
        spec = RequestSpec.of(prompt, sampling, options)
        return self.submit_valid(self._intake.validate(spec, time.perf_counter()))

    def submit_valid(self, spec: RequestSpec, stream: RequestStream | None = None) -> RequestStream:
        """Queue a complete request that was checked, and return its outputs. ``stream`` has those
        of the reader's other requests."""
        if not self._is_open:
            raise EngineStopped(self.failure or STOPPING)
        request_id = spec.request_id
        assert request_id is not None, "its maker numbers it"
        if request_id in self._streams:
            raise DuplicateId(request_id)
        max_running = self.channel.num_engines * self.config.max_running
        if len(self._streams) >= max_running + self.config.max_queue:
            raise QueueFull(self.config.max_queue)
        stream = self._streams[request_id] = stream or RequestStream(self.abort)
        stream.open(request_id, cast("Tokens", spec.prompt))
        self.channel.send(spec)
        return stream

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request before the next step. Does nothing if it has ended."""
        if (stream := self._streams.get(request_id)) is not None:
            was_broken, stream.is_broken = stream.is_broken, True
            self.channel.send(Abort(request_id, reason))
            stream.is_broken = was_broken

    def receive(self, message: FromEngine) -> None:
        """Process a message in the event loop. Called by the channel, in one thread at a time."""
        if asyncio._get_running_loop() is not self._loop:
            if self._loop is not None:
                with suppress(RuntimeError):  # The loop is closed.
                    self._loop.call_soon_threadsafe(self.receive, message)
            return
        match message:
            case Reply(number, value, error):
                reply = self._replies.pop(number, None)
                if reply is None or reply.done():
                    return
                if error is not None:
                    reply.set_exception(RequestError.from_wire(error))
                else:
                    reply.set_result(value)
            case Seen(view):
                self.seen, self._seen_s = view, time.monotonic()
            case Outputs(outputs):
                now_s = time.perf_counter()
                for output in outputs:
                    request_id = output.request_id
                    if (stream := self._streams.get(request_id)) is None:
                        continue
                    try:
                        stream.put(output)
                        if output.new_token_ids:
                            before_s = self._told_s.get(request_id)
                            self._told_s[request_id] = now_s
                            if before_s is not None:
                                self.on_gap(now_s - before_s)
                        if output.finish_reason is not None:
                            del self._streams[request_id]
                            self._told_s.pop(request_id, None)
                    except (MemoryError, StepFailed):  # The next beat ends it.
                        stream.is_broken = True

    def closed(self, failure: str | None) -> None:
        """Fail all pending requests and questions: the engine has ended."""
        self.failure, self._is_open, self._has_ended = failure, False, True
        error = EngineStopped(failure or STOPPED)
        lost = [RequestOutput.failed(each, error) for each in tuple(self._streams)]
        self.receive(Outputs(tuple(lost)))
        for number in tuple(self._replies):
            self.receive(Reply(number, error=error.to_wire()))

    async def ask(self, question: Question) -> Any:
        """Return the value of the reply to ``question``, or raise its RequestError."""
        if question == Ask("reset_cache"):
            self.seen = {}
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            if self._has_ended:  # Read last: ``closed`` in another thread answers the rest.
                raise EngineStopped(self.failure or STOPPED)
            self.channel.send(cast("ToEngine", structs.replace(question, number=number)))
        except BaseException:
            self._replies.pop(number, None)
            raise
        return await reply

    async def view(self) -> dict[str, Any]:
        """Return ``Engine.cache_view``, or during a long step the last one that arrived, with its
        ``age_s``. Replicas do so themselves."""
        is_known = self.seen and self.channel.num_engines == 1
        asking = asyncio.ensure_future(self.ask(Ask("cache_view")))
        await asyncio.wait({asking}, timeout=FRESH_S if is_known else None)
        if asking.done():
            self.receive(Seen(asking.result()))
            return self.seen
        asking.cancel()
        return self.seen | {"age_s": round(time.monotonic() - self._seen_s, 3)}

    async def report(self) -> CacheReport:
        """See ``Engine.report`` and ``view``."""
        return msgspec.convert(await self.view(), CacheReport)

    async def drain(self) -> None:
        """Accept no more requests, finish those in progress, and end the engine."""
        self._is_open = False
        await self.channel.drain()

    def stop(self) -> None:
        """Accept no more requests and end the engine after its step. Unfinished requests fail with
        EngineStopped. Safe to call from any thread."""
        self._is_open = False
        self.channel.stop()
