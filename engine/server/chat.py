"""POST /v1/chat/completions: OpenAI's dialect of a chat."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request, Response

from engine.server import response_fields as fields
from engine.server.access import new_id
from engine.server.chat_hooks import ChatDiagnostics
from engine.server.chat_session import ChatAnswer, ChatDelta, ChatSession, ask
from engine.server.context import ServingContext, usage
from engine.server.schemas import ChatRequest
from engine.server.streaming import DONE, EventStream, as_event, event, unless_gone
from engine.text.answers import (
    CallArguments,
    CallBegin,
    Event,
    ReasoningDelta,
    TextDelta,
)
from engine.text.outputs import RequestOutput, SampledToken

QUIET_S = 5.0
"""Seconds without an event after which an empty one is sent. It keeps proxies from closing the
stream while a long call is generated."""


async def chat(context: ServingContext, request: Request, body: ChatRequest) -> Response:
    """Answer one chat request."""
    context.check_limit(body.max_tokens, "max_tokens")
    context.check_limit(body.max_completion_tokens, "max_completion_tokens")
    tenant = context.tenant_of(request, body.cache_salt)
    with context.ids.claimed("chatcmpl", tenant, body.request_id) as answer_id:
        session = await ask(context, body, len(await request.body()), tenant, answer_id)
    diagnostics = session.diagnostics
    writer = _ChatWriter(context, body, diagnostics)
    if body.stream:
        return EventStream(writer.events(session), diagnostics.headers, as_event)
    answers = await unless_gone(request, session.answers())
    outputs = [answer.output for answer in answers]
    headers = diagnostics.headers()
    return await context.answer(outputs, lambda: writer.whole(answers), headers=headers)


class _ChatWriter:
    """Writes a chat's answers, as a whole or as events."""

    def __init__(
        self, context: ServingContext, body: ChatRequest, diagnostics: ChatDiagnostics
    ) -> None:
        self._context = context
        self._diagnostics = diagnostics
        self._body = body
        self._head = {
            "id": diagnostics.answer_id,
            "created": int(time.time()),
            "model": context.model_name,
        }

    def whole(self, answers: Sequence[ChatAnswer]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(answer.events),
                "logprobs": self._scores(answer.output.logprobs),
                "finish_reason": answer.finish,
                **_warning(answer.warning),
                **fields.token_ids(self._body, answer.output, answer.output.token_ids, False),
            }
            for index, answer in enumerate(answers)
        ]
        outputs = [answer.output for answer in answers]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(outputs, self._body.n),
            **self._of_prompt(outputs[0]),
            **fields.cache_details(self._body, outputs),
            **self._told(),
        }

    def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """Return the fields about the prompt, which all answers share."""
        ids = fields.token_ids(self._body, output, (), True)
        ids.pop("token_ids", None)
        return ids | fields.prompt_scores(self._context.tokenizer, self._body, output)

    async def events(self, session: ChatSession) -> AsyncIterator[bytes]:
        """Yield the role of each choice, then one event per output. Text that was sent is never
        retracted."""
        last: dict[int, RequestOutput] = {}
        deltas = [_Deltas() for _ in range(session.num_answers)]
        sent_s = time.monotonic()
        async for news in session.news():
            is_first = not last
            if is_first:
                for index in range(session.num_answers):
                    yield self._event([_choice(index, {"role": "assistant", "content": ""})])
            last[news.index] = news.output
            more = self._of_prompt(news.output) if is_first else {}
            if self._body.repeats_usage:
                more["usage"] = usage(list(last.values()), len(last))
            choice = self._delta(deltas[news.index], news)
            if more or choice != _choice(news.index, {}) or sent_s + QUIET_S < time.monotonic():
                sent_s = time.monotonic()
                yield self._event([choice], **more)
        outputs = [last[index] for index in range(session.num_answers)]
        if details := fields.cache_details(self._body, outputs):
            yield self._event([], **details)
        if self._body.includes_usage:
            yield self._event([], usage=usage(outputs, self._body.n), **self._told())
        elif told := self._told():
            yield self._event([], **told)
        yield DONE

    def _told(self) -> dict[str, Any]:
        """Return the explanation of cache misses, if it was requested."""
        return self._diagnostics.told() | self._diagnostics.diagnostics()

    def _delta(self, deltas: _Deltas, news: ChatDelta) -> dict[str, Any]:
        scores = self._scores(news.output.new_logprobs)
        choice = _choice(news.index, deltas.write(news.events), scores, news.finish)
        new = news.output.new_token_ids
        choice |= _warning(news.warning)
        return choice | fields.token_ids(self._body, news.output, new, False)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})

    def _scores(self, scores: Sequence[SampledToken] | None) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return fields.chat_scores(
            self._context.tokenizer, scores or (), self._body.top_logprobs or 0
        )


def _warning(warning: str | None) -> dict[str, Any]:
    return {} if warning is None else {"warning": warning}


def _choice(
    index: int,
    delta: dict[str, Any],
    scores: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish_reason}


def _message(events: Sequence[Event]) -> dict[str, Any]:
    """Return an answer as a message that clients can send back unchanged."""
    delta = _Deltas().write(events)
    message = {"role": "assistant", "content": delta.pop("content", ""), "refusal": None, **delta}
    for call in message.get("tool_calls", ()):
        del call["index"]
        if not message["content"]:
            message["content"] = None
    return message


class _Deltas:
    """Writes the events of one answer as deltas of its message. Calls are numbered, and named in
    their first delta."""

    def __init__(self) -> None:
        self._num_calls = 0

    def write(self, events: Sequence[Event]) -> dict[str, Any]:
        """Write all of ``events`` as one delta. O(their length)."""
        texts: dict[str, list[str]] = {}
        calls: list[dict[str, Any]] = []
        arguments: list[list[str]] = []
        for one in events:
            match one:
                case ReasoningDelta(text):
                    texts.setdefault("reasoning_content", []).append(text)
                case TextDelta(text):
                    texts.setdefault("content", []).append(text)
                case CallBegin(name):
                    head = {
                        "id": new_id("call", "_"),
                        "type": "function",
                        "function": {"name": name},
                    }
                    calls.append({"index": self._num_calls, **head})
                    arguments.append([])
                    self._num_calls += 1
                case CallArguments(text):
                    if not calls:
                        calls.append({"index": self._num_calls - 1, "function": {}})
                        arguments.append([])
                    arguments[-1].append(text)
        for call, pieces in zip(calls, arguments, strict=True):
            call["function"]["arguments"] = "".join(pieces)
        delta: dict[str, Any] = {name: "".join(pieces) for name, pieces in texts.items()}
        return delta | ({"tool_calls": calls} if calls else {})
