"""The page, and its data: a stream of changes and the details of one node."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from engine.plugins.observe.feed import Feed
from engine.server.access import Operator
from engine.server.api_errors import APIError
from engine.server.bodies import EventStream
from engine.server.context import ServerExtension, ServingContext
from engine.server.settings import ServerConfig
from hybridcache.watch.page import POLICY, live_page

MAX_REPLICAS = 1024
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class ObserveExtension(ServerExtension):
    """Serves the page. The page itself holds no data and is public; its data require the operator's
    key."""

    def __init__(self, context: ServingContext, config: ServerConfig) -> None:
        super().__init__(context, config)
        self._feeds: dict[int, Feed] = {}
        """Feed of each replica, by its number; 1 is the only engine of other servers."""

    def close(self) -> None:
        """See ``ServerExtension``: open pages would delay the shutdown."""
        for feed in self._feeds.values():
            feed.close()

    def _feed(self, replica: int) -> Feed:
        if replica not in self._feeds:
            if not 1 <= replica <= MAX_REPLICAS:
                raise APIError(400, f"replica must be between 1 and {MAX_REPLICAS}.")
            context = self.context
            self._feeds[replica] = Feed(context.engine, context.workers, replica=replica)
        return self._feeds[replica]

    def add_routes(self, app: FastAPI, operator: Operator) -> None:
        context = self.context

        @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
        async def page() -> Response:
            return Response(live_page(), media_type="text/html", headers=HEADERS)

        @app.get("/v1/cache/events")
        async def events(request: Request, replica: int = 1) -> Response:
            operator.check(request)
            feed = self._feed(replica)
            return EventStream(await feed.subscribe(request.headers.get("last-event-id")))

        @app.get("/v1/cache/nodes/{number}")
        async def node(request: Request, number: int, replica: int = 1) -> dict[str, Any]:
            operator.check(request)
            found = await self._feed(replica).node(number)
            if found is None:
                raise APIError(404, "This node is not in the cache, or no page is connected.")
            tokens = found.pop("tokens")
            text = None
            if tokens is not None:

                def decode() -> str:
                    return context.tokenizer.decode(tokens, skip_special_tokens=False)

                text = await context.workers.run(len(tokens), decode)
            return found | {"text": text, "is_cut": tokens is not None and len(tokens) == 4096}
