"""The ASGI application: which path answers what, and how the server starts and stops."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

from engine.async_engine import EngineStopped, ServedEngine
from engine.plugins.diagnostics.replays import compiled
from engine.plugins.dialects.response_store import ResponseStore
from engine.plugins.dialects.routes import add_messages, add_responses
from engine.plugins.observe.feed import Feed
from engine.plugins.observe.page import add_page
from engine.server import access, errors, openapi
from engine.server.body import BodyReader, to_json
from engine.server.chat import chat
from engine.server.chat_session import render
from engine.server.compat_routes import add_peers_paths
from engine.server.completions import complete
from engine.server.config import ServerConfig
from engine.server.connections import (
    MOST_DESCRIPTORS,
    Connections,
    most_connections,
    raise_descriptor_limit,
)
from engine.server.context import ServingContext
from engine.server.errors import APIError, PlainJSON
from engine.server.listening import ACCEPTED_AT_ONCE, BACKLOG
from engine.server.malloc_trim import TRIM_S, trim
from engine.server.operator import Operator
from engine.server.request_log import RequestLog, is_wanted, set_up_logging
from engine.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    described,
)
from engine.server.streaming import ClientGone
from engine.server.workers import SWITCH_S, Workers
from engine.text.tokenizer import EncodeOptions

HEALTH_WAIT_S = 0.2
"""Most time that ``/health`` waits for the engine to finish a step."""
FAREWELL_S = 5
"""How long clients may take to read, after the drain, that their answer was cut short."""


def create_app(engine: ServedEngine, config: ServerConfig) -> FastAPI:
    """The application that serves ``engine``, which starts and stops with it."""
    workers = Workers()
    front = ServingContext(engine, config, workers)
    reader = BodyReader(config, workers)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.drain()
        workers.close()

    app = FastAPI(title="hybridcache engine", lifespan=lifespan, default_response_class=PlainJSON)
    app.state.feed = feed = Feed(engine, workers)
    app.state.metrics = front.metrics
    errors.install(app)
    app.add_middleware(errors.BodyLimit, max_bytes=int(config.max_body_mib * 2**20))

    @app.exception_handler(ClientGone)
    async def _gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    _add_generation(app, front, reader)
    add_messages(app, front, reader)
    add_responses(app, front, reader, ResponseStore(int(config.responses_mib * 2**20)))
    _add_tokens(app, front, reader, config)
    _add_watching(app, front)
    operator = Operator.of(config)
    _add_administration(app, front, operator)
    add_page(app, front, feed, operator)
    add_peers_paths(app, front, operator)
    access.install(app, config)
    if is_wanted(config.log_requests):
        app.add_middleware(RequestLog)
    openapi.install(app)
    return app


def _add_generation(app: FastAPI, front: ServingContext, reader: BodyReader) -> None:
    @app.post("/v1/completions", openapi_extra=described(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await complete(front, request, await reader.read(request, CompletionRequest))

    @app.post("/v1/chat/completions", openapi_extra=described(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await chat(front, request, await reader.read(request, ChatRequest))

    def card() -> dict[str, Any]:
        return {
            "id": front.model_name,
            "object": "model",
            "created": front.created,
            "owned_by": "hybridcache",
            "max_model_len": front.engine.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        front.check_model(name)
        return card()


def _add_tokens(
    app: FastAPI, front: ServingContext, reader: BodyReader, config: ServerConfig
) -> None:
    @app.post("/tokenize", openapi_extra=described(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        body = await reader.read(request, TokenizeRequest)
        front.check_model(body.model)
        answer: dict[str, Any] = {"max_model_len": front.engine.max_model_len}
        if body.messages:
            size = len(await request.body())
            prompt, _ = await render(front, body, size, front.tenant_of(request))
            token_ids = prompt.token_ids
            answer["boundaries"] = list(prompt.boundaries)
        else:
            [token_ids] = await front.encode(
                [body.prompt or ""],
                EncodeOptions(
                    body.add_special_tokens, namespace=front.tenant_of(request).namespace
                ),
            )
        if len(token_ids) > config.max_prompt_ids:
            raise APIError(
                400,
                f"This makes {len(token_ids)} tokens, more than {config.max_prompt_ids}: send it "
                "in parts, or raise --max-prompt-ids.",
            )
        answer |= {"count": len(token_ids), "tokens": token_ids}
        content = await front.workers.run(len(token_ids), lambda: to_json(answer))
        return Response(content, media_type="application/json")

    @app.post("/detokenize", openapi_extra=described(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, str]:
        body = await reader.read(request, DetokenizeRequest)
        front.check_model(body.model)

        def work() -> str:
            num_ids = front.tokenizer.vocab_size
            if any(not 0 <= token_id < num_ids for token_id in body.tokens):
                raise APIError(
                    400, f"'tokens' must be ids from 0 to {num_ids - 1}.", param="tokens"
                )
            return front.tokenizer.decode(body.tokens, skip_special_tokens=False)

        return {"prompt": await front.workers.run(len(body.tokens), work)}


class Health:
    """The answer of ``/health`` for an engine that runs."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine
        self._asking: asyncio.Task[None] | None = None
        self._problem: str | None = None

    async def check(self) -> dict[str, str]:
        """``ok``, or ``degraded`` with the problem of the state directory.

        Reports are made between two steps. During a long one the answer is that of the last report,
        so that a probe need not wait for it.
        """
        if self._engine.config.state_dir is not None:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            await asyncio.wait({self._asking}, timeout=HEALTH_WAIT_S)
        if self._problem is None:
            return {"status": "ok"}
        return {"status": "degraded", "state_dir": self._problem}

    async def _ask(self) -> None:
        with suppress(EngineStopped, ValueError):  # ended, or no replica is up
            lower = (await self._engine.report()).lower
            folder = None if lower is None else lower.folder
            self._problem = None if folder is None else folder.problem


def _add_watching(app: FastAPI, front: ServingContext) -> None:
    state = Health(front.engine)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not front.engine.is_alive:
            raise APIError(503, "The engine has stopped; the server's log says why.")
        return await state.check()

    @app.get("/metrics")
    async def metrics() -> Response:
        report = await front.engine.report()
        return Response(front.metrics.render(report), media_type=front.metrics.content_type)


def _add_administration(app: FastAPI, front: ServingContext, operator: Operator) -> None:
    """What is the operator's: it shows, or ends, what all clients have in the cache."""

    @app.get("/v1/cache")
    async def cache(request: Request) -> dict[str, Any]:
        operator.check(request)
        return await front.engine.cache_view()

    @app.get("/v1/cache/explanations/{answer_id}")
    async def explanation(
        request: Request, answer_id: str, compared_with: str | None = None
    ) -> dict[str, Any]:
        operator.check(request)
        told = front.explanations.look_up(answer_id, compared_with)
        if told is None:
            raise APIError(
                404,
                "This answer, or the one it is compared with, is not remembered: raise "
                "--explain-mib to remember more.",
            )
        return told

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> dict[str, bool]:
        operator.check(request)
        await front.engine.reset_prefix_cache()
        return {"reset": True}


class Server(uvicorn.Server):
    """Ends what still runs ``drain_s`` after it was asked to stop, so that whoever waits for it
    learns why."""

    def __init__(
        self,
        engine: ServedEngine,
        config: ServerConfig,
        must_end: Callable[[], bool] = lambda: False,
    ) -> None:
        """``must_end`` is asked ten times a second whether there is nothing left to serve."""
        app = create_app(engine, config)
        limit = min(config.max_connections or MOST_DESCRIPTORS, most_connections())
        self._connections = Connections(limit, config.header_timeout_s)
        super().__init__(
            uvicorn.Config(
                app,
                http=self._connections.protocol,  # type: ignore[arg-type]
                ws="none",
                log_level=config.log_level,
                access_log=False,
                backlog=ACCEPTED_AT_ONCE,
                timeout_graceful_shutdown=math.ceil(config.drain_s) + FAREWELL_S,
                callback_notify=trim,
                timeout_notify=TRIM_S,
            )
        )
        self._engine = engine
        self._feed: Feed = app.state.feed
        self._drain_s = config.drain_s
        self._must_end = must_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        self._connections.sweep()
        return await super().on_tick(counter) or self._must_end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._feed.close()  # or open pages would hold the server up
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        """Stop serving other engines at once, and everybody after ``drain_s``."""
        deadline_s = time.monotonic() + self._drain_s
        with suppress(EngineStopped, TimeoutError):
            await asyncio.wait_for(self._engine.stop_accepting(), self._drain_s)
        await asyncio.sleep(max(0.0, deadline_s - time.monotonic()))
        await asyncio.to_thread(self._engine.stop)


def check(config: ServerConfig) -> None:
    """ValueError: a file or a pattern that it names can not be used. For before a model is loaded:
    ``serve`` refuses the same."""
    access.api_keys(config, os.environ)
    Operator.of(config)
    compiled(config.volatile_line)


def serve(
    engine: ServedEngine,
    config: ServerConfig,
    listener: socket.socket,
    must_end: Callable[[], bool] = lambda: False,
) -> None:
    """Serve on ``listener`` until SIGTERM or SIGINT, or until it ``must_end``; then finish what
    runs, for at most ``drain_s``."""
    # A signal may come before uvicorn listens to signals, and uvicorn raises its own again once it
    # has shut down: a drained server has ended well.
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    set_up_logging(config.log_level)
    sys.setswitchinterval(SWITCH_S)
    raise_descriptor_limit()
    # What was made at the start stays: collecting garbage need not look at it again, which takes a
    # quarter of a second.
    gc.collect()
    gc.freeze()
    Server(engine, config, lambda: bool(told) or must_end()).run(sockets=[listener])
