"""Interfaces of the server: dialects, and extensions with additional routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response

from engine.server.body import BodyReader
from engine.server.schemas import described

if TYPE_CHECKING:
    from engine.server.config import ServerConfig
    from engine.server.context import ServingContext
    from engine.server.operator import Operator


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

    @classmethod
    def check(cls, config: ServerConfig) -> None:
        """Raise ValueError for an invalid setting, before a model is loaded."""

    def __init__(self, front: ServingContext, config: ServerConfig) -> None:
        self.front, self.config = front, config

    def dialects(self) -> Iterator[Dialect]:
        """Yield the dialects to serve."""
        yield from ()

    def add_routes(self, app: FastAPI, operator: Operator) -> None:
        """Add routes that are not dialects."""

    def close(self) -> None:
        """End open streams when the server shuts down."""
