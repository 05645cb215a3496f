"""POST /v1/messages: Anthropic's dialect of a chat."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import Request, Response

from engine.plugins.dialects.anthropic_body import CountRequest, MessagesRequest
from engine.server.access import AnswerId, new_id
from engine.server.api_errors import ANTHROPIC, APIError, request_name
from engine.server.bodies import EventStream, named_event, to_json, unless_gone, with_pauses
from engine.server.chat import ChatDelta, ChatSession, Finish, ask, render, settle_system
from engine.server.context import ServingContext
from engine.server.schemas import ChatRequest, parsed_arguments
from engine.text.answers import (
    CallArguments,
    CallBegin,
    CallEnd,
    Event,
    ReasoningDelta,
    TextDelta,
)
from engine.text.outputs import RequestOutput

PING_S = 10.0
"""Silence after which a stream sends a ping."""
REASONS: dict[Finish | None, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}


async def messages(context: ServingContext, request: Request, body: MessagesRequest) -> Response:
    """Answer one request.

    ``max_tokens`` may be more than the context. It is required, so clients send that of Anthropic's
    models: Claude Code 32,000, pydantic-ai 16,384.
    """
    size = len(await request.body())
    tenant = context.tenant_of(request, body.cache_salt)
    chat = await _chat_of(context, body, size)
    session = await ask(context, chat, size, tenant, AnswerId.random("msg", "_"))
    writer = _MessagesWriter(context, body, session)
    if body.stream:
        name = request_name(request.scope)

        def as_event(failure: APIError) -> bytes:
            return named_event(failure.body(ANTHROPIC, name))

        return EventStream(writer.events(), session.diagnostics.headers, as_event, context.pause_s)
    [answer] = await unless_gone(request.receive, session.answers())
    headers = session.diagnostics.headers()
    return await context.answer([answer.output], lambda: writer.whole(answer), headers=headers)


async def count_tokens(context: ServingContext, request: Request, body: CountRequest) -> Response:
    """Return the length of the prompt of a request."""
    context.check_model(body.model)
    size = len(await request.body())
    tenant = context.tenant_of(request, body.cache_salt)
    prompt, _ = await render(context, await _chat_of(context, body, size), size, tenant)
    counts = {"input_tokens": len(prompt.token_ids)}
    return Response(to_json(counts), media_type="application/json")


async def _chat_of(context: ServingContext, body: CountRequest, size: int) -> ChatRequest:
    chat = await context.workers.run(size, body.as_chat)
    return settle_system(context, chat)


class _MessagesWriter:
    """Writes one answer, as a whole or as events."""

    def __init__(
        self, context: ServingContext, body: MessagesRequest, session: ChatSession
    ) -> None:
        self._context = context
        self._body = body
        self._session = session
        # The answer says that no edit was applied.
        asked = body.context_management is not None
        self._told: dict[str, Any] = {"context_management": {"applied_edits": []}} if asked else {}
        thinking = body.thinking
        self._omits_thinking = thinking is not None and thinking.display == "omitted"

    def whole(self, answer: ChatDelta) -> dict[str, Any]:
        ending = self._ending(answer)
        content = _content(answer.events, self._omits_thinking)
        return self._message(content, ending, self._usage(answer.output)) | self._told

    async def events(self) -> AsyncIterator[bytes]:
        """Yield ``message_start`` with the first output, which has the cached length, then one
        block at a time, and ``ping`` in pauses."""
        blocks = _Blocks(self._omits_thinking)
        has_begun = False
        async for news in with_pauses(self._session.news(), PING_S):
            if news is None:
                if has_begun:
                    yield named_event({"type": "ping"})
                continue
            if not has_begun:
                has_begun = True
                message = self._message([], _NO_ENDING, self._usage(news.output))
                yield named_event({"type": "message_start", "message": message})
                yield named_event({"type": "ping"})
            said = b"".join(map(named_event, blocks.write(news.events)))
            if said:
                yield said
            if news.finish is not None:
                last: dict[str, Any] = {"type": "message_delta", "delta": self._ending(news)}
                last |= {"usage": self._usage(news.output)} | self._told
                closing = [*blocks.close(), last, {"type": "message_stop"}]
                yield b"".join(map(named_event, closing))

    def _message(
        self, content: list[dict[str, Any]], ending: dict[str, Any], usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._session.diagnostics.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._context.model_name,
            "content": content,
            **ending,
            "usage": usage,
            **self._session.diagnostics.diagnostics(),
        }

    def _ending(self, answer: ChatDelta) -> dict[str, Any]:
        """Return the reason of the end, and a warning if there is one."""
        finish, output = answer.finish, answer.output
        reason, stop = REASONS.get(finish, "end_turn"), None
        if finish == "length" and len(output.output) < self._body.max_tokens:
            reason = "model_context_window_exceeded"
        elif finish == "stop" and self._body.stop_sequences:
            stop = self._stop_of(output, self._body.stop_sequences)
            reason = reason if stop is None else "stop_sequence"
        ending = {"stop_reason": reason, "stop_sequence": stop}
        return ending if answer.warning is None else ending | {"warning": answer.warning}

    def _stop_of(self, output: RequestOutput, stops: Sequence[str]) -> str | None:
        """Return the stop sequence that ended an answer, which follows its text, or None.
        O(tokens)."""
        text = self._context.tokenizer.decode(output.token_ids)
        met = [stop for stop in stops if text.startswith(stop, len(output.text))]
        return min(met, key=len, default=None)

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        """Return the token counts; the three counts of input sum to the prompt.

        ``cache_creation_input_tokens`` counts the tokens computed up to the last mark of
        ``cache_control``.
        """
        prompt, num_cached = self._session.prompt, output.cached_len
        marked = [*prompt.cuts, *(prompt.boundaries[-1:] if self._body.marks_end else ())]
        num_created = max(0, max(marked, default=0) - num_cached)
        return {
            "input_tokens": len(output.prompt_token_ids) - num_cached - num_created,
            "cache_creation_input_tokens": num_created,
            "cache_read_input_tokens": num_cached,
            "output_tokens": len(output.output),
        }


_NO_ENDING = {"stop_reason": None, "stop_sequence": None}


def _content(events: Sequence[Event], omits_thinking: bool) -> list[dict[str, Any]]:
    """Return an answer as blocks."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for one in events:
        match one:
            case ReasoningDelta(text):
                sign = _signature(hashlib.sha256(text.encode()))
                shown = "" if omits_thinking else text
                blocks.append({"type": "thinking", "thinking": shown, "signature": sign})
            case TextDelta(text):
                blocks.append({"type": "text", "text": text})
            case CallBegin(name):
                blocks.append(_tool_use(name))
                arguments = ""
            case CallArguments(text):
                arguments += text
            case CallEnd():
                blocks[-1]["input"] = parsed_arguments(arguments)
    return blocks


def _tool_use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu", "_"), "name": name, "input": {}}


def _signature(digest: Any) -> str:
    """Return a signature. Clients drop thinking without one; it proves nothing."""
    return str(digest.hexdigest())


class _Blocks:
    """Writes events as blocks, of which one is open at a time."""

    def __init__(self, omits_thinking: bool) -> None:
        self._omits_thinking = omits_thinking
        self._index = -1
        self._open: type[Event] | None = None
        self._thoughts = hashlib.sha256()

    def write(self, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        for one in events:
            match one:
                case ReasoningDelta(text):
                    empty = {"type": "thinking", "thinking": "", "signature": ""}
                    yield from self._turn_to(ReasoningDelta, empty)
                    self._thoughts.update(text.encode())
                    if self._omits_thinking:
                        continue
                    yield self._delta({"type": "thinking_delta", "thinking": text})
                case TextDelta(text):
                    yield from self._turn_to(TextDelta, {"type": "text", "text": ""})
                    yield self._delta({"type": "text_delta", "text": text})
                case CallBegin(name):
                    yield from self.close()
                    yield from self._turn_to(CallBegin, _tool_use(name))
                case CallArguments(text):
                    yield self._delta({"type": "input_json_delta", "partial_json": text})
                case CallEnd():
                    yield from self.close()

    def close(self) -> Iterator[dict[str, Any]]:
        """End the open block, if there is one."""
        if self._open is ReasoningDelta:
            sign = _signature(self._thoughts)
            yield self._delta({"type": "signature_delta", "signature": sign})
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _turn_to(self, kind: type[Event], block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open is kind:
            return
        yield from self.close()
        self._open = kind
        self._index += 1
        self._thoughts = hashlib.sha256()
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
