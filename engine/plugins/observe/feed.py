"""GET /v1/cache/events: one stream of changes for all readers, as server-sent events.

While there is a reader, the engine is asked for changes twenty times a second. Each answer is
encoded once and kept, up to a limit. A reader that falls behind the limit gets the complete state
again; so does one that reconnects with an older ``Last-Event-ID``.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, NamedTuple

from engine.async_engine import AsyncEngine, View
from engine.errors import EngineStopped
from engine.server.api_errors import APIError
from engine.server.bodies import Workers
from engine.text.json_text import write_json
from hybridcache.watch.recorder import Record

EVERY_S = 0.05
"""Seconds between two requests for changes."""
LINGER_S = 5.0
"""Seconds for which changes are still collected after the last reader left, for one that
reconnects."""
ALIVE_S = 10.0
"""Maximum seconds without a message to a reader."""
MAX_KEPT_BYTES = 4 << 20
MAX_READERS = 32
BYTES = 40
"""Approximate size of a record as JSON."""


class _Change(NamedTuple):
    number: int
    data: bytes


class Feed:
    """The readers of one engine, and the changes that they may still request. Lives in the server's
    event loop."""

    def __init__(
        self,
        engine: AsyncEngine,
        workers: Workers,
        max_kept_bytes: int = MAX_KEPT_BYTES,
        replica: int = 1,
    ) -> None:
        self._engine, self._workers, self._replica = engine, workers, replica
        self._max_kept_bytes = max_kept_bytes
        self._watch: View | None = None
        self._name = ""
        """Prefix of the event ids of this watch, which are unknown to other watches."""
        self._kept: deque[_Change] = deque()
        self._num_kept_bytes = 0
        self._last = 0
        self._num_readers = 0
        self._news = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._is_closed = False

    def close(self) -> None:
        """End all streams, because the server stops."""
        self._is_closed = True
        self._tell()

    async def subscribe(self, after: str | None) -> AsyncIterator[bytes]:
        """Yield the complete state, or the changes after the event ``after``, and then every
        change.

        Raises APIError with 429 for too many readers, and 503 for a tree that is too large or a
        replica that does not exist; EngineStopped if the engine has ended.
        """
        if self._num_readers >= MAX_READERS:
            raise APIError(429, f"{MAX_READERS} pages are connected already: close one.")
        async with self._turn:
            if self._asking is None or self._asking.done():
                await self._begin()
        return self._events(after)

    async def node(self, id_: int) -> dict[str, Any] | None:
        """Return details of one node, or None if there is no reader or the node is gone."""
        watch = self._watch
        if watch is None:
            return None
        return await watch.node(id_)

    async def _begin(self) -> None:
        try:
            self._watch = await self._engine.watch(self._replica)
        except ValueError as error:
            raise APIError(503, str(error)) from error
        self._name, self._last = secrets.token_hex(4), 0
        self._kept.clear()
        self._num_kept_bytes = 0
        self._asking = asyncio.create_task(self._ask(self._watch))

    async def _events(self, after: str | None) -> AsyncIterator[bytes]:
        self._num_readers += 1
        try:
            at = self._number_of(after)
            while not self._is_closed:
                if at is None or not self._has_all_since(at):
                    at, data = await self._whole()
                    yield data
                for change in [change for change in self._kept if change.number > at]:
                    if change.number > at + 1 or not self._has_all_since(at):
                        break
                    at = change.number
                    yield change.data
                if at == self._last and not await self._wait():
                    yield b": nothing new\n\n"
        except EngineStopped as error:
            yield _event("ended", None, _dump(str(error)))
        finally:
            self._num_readers -= 1

    def _number_of(self, after: str | None) -> int | None:
        name, _, number = (after or "").partition("-")
        if name != self._name or not number.isdecimal() or len(number) > 15:
            return None
        return int(number) if int(number) <= self._last else None

    def _has_all_since(self, number: int) -> bool:
        return number == self._last or (bool(self._kept) and self._kept[0].number <= number + 1)

    async def _ask(self, watch: View) -> None:
        """Collect changes until there has been no reader for a while or the engine has ended."""
        idle_s = 0.0
        try:
            while idle_s < LINGER_S and not self._is_closed:
                async with self._turn:
                    await self._keep(await watch.take())
                await asyncio.sleep(EVERY_S)
                idle_s = 0.0 if self._num_readers else idle_s + EVERY_S
        finally:
            self._watch = None
            self._tell()
            with suppress(EngineStopped):
                await watch.close()

    async def _keep(self, records: list[Record]) -> None:
        if not records:
            return
        data = await self._workers.run(BYTES * len(records), lambda: _dump({"records": records}))
        self._last += 1
        self._kept.append(_Change(self._last, _event("changes", self._id(), data)))
        self._num_kept_bytes += len(self._kept[-1].data)
        while self._num_kept_bytes > self._max_kept_bytes:
            self._num_kept_bytes -= len(self._kept.popleft().data)
        self._tell()

    def _tell(self) -> None:
        """Wake all waiting readers."""
        self._news.set()
        self._news = asyncio.Event()

    def _id(self) -> str:
        return f"{self._name}-{self._last}"

    async def _whole(self) -> tuple[int, bytes]:
        """Return (number of the last change in it, the event with the complete state)."""
        async with self._turn:
            watch = self._watch
            if watch is None:
                raise EngineStopped("The engine has stopped.")
            missed, state = await watch.whole()
            await self._keep(missed)
            number, id_ = self._last, self._id()
        data = await self._workers.run(BYTES * len(state["records"]), lambda: _dump(state))
        return number, _event("whole", id_, data)

    async def _wait(self) -> bool:
        """Wait for changes. Returns False if there were none for a while; raises EngineStopped if
        there can be none."""
        news = self._news
        if self._asking is not None and self._asking.done() and not self._is_closed:
            raise EngineStopped("The engine has stopped.")
        try:
            await asyncio.wait_for(news.wait(), ALIVE_S)
        except TimeoutError:
            return False
        return True


def _dump(data: object) -> bytes:
    return write_json(data, compact=True).encode()


def _event(name: str, id_: str | None, data: bytes) -> bytes:
    head = f"event: {name}\n" + (f"id: {id_}\n" if id_ is not None else "")
    return head.encode() + b"data: " + data + b"\n\n"
