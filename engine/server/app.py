"""The ASGI application and its routes: the composition root of a server, which imports plugins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.async_engine import AsyncEngine
from engine.errors import EngineStopped
from engine.plugins.diagnostics import DiagnosticsConfig
from engine.plugins.diagnostics.explanations import Explanations, explanation
from engine.plugins.dialects.anthropic import CountRequest, MessagesRequest, count_tokens, messages
from engine.plugins.dialects.responses import Responses, ResponsesRequest
from engine.plugins.dialects.tokens import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
)
from engine.plugins.observe.server import Page
from engine.plugins.replicas import ReplicasConfig
from engine.server import access
from engine.server.access import ServerKeys, Tenants
from engine.server.api_errors import HANDLERS, APIError
from engine.server.bodies import Body, BodyReader, Workers, json_response
from engine.server.chat import chat
from engine.server.completions import CompletionRequest, complete
from engine.server.context import Call, ServingContext
from engine.server.schemas import ChatRequest
from engine.server.settings import ServerConfig
from hybridcache.command.extras import version as installed_version

HEALTH_WAIT_S = 0.2
"""Maximum time that ``/health`` waits for the engine to finish a step."""
Answer = Callable[[Call, Any], Awaitable[Response]]
"""Answers a request with its body."""


def create_app(engine: AsyncEngine, config: ServerConfig) -> Starlette:
    """Make the application that serves ``engine``. The engine starts and stops with it."""
    workers, keys = Workers(), ServerKeys.of(config)
    assert engine.tokenizer is not None, "a served engine always has a tokenizer"
    grid = engine.config.grid if engine.config.prefix_cache == "hybrid" else 0
    explain_bytes = int(config.of(DiagnosticsConfig).explain_mib * 2**20)
    explanations = Explanations(engine.tokenizer, explain_bytes, grid)
    tenants = Tenants(keys, engine.config.kept_folder)
    context = ServingContext(engine, config, workers, tenants, explanations.remember)
    responses = Responses(context, config)
    page = Page(context, keys, config.of(ReplicasConfig).replicas)
    bodies: dict[str, tuple[type[Body], Answer]] = {
        "/v1/completions": (CompletionRequest, complete),
        "/v1/chat/completions": (ChatRequest, chat),
        "/v1/messages": (MessagesRequest, messages),
        "/v1/messages/count_tokens": (CountRequest, count_tokens),
        "/v1/responses": (ResponsesRequest, responses.create),
        "/tokenize": (TokenizeRequest, tokenize),
        "/detokenize": (DetokenizeRequest, detokenize),
    }
    reader = BodyReader(int(config.max_body_mib * 2**20), config.body_timeout_s, workers)

    def body_route(path: str, kind: type[Body], answer: Answer) -> Route:
        async def operation(request: Request) -> Response:
            body, size = await reader.read(request, kind)
            context.check_model(body.model)
            tenant = tenants.of(request.scope, body.cache_salt)
            return await answer(Call(context, request, size, tenant), body)

        return Route(path, operation, methods=["POST"])

    async def openapi(request: Request) -> Response:
        return json_response(_described(routes, {path: kind for path, (kind, _) in bodies.items()}))

    async def version(request: Request) -> Response:
        return json_response({"version": installed_version()})

    routes = [
        *(body_route(path, *of_path) for path, of_path in bodies.items()),
        *_model_routes(context),
        *_operator_routes(context, keys),
        *page.routes(),
        Route("/v1/responses/{response_id}", responses.retrieve),
        Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
        Route(
            "/v1/cache/explanations/{answer_id}", partial(explanation, context, explanations, keys)
        ),
        Route("/version", version),
        Route("/openapi.json", openapi, include_in_schema=False),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.drain()
        workers.close()

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=HANDLERS)
    app.state.metrics, app.state.page = context.metrics, page
    access.install(app, config, keys)
    return app


def _model_routes(context: ServingContext) -> list[Route]:
    """Return the routes of models, health and metrics."""
    state = Health(context.engine)
    num_tokens = context.engine.facts.max_model_len
    card = {
        "id": context.model_name,
        "object": "model",
        "created": context.created,
        "owned_by": "hybridcache",
        "max_model_len": num_tokens,
        # Fields of Anthropic's API.
        "type": "model",
        "display_name": context.model_name,
        "max_input_tokens": num_tokens,
        "max_tokens": num_tokens,
        "created_at": datetime.fromtimestamp(context.created, UTC).isoformat(),
    }

    async def models(request: Request) -> Response:
        ends = {"first_id": context.model_name, "last_id": context.model_name, "has_more": False}
        return json_response({"object": "list", "data": [card], **ends})

    async def model(request: Request) -> Response:
        context.check_model(request.path_params["name"])
        return json_response(card)

    async def health(request: Request) -> Response:
        if not context.engine.is_alive:
            raise APIError(503, "The engine has stopped; see the server's log for the reason.")
        return json_response(await state.check())

    async def metrics(request: Request) -> Response:
        report = await context.engine.report()
        return Response(context.metrics.render(report), media_type=context.metrics.content_type)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]


class Health:
    """State reported by ``/health`` for a running engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._asking: asyncio.Task[None] | None = None
        self._folder: dict[str, str] = {"status": "ok"}

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
        return self._folder | {"exactness": self._engine.facts.exactness.sentence}

    async def _ask(self) -> None:
        with suppress(EngineStopped, ValueError):  # ended, or no replica is up
            offload = (await self._engine.report()).offload
            problem = offload and offload.folder and offload.folder.problem
            degraded = {"status": "degraded", "state_dir": problem or ""}
            self._folder = degraded if problem else {"status": "ok"}


def _operator_routes(context: ServingContext, keys: ServerKeys) -> list[Route]:
    """Return the operator's paths, which show or empty the cache of all clients."""

    async def cache(request: Request) -> Response:
        keys.check_operator(request)
        if request.query_params:
            raise APIError(400, "/v1/cache has no parameters; it covers all replicas.")
        return json_response(await context.engine.cache_view())

    async def reset(request: Request) -> Response:
        keys.check_operator(request)
        await context.engine.reset_prefix_cache()
        return json_response({"reset": True})

    return [
        Route("/v1/cache", cache),
        Route("/flush_cache", reset, methods=["POST"]),  # SGLang's name.
        Route("/reset_prefix_cache", reset, methods=["POST"]),
    ]


def _described(routes: Sequence[Route], bodies: dict[str, type[Body]]) -> dict[str, Any]:
    """Return the OpenAPI description of ``routes``, generated from the types of their bodies."""
    place = "#/components/schemas/{name}"
    schemas, shapes = msgspec.json.schema_components(bodies.values(), ref_template=place)
    paths: dict[str, dict[str, Any]] = {}
    of_body = dict(zip(bodies, schemas, strict=True))
    for route in routes:
        if not route.include_in_schema:
            continue
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operation: dict[str, Any] = {"responses": {"200": {"description": "Done."}}}
            if route.path in of_body and method == "POST":
                content = {"application/json": {"schema": of_body[route.path]}}
                operation["requestBody"] = {"required": True, "content": content}
            paths.setdefault(route.path.replace(":path", ""), {})[method.lower()] = operation
    info = {"title": "hybridcache engine", "version": installed_version()}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": shapes}}
