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
        self._feed = Feed(context.engine, context.workers)

    def close(self) -> None:
        """See ``ServerExtension``: open pages would delay the shutdown."""
        self._feed.close()

    def add_routes(self, app: FastAPI, operator: Operator) -> None:
        context, feed = self.context, self._feed

        @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
        async def page() -> Response:
            return Response(live_page(), media_type="text/html", headers=HEADERS)

        @app.get("/v1/cache/events")
        async def events(request: Request) -> Response:
            operator.check(request)
            return EventStream(await feed.subscribe(request.headers.get("last-event-id")))

        @app.get("/v1/cache/nodes/{number}")
        async def node(request: Request, number: int) -> dict[str, Any]:
            operator.check(request)
            found = await feed.node(number)
            if found is None:
                raise APIError(404, "This node is not in the cache, or no page is connected.")
            tokens = found.pop("tokens")
            text = None
            if tokens is not None:

                def decode() -> str:
                    return context.tokenizer.decode(tokens, skip_special_tokens=False)

                text = await context.workers.run(len(tokens), decode)
            return found | {"text": text, "is_cut": tokens is not None and len(tokens) == 4096}
