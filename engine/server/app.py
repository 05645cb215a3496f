"""The ASGI application and its routes: the composition root of a server, which imports plugins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, cast

from fastapi import FastAPI, Request, Response

from engine.async_engine import AsyncEngine
from engine.errors import EngineStopped
from engine.requests.grammar import Grammar
from engine.server import access, api_description, api_errors
from engine.server.access import Operator
from engine.server.api_errors import APIError, PlainJSON
from engine.server.bodies import BodyLimit, BodyReader, ClientGone, Workers
from engine.server.chat import chat
from engine.server.completions import complete
from engine.server.context import (
    ChatHooks,
    Dialect,
    Extensions,
    ServerExtension,
    ServerParts,
    ServingContext,
)
from engine.server.request_log import RequestLog, is_wanted
from engine.server.schemas import ChatRequest, CompletionRequest
from engine.server.settings import ServerConfig
from engine.text.answers import CallForm
from engine.text.tokenizer import Tokenizer
from hybridcache.command.extras import version as installed_version

HEALTH_WAIT_S = 0.2
"""Maximum time that ``/health`` waits for the engine to finish a step."""


def _chat_hooks(tokenizer: Tokenizer, config: ServerConfig, grid: int) -> ChatHooks:
    from engine.plugins.diagnostics.server import Hooks

    return Hooks(tokenizer, config, grid)


def _call_form(template: str) -> CallForm | None:
    from engine.plugins.tool_calls.forms import call_form

    return cast("CallForm | None", call_form(template))


def _call_grammar(
    body: ChatRequest, form: Literal["hermes", "xml"], may_think: bool
) -> Grammar | None:
    from engine.plugins.tool_calls.call_grammars import call_grammar

    return call_grammar(body, form, may_think)


def _page() -> type[ServerExtension]:
    from engine.plugins.observe.server import ObserveExtension

    return ObserveExtension


def _explanations() -> type[ServerExtension]:
    from engine.plugins.diagnostics.server import DiagnosticsExtension

    return DiagnosticsExtension


def _dialects() -> type[ServerExtension]:
    from engine.plugins.dialects.server import DialectsExtension

    return DialectsExtension


PARTS = ServerParts(
    _chat_hooks,
    _call_form,
    _call_grammar,
    {
        "/": _page,
        "/v1/cache/events": _page,
        "/v1/cache/nodes/": _page,
        "/v1/cache/explanations/": _explanations,
        "/v1/messages": _dialects,
        "/v1/messages/": _dialects,
        "/v1/responses": _dialects,
        "/v1/responses/": _dialects,
        "/tokenize": _dialects,
        "/detokenize": _dialects,
        "/tokenizer_info": _dialects,
        "/version": _dialects,
    },
)
"""Plugins of a server, each imported when it is first needed."""


def create_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """Make the application that serves ``engine``. The engine starts and stops with it."""
    workers = Workers()
    context = ServingContext(engine, config, workers, PARTS)
    reader = BodyReader(config, workers)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.drain()
        workers.close()

    app = FastAPI(
        title="hybridcache engine",
        version=installed_version(),
        lifespan=lifespan,
        default_response_class=PlainJSON,
        docs_url=None,
        redoc_url=None,
    )
    app.state.metrics = context.metrics
    api_errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=int(config.max_body_mib * 2**20))

    @app.exception_handler(ClientGone)
    async def _gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    _add_generation(app, context, reader)
    _add_watching(app, context)
    operator = Operator.of(config)
    _add_administration(app, context, operator)
    app.state.extensions = Extensions(app, context, config, reader, operator)
    access.install(app, config)
    if is_wanted(config.log_requests):
        app.add_middleware(RequestLog)
    api_description.install(app)
    return app


def _add_generation(app: FastAPI, context: ServingContext, reader: BodyReader) -> None:
    own = (
        Dialect("/v1/completions", CompletionRequest, partial(complete, context), "completions"),
        Dialect("/v1/chat/completions", ChatRequest, partial(chat, context), "chat_completions"),
    )
    for dialect in own:
        dialect.add_to(app, reader)

    def card() -> dict[str, Any]:
        return {
            "id": context.model_name,
            "object": "model",
            "created": context.created,
            "owned_by": "hybridcache",
            "max_model_len": context.engine.max_model_len,
            # Fields of Anthropic's API.
            "type": "model",
            "display_name": context.model_name,
            "max_input_tokens": context.engine.max_model_len,
            "max_tokens": context.engine.max_model_len,
            "created_at": datetime.fromtimestamp(context.created, UTC).isoformat(),
        }

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = card()
        ends = {"first_id": one["id"], "last_id": one["id"], "has_more": False}
        return {"object": "list", "data": [one], **ends}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        context.check_model(name)
        return card()


class Health:
    """State reported by ``/health`` for a running engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._asking: asyncio.Task[None] | None = None
        self._problem: str | None = None

    async def check(self) -> dict[str, str]:
        """Return ``ok``, or ``degraded`` with the problem of the state directory; and the result of
        the check of exactness.

        Reports are made between two steps. During a long step the result is that of the last
        report, so that a probe does not have to wait.
        """
        if self._engine.config.plugins:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            await asyncio.wait({self._asking}, timeout=HEALTH_WAIT_S)
        exactness = {"exactness": self._engine.exactness.sentence}
        if self._problem is None:
            return {"status": "ok"} | exactness
        return {"status": "degraded", "state_dir": self._problem} | exactness

    async def _ask(self) -> None:
        with suppress(EngineStopped, ValueError):  # ended, or no replica is up
            offload = (await self._engine.report()).offload
            folder = None if offload is None else offload.folder
            self._problem = None if folder is None else folder.problem


def _add_watching(app: FastAPI, context: ServingContext) -> None:
    state = Health(context.engine)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        if not context.engine.is_alive:
            raise APIError(503, "The engine has stopped; see the server's log for the reason.")
        return await state.check()

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics() -> Response:
        report = await context.engine.report()
        return Response(context.metrics.render(report), media_type=context.metrics.content_type)


def _add_administration(app: FastAPI, context: ServingContext, operator: Operator) -> None:
    """Add the operator's paths, which show or empty the cache of all clients."""

    @app.get("/v1/cache")
    async def cache(request: Request) -> dict[str, Any]:
        operator.check(request)
        return await context.engine.cache_view()

    @app.post("/flush_cache")  # SGLang's name
    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> dict[str, bool]:
        operator.check(request)
        await context.engine.reset_prefix_cache()
        return {"reset": True}
