"""/v1/responses: OpenAI's dialect of a conversation that the server may store.

A conversation is a flat list of items. The assistant's items between two messages of the user
(reasoning, text, calls) are one message of a chat; the result of a call is a separate message.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import Json, JsonObject
from engine.front.server.access import Tenant
from engine.front.server.bodies import APIError, FixedObject, checked_tool, json_response, quoted
from engine.front.server.endpoints.chat import PartWriter, as_tool, chat_of, named_event
from engine.front.server.schemas import (
    IGNORED,
    MAX_MESSAGES,
    AnswerLimit,
    ChatRequest,
    Choice,
    Effort,
    Message,
    Name,
    NamedTool,
    OpenAIBody,
    ResponseFormat,
    TextPart,
    parsed_arguments,
    parts_of,
)
from engine.front.server.writers import Call, ServingContext, new_id
from engine.messages import EndSession
from engine.text.answers import Event, ReasoningDelta, ToolCall, joined
from engine.text.bounded import BoundedMemory
from hybridcache.adapters.client_habits import RENDERED, line_of, told

Kind = Literal["reasoning", "message", "function_call"]
KINDS: dict[Kind, tuple[str, str]] = {
    "reasoning": ("rs", "reasoning_text"),
    "message": ("msg", "output_text"),
    "function_call": ("fc", "function_call_arguments"),
}
"""Kind of an item -> (prefix of its id, name of its text in events)."""
NEUTRAL: dict[str, tuple[object, ...] | None] = IGNORED | {
    "background": (False,),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "context_management": ([],),
    "include": ([], ["reasoning.encrypted_content"]),
    "client_metadata": None,
}
"""Parameters of OpenAI's API that are not supported, with the values that have no effect."""


REPEATED = (
    *("instructions", "max_output_tokens", "parallel_tool_calls", "previous_response_id"),
    *("store", "temperature", "top_p"),
)
"""Parameters that a response repeats as they were sent."""


class ContentPart(msgspec.Struct, kw_only=True):
    type: Literal["input_text", "output_text", "text"]
    text: str


class ReasoningPart(msgspec.Struct, kw_only=True):
    text: str


Content = str | Annotated[list[ContentPart], Meta(max_length=MAX_MESSAGES)]


class MessageItem(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    summary: list[ReasoningPart] = []
    content: list[ReasoningPart] = []


class CallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class ResultItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call_output"):
    call_id: str
    output: Content


class ItemReference(msgspec.Struct, kw_only=True, tag_field="type", tag="item_reference"):
    """An item of a stored response by its id, as AI SDK sends earlier answers back."""

    id: str


def plain_item(item: JsonObject, place: str) -> JsonObject:
    """Return an item of a conversation as one that is supported, by default a message.

    A call of a tool that is no function becomes a call with its fields, and a tool that the server
    ran a line of text.
    """
    kind = item.setdefault("type", "message")
    if not isinstance(kind, str) or kind in RENDERED:
        return item
    own = ("type", "id", "status", "call_id", "name", "namespace")
    rest = {name: value for name, value in item.items() if name not in own}
    if "call_id" in item and kind.endswith("_call"):
        given = rest.get("arguments") if len(rest) == 1 and "arguments" in rest else rest
        arguments = given if isinstance(given, str) else msgspec.json.encode(given).decode()
        name = item.get("name") or kind.removesuffix("_call")
        call: JsonObject = {"type": "function_call", "name": name, "arguments": arguments}
        return {"call_id": item["call_id"], **call}
    if "call_id" in item and kind.endswith("_output"):
        output = rest.get("output", rest)
        is_custom = kind == "custom_tool_call_output" and isinstance(output, str | list)
        said = output if is_custom else told(output)
        return {"type": "function_call_output", "call_id": item["call_id"], "output": said}
    line = line_of(item)
    return item if line is None else {"type": "message", "role": "assistant", "content": line}


def plain_tool(tool: JsonObject, place: str) -> JsonObject:
    """Return a tool, by default a function. Raises APIError 400 for an unsupported type."""
    return checked_tool({"type": "function"} | tool, place, served=("function", "namespace"))


AnyItem = MessageItem | ReasoningItem | CallItem | ResultItem


def _joined(namespace: str | None, name: str) -> str:
    """Return the name by which the model calls a function of ``namespace``."""
    return name if namespace is None else f"{namespace}__{name}"


class FunctionTool(msgspec.Struct, kw_only=True, tag_field="type", tag="function"):
    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    def as_told(self) -> JsonObject:
        """Return the tool as part of a response, in which a missing schema is empty."""
        told: JsonObject = msgspec.to_builtins(self)
        return told | {"parameters": self.parameters or {}, "strict": bool(self.strict)}

    def as_tools(self, group: str | None = None, intro: str | None = None) -> list[JsonObject]:
        said = "\n".join(filter(None, (intro, self.description)))
        return [as_tool(_joined(group, self.name), said or None, self.parameters, self.strict)]


class NamespaceTool(msgspec.Struct, kw_only=True, tag_field="type", tag="namespace"):
    """Functions with a common name before theirs, as Codex groups the tools of a server."""

    name: Name
    description: str | None = None
    tools: list[FunctionTool]

    def as_told(self) -> JsonObject:
        told: JsonObject = msgspec.to_builtins(self)
        return told | {"tools": [one.as_told() for one in self.tools]}

    def as_tools(self) -> list[JsonObject]:
        return [tool for one in self.tools for tool in one.as_tools(self.name, self.description)]


AnyTool = FunctionTool | NamespaceTool


class NamedFunction(FixedObject, kw_only=True):
    type: Literal["function"]
    name: Name


class Reasoning(msgspec.Struct, kw_only=True):
    """Reasoning options. Others are ignored: reasoning is returned unchanged, and the template
    decides on that of earlier turns."""

    effort: Effort | None = None
    """``reasoning_effort`` of a chat."""


class TextConfig(msgspec.Struct, kw_only=True):
    format: ResponseFormat | None = None


class ResponsesRequest(OpenAIBody, kw_only=True):
    """POST /v1/responses."""

    NEUTRAL = NEUTRAL
    ENTRIES: ClassVar = {"input": plain_item, "tools": plain_tool}

    input: str | Annotated[list[AnyItem | ItemReference], Meta(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    max_output_tokens: AnswerLimit | None = None
    tools: list[AnyTool] | None = None
    tool_choice: Choice | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None

    @property
    def items(self) -> Sequence[AnyItem | ItemReference]:
        """New items of the conversation. A text is a message of the user."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input

    @property
    def namespaces(self) -> dict[str, tuple[str, str]]:
        """Joined name of a function -> (its namespace, its name)."""
        groups = [tool for tool in self.tools or () if isinstance(tool, NamespaceTool)]
        pairs = [(group.name, one.name) for group in groups for one in group.tools]
        return {_joined(*pair): pair for pair in pairs}

    def as_chat(self, items: Sequence[AnyItem]) -> ChatRequest:
        """Return the chat request of all ``items`` of the conversation. Raises APIError 400 or
        ValueError if a field is not supported. O(all items)."""
        messages = _messages(self.instructions, items)
        if not messages:
            raise APIError(400, "'input' is empty. Send at least one item.")
        asked = self.tool_choice
        return ChatRequest(
            messages=messages,
            tools=[one for tool in self.tools or () for one in tool.as_tools()] or None,
            tool_choice=asked if isinstance(asked, str) else NamedTool.of(asked.name),
            parallel_tool_calls=self.parallel_tool_calls,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            response_format=(self.text or TextConfig()).format,
            metadata=self.hints | (self.metadata or {}),
        )


def _messages(instructions: str | None, items: Sequence[AnyItem]) -> list[Message]:
    """Return the messages of a chat with these ``items``."""
    messages = list[Message]()
    if instructions is not None:
        messages.append(Message(role="system", content=instructions))
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                last = _assistant(messages, has_text=True)
                last.content = _continued(last.content, item.content)
            case MessageItem():
                messages.append(Message(role=item.role, content=_continued(None, item.content)))
            case ReasoningItem():
                thoughts = "\n".join(part.text for part in item.content or item.summary)
                extra: JsonObject = {"reasoning_content": thoughts}
                messages.append(Message(role="assistant", extra=extra))
            case CallItem():
                name = _joined(item.namespace, item.name)
                function: JsonObject = {"name": name, "arguments": parsed_arguments(item.arguments)}
                call: JsonObject = {"id": item.call_id, "type": "function", "function": function}
                last = _assistant(messages)
                last.tool_calls = [*(last.tool_calls or ()), call]
            case ResultItem():
                content, extra = _continued(None, item.output), {"tool_call_id": item.call_id}
                messages.append(Message(role="tool", content=content, extra=extra))
    return messages


def _continued(before: str | list[TextPart] | None, new: Content) -> list[TextPart]:
    """Return the parts of a content that goes on with those of another item."""
    parts = [*parts_of(before)]
    more = [new] if isinstance(new, str) else [part.text for part in new]
    if parts and more:
        more[0] = parts.pop().text + more[0]
    return [*parts, *(TextPart(text=text) for text in more)]


def _assistant(messages: list[Message], has_text: bool = False) -> Message:
    """Return the last message if it is the assistant's and may have a call, or the next text, else
    a new one. Text continues after calls that have no result yet."""
    last = messages[-1] if messages else Message(role="user")
    if last.role != "assistant" or (has_text and last.content is not None and not last.tool_calls):
        messages.append(Message(role="assistant"))
    return messages[-1]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response with the conversation that it ends."""

    items: Sequence[AnyItem]
    """All items from the beginning; entries may be shared with the previous response."""
    items_bytes: int
    """Size of the bodies and responses with these items, counting shared entries fully."""
    content: bytes
    """The response as JSON."""


ITEM_FACTOR = 4
"""Approximate memory of parsed items relative to the size of their JSON."""


class Responses:
    """Answers requests, and stores the responses that requests of the same tenant may continue."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        limit_bytes = int(context.config.responses_mib * 2**20)
        self._store = BoundedMemory[tuple[Tenant, str], StoredResponse | AnyItem](limit_bytes)
        """Responses and the items of their output, by their ids."""

    async def create(self, call: Call, body: ResponsesRequest) -> Response:
        """Answer one request. Raises APIError 400 if the response to continue, or an item that is
        referred to, is not stored."""
        tenant, size, items = call.tenant, call.size, list[AnyItem]()
        if body.previous_response_id is not None:
            before = self._store.get((tenant, body.previous_response_id))
            if not isinstance(before, StoredResponse):
                raise APIError(
                    400,
                    f"Previous response with id {quoted(body.previous_response_id)} not found: "
                    "send the conversation as 'input'.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            size, items = size + before.items_bytes, [*before.items]
        for at, item in enumerate(body.items):
            if isinstance(item, ItemReference):
                found = self._store.get((tenant, item.id))
                if found is None or isinstance(found, StoredResponse):
                    raise APIError(
                        400,
                        f"Item with id {quoted(item.id)} not found: its response was not stored, "
                        "or was evicted to make room. Send the item itself.",
                        param=f"input.{at}.id",
                    )
                size, item = size + len(msgspec.json.encode(found)), found
            items.append(item)
        call = replace(call, size=size)
        chat = await chat_of(call, lambda: body.as_chat(items))

        def keep(response_id: str, output: Sequence[JsonObject], response: JsonObject) -> None:
            if body.store:
                content = msgspec.json.encode(response)
                parsed = msgspec.convert(output, list[AnyItem])
                stored = StoredResponse([*items, *parsed], size + len(content), content)
                num_bytes = ITEM_FACTOR * stored.items_bytes + len(content)
                self._store.put((tenant, response_id), stored, num_bytes)
                for one, item in zip(output, parsed, strict=True):
                    num_bytes = ITEM_FACTOR * len(msgspec.json.encode(one))
                    self._store.put((tenant, str(one["id"])), item, num_bytes)

        return await _ResponsesWriter(call, chat, body, keep).answer(body.stream)

    async def stored(self, request: Request) -> Response:
        """Return a stored response, or remove it; the newest one of a chain ends its session.
        Raises APIError 404 if the tenant has none with this id."""
        response_id = request.path_params["response_id"]
        key = self._context.access.tenant(request.scope), response_id
        stored = self._store.get(key)
        if not isinstance(stored, StoredResponse):
            raise APIError(
                404,
                f"Response with id {quoted(response_id)} not found: it was not stored, or was "
                "evicted to make room.",
            )
        if request.method != "DELETE":
            return Response(stored.content, media_type="application/json")
        self._store.delete(key)
        for item in msgspec.json.decode(stored.content)["output"]:
            self._store.delete((key[0], item["id"]))
        await self._context.engine.ask(EndSession(response_id))
        return json_response({"id": response_id, "object": "response", "deleted": True})


class _ResponsesWriter(PartWriter):
    """Writes one response."""

    FORMAT = "text.format"

    def __init__(
        self,
        call: Call,
        chat: ChatRequest,
        body: ResponsesRequest,
        keep: Callable[[str, Sequence[JsonObject], JsonObject], None],
    ) -> None:
        """``keep`` stores the whole response by its id, with its output."""
        super().__init__(call, chat, new_id("resp", "_"))
        self._keep, self._namespaces = keep, body.namespaces
        self._numbers = itertools.count()
        """Numbers of the next events."""
        self._item: dict[str, Any] = {}
        """Open item."""
        asked = (body.text and body.text.format) or ResponseFormat(type="text")
        self._head = {
            "id": self.answer_id,
            "object": "response",
            "created_at": self._created,
            "background": False,
            **{name: getattr(body, name) for name in REPEATED},
            "metadata": body.metadata or {},
            "model": self._context.model_name,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "text": {"format": msgspec.to_builtins(asked)},
            "tool_choice": msgspec.to_builtins(body.tool_choice),
            "tools": [tool.as_told() for tool in body.tools or ()],
            "truncation": "disabled",
        }

    def whole(self) -> JsonObject:
        for _ in self.parts(joined(self._answer.events)):
            pass
        return self._ended()[-1]

    def write(self, index: int, is_first: bool) -> Iterator[bytes]:
        """Yield the events of the items, at first after ``response.created``."""
        if is_first:
            response = self._response("in_progress", None)
            for name in ("created", "in_progress"):
                yield self._event({"type": f"response.{name}", "response": response})
        yield from map(self._event, self.parts(self._answer.new))

    def end(self) -> Iterator[bytes]:
        *closing, response = self._ended()
        last: JsonObject = {"type": f"response.{response['status']}", "response": response}
        yield from map(self._event, closing)
        yield self._event(last)

    def failed(self, failure: APIError) -> bytes:
        """Return the event of a failure in the middle of a stream."""
        error = {"code": failure.code or "server_error", "message": str(failure)}
        response = self._response("failed", None) | {"error": error}
        return self._event({"type": "response.failed", "response": response})

    def _ended(self) -> list[JsonObject]:
        """Return the last events of the items, then the whole response, which is kept."""
        is_cut = self._answer.finish == "length"
        closing = list(self.close(is_cut))
        status = "incomplete" if is_cut else "completed"
        response = self._response(status, self._usage()) | self._answer.warned
        self._keep(self.answer_id, self.done, response)
        return [*closing, response]

    def _response(self, status: str, usage: JsonObject | None) -> JsonObject:
        is_cut = status == "incomplete"
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [*self.done],
            "usage": usage,
        }

    def _event(self, data: JsonObject) -> bytes:
        return named_event({**data, "sequence_number": next(self._numbers)})

    def _usage(self) -> JsonObject:
        """Return the token counts."""
        output = self._answer.output
        num_prompt, num_new = len(output.prompt_token_ids), len(output.output)
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": output.cached_len, **self.written()},
            "output_tokens": num_new,
            "output_tokens_details": self.thought(),
            "total_tokens": num_prompt + num_new,
        }

    def open(self, one: Event) -> Iterator[JsonObject]:
        fields: dict[str, Any] = {"role": "assistant", "content": []}
        kind: Kind = "message"
        if isinstance(one, ReasoningDelta):
            kind, fields = "reasoning", {"summary": [], "content": []}
        elif isinstance(one, ToolCall):
            kind = "function_call"
            fields = {"call_id": new_id("call", "_"), "name": one.name, "arguments": ""}
            if one.name in self._namespaces:
                fields["namespace"], fields["name"] = self._namespaces[one.name]
        head = {"id": new_id(KINDS[kind][0], "_"), "type": kind, "status": "in_progress"}
        place, item = len(self.done), head | fields
        self._item = item
        yield {"type": "response.output_item.added", "output_index": place, "item": item}
        if kind != "function_call":
            yield self._of_item("content_part.added", part=self._part(""))

    def extend(self, text: str) -> Iterator[JsonObject]:
        yield self._of_item(f"{KINDS[self._item['type']][1]}.delta", delta=text)

    def complete(self, text: str, is_cut: bool) -> Iterator[JsonObject]:
        kind, place = self._item["type"], len(self.done)
        if kind == "function_call":
            content: JsonObject = {"arguments": text}
            yield self._of_item(f"{KINDS[kind][1]}.done", name=self._item["name"], arguments=text)
        else:
            part = self._part(text)
            content = {"content": [part]}
            yield self._of_item(f"{KINDS[kind][1]}.done", text=text)
            yield self._of_item("content_part.done", part=part)
        item = self._item | content | {"status": "incomplete" if is_cut else "completed"}
        yield {"type": "response.output_item.done", "output_index": place, "item": item}
        self.done.append(item)

    def _of_item(self, event: str, **more: Json) -> JsonObject:
        """Return an event of the open item."""
        place = {"item_id": self._item["id"], "output_index": len(self.done)}
        if self._item["type"] != "function_call":
            place["content_index"] = 0
        if self._item["type"] == "message" and "part" not in more:
            more["logprobs"] = []
        return {"type": f"response.{event}", **place, **more}

    def _part(self, text: str) -> JsonObject:
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
