"""POST /v1/messages: Anthropic's dialect of a chat.

Blocks become the messages of chat templates: a tool result is a separate message, thinking is the
assistant's ``reasoning_content``, and a tool use is one of its calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta
from starlette.responses import Response

from engine.errors import JsonObject
from engine.front.server.bodies import APIError, Body, FixedObject, checked_tool, json_response, run
from engine.front.server.endpoints.chat import PartWriter, as_tool, chat_of, named_event, render
from engine.front.server.schemas import (
    MAX_MESSAGES,
    TTLS_S,
    AnswerLimit,
    CacheControl,
    ChatRequest,
    Choice,
    Message,
    Name,
    NamedTool,
    ResponseFormat,
    Stops,
    Temperature,
    TextPart,
    TopK,
    TopP,
    parts_of,
)
from engine.front.server.writers import Call, new_id
from engine.requests.request import MAX_COUNT
from engine.text.answers import Event, Finish, ReasoningDelta, TextDelta, ToolCall, joined
from engine.text.bounded import read_json

REASONS: dict[Finish | None, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}
DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""Type of a block -> (type of its pieces, name of their text)."""
CHOICES: dict[str, Choice] = {"auto": "auto", "any": "required", "none": "none"}


class Thinking(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    """Thinking of an earlier answer. Its signature is not checked, because clients may write
    thinking themselves."""

    thinking: str


class RedactedThinking(msgspec.Struct, kw_only=True, tag_field="type", tag="redacted_thinking"):
    """Encrypted thinking of another server, which is omitted."""


class ToolUse(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: JsonObject
    cache_control: CacheControl | None = None


class ToolResult(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[TextPart] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    def as_message(self) -> Message:
        """Return the tool message. Templates do not support failed tools, so the failure is added
        to the text."""
        parts = parts_of(self.content or "")
        texts = [part.text for part in parts]
        if self.is_error and not texts[0].lower().startswith("error"):
            texts[0] = f"Error: {texts[0]}"
        marks = [one for one in (self.cache_control, *(p.cache_control for p in parts)) if one]
        return Message(
            role="tool",
            content=[TextPart(text=text) for text in texts],
            cache_control=marks[0] if marks else None,
            extra={"tool_call_id": self.tool_use_id},
        )


Block = TextPart | Thinking | RedactedThinking | ToolUse | ToolResult


class Turn(msgspec.Struct, kw_only=True):
    """One message, in blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Meta(max_length=MAX_MESSAGES)]

    def as_messages(self) -> list[Message]:
        """Return the chat messages of this message, in the order of its blocks."""
        if isinstance(self.content, str):
            return [Message(role=self.role, content=self.content)]
        is_after_call, parts = False, list[TextPart]()
        messages, thoughts = [Message(role=self.role, content=parts)], list[str]()
        for block in self.content:
            match block:
                case TextPart(text=text, cache_control=mark):
                    if parts and is_after_call:  # Calls divide the text of one answer.
                        last = parts.pop()
                        text, mark = last.text + text, mark or last.cache_control
                    parts.append(TextPart(text=text, cache_control=mark))
                case Thinking():
                    thoughts.append(block.thinking)
                    messages[0].extra = {"reasoning_content": "\n".join(thoughts)}
                case ToolUse():
                    function: JsonObject = {"name": block.name, "arguments": block.input}
                    call: JsonObject = {"id": block.id, "type": "function", "function": function}
                    messages[0].tool_calls = [*(messages[0].tool_calls or ()), call]
                    messages[0].cache_control = block.cache_control or messages[0].cache_control
                case RedactedThinking():
                    pass
                case ToolResult():
                    parts = []  # Of a message after the result.
                    messages += block.as_message(), Message(role=self.role, content=parts)
            is_after_call = isinstance(block, ToolUse) or (
                is_after_call and isinstance(block, Thinking | RedactedThinking)
            )
        has_results = len(messages) > 1
        return [one for one in messages if one.content or not has_results or one.role == "tool"]


class CustomTool(msgspec.Struct, kw_only=True):
    """A custom tool."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: JsonObject
    cache_control: CacheControl | None = None
    strict: bool | None = None

    def as_tool(self) -> JsonObject:
        mark = {} if self.cache_control is None else {"cache_control": {"type": "ephemeral"}}
        return as_tool(self.name, self.description, self.input_schema, self.strict) | mark


class ToolChoice(FixedObject, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False

    def __post_init__(self) -> None:
        if self.type == "tool" and self.name is None:
            raise ValueError("'tool_choice.name' is missing: add it.")


class ThinkingConfig(FixedObject, kw_only=True):
    """Thinking ends at the latest after ``budget_tokens``."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=MAX_COUNT)] | None = None
    display: Literal["summarized", "omitted"] | None = None
    """``omitted``: thinking blocks have a signature and no text."""


class OutputConfig(FixedObject, kw_only=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Variable ``reasoning_effort`` of the template."""
    format: ResponseFormat | None = None


class CountRequest(Body, kw_only=True):
    """POST /v1/messages/count_tokens: the fields that determine the prompt."""

    # The cache's own explanations replace ``diagnostics``.
    NEUTRAL: ClassVar = {
        **dict.fromkeys(("diagnostics", "service_tier")),
        **dict.fromkeys(("mcp_servers", "fallbacks"), ([],)),
        "speed": ("standard",),
    }
    ENTRIES: ClassVar = {"tools": partial(checked_tool, served=("custom",))}

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[list[TextPart], Meta(max_length=MAX_MESSAGES)] | None = None
    tools: list[CustomTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    """Later prompts will share all of this one."""
    context_management: Any = None
    """Ignored: the answer says that no edit was applied."""
    metadata: JsonObject | None = None
    thread: Any = None
    """Refused with a code, at which Anthropic's client sends the whole chat without it."""

    def __post_init__(self) -> None:
        if self.thread is not None:
            message, code = "'thread' is not supported: omit it.", "thread_unsupported_request"
            raise APIError(400, message, param="thread", code=code)
        if self.messages[-1].role == "assistant":
            raise ValueError(
                "The last of 'messages' is the assistant's, and continuing an answer is not "
                "supported: end with a message of the user."
            )

    @property
    def end_marks(self) -> list[JsonObject]:
        """The values of ``cache_control`` that mark the end of the chat."""
        content = self.messages[-1].content
        ends = [self, *(content[-1:] if isinstance(content, list) else ())]
        marks = (getattr(one, "cache_control", None) for one in ends)
        return [mark for mark in marks if mark is not None]

    def as_chat(self, **sampling: Any) -> ChatRequest:
        """Return the chat request, with the fields ``sampling``. Raises ValueError if a field is
        not supported. O(blocks)."""
        system = parts_of(self.system)
        messages = [Message(role="system", content=system)] if system else []
        for turn in self.messages:
            messages += turn.as_messages()
        choice = self.tool_choice or ToolChoice(type="auto")
        config = self.output_config or OutputConfig()
        ttls_s = [s for one in self.end_marks if (s := TTLS_S.get(str(one.get("ttl"))))]
        promise: JsonObject = {"returns_within_s": max(ttls_s)} if ttls_s else {}
        switches: JsonObject = {}
        if config.effort is not None:
            switches["reasoning_effort"] = config.effort
        if self.thinking is not None and self.thinking.type != "adaptive":
            switches["enable_thinking"] = self.thinking.type == "enabled"
        return ChatRequest(
            messages=messages,
            tools=None if self.tools is None else [tool.as_tool() for tool in self.tools],
            tool_choice=CHOICES.get(choice.type) or NamedTool.of(choice.name or ""),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            chat_template_kwargs=switches or None,
            response_format=config.format,
            metadata=promise | (self.metadata or {}),
            **sampling,
        )


class MessagesRequest(CountRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: AnswerLimit
    stream: bool = False
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stop_sequences: Stops | None = None

    def as_chat(self, **sampling: Any) -> ChatRequest:
        same = ("max_tokens", "temperature", "top_p", "top_k")
        return super().as_chat(
            **{name: getattr(self, name) for name in same},
            stop=self.stop_sequences,
            thinking_token_budget=self.thinking and self.thinking.budget_tokens,
        )


async def messages(call: Call, body: MessagesRequest) -> Response:
    """Answer one request."""
    chat = await chat_of(call, body.as_chat)
    return await _MessagesWriter(call, chat, body).answer(body.stream)


async def count_tokens(call: Call, body: CountRequest) -> Response:
    """Return the length of the prompt of a request."""
    chat = await chat_of(call, body.as_chat)
    prompt = await run(call.size, partial(render, call, chat))
    return json_response({"input_tokens": len(prompt.tokens)})


class _MessagesWriter(PartWriter):
    """Writes one message."""

    FORMAT = "output_config.format"

    def __init__(self, call: Call, chat: ChatRequest, body: MessagesRequest) -> None:
        super().__init__(call, chat, new_id("msg", "_"))
        self._given = body
        # The answer says that no edit was applied.
        asked = body.context_management is not None
        self._told: JsonObject = {"context_management": {"applied_edits": []}} if asked else {}
        thinking = body.thinking
        self._omits_thinking = thinking is not None and thinking.display == "omitted"
        self._block: dict[str, Any] = {}
        """Open block, without its text."""

    def failed(self, failure: APIError) -> bytes:
        return named_event(failure.body(self._call.request.scope))

    def whole(self) -> JsonObject:
        for _ in (*self.parts(joined(self._answer.events)), *self.close()):
            pass
        return self._message(self.done, self._ending()) | self._told

    def write(self, index: int, is_first: bool) -> Iterator[bytes]:
        """Yield the events of one block at a time, at first after ``message_start``."""
        if is_first:
            message = self._message([], {"stop_reason": None, "stop_sequence": None})
            yield named_event({"type": "message_start", "message": message})
        yield from map(named_event, self.parts(self._answer.new))

    def end(self) -> Iterator[bytes]:
        last: JsonObject = {"type": "message_delta", "delta": self._ending()}
        last |= {"usage": self._usage(), **self._told}
        yield from map(named_event, self.close())
        yield named_event(last)
        yield named_event({"type": "message_stop"})

    def _message(self, content: list[JsonObject], ending: JsonObject) -> JsonObject:
        return {
            "id": self.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._context.model_name,
            "content": content,
            **ending,
            "usage": self._usage(),
        }

    def _ending(self) -> JsonObject:
        """Return the reason of the end, and a warning if there is one. The stop sequence that ended
        the answer follows its text. O(tokens)."""
        finish, output = self._answer.finish, self._answer.output
        reason, stop = REASONS.get(finish, "end_turn"), None
        if finish == "length" and len(output.output) < self._given.max_tokens:
            reason = "model_context_window_exceeded"
        elif finish == "stop" and (stops := self._given.stop_sequences):
            text = self._context.tokenizer.decode(output.token_ids)
            met = [one for one in stops if text.startswith(one, len(output.text))]
            stop = min(met, key=len, default=None)
            reason = reason if stop is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stop, **self._answer.warned}

    def _usage(self) -> JsonObject:
        """Return the token counts; the three counts of input sum to the prompt.

        ``cache_creation_input_tokens`` counts the tokens computed up to the last mark of
        ``cache_control``.
        """
        prompt, output = self._prompt, self._answer.output
        num_cached = output.cached_len
        known = prompt.marks["boundaries"].positions
        marked = [*prompt.cuts, *(known[-1:] if self._given.end_marks else ())]
        num_created = max(0, max(marked, default=0) - num_cached)
        return {
            "input_tokens": len(output.prompt_token_ids) - num_cached - num_created,
            "cache_creation_input_tokens": num_created,
            "cache_read_input_tokens": num_cached,
            "output_tokens": len(output.output),
            "output_tokens_details": {"thinking_tokens": self._answer.num_reasoning_tokens},
        }

    def open(self, one: Event) -> Iterator[JsonObject]:
        block: JsonObject = {"type": "text", "text": ""}
        if isinstance(one, ReasoningDelta):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        elif isinstance(one, ToolCall):
            block = {"type": "tool_use", "id": new_id("toolu", "_"), "name": one.name, "input": {}}
        self._block = block
        yield {"type": "content_block_start", "index": len(self.done), "content_block": block}

    def extend(self, text: str) -> Iterator[JsonObject]:
        if self._kind is not ReasoningDelta or not self._omits_thinking:
            kind, name = DELTAS[self._block["type"]]
            yield self._delta({"type": kind, name: text})

    def complete(self, text: str, is_cut: bool) -> Iterator[JsonObject]:
        block = {**self._block}
        if self._kind is ToolCall:
            block["input"] = read_json(text)
        elif self._kind is TextDelta or not self._omits_thinking:
            block[block["type"]] = text
        if self._kind is ReasoningDelta:
            # Clients drop thinking without a signature; it proves nothing.
            block["signature"] = sign = hashlib.sha256(text.encode()).hexdigest()
            yield self._delta({"type": "signature_delta", "signature": sign})
        yield {"type": "content_block_stop", "index": len(self.done)}
        self.done.append(block)

    def _delta(self, delta: JsonObject) -> JsonObject:
        return {"type": "content_block_delta", "index": len(self.done), "delta": delta}
