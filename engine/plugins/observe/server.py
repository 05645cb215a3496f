"""The page, and its data: a stream of changes and the details of one node.

While there is a reader of ``GET /v1/cache/events``, the engine is asked for changes twenty times a
second. Each answer is encoded once and queued for every reader. A reader that falls behind a limit
gets the complete state again; so does one that reconnects.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.async_engine import AsyncEngine, View
from engine.errors import EngineStopped
from engine.server.access import ServerKeys
from engine.server.api_errors import APIError
from engine.server.bodies import EventStream, Workers, event, json_response
from engine.server.context import ServingContext
from hybridcache.watch.page import POLICY, live_page
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

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


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
        return None if self._watch is None else await self._watch.node(id_)

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


class Page:
    """Serves the page. The page itself holds no data and is public; its data require the operator's
    key."""

    def __init__(self, context: ServingContext, keys: ServerKeys, num_replicas: int) -> None:
        self._context, self._keys, self._num_replicas = context, keys, num_replicas
        self._feeds: dict[int, Feed] = {}
        """Feed of each replica, by its number; 1 is the only engine of other servers."""

    def routes(self) -> list[Route]:
        return [
            Route("/", self._page, include_in_schema=False),
            Route("/v1/cache/events", self._events),
            Route("/v1/cache/nodes/{number}", self._node),
        ]

    def close(self) -> None:
        """Close open pages, which would delay the shutdown."""
        for feed in self._feeds.values():
            feed.close()

    def _feed(self, request: Request) -> Feed:
        self._keys.check_operator(request)
        replica = _number(request.query_params.get("replica", "1"), "replica")
        if replica not in self._feeds:
            if not 1 <= replica <= self._num_replicas:
                limits = f"between 1 and {self._num_replicas} (got {replica})"
                raise APIError(400, f"'replica' must be {limits}.", param="replica")
            context = self._context
            self._feeds[replica] = Feed(context.engine, context.workers, replica=replica)
        return self._feeds[replica]

    async def _page(self, request: Request) -> Response:
        return Response(live_page(), media_type="text/html", headers=HEADERS)

    async def _events(self, request: Request) -> Response:
        feed = self._feed(request)
        return EventStream(await feed.subscribe())

    async def _node(self, request: Request) -> Response:
        feed = self._feed(request)
        number = _number(request.path_params["number"], "number")
        found = await feed.node(number) if 0 <= number < 1 << 63 else None
        if found is None:
            raise APIError(404, "This node is not in the cache, or no page is connected.")
        tokens, text = found.pop("tokens"), None
        if tokens is not None:
            tokenizer = self._context.tokenizer
            text = await self._context.workers.run(
                len(tokens), lambda: tokenizer.decode(tokens, skip_special_tokens=False)
            )
        is_cut = tokens is not None and len(tokens) == 4096
        return json_response(found | {"text": text, "is_cut": is_cut})


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise APIError(
            400, f"'{name}' in the address must be a whole number.", param=name
        ) from None
