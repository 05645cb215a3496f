"""GET /v1/cache/events: one stream of changes for all readers, as server-sent events.

While there is a reader, the engine is asked for changes twenty times a second. Each answer is
encoded once and queued for every reader. A reader that falls behind a limit gets the complete state
again; so does one that reconnects.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

from engine.async_engine import AsyncEngine, View
from engine.errors import EngineStopped
from engine.server.api_errors import APIError
from engine.server.bodies import Workers, event
from hybridcache.watch.recorder import Record

EVERY_S = 0.05
"""Seconds between two requests for changes."""
LINGER_S = 5.0
"""Seconds for which changes are still collected after the last reader left."""
MAX_QUEUED_BYTES = 4 << 20
"""Maximum size of the changes that wait for one reader."""
MAX_READERS = 32
BYTES = 40
"""Approximate size of a record as JSON."""


class _Reader:
    """Events that one page has not received."""

    def __init__(self) -> None:
        self.queue: deque[bytes] = deque()
        self.num_bytes = 0
        self.is_behind = True
        """True if it must get the complete state next."""
        self.news = asyncio.Event()

    def put(self, change: bytes) -> None:
        """Queue ``change``, or drop all changes if they are too many."""
        self.num_bytes += len(change)
        self.queue.append(change)
        if self.num_bytes > MAX_QUEUED_BYTES:
            self.is_behind = True
            self.clear()
        self.news.set()

    def clear(self) -> None:
        self.queue.clear()
        self.num_bytes = 0


class Feed:
    """The readers of one engine. Lives in the server's event loop."""

    def __init__(self, engine: AsyncEngine, workers: Workers, replica: int = 1) -> None:
        self._engine, self._workers, self._replica = engine, workers, replica
        self._watch: View | None = None
        self._readers: set[_Reader] = set()
        self._asking: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._is_closed = False

    def close(self) -> None:
        """End all streams, because the server stops."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        for reader in self._readers:
            reader.news.set()

    async def subscribe(self) -> AsyncGenerator[bytes, None]:
        """Yield the complete state, and then every change.

        Raises APIError with 429 for too many readers, and 503 for a tree that is too large or a
        replica that is not up; EngineStopped if the engine has ended.
        """
        if len(self._readers) >= MAX_READERS:
            raise APIError(429, f"{MAX_READERS} pages are connected already: close one.")
        async with self._turn:
            if self._asking is None or self._asking.done():
                try:
                    self._watch = await self._engine.watch(self._replica)
                except ValueError as error:
                    raise APIError(503, str(error)) from error
                self._asking = asyncio.create_task(self._ask(self._watch))
        return self._events()

    async def node(self, id_: int) -> dict[str, Any] | None:
        """Return details of one node, or None if there is no reader or the node is gone."""
        watch = self._watch
        if watch is None:
            return None
        return await watch.node(id_)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        reader = _Reader()
        self._readers.add(reader)
        try:
            while not self._is_closed:
                if reader.is_behind:
                    yield await self._whole(reader)
                while reader.queue:
                    reader.num_bytes -= len(reader.queue[0])
                    yield reader.queue.popleft()
                if self._asking is not None and self._asking.done() and not self._is_closed:
                    raise EngineStopped("The engine has stopped.")
                await reader.news.wait()
                reader.news.clear()
        except EngineStopped as error:
            yield event(str(error), "ended")
        finally:
            self._readers.discard(reader)

    async def _ask(self, watch: View) -> None:
        """Collect changes until there has been no reader for a while or the engine has ended."""
        idle_s = 0.0
        with suppress(EngineStopped):
            try:
                while idle_s < LINGER_S and not self._is_closed:
                    async with self._turn:
                        await self._keep(await watch.take())
                    await asyncio.sleep(EVERY_S)
                    idle_s = 0.0 if self._readers else idle_s + EVERY_S
            finally:
                self._watch = None
                self._wake()
                await watch.close()

    async def _keep(self, records: list[Record]) -> None:
        if records:
            work = partial(event, {"records": records}, "changes")
            change = await self._workers.run(BYTES * len(records), work)
            for reader in self._readers:
                reader.put(change)

    async def _whole(self, reader: _Reader) -> bytes:
        """Return the event with the complete state, which later changes of ``reader`` follow."""
        async with self._turn:
            watch = self._watch
            if watch is None:
                raise EngineStopped("The engine has stopped.")
            missed, state = await watch.whole()
            await self._keep(missed)
            reader.clear()
            reader.is_behind = False
        work = partial(event, state, "whole")
        return await self._workers.run(BYTES * len(state["records"]), work)
