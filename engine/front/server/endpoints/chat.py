"""Chats: their prompts, the writers of their answers, OpenAI's chat completions, and the common
parts of the dialects that are translated to and from chats."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from starlette.responses import Response

from engine.errors import Json, JsonObject
from engine.front.chat_prompt import NO_CHAT, ChatPrompt
from engine.front.server.bodies import APIError, run
from engine.front.server.schemas import ChatRequest
from engine.front.server.tool_calls.form import prepared, tool_calls
from engine.front.server.transport import event
from engine.front.server.writers import Call, Writer, finite, new_id, token_text
from engine.text.answers import (
    AnswerReader,
    Event,
    RequestOutput,
    SampledToken,
    TextDelta,
    ToolCall,
    as_message,
)


def render(call: Call, body: ChatRequest) -> ChatPrompt:
    """Return the prompt of a chat. Raises APIError 400 if the template rejects it. O(its size)."""
    context, tenant = call.context, call.tenant
    template = context.tokenizer.chat_template
    if template is None:
        raise APIError(400, NO_CHAT)
    try:
        chat = body.conversation(template, context.switches)
        chat = replace(chat, messages=prepared(chat.messages, template))
        return context.history.render(chat, tenant, tenant.namespace)
    except ValueError as error:
        message = f"The chat template rejects these messages: {error}"
        raise APIError(400, message, param="messages") from error


TEXT_EVENT = b'%b,"choices":[{"index":%d,"delta":{"content":%b},"logprobs":null,'
TEXT_EVENT += b'"finish_reason":null}]}\n\n'
"""Format of an event with text: start of all events, index of the choice, and text as JSON."""


class ChatWriter(Writer):
    """Generates the answers to one chat, reads them as events, and writes OpenAI's chat
    completions. Subclasses write other dialects."""

    KIND, CHUNK_KIND = "chat.completion", "chat.completion.chunk"
    FORMAT = "response_format"
    """The dialect's name of the answer's format."""
    _body: ChatRequest

    async def answer(self, is_stream: bool) -> Response:
        """Submit the chat and return the response. Raises APIError if the chat is refused."""
        context, body, template = self._context, self._body, self._context.tokenizer.chat_template
        prompt = self._prompt = await run(self._call.size, partial(render, self._call, body))
        assert template is not None, "render raises an error without one"
        self._template = template
        calls = tool_calls(body, template) if body.tools else None
        forms = body.forms(self.FORMAT)
        read = AnswerReader if calls is None else calls.reader
        marks, is_thinking = prompt.marks, prompt.marks["is_thinking"]
        self.readers = [
            read(
                thinks=template.thinks,
                is_thinking=is_thinking,
                starts_text=marks["answer_starts_text"],
                end_token_ids=context.tokenizer.eos_token_ids,
            )
            for _ in range(body.n)
        ]
        self._has_only_text = not (body.logprobs or body.return_token_ids)
        self._num_calls = Counter[int]()
        """Number of calls of each answer that were written."""
        if calls is not None:
            marks = {**marks, "call_marks": calls.marks}
            calls.restrict(forms, self.FORMAT, template.thinks and not is_thinking)
        num_scores = (body.top_logprobs or 0) if body.logprobs else None
        limit = body.max_completion_tokens or body.max_tokens
        await self.submit([prompt.tokens], marks, limit, num_scores, forms)
        return await self.respond(is_stream)

    def written(self) -> dict[str, int]:
        """Return the tokens computed up to the last position that later prompts may share."""
        is_off = self._context.engine.config.prefix_cache == "none"
        shared = 0 if is_off else max(self._prompt.marks["boundaries"].positions, default=0)
        return {"cache_write_tokens": max(0, shared - self.outputs[0].cached_len)}

    def thought(self) -> dict[str, int]:
        return {"reasoning_tokens": sum(one.num_reasoning_tokens for one in self.readers)}

    def read(self, index: int, output: RequestOutput) -> RequestOutput:
        """Read the events of the next output. The first call may end it."""
        reader = self.readers[index]
        reader.read(output)
        if reader.finish is not None and not reader.is_over:
            [message] = prepared([as_message(reader.events)], self._template)
            self._context.history.keep(self._prompt, message, output)
        elif reader.is_over and reader.finish is None:
            self._stream.abort("stop", output.request_id)
        return reader.output

    def ended(self) -> None:
        """Also remember the chat with its first answer, for explanations."""
        super().ended()
        if first := self._latest.get(0):
            message = as_message(self.readers[0].events)
            self._context.remember(self.answer_id, self._call, self._body, first, message)

    def whole(self) -> JsonObject:
        choices: list[JsonObject] = [
            {
                "index": index,
                "message": _message(self.readers[index].events),
                **self._more(index, output.logprobs, output.token_ids),
            }
            for index, output in enumerate(self.outputs)
        ]
        ids = self._ids("prompt_token_ids", self.outputs[0].prompt_token_ids)
        return {**self._fields, "choices": choices, "usage": self._usage(), **ids}

    def write(self, index: int, is_first: bool) -> Iterator[bytes]:
        """Yield one event, after the role of the choice if it is its first."""
        news, ids = self.readers[index], dict[str, Json]()
        if not is_first and self._has_only_text and news.finish is None:
            match news.new:  # The usual piece, in a third of the time.
                case [TextDelta(text)] if text:
                    yield TEXT_EVENT % (self._event_head, index, msgspec.json.encode(text))
                    return
        empty: JsonObject = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}
        if is_first:
            if len(self._latest) == 1:
                ids = self._ids("prompt_token_ids", news.output.prompt_token_ids)
            role = {"delta": {"role": "assistant", "content": ""}}
            yield self._chunk([empty | role])
        delta, output = _delta(news.new, self._num_calls[index]), news.output
        self._num_calls[index] += len(delta.get("tool_calls", ()))
        more = self._more(index, output.new_logprobs, output.new_token_ids)
        choice: JsonObject = {"index": index, "delta": delta, **more}
        if ids or choice != empty:
            yield self._chunk([choice], **ids)

    def _more(
        self, index: int, scores: Sequence[SampledToken] | None, token_ids: Sequence[int]
    ) -> JsonObject:
        """Return the fields of a choice, or of a part of it, besides its text."""
        answer = self.readers[index]
        logprobs = self._scores(scores) if self._body.logprobs else None
        told: JsonObject = {"logprobs": logprobs, "finish_reason": answer.finish}
        return told | answer.warned | self._ids("token_ids", token_ids)

    def _scores(self, scores: Sequence[SampledToken] | None) -> JsonObject:
        """Return one object per token, with its best alternatives."""
        tokenizer, num_top = self._context.tokenizer, self._body.top_logprobs or 0

        def entry(token_id: int, logprob: float | None) -> JsonObject:
            return {
                "token": token_text(tokenizer, token_id),
                "logprob": finite(logprob),
                "bytes": list(tokenizer.token_bytes(token_id)),
            }

        content = []
        for score in scores or ():
            rivals = [entry(*pair) for pair in score.top_logprobs[:num_top]]
            content.append({**entry(score.token_id, score.logprob), "top_logprobs": rivals})
        return {"content": content}


async def chat(call: Call, body: ChatRequest) -> Response:
    """Answer one chat request."""
    return await ChatWriter(call, body, new_id("chatcmpl")).answer(body.stream)


def _message(events: Sequence[Event]) -> dict[str, Any]:
    """Return an answer as a message that clients can send back unchanged."""
    delta = _delta(events)
    message = {"role": "assistant", "content": delta.pop("content", ""), "refusal": None, **delta}
    for call in message.get("tool_calls", ()):
        del call["index"]
        if not message["content"]:
            message["content"] = None
    return message


def _delta(events: Sequence[Event], num_calls: int = 0) -> dict[str, Any]:
    """Return ``events`` as one delta of a message that has ``num_calls`` already. O(length)."""
    said = as_message(events)
    delta = dict.fromkeys(("reasoning_content", "reasoning"), said["reasoning_content"])
    delta = {name: text for name, text in (*delta.items(), ("content", said["content"])) if text}
    if calls := [
        {"index": number, "id": new_id("call", "_"), **call}
        for number, call in enumerate(said["tool_calls"], num_calls)
    ]:
        delta["tool_calls"] = calls
    return delta


# --- Other dialects of a chat ---------------------------------------------------------------------


def named_event(data: Mapping[str, Json]) -> bytes:
    """Return one server-sent event named after its ``type``."""
    return event(data, str(data["type"]))


def as_tool(name: str, description: str | None, schema: Json, strict: bool | None) -> JsonObject:
    """Return a function of another dialect as a tool of a chat."""
    function: JsonObject = {"name": name, "description": description, "strict": strict}
    function["parameters"] = schema
    given: JsonObject = {name: one for name, one in function.items() if one is not None}
    return {"type": "function", "function": given}


async def chat_of(call: Call, convert: Callable[[], ChatRequest]) -> ChatRequest:
    """Return the chat that the body of another dialect means. Raises APIError 400 if one of its
    fields is not supported."""
    try:
        return await run(call.size, convert)
    except ValueError as error:
        raise APIError(400, str(error)) from error


class PartWriter(ChatWriter):
    """Writes one answer as a sequence of parts: reasoning, texts and calls."""

    def __init__(self, call: Call, chat: ChatRequest, answer_id: str) -> None:
        super().__init__(call, chat, answer_id)
        self._kind: type[Event] | None = None
        """Kind of the open part, or None."""
        self._pieces: list[str] = []
        """Its text."""
        self.done: list[JsonObject] = []
        """Completed parts."""

    @property
    def _answer(self) -> AnswerReader:
        return self.readers[0]

    def parts(self, events: Sequence[Event]) -> Iterator[JsonObject]:
        """Yield the next parts of the answer."""
        for one in events:
            if self._kind is not type(one):
                yield from self.close()
                self._kind, self._pieces = type(one), []
                yield from self.open(one)
            self._pieces.append(one.arguments if isinstance(one, ToolCall) else one.text)
            yield from self.extend(self._pieces[-1])
            if isinstance(one, ToolCall):
                yield from self.close()

    def close(self, is_cut: bool = False) -> Iterator[JsonObject]:
        """End the open part, if there is one. ``is_cut``: a limit ended the answer inside it."""
        if self._kind is not None:
            yield from self.complete("".join(self._pieces), is_cut)
            self._kind = None

    @abstractmethod
    def open(self, one: Event) -> Iterator[JsonObject]:
        """Yield the beginning of a part."""

    @abstractmethod
    def extend(self, text: str) -> Iterator[JsonObject]:
        """Yield the next piece of the open part: its text or arguments."""

    @abstractmethod
    def complete(self, text: str, is_cut: bool) -> Iterator[JsonObject]:
        """Yield the end of the open part with all its ``text``, and add the part to ``done``."""
