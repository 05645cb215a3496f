"""Answers of all endpoints: the context of one server, and the base of the writers, which submit a
request and write its outputs whole or as a stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import Json, JsonObject, RequestError
from engine.front.async_engine import AsyncEngine, RequestStream
from engine.front.chat_prompt import Replay
from engine.front.server.access import Access, Tenant
from engine.front.server.bodies import (
    MAX_LARGE_BODIES,
    APIError,
    Body,
    json_response,
    of_failure,
    quoted,
    read_body,
    run,
)
from engine.front.server.metrics import Metrics
from engine.front.server.schemas import ChatRequest, Sampling
from engine.front.server.settings import ServerConfig
from engine.front.server.transport import DONE, SentEvents, event, unless_gone
from engine.messages import Compile
from engine.requests.request import Marks, RequestSpec
from engine.text.answers import RequestOutput, Transferred
from engine.text.grammar import MAX_CHARS, Grammar
from engine.text.tokenizer import CLOSE, Tokenizer, as_tokens
from hybridcache.radix.api import Losses
from hybridcache.radix.tokens import Tokens


class ServingContext:
    """One engine with the names of its model, for all requests."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        access: Access,
        remember: Callable[[str, Call, ChatRequest, RequestOutput, Mapping[str, Json]], None],
    ) -> None:
        """``remember`` stores a chat: id of its answer, call, chat, first answer as output and
        message."""
        self.engine, self.config, self.access, self.remember = engine, config, access, remember
        assert engine.tokenizer is not None, "a served engine always has a tokenizer"
        self.tokenizer = engine.tokenizer
        replay_bytes, thinks = int(config.replay_mib * 2**20), config.preserve_thinking
        self.history = Replay(self.tokenizer, replay_bytes, keeps_thinking=thinks)
        names = [name for name in config.served_model_name if name != "*"]
        self.model_names = names or [engine.facts.model_name]
        self.model_name = self.model_names[0]
        """Name in answers."""
        self.switches = config.default_switches or {}
        self.fingerprint = engine.facts.exactness.fingerprint
        self.large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)
        self.metrics = Metrics(engine.channel.pid)
        self.created = int(time.time())

    def body_route(self, path: str, kind: type[Body], handler: Handler) -> Route:
        """Return the route of requests with a body of this ``kind``."""

        async def operation(request: Request) -> Response:
            body, size = await read_body(request, kind, self.config, self.large_bodies)
            self.check_model(body.model)
            tenant = self.access.tenant(request.scope, body.cache_salt)
            return await handler(Call(self, request, size, tenant), body)

        return Route(path, operation, methods=["POST"])

    def check_model(self, model: str | None) -> None:
        """Raise APIError 404 if a client names another model."""
        is_any = "*" in self.config.served_model_name
        if not is_any and model is not None and model not in self.model_names:
            raise APIError(
                404,
                f"The model {quoted(model)} is not served: use '{self.model_name}'. A server has "
                "one model; --served-model-name gives it more names, or '*' for any.",
                param="model",
                code="model_not_found",
            )

    async def encode(
        self, prompts: Sequence[str | list[int]], adds_special: bool, namespace: str | None
    ) -> list[Tokens]:
        """Return the ids of each prompt as an array that all its choices share. Long ones are
        encoded in a thread. Raises APIError 400 for a text that the tokenizer rejects."""
        encode = partial(
            self.tokenizer.encode, add_special_tokens=adds_special, namespace=namespace
        )

        def work() -> list[Tokens]:
            return [as_tokens(encode(one) if isinstance(one, str) else one) for one in prompts]

        try:
            return await run(sum(map(len, prompts)), work)
        except ValueError as error:
            raise APIError(400, str(error), param="prompt") from error

    async def grammar_of(
        self,
        forms: Mapping[str, Callable[[], Grammar]],
        namespace: str | None,
        is_thinking: bool = False,
    ) -> Grammar:
        """Compile the grammar of an answer that is not free. ``forms``: parameter of the body ->
        function that makes its grammar. ``is_thinking``: the grammar applies after the reasoning.
        Raises APIError 400 for several forms, or an unusable one."""
        if len(forms) > 1:
            listed = ", ".join(f"'{name}'" for name in forms)
            raise APIError(400, f"An answer can have only one form: send one of {listed}.")
        [(param, make)] = forms.items()
        try:
            grammar = await run(MAX_CHARS, make)
            while True:
                looser, end = grammar.looser, CLOSE if is_thinking else None
                grammar = replace(grammar, looser=None, end_of_reasoning=end)
                try:
                    await self.engine.ask(Compile(grammar, namespace))
                    return grammar
                except ValueError:
                    if looser is None:
                        raise
                    grammar = looser
        except ValueError as error:
            raise APIError(400, f"'{param}': {error}") from error


@dataclass(frozen=True, slots=True)
class Call:
    """One request with a body, whose model is served."""

    context: ServingContext
    request: Request
    size: int
    """Bytes of the body."""
    tenant: Tenant
    began_s: float = field(default_factory=time.perf_counter)
    """Time at which its body was complete."""


Handler = Callable[[Call, Any], Awaitable[Response]]
"""Answers a request with its body."""


# --- Answers --------------------------------------------------------------------------------------


class Writer(ABC):
    """Generates the answers to one request, and writes them in the form of an endpoint. By default
    a stream has the form of OpenAI's completions."""

    KIND = CHUNK_KIND = "text_completion"
    """Kinds of the answers of OpenAI's completions, and of the parts of their streams."""

    def __init__(self, call: Call, body: Sampling, answer_id: str, num_prompts: int = 1) -> None:
        """Raises APIError 400 if there are more answers than the queue can ever hold."""
        most, num_answers = call.context.engine.config.max_queue, num_prompts * body.n
        if num_answers > most:
            message = f"{num_answers} answers are more than the queue of {most} requests can hold"
            raise APIError(400, f"{message}: send fewer prompts or lower 'n'.")
        self._call, self._context, self._body = call, call.context, body
        self.answer_id = answer_id
        self._stream: RequestStream
        self._index_of: dict[str, int] = {}
        """Index of each answer by the id of its request."""
        self._latest: dict[int, RequestOutput] = {}
        """Latest output of each answer, by its index."""
        self._created = int(time.time())
        self._fields: JsonObject = {
            "id": answer_id,
            "object": self.CHUNK_KIND if body.stream else self.KIND,
            "created": self._created,
            "model": call.context.model_name,
            "system_fingerprint": call.context.fingerprint,
        }
        """First fields of OpenAI's completions, and of each event of their streams."""
        self._event_head = b"data: " + msgspec.json.encode(self._fields).removesuffix(b"}")

    @property
    def outputs(self) -> list[RequestOutput]:
        """Latest output of each answer that has one, in order."""
        return [self._latest[index] for index in sorted(self._latest)]

    @abstractmethod
    def whole(self) -> JsonObject:
        """Return the body of a response that is not streamed."""

    @abstractmethod
    def write(self, index: int, is_first: bool) -> Iterator[bytes]:
        """Yield the events of the latest output of an answer. Text that was sent is never
        retracted. ``is_first``: it is the first output of this answer."""

    def end(self) -> Iterator[bytes]:
        """Yield the events after all answers."""
        if (self._body.stream_options or {}).get("include_usage") is True:
            yield self._chunk([], usage=self._usage())
        yield DONE

    def failed(self, failure: APIError) -> bytes:
        """Return the event of a failure in the middle of a stream."""
        return event(failure.body())

    def _chunk(self, choices: list[JsonObject], **more: Json) -> bytes:
        """Return the event of a part of a stream. Only its end, from the choices on, is encoded."""
        end = msgspec.json.encode({"choices": choices, **more} if more else {"choices": choices})
        return b"%b,%b\n\n" % (self._event_head, end[1:])

    async def submit(
        self,
        prompts: Sequence[Tokens],
        marks: Marks,
        limit: int | None,
        num_scores: int | None,
        forms: Mapping[str, Callable[[], Grammar]],
    ) -> None:
        """Submit all choices of ``prompts`` in order, or none. ``marks``: further fields of their
        ``RequestSpec``. ``limit``: maximum length of an answer; None means
        ``--default-max-tokens``. ``forms``: those of ``grammar_of``. Raises APIError for a value
        out of range or a choice that is refused."""
        context, body, engine = self._context, self._body, self._context.engine
        limit = context.config.default_max_tokens if limit is None else limit
        room, namespace = engine.facts.max_model_len - (limit or 0), self._call.tenant.namespace
        samplings = cache(
            partial(body.samplings, logprobs=num_scores, defaults=engine.sampling_defaults)
        )
        self._stream = RequestStream(engine.abort, context.metrics.observe)
        self._call.request.state.answer_id = own_id = self.answer_id
        try:
            choices = []
            for tokens in prompts:
                of_prompt = samplings(limit if len(tokens) <= room else None)
                engine.check(tokens, of_prompt[0], marks.get("prompt_logprobs"))
                choices += [(tokens, *choice) for choice in enumerate(of_prompt)]
                await asyncio.sleep(0)  # Let the event loop run between two prompts.
            grammar = None
            if forms:
                is_thinking = marks.get("is_thinking", False)
                grammar = await context.grammar_of(forms, namespace, is_thinking)
            session = body.session
            names = [f"{own_id}-{number}" if number else own_id for number in range(len(choices))]
            for number, (tokens, at, sampling) in enumerate(choices):
                request_id = names[number]
                spec = RequestSpec(
                    tokens,
                    sampling,
                    namespace,
                    request_id=request_id,
                    choice_of=names[number - at] if at else None,
                    grammar=grammar,
                    arrival_s=time.perf_counter(),
                    **session,
                    **marks,
                )
                self._index_of[request_id] = number
                engine.submit_valid(spec, self._stream)
                await asyncio.sleep(0)
        except BaseException as error:
            self._stream.abort()
            if not isinstance(error, ValueError | RequestError):
                raise
            context.metrics.count_failure(error)
            raise of_failure(RequestError.of(error)) from error

    def read(self, index: int, output: RequestOutput) -> RequestOutput:
        """Read the next output of an answer, and return it as it is written."""
        return output

    def ended(self) -> None:
        """Note the token counts for the log, once no output follows."""
        firsts = [output for at, output in self._latest.items() if at % self._body.n == 0]
        self._call.request.state.num_tokens = (
            sum(len(one.prompt_token_ids) for one in firsts),
            sum(one.cached_len for one in firsts),
            sum(len(one.output) for one in self._latest.values()),
        )

    def _usage(self) -> JsonObject:
        """Return the token counts in the form of OpenAI's completions, with ``lost_tokens`` and
        ``transferred``. A prompt counts once, with the cache hit of its first choice."""
        outputs, firsts = self.outputs, self.outputs[:: self._body.n]
        num_prompt = sum(len(output.prompt_token_ids) for output in firsts)
        num_new = sum(len(output.token_ids) for output in outputs)
        losses = [output.losses for output in firsts if output.losses is not None]
        drafts = [output.drafts for output in outputs if output.drafts is not None]
        moved = [output.transferred for output in firsts if output.transferred is not None]
        num_accepted = sum(sum(counts.accepted.values()) for counts in drafts)
        num_drafted = sum(sum(counts.drafted.values()) for counts in drafts)
        drafted = {
            "accepted_prediction_tokens": num_accepted,
            "rejected_prediction_tokens": num_drafted - num_accepted,
        }
        details = (drafted if drafts else {}) | self.thought()
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {
                "cached_tokens": sum(output.cached_len for output in firsts),
                "lost_tokens": _sums(losses or [Losses(0, 0, 0, 0, 0)]),
                **({"transferred": _sums(moved)} if moved else {}),
                **self.written(),
            },
            **({"completion_tokens_details": details} if details else {}),
        }

    def written(self) -> dict[str, int]:
        """Return the number of tokens that later prompts may share, for a chat."""
        return {}

    def thought(self) -> dict[str, int]:
        """Return the number of tokens of reasoning, for a chat."""
        return {}

    def _ids(self, name: str, token_ids: Sequence[int] | np.ndarray) -> JsonObject:
        """Return a field with token ids, in vLLM's form, if they are requested."""
        return {name: np.asarray(token_ids).tolist()} if self._body.return_token_ids else {}

    def _cache_headers(self) -> dict[str, str]:
        """Return the cache headers of an answer; {} before the first output."""
        if (output := self._latest.get(0)) is None:
            return {}
        headers = {
            "x-cache-prompt-tokens": str(len(output.prompt_token_ids)),
            "x-cache-hit-tokens": str(output.cached_len),
        }
        if output.losses is not None:
            causes = output.losses._asdict().items()
            lost = ", ".join(f"{cause}={number}" for cause, number in causes if number)
            headers["x-cache-lost"] = lost or "none"
        return headers

    async def respond(self, is_stream: bool) -> Response:
        """Return the response with all answers. Long texts are written in a thread."""
        if is_stream:
            wait_s = self._context.config.keep_alive_s
            self._event_stream = SentEvents(self._events(), self.failed, wait_s)
            return self._event_stream
        await unless_gone(self._call.request.receive, anext(self._events(is_stream=False), None))
        size = sum(len(one.output) + len(one.prompt_token_ids) for one in self.outputs)
        response = await run(size, lambda: json_response(self.whole()))
        response.headers.update(self._cache_headers())
        return response

    def _write_now(self, output: RequestOutput) -> bool:
        """Write an output to the connection without waking the task of the stream, and return True.
        Returns False for the first output of an answer, and while the client reads too slowly."""
        index = self._index_of[output.request_id]
        if index not in self._latest or not self._event_stream.is_ready:
            return False
        self._latest[index] = self.read(index, output)
        if written := b"".join(self.write(index, False)):
            self._event_stream.write(written)
        return True

    async def _events(self, is_stream: bool = True) -> AsyncGenerator[bytes, None]:
        """Read all outputs, and yield one piece for each if they are streamed. Closing the iterator
        ends the requests. Raises RequestError if one ended without an answer."""
        try:
            async for output in self._stream:
                index = self._index_of[output.request_id]
                is_first = index not in self._latest
                self._latest[index] = self.read(index, output)
                if is_stream:
                    if is_first:
                        self._event_stream.headers.update(self._cache_headers())
                        self._stream.handle = self._write_now
                    # A prompt can be echoed.
                    size = len(output.prompt_token_ids) if is_first else 0
                    if written := await run(size, partial(b"".join, self.write(index, is_first))):
                        yield written
        finally:
            self._stream.abort()
            if self._latest:
                self.ended()
        if is_stream:
            yield b"".join(self.end())


# --- Parts of answers -----------------------------------------------------------------------------


def new_id(kind: str, joint: str = "-") -> str:
    """Return a random id for an answer or a part of one."""
    return f"{kind}{joint}{uuid.uuid4().hex}"


def _sums(counts: Sequence[Losses] | Sequence[Transferred]) -> dict[str, int]:
    """Return the sum of each field of ``counts``, which are NamedTuples."""
    return dict(zip(counts[0]._fields, map(sum, zip(*counts, strict=True)), strict=True))


LEAST = -9999.0
"""Log-probability of an impossible token, as in OpenAI's API. JSON has no infinity."""


def finite(logprob: float | None) -> float | None:
    """Return ``logprob`` as a number that JSON can represent."""
    return None if logprob is None else max(logprob, LEAST)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text, or as ``bytes:\\xe2`` if it is not valid UTF-8."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8") if raw else f"token:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
