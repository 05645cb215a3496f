"""An engine in a thread of its own, for callers that live in asyncio.

Callers and the thread share nothing but an inbox of orders, done between two steps, and outputs,
which are handed to the caller's event loop. A step never waits for a caller; a caller that reads
slowly finds its outputs queued up.

A step that fails (for want of memory, say) takes the requests that ran along with it, and the
engine goes on; if the next one fails too, or what computes has gone, the engine ends, and says so
to everybody.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from engine.config import EngineConfig
from engine.guided.grammar import Grammar
from engine.interfaces import RunnerLost
from engine.requests.sampling_params import SamplingParams
from engine.requests.spec import Prompt, RequestSpec
from engine.schedule.scheduler import QueueFull
from engine.text.outputs import RequestOutput

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.schedule.report import CacheReport
    from engine.text.tokenizer import Tokenizer

__all__ = [
    "AsyncEngine",
    "EngineStopped",
    "QueueFull",
    "RequestStream",
    "ServedEngine",
    "StepFailed",
]

Result = TypeVar("Result")
STOPPED = "The engine stopped before the answer was done."
FAILED = "The engine has failed, its log says why: restart it."
logger = logging.getLogger(__name__)


class EngineStopped(RuntimeError):
    """The engine takes no more requests, or ended before this one was done."""


class StepFailed(RuntimeError):
    """What computed this request broke off; others may go on."""


Ending = EngineStopped | StepFailed


class RequestStream:
    """Outputs of one request: ``async for output in stream``. Belongs to the event loop it was made
    in."""

    def __init__(self, request_id: str, on_abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._on_abort = on_abort
        self._outputs: asyncio.Queue[RequestOutput | Ending] = asyncio.Queue()
        self._has_ended = self._was_aborted = False

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output; the last one has a ``finish_reason``. EngineStopped, StepFailed: there
        will be none."""
        if self._has_ended:
            raise StopAsyncIteration
        output = await self._outputs.get()
        if isinstance(output, Ending):
            self._has_ended = True
            raise output
        self._has_ended = output.is_finished
        return output

    def abort(self) -> None:
        """End the request; what it held is free before the next step. Does nothing to one that has
        ended."""
        if not (self._has_ended or self._was_aborted):
            self._was_aborted = True
            self._on_abort(self.request_id)

    def put(self, output: RequestOutput | Ending) -> None:
        """Hand ``output`` to the reader; called in the stream's event loop."""
        self._outputs.put_nowait(output)


class ServedEngine(Protocol):
    """What a server needs of an engine: one in a thread, or replicas of it; see ``AsyncEngine``."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def sampling_defaults(self) -> dict[str, float]: ...
    @property
    def model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def is_alive(self) -> bool: ...
    def start(self) -> None: ...
    def compile(self, grammar: Grammar) -> None: ...
    def submit(self, prompt: Prompt | RequestSpec) -> RequestStream: ...
    async def report(self) -> CacheReport: ...
    async def call(self, function: Callable[[Engine], Result]) -> Result: ...
    async def cache_view(self) -> dict[str, Any]: ...
    async def reset_prefix_cache(self) -> None: ...
    async def drain(self) -> None: ...
    def stop(self) -> None: ...


class AsyncEngine:
    """Runs an ``Engine`` in a thread, from ``start`` until ``drain`` or ``stop``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[str, RequestStream] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._num_arriving = 0
        self._wake = threading.Condition()
        self._is_open = True
        self._must_stop = False
        self._is_closed = False
        self._has_failed = self._last_step_failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    @property
    def sampling_defaults(self) -> dict[str, float]:
        return self._engine.sampling_defaults

    @property
    def model_name(self) -> str:
        return self._engine.model_name

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs: not before ``start``, not after it ended or failed."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(
        self,
        prompt: Prompt | RequestSpec,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> RequestStream:
        """Queue a prompt; see ``Engine.submit``. Returns at once; raises before anything is queued:
        ValueError, QueueFull, or EngineStopped where the engine is stopping. A ``request_id`` must
        be one that no other request has."""
        request = self._engine.prepare(RequestSpec.of(prompt, sampling, options))
        stream = RequestStream(request.request_id, self._abort)

        def arrive() -> None:
            self._streams[request.request_id] = stream
            self._engine.enqueue(request)
            with self._wake:
                self._num_arriving -= 1

        with self._wake:
            if self._has_failed:
                raise EngineStopped(FAILED)
            if not self._is_open:
                raise EngineStopped("The engine is stopping and takes no more requests.")
            if self._engine.num_waiting + self._num_arriving >= self.config.max_queue:
                raise QueueFull(self.config.max_queue)
            self._num_arriving += 1
            self._order(arrive)
        return stream

    def compile(self, grammar: Grammar) -> None:
        """See ``Engine.compile``: to be called from a thread of the caller's."""
        self._engine.compile(grammar)

    async def generate(
        self,
        prompt: Prompt | RequestSpec,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one prompt as they come; left early or cancelled, the request ends."""
        stream = self.submit(prompt, sampling, **options)
        try:
            async for output in stream:
                yield output
        finally:
            stream.abort()

    async def call(self, function: Callable[[Engine], Result]) -> Result:
        """What ``function`` makes of the engine, called in its thread between two steps.
        EngineStopped: it has ended."""
        answer: Future[Result] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function(self._engine))
            except Exception as error:
                answer.set_exception(error)
            except BaseException as error:
                # SystemExit, say: it would end this thread, and then the caller's event loop.
                answer.set_exception(RuntimeError(f"a call to the engine raised {error!r}"))

        with self._wake:
            if self._is_closed:
                raise EngineStopped("The engine has stopped.")
            self._order(run)
        return await asyncio.wrap_future(answer)

    async def report(self) -> CacheReport:
        """See ``Engine.report``."""
        return await self.call(lambda engine: engine.report())

    async def cache_view(self) -> dict[str, Any]:
        """The report as plain data, with an outline of the tree."""
        return await self.call(
            lambda engine: engine.cache_report() | {"tree": engine.outline().splitlines()}
        )

    async def cache_report(self) -> dict[str, Any]:
        return await self.call(lambda engine: engine.cache_report())

    async def reset_prefix_cache(self) -> None:
        await self.call(lambda engine: engine.reset_prefix_cache())

    async def drain(self) -> None:
        """Take no more requests, finish those there are, and end the thread."""
        with self._wake:
            self._is_open = False
            self._wake.notify()
        await asyncio.to_thread(self._join)

    def stop(self) -> None:
        """Take no more requests and end the thread after its step; requests that are not done fail
        with EngineStopped."""
        with self._wake:
            self._is_open, self._must_stop = False, True
            self._wake.notify()
        self._join()

    def _join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()
        else:  # It never started, so nobody else tells those who wait.
            self._close()

    def _abort(self, request_id: str) -> None:
        def leave() -> None:
            output = self._engine.abort(request_id)
            if output is not None:
                self._hand_out([output])

        with self._wake:
            if not self._is_closed:
                self._order(leave)

    def _order(self, order: Callable[[], None]) -> None:
        """Have ``order`` done by the thread before its next step. The caller holds ``_wake``."""
        self._orders.append(order)
        self._wake.notify()

    def _run(self) -> None:
        try:
            while self._run_commands():
                self._step()
            for request_id in tuple(self._streams):
                self._engine.abort(request_id)
        except RunnerLost as error:
            self._has_failed = True
            logger.error("The engine ended: %s", error)
        except BaseException:
            self._has_failed = True
            logger.exception("The engine failed; it answers nothing from here on.")
        finally:
            self._close()

    def _step(self) -> None:
        """One step, or what one that failed leaves to do. Raises where the one before it failed
        too."""
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
            self._hand_out(self._engine.take_outputs())
            self._give_up(self._engine.interrupted)
        else:
            self._last_step_failed = False
            self._hand_out(outputs)

    def _give_up(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                _post(stream.loop, [(stream, StepFailed("the step that computed it broke off"))])

    def _run_commands(self) -> bool:
        """Do all orders, and wait for one where there is nothing to compute. False: the thread
        ends."""
        engine = self._engine
        while True:
            with self._wake:
                if not self._orders and not engine.has_work() and self._is_open:
                    self._wake.wait()
                num_orders = len(self._orders)
                is_open, must_stop = self._is_open, self._must_stop
            for _ in range(num_orders):
                self._orders.popleft()()  # If it raises, those after it are left to _close.
            if must_stop:
                return False
            if engine.has_work():
                return True
            if engine.config.check:
                engine.check()
            if not is_open and not self._orders:
                return False

    def _hand_out(self, outputs: Sequence[RequestOutput]) -> None:
        """Give ``outputs`` to their event loops: one call for each loop."""
        mail: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                ending = output if output.error is None else StepFailed(output.error)
                mail.setdefault(stream.loop, []).append((stream, ending))
            if output.is_finished:
                self._streams.pop(output.request_id, None)
        for loop, letters in mail.items():
            _post(loop, letters)

    def _close(self) -> None:
        """Tell everybody who waits that nothing will come."""
        with self._wake:
            self._is_open, self._is_closed = False, True
            orders, self._orders = self._orders, deque()
        for order in orders:
            try:
                order()
            except Exception:
                logger.exception("An order failed that was left when the engine ended.")
        for stream in self._streams.values():
            ended = EngineStopped(FAILED if self._has_failed else STOPPED)
            _post(stream.loop, [(stream, ended)])
        self._streams.clear()


Letter = tuple[RequestStream, RequestOutput | Ending]


def _post(loop: asyncio.AbstractEventLoop, letters: Sequence[Letter]) -> None:
    """Have ``letters`` delivered in ``loop``; nobody reads any more in a loop that is closed."""
    if not loop.is_closed():
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_deliver, letters)


def _deliver(letters: Sequence[Letter]) -> None:
    for stream, output in letters:
        stream.put(output)
