"""Engine in a separate thread, for callers in asyncio.

Outputs are queued in the caller's event loop, so a slow reader delays neither the engine nor other
readers. The loop of the thread is in ``engine_loop.py``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from engine.config import EngineConfig
from engine.engine_loop import EngineLoop
from engine.errors import RequestError
from engine.interfaces import EngineWatch
from engine.plugins import cache_watch
from engine.requests.grammar import Grammar
from engine.requests.spec import Prompt, RequestSpec, SamplingParams
from engine.text.outputs import RequestOutput

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.schedule.report import CacheReport
    from engine.text.tokenizer import Tokenizer
    from hybridcache.watch.recorder import Record

Result = TypeVar("Result")


class NoSingleEngine(RuntimeError):
    """A view of one engine's tree was requested from several engines."""


class RequestStream:
    """Outputs of one request: ``async for output in stream``. Belongs to the event loop it was made
    in."""

    def __init__(self, request_id: str, on_abort: Callable[[str], None]) -> None:
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

    def abort(self) -> None:
        """End the request; its memory is free before the next step. Does nothing if it has
        ended."""
        if not (self._has_all or self._was_aborted):
            self._was_aborted = True
            self._on_abort(self.request_id)

    def put(self, output: RequestOutput | RequestError) -> None:
        """Queue ``output`` for the reader. Must be called in the stream's event loop."""
        self._has_all = isinstance(output, RequestError) or output.is_finished
        self._outputs.put_nowait(output)


class Watching(Protocol):
    """View of one engine for an event loop; see ``EngineWatch``. Raises EngineStopped."""

    async def take(self) -> list[Record]: ...
    async def whole(self) -> tuple[list[Record], dict[str, Any]]:
        """Return (changes not yet taken, the state with them)."""
        ...

    async def node(self, id_: int) -> dict[str, Any] | None: ...
    async def close(self) -> None: ...


class ServedEngine(Protocol):
    """Engine as a server uses it: in a thread, in another process, or replicas; see
    ``AsyncEngine``."""

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
    async def cache_view(self) -> dict[str, Any]: ...
    async def reset_prefix_cache(self) -> None: ...
    async def end_session(self, request_id: str) -> None: ...
    async def stop_accepting(self) -> None: ...
    async def watch(self) -> Watching: ...
    async def drain(self) -> None: ...
    def stop(self) -> None: ...


Delivery = tuple[RequestStream, RequestOutput | RequestError]


class AsyncEngine(EngineLoop[RequestStream]):
    """Runs an ``Engine`` in a thread, from ``start`` until ``drain`` or ``stop``."""

    _engine: Engine

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, _post)
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    @property
    def config(self) -> EngineConfig:
        """Configuration of the engine."""
        return self._engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer, or None if the model has none."""
        return self._engine.tokenizer

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """Sampling parameters that the model's files recommend."""
        return self._engine.sampling_defaults

    @property
    def model_name(self) -> str:
        """Name of the served model."""
        return self._engine.model_name

    @property
    def max_model_len(self) -> int:
        """Longest request in tokens, prompt and answer together."""
        return self._engine.max_model_len

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
        """Queue a prompt; see ``Engine.submit``. Returns at once.

        Raises a RequestError such as QueueFull or EngineStopped, or a ValueError, before anything
        is queued.
        """
        request = self._engine.prepare(RequestSpec.of(prompt, sampling, options))
        stream = RequestStream(request.request_id, self.abort)
        self.enqueue(request, stream)
        return stream

    def compile(self, grammar: Grammar) -> None:
        """See ``Engine.compile``. Call it from a separate thread, because it may take long."""
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

    async def report(self) -> CacheReport:
        """See ``Engine.report``."""
        return await self.call(lambda engine: engine.report())

    async def cache_view(self) -> dict[str, Any]:
        """See ``Engine.cache_view``."""
        return await self.call(lambda engine: engine.cache_view())

    async def cache_report(self) -> dict[str, Any]:
        """See ``Engine.cache_report``."""
        return await self.call(lambda engine: engine.cache_report())

    async def reset_prefix_cache(self) -> None:
        """See ``Engine.reset_prefix_cache``."""
        await self.call(lambda engine: engine.reset_prefix_cache())

    async def end_session(self, request_id: str) -> None:
        """See ``Engine.end_session``."""
        await self.call(lambda engine: engine.end_session(request_id))

    async def stop_accepting(self) -> None:
        """See ``Engine.stop_accepting``."""
        await self.call(lambda engine: engine.stop_accepting())

    async def watch(self) -> Watching:
        """Return a view of the cache and its requests. Raises ValueError if the tree is too large
        to show."""
        return _ThreadWatch(self, await self.call(cache_watch))

    async def drain(self) -> None:
        """Accept no more requests, finish those in progress, and end the thread."""
        self.end(at_once=False)
        await asyncio.to_thread(self._join)

    def stop(self) -> None:
        """Accept no more requests and end the thread after its step. Unfinished requests fail with
        EngineStopped."""
        self.end(at_once=True)
        self._join()

    def _join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()
        else:  # It never started, so its loop cannot end the streams.
            self._engine.disconnect()
            self._close()


class _ThreadWatch:
    """A ``Watch``, called in the engine's thread."""

    def __init__(self, engine: AsyncEngine, watch: EngineWatch) -> None:
        self._engine, self._watch = engine, watch

    async def take(self) -> list[Record]:
        return await self._engine.call(lambda _: self._watch.take())

    async def whole(self) -> tuple[list[Record], dict[str, Any]]:
        return await self._engine.call(lambda _: (self._watch.take(), self._watch.whole()))

    async def node(self, id_: int) -> dict[str, Any] | None:
        return await self._engine.call(lambda _: self._watch.node(id_))

    async def close(self) -> None:
        await self._engine.call(lambda _: self._watch.close())


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
