"""One engine as a replica: an actor of Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import structs

from engine.async_engine import AsyncEngine, RequestStream
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RequestError
from engine.interfaces import StepReport
from engine.messages import Abort, EngineFacts, Question, ResetCache
from engine.requests.request import RequestSpec, SamplingParams
from engine.text.outputs import RequestOutput
from engine.worker.screen import screen_rows
from hybridcache.geometry.times import MeasuredTimes
from hybridcache.policies.registry import parse_placement
from hybridcache.routing.outbox import EventBatch, Outbox
from hybridcache.routing.protocol import ReplicaSpec

TRIAL_TOKENS = 512
"""Length of the prompt for the measurement at the start."""
ALIVE_S = 2.0
"""Interval in which the reader of events learns that the engine has ended."""


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """Facts about the engines for the server and its router."""

    engine: EngineFacts
    spec: ReplicaSpec
    screen: tuple[tuple[str, str], ...]
    """Rows of the start screen of one engine."""


class EngineReplica:
    """Computes answers and reports cache events."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = Engine(config)
        if config.warm_up:
            self._engine.prepare_grammars()
        self._times = self._timed()
        self._engine.reset_prefix_cache()
        self._engine.cache.stats.clear()
        self._outbox = Outbox(self._engine.cache)
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        """Event loop of the reader of events."""
        self._engine.observers.append(self._stepped)
        self._async = AsyncEngine(self._engine)
        self._async.start()

    def _timed(self) -> MeasuredTimes:
        """Time a prefill, the second of two. Others take a time in proportion to their length."""
        length = min(TRIAL_TOKENS, self._engine.max_model_len - 1)
        for first in (0, 1):
            prompt = (
                np.arange(first, first + length, dtype=np.int32) % self._engine.runner.vocab_size
            )
            start = time.perf_counter()
            self._engine.generate([prompt], SamplingParams(max_tokens=1))
        return MeasuredTimes((0,), (0, length), ((0.0, time.perf_counter() - start),))

    def _stepped(self, report: StepReport) -> None:
        """Publish the events of a step. Called in the engine's thread."""
        if self._outbox.flush() and self._loop is not None:
            self._loop.call_soon_threadsafe(self._news.set)

    async def facts(self, address: str) -> ReplicaFacts:
        """Return the facts of this replica, behind a server at ``address``."""
        memory, cache = self._engine.runner.memory, self._engine.cache
        report, rules = await self._async.report(), self._engine.config.checkpoints
        spec = ReplicaSpec(
            self._times,
            page_size=cache.page_size,
            grid=cache.grid,
            kv_bytes=memory.row_bytes,
            state_bytes=memory.state_bytes,
            capacity_bytes=report.bytes.total,
            stateful=memory.is_stateful,
            placement=parse_placement(",".join(rules)) if memory.is_stateful else None,
        )
        rows = screen_rows(self._engine, address)
        rows[1:1] = [("prefill", f"{1 / self._times.seconds(0, 1):,.0f} tokens/s, measured")]
        return ReplicaFacts(self._async.facts, spec, tuple(rows))

    async def generate(self, spec: RequestSpec) -> AsyncIterator[RequestOutput]:
        """Yield outputs without the prompt and without earlier tokens, which the server has.

        An error of the request is yielded last. The request ends if the reader stops.
        """
        assert spec.request_id is not None
        stream: RequestStream | None = None
        is_covered = False
        try:
            stream = self._async.submit_valid(spec)
            async for output in stream:
                if not is_covered and output.new_token_ids:
                    is_covered = True
                    self._outbox.cover(spec.request_id)
                    await self._flush()
                yield structs.replace(output, answer=None)
        except Exception as error:
            yield RequestOutput.failed(spec.request_id, RequestError.of(error))
        finally:
            if stream is not None:
                stream.abort()

    async def _flush(self) -> None:
        if await self._async.call(lambda _: self._outbox.flush()):
            self._news.set()

    async def events(self) -> AsyncIterator[EventBatch]:
        """Yield the changes of the cache as they occur, for one reader, until the engine ends. The
        first batch describes the whole cache."""
        self._loop = asyncio.get_running_loop()
        due, batches = 0, None
        while self._async.is_alive:
            if batches is None:  # At the start, or if the reader was too slow.
                await self._async.call(lambda _: self._outbox.restart())
                due = 0
            self._news.clear()
            batches = self._outbox.since(due)
            for batch in batches or ():
                yield batch
                due = batch.sequence + 1
            if batches == []:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), ALIVE_S)

    async def tell(self, message: Question | Abort) -> Any:
        """Pass a message to the engine, and return the reply to a question."""
        if isinstance(message, Abort):
            # The last output of the request follows the others.
            return self._async.abort(message.request_id, message.reason)
        reply = await self._async.ask(message)
        if isinstance(message, ResetCache):
            await self._flush()
        return reply
