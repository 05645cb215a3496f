"""A proxy that passes every request on unchanged, and writes chat completions as a trace."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from engine.errors import JsonObject
from engine.front.chat_prompt import NO_CHAT, Conversation, Rendering
from engine.front.server.access import SALT_HEADER, key_in, plain_address
from engine.front.server.bodies import APIError, ClientGone, converted, settled
from engine.front.server.schemas import ChatRequest, Message, plain_message
from engine.front.server.tool_calls.form import prepared
from engine.front.server.transport import unless_gone
from engine.text.tokenizer import Tokenizer
from hybridcache.adapters.client_habits import thoughts_of

Fields = Mapping[str, Any]

RECORDED = "/chat/completions"
"""End of the paths of recorded requests."""
ANSWERS = ("/completions", "/messages", "/responses")
"""Ends of the paths whose requests are counted although they are not written."""
CONNECTION = frozenset(
    b"connection host keep-alive proxy-connection te trailer transfer-encoding upgrade".split()
)
"""Headers that belong to one connection and are not passed on."""
PIECE = 4
"""Characters per id without a tokenizer."""
HEADER, END = "<|im_start|>", "<|im_end|>\n"
logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Recording:
    """A request that is recorded, and its answer so far."""

    seconds: float
    headers: Mapping[bytes, bytes]
    body: bytes
    answer: httpx.Response | None = None
    """Status and headers of the answer. None before the answer starts."""
    pieces: list[bytes] = field(default_factory=list)
    """Content of the answer, in its compression."""
    line: bytes | None = None
    """Line of the trace once the exchange has ended; empty if it is not written."""


class TraceWriter:
    """Writes exchanges as lines of a trace in the laboratory's own format (``jsonl``), in the order
    of their arrival.

    Without a tokenizer, one id stands for ``PIECE`` characters, about the length of a token. Unless
    ``keeps_text``, an id is a keyed hash of all text up to it: equal ids mean equal prefixes, and
    the text cannot be recovered. One thread calls ``begin``, another ``end``.
    """

    def __init__(
        self, file: BinaryIO, *, keeps_text: bool, tokenizer: Tokenizer | None, counted_by: str = ""
    ) -> None:
        """``file`` is empty and unbuffered. ``counted_by`` goes into its first line, for readers.
        Raises ValueError if the model of ``tokenizer`` has no chat template."""
        if tokenizer is not None and tokenizer.chat_template is None:
            raise ValueError(NO_CHAT)
        self._file, self._keeps_text, self._tokenizer = file, keeps_text, tokenizer
        self._key = secrets.token_bytes(32)
        self._began_s = time.monotonic()
        self._pending: deque[Recording] = deque()
        """Exchanges from the oldest that is running on, in order of arrival."""
        self.num_requests = 0
        self.skipped: Counter[str] = Counter()
        """Number of requests that are not in the trace, by reason."""
        header = {"format": "hybridcache", "version": 1, "unit": 1, "counted_by": counted_by}
        self._append(_line(header))

    def begin(self, headers: Mapping[bytes, bytes], body: bytes) -> Recording:
        """Start to record a request with this complete ``body``. O(1)."""
        exchange = Recording(time.monotonic() - self._began_s, headers, body)
        self._pending.append(exchange)
        return exchange

    def end(self, exchange: Recording) -> None:
        """Write ``exchange`` after all earlier ones. Does nothing if it has already ended.

        An incomplete answer is written too, because its request was computed.
        """
        if exchange.line is not None:
            return
        try:
            exchange.line = self._line_of(exchange)
        except Exception as error:  # The body of a request may be anything.
            exchange.line = b""
            self.skip(f"its body cannot be read ({type(error).__name__}: {error})")
        self._write()

    def finish(self) -> None:
        """End all running exchanges. May be called again."""
        for exchange in tuple(self._pending):
            self.end(exchange)

    def _write(self) -> None:
        while self._pending and (line := self._pending[0].line) is not None:
            self._pending.popleft()
            if line:
                try:
                    self._append(line)
                    self.num_requests += 1
                except OSError as error:
                    self.skip(f"the file cannot be written ({error.strerror})")

    def _append(self, line: bytes) -> None:
        """Write a line whole, or no part of it. Raises OSError."""
        end = self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._file.seek(end))
            raise

    def _line_of(self, exchange: Recording) -> bytes:
        if exchange.answer is None:
            self.skip("requests without an answer are not written")
            return b""
        if exchange.answer.status_code != 200:
            return b""
        body: Any = settled(json.loads(exchange.body))
        coded = {"content-encoding": exchange.answer.headers.get("content-encoding", "")}
        raw = httpx.Response(200, headers=coded, content=b"".join(exchange.pieces)).content
        answer, has_end = read_answer(raw)
        ids, boundaries, output = self._tokens(body, answer, has_end)
        if not self._keeps_text:
            chain, hashed = self._key, list[int]()
            for one in (*ids, *output):
                raw = one.to_bytes(8, "little")
                chain = hashlib.blake2b(raw, key=chain, digest_size=32).digest()
                hashed.append(int.from_bytes(chain[:4], "little") & 0x7FFFFFFF)
            ids, output = hashed[: len(ids)], hashed[len(ids) :]
        # As by default in the server, different keys and different salts share nothing.
        in_header = exchange.headers.get(SALT_HEADER.encode(), b"").decode(errors="replace")
        salt = in_header or body.get("cache_salt")
        owner = [body.get("model"), key_in(exchange.headers).hex(), salt]
        line: JsonObject = {
            "timestamp": round(exchange.seconds, 3),
            "session": self._digest([owner, _beginning(body)]),
            "namespace": self._digest(owner),
            "tokens": ids,
            "output": output,
        }
        if boundaries:
            line["boundaries"] = boundaries
        if self._keeps_text:
            line |= {"request": body, "answer": answer}
        return _line(line)

    def skip(self, why: str) -> None:
        """Count one request that is not written; the first for each reason is logged."""
        self.skipped[why] += 1
        if self.skipped[why] == 1:
            logger.warning("Passed on, but %s.", why)

    def _tokens(
        self, body: Fields, answer: Fields, has_end: bool
    ) -> tuple[list[int], list[int], list[int]]:
        """Return (ids of the prompt, known boundaries, ids of ``answer`` behind it, as the next
        prompt has them). Raises ValueError if the chat cannot be rendered."""
        given = [plain_message(one, "messages") for one in (*body["messages"], answer)]
        sent = ChatRequest(messages=converted(given, list[Message], "messages"))
        chat = [one.as_template_input() for one in sent.messages]
        tokenizer, tools = self._tokenizer, body.get("tools")
        if tokenizer is not None and tokenizer.chat_template is not None:
            chat = prepared(chat, tokenizer.chat_template)
        said = _text(chat[-1])
        if tokenizer is None:
            texts = [json.dumps(tools) if tools else ""]
            for one in chat[:-1]:
                texts += f"{HEADER}{one['role']}\n", _text(one), END
            ids = _piece_ids([*texts, f"{HEADER}assistant\n"])
            # A model draws the first token of END; the template adds the rest to the next prompt.
            return ids, [], _piece_ids([said]) + _piece_ids([END])[:has_end]
        before = Conversation(chat[:-1], tools, body.get("chat_template_kwargs"))
        prompt = Rendering(tokenizer, before).prompt()
        ids, boundaries = prompt.tokens.tolist(), list(prompt.marks["boundaries"].positions)
        later = replace(before, messages=chat, add_generation_prompt=False)
        whole = Rendering(tokenizer, later).tokens.tolist()
        ends = tokenizer.eos_token_ids
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            output = tokenizer.encode(said, add_special_tokens=False)
            return ids, boundaries, output + sorted(ends)[:has_end]
        last = max((at for at, one in enumerate(whole) if one in ends), default=len(whole))
        return ids, boundaries, whole[len(ids) : max(len(ids), last + has_end)]

    def _digest(self, content: object) -> str:
        raw = json.dumps(content).encode("utf-8", "replace")
        return hashlib.blake2b(raw, key=self._key, digest_size=8).hexdigest()


def read_answer(raw: bytes) -> tuple[JsonObject, bool]:
    """Return the first choice of an answer, which is one object or events, as a message of the
    assistant, and whether the model ended it. Incomplete events are omitted. O(size)."""
    text, reasoning, has_end = "", "", False
    calls: dict[int, list[str]] = {}
    for answer in _objects(raw.decode("utf-8", "replace")):
        for choice in answer.get("choices") or ():
            if choice.get("index", 0):
                continue
            has_end |= choice.get("finish_reason") in ("stop", "tool_calls")
            said = choice.get("delta") or choice.get("message") or {}
            text += said.get("content") or ""
            reasoning += thoughts_of(said)
            for place, call in enumerate(said.get("tool_calls") or ()):
                known = calls.setdefault(call.get("index", place), ["", ""])
                function = call.get("function") or {}
                known[0] += function.get("name") or ""
                known[1] += function.get("arguments") or ""
    message: JsonObject = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for _, (name, arguments) in sorted(calls.items())
        ]
    return message, has_end


def _objects(text: str) -> Iterator[dict[str, Any]]:
    events = [line[5:] for line in text.split("\n") if line.startswith("data:")]
    for found in [text] if text.lstrip().startswith("{") else events:
        with suppress(ValueError):
            if isinstance(parsed := json.loads(found), dict):
                yield parsed


def _line(content: Fields) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _beginning(body: Fields) -> object:
    """Return the beginning of a conversation, up to the first message of the user."""
    messages = body["messages"]
    roles = [message.get("role") for message in messages]
    return messages[: roles.index("user") + 1 if "user" in roles else 1]


def _text(message: Fields) -> str:
    """Return a message in the plain form, without its header and its end."""
    functions = [call.get("function") for call in message.get("tool_calls") or ()]
    calls = json.dumps(functions, sort_keys=True) if functions else ""
    return f"{message.get('reasoning_content') or ''}{message['content']}{calls}"


def _piece_ids(texts: Iterable[str]) -> list[int]:
    """Return the ids of consecutive texts without a tokenizer. No id spans two of them."""
    pieces = (text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE))
    raw = (piece.encode("utf-8", "replace") for piece in pieces)
    digests = (hashlib.blake2b(piece, digest_size=4).digest() for piece in raw)
    return [int.from_bytes(digest, "little") & 0x7FFFFFFF for digest in digests]


class Proxy:
    """ASGI application in front of the server at ``upstream``."""

    def __init__(self, upstream: str, writer: TraceWriter) -> None:
        self._url, self._writer = httpx.URL(upstream), writer
        # httpx has a pool of 100 connections by default, and further requests wait without limit.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        # A proxy of the environment would need the whole address, which ``target`` replaces. With
        # TLS it only sees a tunnel.
        uses_proxies = self._url.scheme == "https"
        self._client = httpx.AsyncClient(timeout=None, limits=limits, trust_env=uses_proxies)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trace")

    def finish(self) -> None:
        """Write all exchanges, running ones too. May be called again."""
        self._thread.shutdown()
        self._writer.finish()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            async with self._client:
                await send({"type": "lifespan.startup.complete"})
                await receive()
            await asyncio.to_thread(self.finish)
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, while its client is connected and the server runs."""
        with suppress(ClientDisconnect, ClientGone, asyncio.CancelledError):
            body = await Request(scope, receive).body()
            await unless_gone(receive, self._pass_on(scope, body, receive, send))

    async def _pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        is_recorded = scope["method"] == "POST" and scope["path"].endswith(RECORDED)
        exchange = self._writer.begin(dict(scope["headers"]), body) if is_recorded else None
        if scope["method"] == "POST" and scope["path"].endswith(ANSWERS) and not is_recorded:
            self._thread.submit(self._writer.skip, "only chat completions are written")
        try:
            answer = await self._client.send(self._request(scope, body), stream=True)
        except (httpx.RequestError, asyncio.CancelledError) as error:
            # An error in the form of the API of the path.
            await self._refusal(error).response(scope)(scope, receive, send)
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            if exchange is not None:
                exchange.answer = answer
            try:
                await _answer(answer, exchange, send)
            finally:
                await answer.aclose()
        finally:
            if exchange is not None:
                self._thread.submit(self._writer.end, exchange)

    def _refusal(self, error: BaseException) -> APIError:
        """Return the answer to a request that ``error`` has kept from being passed on."""
        if isinstance(error, httpx.LocalProtocolError):
            return APIError(400, f"This request cannot be passed on ({error}).")
        if isinstance(error, httpx.RequestError):
            return APIError(502, f"The server at {self._url} does not answer ({error}).")
        return APIError(503, "The recording has ended: send requests to the server itself.")

    def _request(self, scope: Scope, body: bytes) -> httpx.Request:
        """Return the request for upstream, with path and query byte for byte.

        It has the client's address, unless that is of this machine, as the proxy's own.
        ``httpx.AsyncClient.build_request`` is not used: it would add cookies of other clients.
        """
        target = self._url.raw_path.rstrip(b"/") + scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        skipped = CONNECTION | {b"content-length", b"accept-encoding"}
        headers = [(name, value) for name, value in scope["headers"] if name not in skipped]
        if not (client := plain_address(scope["client"][0])).is_loopback:
            headers.append((b"x-forwarded-for", f"{client}".encode()))
        has_body = body or scope["method"] in ("POST", "PUT", "PATCH")
        return httpx.Request(
            scope["method"],
            self._url,
            headers=headers,
            content=body if has_body else None,
            extensions={"target": target},
        )


async def _answer(answer: httpx.Response, exchange: Recording | None, send: Send) -> None:
    """Send ``answer`` as it arrives. An answer that is aborted upstream gets no end, so that
    clients see that it is incomplete."""
    headers = [(name.lower(), value) for name, value in answer.headers.raw]
    kept = [pair for pair in headers if pair[0] not in CONNECTION]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
    try:
        async for piece in answer.aiter_raw():
            if exchange is not None:
                exchange.pieces.append(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except httpx.RequestError as error:
        logger.warning("An answer ended early (%s).", error or type(error).__name__)
        return
    await send({"type": "http.response.body", "body": b""})
