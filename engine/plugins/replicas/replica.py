"""One engine as a replica of Ray Serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from msgspec import structs

from engine.async_engine import AsyncEngine, RequestStream
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RequestError
from engine.interfaces import StepReport
from engine.messages import Abort, ResetCache
from engine.plugins.replicas.fleet import Order, PerToken, ReplicaFacts
from engine.requests.request import SamplingParams
from engine.text.outputs import RequestOutput
from engine.worker.screen import screen_rows
from hybridcache.policies.registry import parse_placement
from hybridcache.routing.outbox import EventBatch, Outbox
from hybridcache.routing.protocol import ReplicaSpec

logger = logging.getLogger(__name__)
TRIAL_TOKENS = 512
"""Length of the prompt for the measurement at the start."""


class ReplicaGone(RuntimeError):
    """Error of an order that was sent to another replica."""


class EngineReplica:
    """Computes answers and reports cache events. The argument of each method is an ``Order``."""

    def __init__(self, config: EngineConfig, replica: str | None = None) -> None:
        """``replica`` is its id. If None, Ray Serve provides the id, and a core."""
        if replica is None:
            import torch
            from ray import serve

            torch.set_num_threads(1)
            replica = serve.get_replica_context().replica_id.unique_id
        self._id = replica
        self._engine = Engine(config)
        if config.warm_up:
            self._engine.prepare_grammars()
        self._tokens_per_s = self._timed()
        self._engine.reset_prefix_cache()
        self._engine.cache.stats.clear()
        self._outbox = Outbox(self._engine.cache)
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._engine.observers.append(self._stepped)
        self._async = AsyncEngine(self._engine)
        self._async.start()

    def _timed(self) -> float:
        """Return the tokens per second of a prefill: the second of two."""
        length = min(TRIAL_TOKENS, self._engine.max_model_len - 1)
        for first in (0, 1):
            prompt = (
                np.arange(first, first + length, dtype=np.int32) % self._engine.runner.vocab_size
            )
            start = time.perf_counter()
            self._engine.generate([prompt], SamplingParams(max_tokens=1))
        return length / (time.perf_counter() - start)

    def _stepped(self, report: StepReport) -> None:
        """Publish the events of a step. Called in the engine's thread."""
        if self._outbox.flush():
            self._loop.call_soon_threadsafe(self._news.set)

    async def check_health(self) -> None:
        """Raise if the engine has ended; Ray Serve then replaces this replica."""
        if not self._async.is_alive:
            raise RuntimeError("the engine of this replica has ended; see its log")

    def _check_address(self, order: Order) -> None:
        if order.replica is not None and order.replica != self._id:
            raise ReplicaGone(f"replica {order.replica} is gone")

    async def facts(self, order: Order) -> ReplicaFacts:
        """Return the facts of this replica."""
        memory, cache = self._engine.runner.memory, self._engine.cache
        report, rules = await self._async.report(), self._engine.config.checkpoints
        spec = ReplicaSpec(
            PerToken(self._tokens_per_s),
            page_size=cache.page_size,
            grid=cache.grid,
            kv_bytes=memory.row_bytes,
            state_bytes=memory.state_bytes,
            capacity_bytes=report.bytes.total,
            stateful=memory.is_stateful,
            placement=parse_placement(",".join(rules)) if memory.is_stateful else None,
        )
        rows = screen_rows(self._engine, order.address)
        rows[1:1] = [("prefill", f"{self._tokens_per_s:,.0f} tokens/s, measured")]
        return ReplicaFacts(self._async.facts, spec, tuple(rows))

    async def generate(self, order: Order) -> AsyncIterator[RequestOutput]:
        """Yield outputs without the prompt and without earlier tokens, which the server has.

        An error of the request is yielded last. The request ends if the reader stops.
        """
        assert order.spec is not None
        stream: RequestStream | None = None
        is_covered = False
        try:
            stream = self._async.submit_valid(order.spec)
            async for output in stream:
                if not is_covered and output.new_token_ids:
                    is_covered = True
                    self._outbox.cover(order.request_id)
                    await self._flush()
                yield structs.replace(output, answer=None)
        except Exception as error:
            if not isinstance(error, ValueError | RequestError):
                logger.exception("The request %s failed.", order.request_id)
            yield RequestOutput.failed(order.request_id, RequestError.of(error))
        finally:
            if stream is not None:
                stream.abort()

    async def _flush(self) -> None:
        if await self._async.call(lambda _: self._outbox.flush()):
            self._news.set()

    async def events(self, order: Order) -> AsyncIterator[EventBatch]:
        """Yield batches from ``order.sequence`` on as they occur, for one reader. If that batch is
        no longer stored, starts again from 0."""
        self._check_address(order)
        due = order.sequence
        while True:
            self._news.clear()
            batches = self._outbox.since(due)
            if batches is None:
                await self._async.call(lambda _: self._outbox.restart())
                due = 0
                continue
            for batch in batches:
                yield batch
                due = batch.sequence + 1
            if not batches:
                await self._news.wait()

    async def tell(self, order: Order) -> Any:
        """Pass ``order.message`` to the engine, and return the reply to a question."""
        self._check_address(order)
        if isinstance(order.message, Abort):
            # The last output of the request follows the others.
            return self._async.abort(order.message.request_id, order.message.reason)
        assert order.message is not None
        reply = await self._async.ask(order.message)
        if isinstance(order.message, ResetCache):
            await self._flush()
        return reply
