"""The page, and its data: a stream of changes and the details of one node.

Each reader of ``GET /v1/cache/events`` has a view of the engine. All readers together ask for
changes twenty times a second. The changes of a slow reader wait in its view.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import EngineStopped
from engine.front.async_engine import FRESH_S
from engine.front.server.bodies import APIError, json_response, run
from engine.front.server.transport import SentEvents, event
from engine.front.server.writers import ServingContext
from engine.messages import AskView, OpenView
from hybridcache.adapters.watch.page import POLICY, live_page

EVERY_S = 0.05
"""Seconds between two requests for changes."""
MAX_READERS = 32
BUSY_S = 1.0
"""Seconds of silence after which a page learns what is computed."""
BYTES = 40
"""Approximate size of a record as JSON."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page:
    """Serves the page. The page itself holds no data and is public; its data require the operator's
    key."""

    def __init__(self, context: ServingContext, num_replicas: int) -> None:
        self._context, self._num_replicas = context, num_replicas
        self._views: list[tuple[int, int]] = []
        """View of each reader with the number of its replica; 1 is the only engine of other
        servers."""
        self._is_closed = False

    def routes(self) -> list[Route]:
        return [
            Route("/", self._page, include_in_schema=False),
            Route("/v1/cache/events", self._events),
            Route("/v1/cache/nodes/{number}", self._node),
        ]

    def close(self) -> None:
        """Close open pages, which would delay the shutdown."""
        self._is_closed = True

    def _replica(self, request: Request) -> int:
        """Return the replica that the operator asks for."""
        replica = _number(request.query_params.get("replica", "1"), "replica")
        if not 1 <= replica <= self._num_replicas:
            most = self._num_replicas
            raise APIError(400, f"'replica' must be between 1 and {most} (got {replica}).")
        return replica

    async def _page(self, request: Request) -> Response:
        return Response(live_page(), media_type="text/html", headers=HEADERS)

    async def _events(self, request: Request) -> Response:
        replica = self._replica(request)
        if len(self._views) >= MAX_READERS:
            raise APIError(429, f"{MAX_READERS} pages are connected already: close one.")
        events = self._follow(replica)
        busy = partial(self._busy, replica)
        return SentEvents(events, lambda error: event(str(error), "ended"), BUSY_S, busy)

    def _busy(self, replica: int) -> bytes:
        """Return the event with the progress of the prompts that are computed, as last reported."""
        seen = self._context.engine.seen
        if self._num_replicas > 1:  # They report when they are asked.
            self._asking = asyncio.ensure_future(self._ask_replicas())
            seen = dict(enumerate(seen.get("replicas", {}).values(), 1)).get(replica, {})
        shown = {name: seen.get(name, 0) for name in ("num_prefilled", "num_to_prefill")}
        return event(shown, "busy")

    async def _ask_replicas(self) -> None:
        with suppress(EngineStopped):
            await self._context.engine.view()

    async def _follow(self, replica: int) -> AsyncGenerator[bytes, None]:
        """Yield the complete state, and then every change."""
        ask = self._context.engine.ask
        opening = asyncio.ensure_future(ask(OpenView(replica)))
        try:
            await asyncio.wait({opening}, timeout=FRESH_S)
            if not opening.done():
                yield self._busy(replica)
            try:
                view = await asyncio.shield(opening)
            except ValueError as error:  # The tree is too large, or the replica is not up.
                raise APIError(503, str(error)) from error
            self._views.append((replica, view))
            whole = await ask(AskView(view, "whole"))
            meta = whole["meta"]
            whole["meta"] = meta | {"model": meta["title"], "title": self._context.model_name}
            yield await self._event(len(whole["records"]), whole, "whole")
            while not self._is_closed:
                await asyncio.sleep(EVERY_S * len(self._views))
                if records := await ask(AskView(view, "changes")):
                    yield await self._event(len(records), {"records": records}, "changes")
        except EngineStopped as error:
            yield event(str(error), "ended")
        finally:
            with suppress(EngineStopped, ValueError):
                view = await opening  # It opens also if the reader has left.
                self._views = [one for one in self._views if one != (replica, view)]
                await ask(AskView(view, "close"))

    async def _event(self, num_records: int, data: object, name: str) -> bytes:
        return await run(BYTES * num_records, partial(event, data, name))

    async def _node(self, request: Request) -> Response:
        replica = self._replica(request)
        number = _number(request.path_params["number"], "number")
        view = next((view for at, view in self._views if at == replica), None)
        found = None
        if view is not None and 0 <= number < 1 << 63:
            found = await self._context.engine.ask(AskView(view, "node", number))
        if found is None:
            raise APIError(404, "This node is not in the cache, or no page is connected.")
        tokens, text = found.pop("tokens"), None
        if tokens is not None:
            tokenizer = self._context.tokenizer
            text = await run(
                len(tokens), lambda: tokenizer.decode(tokens, skip_special_tokens=False)
            )
        is_cut = tokens is not None and len(tokens) == 4096
        return json_response(found | {"text": text, "is_cut": is_cut})


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise APIError(400, f"'{name}' in the address must be a whole number.") from None
