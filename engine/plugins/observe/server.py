"""The page, and its data: a stream of changes and the details of one node."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.plugins.observe.feed import Feed
from engine.server.access import ServerKeys
from engine.server.api_errors import APIError
from engine.server.bodies import EventStream, json_response
from engine.server.context import ServingContext
from hybridcache.watch.page import POLICY, live_page

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


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
