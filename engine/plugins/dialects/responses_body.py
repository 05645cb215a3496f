"""Request bodies of /v1/responses, and their conversion to a chat.

A conversation is a flat list of items. The assistant's items between two messages of the user
(reasoning, text, calls) are one message of a chat; the result of a call is a separate message.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from engine.server.api_errors import APIError, of_validation, quoted
from engine.server.schemas import (
    MAX_TEMPERATURE,
    AnswerLimit,
    CacheOptions,
    ChatRequest,
    Effort,
    Listed,
    Name,
    NamedSchema,
    Streamed,
    Strict,
    Unused,
    Verbosity,
    parsed_arguments,
    without_what_asks_for_nothing,
)

ITEMS = ("message", "reasoning", "function_call", "function_call_output")
TEXTS = ("input_text", "output_text", "text")
Included = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""Values of ``include``: parts of items that answers never contain. Reasoning is returned as text
and never encrypted."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "conversation": (),
    "prompt": (),
    "max_tool_calls": (),
    "top_logprobs": (0,),
    "context_management": ([],),
}
"""Parameters of OpenAI's API that are not supported, with the values that have no effect."""


def _known_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in TEXTS:
        raise ValueError(f"This model supports text only: remove the {quoted(kind)} part.")
    return part


def _known_item(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    kind = "message" if item.get("type") is None else item["type"]
    if kind not in ITEMS:
        raise ValueError(f"{quoted(str(kind))} items are not supported: remove them.")
    return item | {"type": kind}


class ContentPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = Field(default=None, exclude=True)
    """Added by OpenAI's client according to the requested format; ignored."""


class ReasoningPart(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


Parts = Listed[Annotated[ContentPart, BeforeValidator(_known_part)]]


class Item(Strict):
    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    phase: str | None = None


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: Listed[ReasoningPart] | None = None
    content: Listed[ReasoningPart] | None = None
    encrypted_content: str | None = None

    @model_validator(mode="after")
    def _can_be_read(self) -> ReasoningItem:
        if self.encrypted_content is not None and not self.content:
            raise ValueError("Encrypted reasoning is not supported: remove it.")
        return self


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str
    caller: dict[str, Any] | None = None
    parsed_arguments: Any = Field(default=None, exclude=True)
    """Added by OpenAI's client; ignored."""


class ResultItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts


AnyItem = MessageItem | ReasoningItem | CallItem | ResultItem
InputItem = Annotated[Annotated[AnyItem, Field(discriminator="type")], BeforeValidator(_known_item)]
_ITEMS: TypeAdapter[list[AnyItem]] = TypeAdapter(Listed[InputItem])


def _is_function(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind is not None and kind not in ("function", "namespace"):
        raise ValueError(f"{quoted(str(kind))} tools are not supported: use functions.")
    return tool


def _joined(namespace: str | None, name: str) -> str:
    """Return the name by which the model calls a function of ``namespace``."""
    return name if namespace is None else f"{namespace}__{name}"


class FunctionTool(Strict):
    """A function. ``strict`` is ignored: arguments are returned as the model writes them."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = Field(default=None, exclude=True)

    def as_tool(self) -> dict[str, Any]:
        fields = {"name", "description", "parameters", "strict"}
        function = self.model_dump(include=fields, exclude_none=True)
        return {"type": "function", "function": function}


class NamespaceTool(Strict):
    """Functions with a common name before theirs, as Codex groups the tools of a server."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Listed[Annotated[FunctionTool, BeforeValidator(_is_function)]]

    def as_tools(self) -> Iterator[dict[str, Any]]:
        """Yield the functions, each with the description of all and its joined name."""
        for one in self.tools:
            said = "\n".join(text for text in (self.description, one.description) if text)
            changed = {"name": _joined(self.name, one.name), "description": said or None}
            yield one.model_copy(update=changed).as_tool()


class NamedFunction(Strict):
    type: Literal["function"]
    name: Name


Summary = Literal["auto", "concise", "detailed"]


class Reasoning(Strict):
    """Reasoning options. ``summary`` is ignored: reasoning is returned unchanged."""

    effort: Effort | None = None
    """``reasoning_effort`` of a chat."""
    summary: Summary | None = None
    generate_summary: Summary | None = None
    context: Literal["auto", "all_turns"] | None = None
    """Ignored: the template decides on the reasoning of earlier turns."""


class TextFormat(NamedSchema):
    """``response_format`` of a chat with the fields of its schema on one level."""

    type: Literal["text", "json_object", "json_schema"]

    @model_validator(mode="after")
    def _says_one_thing(self) -> TextFormat:
        if self.type != "json_schema" and self._rest:
            raise ValueError(f"A 'text.format' of type {self.type} must not have other fields.")
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("A 'text.format' of type json_schema requires a 'schema'.")
        return self

    def of_chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": self._rest}

    @property
    def _rest(self) -> dict[str, Any]:
        return self.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Verbosity | None = None

    def as_asked(self) -> dict[str, Any]:
        """Return the format as it appears in a response."""
        asked = self.format or TextFormat(type="text")
        return asked.model_dump(exclude_none=True, by_alias=True)

    @property
    def form(self) -> dict[str, Any] | None:
        return None if self.format is None else self.format.of_chat()


Tool = Annotated[
    Annotated[FunctionTool | NamespaceTool, Field(discriminator="type")],
    BeforeValidator(_is_function),
]


class ResponsesRequest(Streamed, Unused):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Listed[InputItem]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    max_output_tokens: AnswerLimit | None = None
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(default=None, gt=0, le=1)
    tools: Listed[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: Listed[Included] | None = None
    metadata: dict[str, str] | None = None
    client_metadata: dict[str, str] | None = None
    """Ignored. Sent by Codex."""
    prompt_cache_options: CacheOptions | None = None
    cache_salt: str | None = None
    """Requests with different salts share neither cache entries nor stored responses."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        return without_what_asks_for_nothing(body, NEUTRAL)

    @property
    def items(self) -> list[dict[str, Any]]:
        """The input as items in plain data."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return [item.model_dump(exclude_none=True) for item in self.input]

    def _functions(self) -> Iterator[dict[str, Any]]:
        for tool in self.tools or ():
            yield from tool.as_tools() if isinstance(tool, NamespaceTool) else [tool.as_tool()]

    @property
    def namespaces(self) -> dict[str, tuple[str, str]]:
        """Joined name of a function -> (its namespace, its name)."""
        groups = [tool for tool in self.tools or () if isinstance(tool, NamespaceTool)]
        pairs = [(group.name, one.name) for group in groups for one in group.tools]
        return {_joined(*pair): pair for pair in pairs}

    def as_chat(self, before: Sequence[dict[str, Any]]) -> ChatRequest:
        """Return the chat request, after the items of earlier responses. Raises APIError 400 if a
        field is not supported. O(all items)."""
        conversation = [*before, *self.items]
        try:
            items = _ITEMS.validate_python(conversation)
        except ValidationError as error:
            raise of_validation(error, conversation) from None
        messages = _messages(self.instructions, items)
        if not messages:
            raise APIError(400, "'input' is empty. Send at least one item.", param="input")
        choice: Any = self.tool_choice
        options = self.prompt_cache_options
        if isinstance(choice, NamedFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        try:
            return ChatRequest.of(
                {
                    "model": self.model,
                    "messages": messages,
                    "tools": list(self._functions()) or None,
                    "tool_choice": choice,
                    "parallel_tool_calls": self.parallel_tool_calls,
                    "max_completion_tokens": self.max_output_tokens,
                    "temperature": self.temperature,
                    "top_p": self.top_p,
                    "reasoning_effort": self.reasoning and self.reasoning.effort,
                    "response_format": None if self.text is None else self.text.form,
                    "cache_salt": self.cache_salt,
                    "prompt_cache_options": options and options.model_dump(),
                    "metadata": self.metadata,
                },
                "text.format",
            )
        except ValueError as error:
            raise APIError(400, str(error), param="input") from error


def _messages(instructions: str | None, items: Sequence[AnyItem]) -> list[dict[str, Any]]:
    """Return the messages of a chat. Templates support one system message at the beginning, so
    instructions and developer messages at the beginning are joined."""
    beginning = list(itertools.takewhile(_is_system, items))
    texts = [] if instructions is None else [instructions]
    texts.extend(_text(item.content) for item in beginning if isinstance(item, MessageItem))
    messages: list[dict[str, Any]] = []
    if texts:
        messages.append({"role": "system", "content": "\n\n".join(texts)})
    for item in items[len(beginning) :]:
        match item:
            case MessageItem(role="assistant"):
                _add_to_assistant(messages, "content", [_text(item.content)])
            case MessageItem(role="user"):
                messages.append({"role": "user", "content": _text(item.content)})
            case MessageItem():
                messages.append({"role": "system", "content": _text(item.content)})
            case ReasoningItem():
                thoughts = "\n".join(part.text for part in item.content or item.summary or ())
                _add_to_assistant(messages, "reasoning_content", thoughts)
            case CallItem():
                name = _joined(item.namespace, item.name)
                function = {"name": name, "arguments": parsed_arguments(item.arguments)}
                call = {"id": item.call_id, "type": "function", "function": function}
                _add_to_assistant(messages, "tool_calls", [call])
            case ResultItem():
                result = {"role": "tool", "tool_call_id": item.call_id}
                messages.append({**result, "content": _text(item.output)})
    for message in messages:
        if message["role"] == "assistant" and "content" in message:
            message["content"] = "".join(message["content"])
    return messages


def _text(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _is_system(item: AnyItem) -> bool:
    return isinstance(item, MessageItem) and item.role in ("system", "developer")


ORDER = ("reasoning_content", "content", "tool_calls")
"""Order of the parts in an assistant's message."""


def _add_to_assistant(messages: list[dict[str, Any]], field: str, value: Any) -> None:
    """Add ``value`` to the last message if it is the assistant's and has no later part yet, else
    append a message. Calls may occur several times, and text continues after calls that have no
    result yet."""
    last: dict[str, Any] = messages[-1] if messages else {"role": None}
    is_open = field == "tool_calls" or (field == "content" and "tool_calls" in last)
    taken = () if is_open else ORDER[ORDER.index(field) :]
    if last["role"] != "assistant" or any(name in last for name in taken):
        messages.append({"role": "assistant", field: value})
    elif field in last:
        last[field].extend(value)
    else:
        last[field] = value
