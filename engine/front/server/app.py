"""The server: its process, and the ASGI application with its routes, which imports plugins."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import math
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from types import FrameType

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import EngineStopped, JsonObject
from engine.front.async_engine import AsyncEngine
from engine.front.server.access import Access, Requests
from engine.front.server.bodies import HANDLERS, APIError, Body, json_response
from engine.front.server.endpoints.anthropic import (
    CountRequest,
    MessagesRequest,
    count_tokens,
    messages,
)
from engine.front.server.endpoints.chat import chat
from engine.front.server.endpoints.completions import complete
from engine.front.server.endpoints.explain import Explanations, explanation
from engine.front.server.endpoints.observe import Page
from engine.front.server.endpoints.responses import Responses, ResponsesRequest
from engine.front.server.endpoints.tokens import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
)
from engine.front.server.metrics import OF_KEYS
from engine.front.server.schemas import ChatRequest, CompletionRequest
from engine.front.server.settings import ACCEPTED_AT_ONCE, BACKLOG, SWITCH_S, ServerConfig
from engine.front.server.transport import ClientConnection
from engine.front.server.writers import Handler, ServingContext
from engine.messages import Ask
from hybridcache.command.extras import version as installed_version
from hybridcache.command.signals import log_to_stderr
from hybridcache.geometry.units import counted

logger = logging.getLogger(__name__)

# --- Process --------------------------------------------------------------------------------------

MAX_DESCRIPTORS = 1 << 16
"""Upper limit to which the number of descriptors is raised, if the system allows it."""
GC_THRESHOLDS = (50_000, 20, 1000)
"""Objects of a long body would start full collections, each of which stops all clients. Reference
counts free nearly everything."""


def most_connections() -> int:
    """Raise the limit of open descriptors to its hard limit, at most ``MAX_DESCRIPTORS``, and
    return the number of connections that leaves some for the rest of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most - 256, most // 2)


TRIM_S = 30
"""Interval between two calls of ``trim``."""


async def trim() -> None:
    """Return free pages between allocations to the system: up to a millisecond per 100 MiB."""
    with suppress(AttributeError):  # Only glibc has the function.
        ctypes.CDLL(None).malloc_trim(0)


FAREWELL_S = 5
"""Time after the drain in which clients can read that their answer was cut off."""


class Server(uvicorn.Server):
    """Ends requests ``drain_s`` after the stop signal, or at a second one, and tells why."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        must_end: Callable[[], bool] = lambda: False,
        access: Access | None = None,
    ) -> None:
        """``must_end`` is called ten times per second; True ends the server."""
        self.app, idle_s = create_app(engine, config, access), math.ceil(config.idle_timeout_s)
        super().__init__(
            uvicorn.Config(
                self.app,
                interface="asgi3",
                http=ClientConnection,
                proxy_headers=False,  # Access reads them, of trusted proxies.
                limit_concurrency=most_connections(),
                timeout_keep_alive=idle_s,
                headers=[("Keep-Alive", f"timeout={idle_s}")],
                ws="none",
                log_config=None,
                log_level=config.log_level,
                access_log=False,
                backlog=ACCEPTED_AT_ONCE,
                timeout_graceful_shutdown=math.ceil(config.drain_s) + FAREWELL_S,
                callback_notify=trim,
                timeout_notify=TRIM_S,
            )
        )
        self._engine, self._page = engine, self.app.state.page
        self._drain_s = config.drain_s
        self._must_end = must_end
        self._is_hurried = False
        """True after a second signal, which ends the drain."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, or end the drain: requests that are left get an error instead of being dropped."""
        self._is_hurried, self.should_exit = self.should_exit, True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._must_end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.should_exit = True  # A signal from now on is the second one.
        self._page.close()
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        """Stop serving other engines at once, and requests after ``drain_s`` or a second signal."""
        if self._engine.failure is None:  # Else the command prints the reason.
            text = "Stopping: new requests are refused"
            if num_open := self._engine.num_open:
                text += f"; {counted(num_open, 'request')} may run for {self._drain_s:g} s more "
                text += "(--drain-s), or until a second signal"
            logger.warning("%s.", text)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                with suppress(EngineStopped):
                    await self._engine.ask(Ask("stop_accepting"))
                while not self._is_hurried:
                    await asyncio.sleep(0.1)
        if num_left := len(self.server_state.tasks):
            logger.warning("%s not ended: broken off.", counted(num_left, "request"))
        await asyncio.to_thread(self._engine.stop)


def serve(
    engine: AsyncEngine, config: ServerConfig, listener: socket.socket, access: Access
) -> None:
    """Serve on ``listener`` until the engine fails, or until SIGTERM, SIGINT or SIGHUP (unless it
    is ignored, as by ``nohup``); then finish running requests, for at most ``drain_s``. With files
    of keys, SIGHUP reads them again instead."""
    # A signal may arrive before uvicorn handles signals, and uvicorn raises its own signals again
    # after the shutdown. A drained server must exit normally.
    told: list[int] = []
    has_keys = config.api_key_file is not None or config.admin_key_file is not None

    def must_end() -> bool:
        if has_keys and signal.SIGHUP in told:
            told.remove(signal.SIGHUP)
            try:
                access.reload()
                logger.warning("The keys were read again: %s.", access.words())
            except ValueError as error:
                logger.error("The keys stay as they are: %s", error)
        return bool(told or engine.failure)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        is_ignored = signal.getsignal(number) == signal.SIG_IGN
        if number != signal.SIGHUP or has_keys or not is_ignored:
            signal.signal(number, lambda number, _: told.append(number))
    log_to_stderr(config.log_level, "engine", "uvicorn", is_json=config.log_format == "json")
    sys.setswitchinterval(SWITCH_S)
    # Objects made at the start stay alive. Freezing them saves the garbage collector a quarter of a
    # second per run.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    server = Server(engine, config, must_end, access)
    server.run(sockets=[listener])


# --- Application ----------------------------------------------------------------------------------


def create_app(
    engine: AsyncEngine, config: ServerConfig, access: Access | None = None
) -> Starlette:
    """Make the application that serves ``engine``. The engine starts and stops with it.
    ``access``: the keys of ``config``, if they were read before."""
    access = access or Access(config)
    if (folder := engine.config.state_dir) is not None:
        access.keep_secret(folder)
    assert engine.tokenizer is not None, "a served engine always has a tokenizer"
    explanations = Explanations(engine.tokenizer, engine.config, config)
    context = ServingContext(engine, config, access, explanations.remember)
    responses = Responses(context)
    page = Page(context, config.replicas)
    bodies: dict[str, tuple[type[Body], Handler]] = {
        "/v1/completions": (CompletionRequest, complete),
        "/v1/chat/completions": (ChatRequest, chat),
        "/v1/messages": (MessagesRequest, messages),
        "/v1/messages/count_tokens": (CountRequest, count_tokens),
        "/v1/responses": (ResponsesRequest, responses.create),
        "/tokenize": (TokenizeRequest, tokenize),
        "/detokenize": (DetokenizeRequest, detokenize),
    }

    async def cache(request: Request) -> Response:
        if request.query_params:
            raise APIError(400, "/v1/cache has no parameters; it covers all replicas.")
        by_key = context.metrics.by_key
        keys = {name: dict(zip(OF_KEYS, by_key[name], strict=True)) for name in by_key}
        return json_response(await engine.view() | {"keys": keys})

    async def reset(request: Request) -> Response:
        await engine.ask(Ask("reset_cache"))
        return json_response({"reset": True})

    async def openapi(request: Request) -> Response:
        return json_response(_described(routes, {path: kind for path, (kind, _) in bodies.items()}))

    async def version(request: Request) -> Response:
        return json_response({"version": installed_version()})

    routes = [
        *(context.body_route(path, *of_path) for path, of_path in bodies.items()),
        *_model_routes(context),
        Route("/v1/cache", cache),
        Route("/flush_cache", reset, methods=["POST"]),  # SGLang's name.
        Route("/reset_prefix_cache", reset, methods=["POST"]),
        *page.routes(),
        Route("/v1/responses/{response_id}", responses.stored, methods=["GET", "DELETE"]),
        Route("/v1/cache/explanations/{answer_id}", partial(explanation, context, explanations)),
        Route("/version", version),
        Route("/openapi.json", openapi, include_in_schema=False),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.drain()

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=HANDLERS)
    app.state.metrics, app.state.page = context.metrics, page
    engine.on_lost = context.metrics.counters["lost_requests"].inc
    engine.on_gap = context.metrics.histograms["itl_seconds"].observe

    def count(status: int, key_name: str | None, num_tokens: Sequence[int] | None) -> None:
        context.metrics.counters["http_requests"].labels(str(status)).inc()
        if key_name is not None and num_tokens is not None:
            context.metrics.count_key(key_name, num_tokens)

    app.add_middleware(Requests, access=access, is_logged=config.log_requests, count=count)
    if config.cors_origin:  # Outermost.
        every = ["*"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=every,
            allow_headers=every,
            expose_headers=every,
        )
    return app


def _model_routes(context: ServingContext) -> list[Route]:
    """Return the routes of models, health and metrics."""
    num_tokens = context.engine.facts.max_model_len
    card = {
        "object": "model",
        "created": context.created,
        "owned_by": "hybridcache",
        "max_model_len": num_tokens,
        # Fields of Anthropic's API.
        "type": "model",
        "max_input_tokens": num_tokens,
        "max_tokens": num_tokens,
        "created_at": datetime.fromtimestamp(context.created, UTC).isoformat(),
    }

    async def models(request: Request) -> Response:
        names = context.model_names
        cards = [{"id": name, "display_name": name, **card} for name in names]
        ends = {"first_id": names[0], "last_id": names[-1], "has_more": False}
        return json_response({"object": "list", "data": cards, **ends})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        context.check_model(name)
        return json_response({"id": name, "display_name": name, **card})

    async def health(request: Request) -> Response:
        """Return ``ok``, or ``degraded`` with the problem of the state directory."""
        engine, status = context.engine, {"status": "ok"}
        if not engine.is_alive:
            raise APIError(503, "The engine has stopped; see the server's log for the reason.")
        if engine.config.state_dir is not None:
            with suppress(EngineStopped):
                folder = (await engine.report()).folder
                if folder is not None and folder.problem:
                    status = {"status": "degraded", "state_dir": folder.problem}
        return json_response(status | {"exactness": engine.facts.exactness.sentence})

    async def metrics(request: Request) -> Response:
        report = await context.engine.report()
        return Response(context.metrics.render(report), media_type=context.metrics.content_type)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]


def _described(routes: Sequence[Route], bodies: dict[str, type[Body]]) -> JsonObject:
    """Return the OpenAPI description of ``routes``, generated from the types of their bodies."""
    place = "#/components/schemas/{name}"
    schemas, shapes = msgspec.json.schema_components(bodies.values(), ref_template=place)
    paths: dict[str, dict[str, JsonObject]] = {}
    of_body = dict(zip(bodies, schemas, strict=True))
    for route in routes:
        if not route.include_in_schema:
            continue
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operation: JsonObject = {"responses": {"200": {"description": "Done."}}}
            if route.path in of_body and method == "POST":
                content = {"application/json": {"schema": of_body[route.path]}}
                operation["requestBody"] = {"required": True, "content": content}
            paths.setdefault(route.path.replace(":path", ""), {})[method.lower()] = operation
    info = {"title": "hybridcache engine", "version": installed_version()}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": shapes}}
