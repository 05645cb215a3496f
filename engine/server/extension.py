"""Interfaces of the server: dialects, and extensions with additional routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from engine.plugins import PATHS, plugin_of_path, server_extension
from engine.server.body import BodyReader
from engine.server.schemas import described

if TYPE_CHECKING:
    from engine.server.access import Operator
    from engine.server.context import ServingContext
    from engine.server.settings import ServerConfig


@dataclass(frozen=True, slots=True)
class Dialect:
    """One path of an API, with the model of its body and the function that answers a request.

    The function converts the body to a ``ChatRequest``, submits it with ``chat_session.ask``, and
    writes the answer in its own form.
    """

    path: str
    body: type[Any]
    answer: Callable[[Request, Any], Awaitable[Response]]
    name: str
    """Name of the operation in the API's description."""

    def add_to(self, app: FastAPI, reader: BodyReader) -> None:
        """Add the path to ``app``."""

        async def operation(request: Request) -> Response:
            return await self.answer(request, await reader.read(request, self.body))

        app.post(self.path, openapi_extra=described(self.body), name=self.name)(operation)


class ServerExtension:
    """Optional part of one server. Every method does nothing unless it is overridden."""

    def __init__(self, context: ServingContext, config: ServerConfig) -> None:
        self.context, self.config = context, config

    def dialects(self) -> Iterator[Dialect]:
        """Yield the dialects to serve."""
        yield from ()

    def add_routes(self, app: FastAPI, operator: Operator) -> None:
        """Add routes that are not dialects."""

    def close(self) -> None:
        """End open streams when the server shuts down."""


class Extensions:
    """Extensions of one server. Each is loaded by the first request for one of its paths, or at the
    start if one of its settings is given."""

    def __init__(
        self,
        app: FastAPI,
        context: ServingContext,
        config: ServerConfig,
        reader: BodyReader,
        operator: Operator,
    ) -> None:
        self._app, self._context, self._config = app, context, config
        self._reader, self._operator = reader, operator
        self._loaded: dict[str, ServerExtension] = {}
        self._lock = asyncio.Lock()
        self._not_found = app.router.default
        app.router.default = self._serve
        for plugin in set(PATHS.values()):
            if config.uses(plugin):
                self._load(plugin)

    def load_all(self) -> None:
        """Load every extension, for the description of the API."""
        for plugin in dict.fromkeys(PATHS.values()):
            self._load(plugin)

    def close(self) -> None:
        """End open streams."""
        for extension in self._loaded.values():
            extension.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request for a path that is not served yet."""
        plugin = plugin_of_path(scope["path"]) if scope["type"] == "http" else None
        if plugin is None or plugin in self._loaded:
            return await self._not_found(scope, receive, send)
        async with self._lock:
            # Its imports take 0.1 s, in which other requests go on.
            await asyncio.to_thread(server_extension, plugin)
            self._load(plugin)
        await self._app.router(scope, receive, send)

    def _load(self, plugin: str) -> None:
        if plugin in self._loaded:
            return
        self._loaded[plugin] = extension = server_extension(plugin)(self._context, self._config)
        for dialect in extension.dialects():
            dialect.add_to(self._app, self._reader)
        extension.add_routes(self._app, self._operator)
