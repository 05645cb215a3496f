"""Request bodies of Anthropic's /v1/messages, and their conversion to a chat.

Blocks become the messages of chat templates: a tool result is a separate message, thinking is the
assistant's ``reasoning_content``, and a tool use is one of its calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.requests.spec import MAX_COUNT
from engine.server.api_errors import APIError, quoted
from engine.server.schemas import (
    MAX_TEMPERATURE,
    AnswerLimit,
    CacheControl,
    ChatRequest,
    Diagnostics,
    Listed,
    Name,
    Strict,
    Texts,
    without_what_asks_for_nothing,
)

BLOCKS = ("text", "thinking", "tool_use", "tool_result")
BILLING = "x-anthropic-billing-header:"
"""Start of a system block that Claude Code writes for Anthropic's servers. It differs in every
request, so the prompt is made without it: otherwise no request would find a cached prefix."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _is_known(block: Any) -> Any:
    """Check the type of a block. Unknown types are refused by name."""
    if (
        isinstance(block, dict)
        and isinstance(kind := block.get("type"), str)
        and kind not in BLOCKS
    ):
        raise ValueError(f"{quoted(kind)} blocks are not supported: this model supports text only.")
    return block


class Text(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: list[Any] | None = Field(default=None, max_length=0)
    parsed_output: Any = Field(default=None, exclude=True)
    """Added by Anthropic's client according to the requested format; ignored."""


class Thinking(Strict):
    """Thinking of an earlier answer. ``signature`` is not checked, because clients may write
    thinking themselves."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUse(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None


TextBlocks = Listed[Annotated[Text, BeforeValidator(_is_known)]]


class ToolResult(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | TextBlocks | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    def as_message(self) -> dict[str, Any]:
        """Return the tool message. Templates do not support failed tools, so the failure is added
        to the text."""
        parts = [self.content] if isinstance(self.content, str) else self.content or []
        texts = [part if isinstance(part, str) else part.text for part in parts]
        text = "\n".join(texts)
        if self.is_error and not text.lower().startswith("error"):
            text = f"Error: {text}"
        nested = [part.cache_control for part in parts if not isinstance(part, str)]
        marks = [one for one in (self.cache_control, *nested) if one is not None]
        message = {"role": "tool", "tool_call_id": self.tool_use_id, "content": text}
        return message | ({"cache_control": marks[0].model_dump()} if marks else {})


Block = Annotated[
    Annotated[Text | Thinking | ToolUse | ToolResult, Field(discriminator="type")],
    BeforeValidator(_is_known),
]


class Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | Listed[Block]

    def as_messages(self) -> Iterator[dict[str, Any]]:
        """Yield the chat messages of this message, in the order of its blocks."""
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
        elif self.role == "assistant":
            yield _of_assistant(self.content)
        else:
            yield from _of_user(self.role, self.content)


def _of_assistant(blocks: list[Block]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    texts: list[list[Text]] = []
    is_after_call = False
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, Text):
            if texts and is_after_call:
                texts[-1].append(block)
            else:
                texts.append([block])
            is_after_call = False
        elif isinstance(block, Thinking):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUse):
            is_after_call = True
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
            if block.cache_control is not None:
                message["cache_control"] = block.cache_control.model_dump()
        else:
            raise ValueError("A 'tool_result' must be in a message of the user.")
    message["content"] = [_joined(group) for group in texts]
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _of_user(role: str, blocks: list[Block]) -> Iterator[dict[str, Any]]:
    texts: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, Text):
            texts.append(_part(block))
        elif isinstance(block, ToolResult):
            if texts:
                yield {"role": role, "content": texts}
                texts = []
            yield block.as_message()
        else:
            raise ValueError(f"A '{block.type}' must be in a message of the assistant.")
    if texts or not blocks:
        yield {"role": role, "content": texts}


def _joined(blocks: list[Text]) -> dict[str, Any]:
    """Return the text of one answer, which calls divide into ``blocks``, as one part."""
    part: dict[str, Any] = {}
    for block in blocks:
        part |= _part(block)
    return part | {"text": "".join(block.text for block in blocks)}


def _part(block: Text) -> dict[str, Any]:
    return block.model_dump(exclude={"citations"}, exclude_none=True)


def _is_custom(tool: Any) -> Any:
    if isinstance(tool, dict) and tool.get("type") not in (None, "custom"):
        raise ValueError(f"{quoted(str(tool['type']))} tools are not supported: use custom tools.")
    return tool


class Tool(Strict):
    """A custom tool. ``eager_input_streaming`` is ignored: input is sent when it is complete."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: CacheControl | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: Listed[Literal["direct"]] | None = None

    def as_tool(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        tool = {"type": "function", "function": function | {"parameters": self.input_schema}}
        mark = self.cache_control
        return tool if mark is None else tool | {"cache_control": mark.model_dump()}


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _names_its_tool(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError(
                "A 'tool_choice' must have a 'name' if its type is 'tool', and only then."
            )
        return self

    def as_choice(self) -> str | dict[str, Any]:
        if self.name is not None:
            return {"type": "function", "function": {"name": self.name}}
        return CHOICES[self.type]


class ThinkingConfig(Strict):
    """Thinking ends at the latest after ``budget_tokens``."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    display: Literal["summarized", "omitted"] | None = None
    """``omitted``: thinking blocks have a signature and no text."""


class JSONFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Variable ``reasoning_effort`` of the template."""
    format: JSONFormat | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens: the fields that determine the prompt."""

    model: str
    messages: Listed[Message] = Field(min_length=1)
    system: str | TextBlocks | None = None
    tools: Listed[Annotated[Tool, BeforeValidator(_is_custom)]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    """Later prompts will share all of this one."""
    diagnostics: Diagnostics | None = None
    cache_salt: str | None = None
    """Requests with different salts share no cache entries."""
    service_tier: Literal["auto", "standard_only"] | None = None
    """Ignored."""
    speed: Literal["standard"] | None = None
    """Ignored."""
    context_management: dict[str, Any] | None = None
    """Ignored: the answer says that no edit was applied."""
    metadata: Any = None
    """Ignored except ``session_end``, which declares that no request of the session follows."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        return without_what_asks_for_nothing(body, {"mcp_servers": ([],), "fallbacks": ([],)})

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> CountRequest:
        if self.messages[-1].role == "assistant":
            raise ValueError(
                "The last message is the assistant's, and continuing an answer is not supported: "
                "end with a message of the user."
            )
        return self

    @property
    def marks_end(self) -> bool:
        """True if ``cache_control`` marks the end of the chat."""
        content = self.messages[-1].content
        last = content[-1] if isinstance(content, list) and content else None
        is_marked = last is not None and getattr(last, "cache_control", None) is not None
        return is_marked or self.cache_control is not None

    def chat_messages(self) -> list[dict[str, Any]]:
        """Return the messages of the chat request. O(blocks)."""
        messages: list[dict[str, Any]] = []
        if isinstance(self.system, str):
            messages.append({"role": "system", "content": self.system})
        elif self.system is not None:
            parts = [_part(part) for part in self.system if not part.text.startswith(BILLING)]
            if parts:
                messages.append({"role": "system", "content": parts})
        for message in self.messages:
            messages.extend(message.as_messages())
        return messages

    def fields(self) -> dict[str, Any]:
        """Return the fields of the chat request, without its messages."""
        choice, config = self.tool_choice, self.output_config or OutputConfig()
        return {
            "model": self.model,
            "diagnostics": self.diagnostics and self.diagnostics.model_dump(),
            "tools": None if self.tools is None else [tool.as_tool() for tool in self.tools],
            "tool_choice": None if choice is None else choice.as_choice(),
            "parallel_tool_calls": choice is None or not choice.disable_parallel_tool_use,
            "chat_template_kwargs": self._switches(config) or None,
            "response_format": None if config.format is None else _format(config.format),
            "cache_salt": self.cache_salt,
            "metadata": self.metadata,
        }

    def _switches(self, config: OutputConfig) -> dict[str, Any]:
        switches: dict[str, Any] = {}
        if config.effort is not None:
            switches["reasoning_effort"] = config.effort
        if self.thinking is not None and self.thinking.type != "adaptive":
            switches["enable_thinking"] = self.thinking.type == "enabled"
        return switches

    def as_chat(self) -> ChatRequest:
        """Return the chat request. Raises APIError 400 if a field is not supported."""
        try:
            fields = self.fields() | {"messages": self.chat_messages()}
            return ChatRequest.of(fields, "output_config.format")
        except ValueError as error:
            raise APIError(400, str(error), param="messages") from error


def _format(asked: JSONFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked.schema_}}


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: AnswerLimit
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_COUNT)
    stop_sequences: Texts | None = None

    @model_validator(mode="after")
    def _answers_after_thinking(self) -> MessagesRequest:
        budget = self.thinking and self.thinking.budget_tokens
        # With tools, the budget may be that of a whole turn (interleaved thinking).
        if budget and budget >= self.max_tokens and not self.tools:
            raise ValueError(
                f"'thinking.budget_tokens' must be below 'max_tokens', {self.max_tokens} (got "
                f"{budget})."
            )
        return self

    def fields(self) -> dict[str, Any]:
        return super().fields() | {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "thinking_token_budget": self.thinking and self.thinking.budget_tokens,
        }
