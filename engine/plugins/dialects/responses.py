"""/v1/responses: OpenAI's dialect of a conversation that the server may store."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request, Response

from engine.plugins.dialects.responses_body import ResponsesRequest, TextConfig
from engine.server.access import AnswerId, Tenant, new_id
from engine.server.api_errors import APIError, quoted
from engine.server.bodies import EventStream, named_event, to_json, unless_gone
from engine.server.chat import ChatSession, Finish, ask, settle_system
from engine.server.context import ServingContext
from engine.server.schemas import ChatRequest
from engine.text.answers import (
    CallArguments,
    CallBegin,
    CallEnd,
    Event,
    ReasoningDelta,
    TextDelta,
)
from engine.text.bounded_memory import BoundedMemory
from engine.text.outputs import RequestOutput

Kind = Literal["reasoning", "message", "function_call"]
PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
WORDS: dict[Kind, str] = {
    "reasoning": "reasoning_text",
    "message": "output_text",
    "function_call": "function_call_arguments",
}
"""Name of an item's text in its events."""


class ResponseItems:
    """Writes events; one item is open at a time."""

    def __init__(self, namespaces: Mapping[str, tuple[str, str]]) -> None:
        """``namespaces``: name in a call of the model -> (namespace, name) for the client."""
        self._namespaces = namespaces
        self.output: list[dict[str, Any]] = []
        """Completed items."""
        self._item: dict[str, Any] = {}
        self._kind: Kind | None = None
        self._pieces: list[str] = []

    def write(self, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        for one in events:
            match one:
                case ReasoningDelta(text):
                    yield from self._turn_to("reasoning", {"summary": [], "content": []})
                    yield self._delta(text)
                case TextDelta(text):
                    yield from self._turn_to("message", {"role": "assistant", "content": []})
                    yield self._delta(text)
                case CallBegin(name):
                    yield from self.close("completed")
                    call = {"call_id": new_id("call", "_"), "name": name, "arguments": ""}
                    if name in self._namespaces:
                        call["namespace"], call["name"] = self._namespaces[name]
                    yield from self._turn_to("function_call", call)
                case CallArguments(text):
                    yield self._delta(text)
                case CallEnd():
                    pass  # Closed by the next event, or at the end of the answer.

    def close(self, status: Literal["completed", "incomplete"]) -> Iterator[dict[str, Any]]:
        """End the open item, if there is one."""
        if self._kind is None:
            return
        kind, text = self._kind, "".join(self._pieces)
        done = {"type": f"response.{WORDS[kind]}.done", **self._place()}
        if kind == "function_call":
            yield {**done, "name": self._item["name"], "arguments": text}
            content: dict[str, Any] = {"arguments": text}
        else:
            part = self._part(text)
            yield {**done, "text": text} | ({"logprobs": []} if kind == "message" else {})
            yield {"type": "response.content_part.done", **self._place(), "part": part}
            content = {"content": [part]}
        item = self._item | content | {"status": status}
        yield {
            "type": "response.output_item.done",
            "output_index": len(self.output),
            "item": item,
        }
        self.output.append(item)
        self._kind = None
        self._pieces = []

    def _turn_to(self, kind: Kind, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._kind == kind:
            return
        yield from self.close("completed")
        self._kind = kind
        head = {"id": new_id(PREFIXES[kind], "_"), "type": kind, "status": "in_progress"}
        self._item = head | fields
        index = len(self.output)
        yield {"type": "response.output_item.added", "output_index": index, "item": self._item}
        if kind != "function_call":
            part = self._part("")
            yield {"type": "response.content_part.added", **self._place(), "part": part}

    def _delta(self, text: str) -> dict[str, Any]:
        assert self._kind is not None, "arguments of no call"
        self._pieces.append(text)
        delta = {"type": f"response.{WORDS[self._kind]}.delta", **self._place(), "delta": text}
        return delta | ({"logprobs": []} if self._kind == "message" else {})

    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._item["id"], "output_index": len(self.output)}
        return place if self._kind == "function_call" else place | {"content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


ENTRY_BYTES = 512
"""Size of a stored response without its contents."""


def held_bytes(value: Any) -> int:
    """Return the memory of a JSON ``value`` that shares nothing with other values. O(values in it).

    An object that occurs several times in it, such as a key of a parsed text, counts once.

    >>> held_bytes([{"text": "a" * 1000}]) > 1000
    True
    """
    num_bytes, left, seen = 0, [value], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        num_bytes += sys.getsizeof(one)
        if isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
    return num_bytes


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response with the conversation that it ends."""

    items: list[dict[str, Any]]
    """All items from the beginning; entries may be shared with the previous response."""
    response: dict[str, Any]
    items_bytes: int
    """Memory of the ``items``, counting shared entries fully."""

    @property
    def num_bytes(self) -> int:
        """Memory of the whole entry, counted in the same way. O(values in the response)."""
        return ENTRY_BYTES + self.items_bytes + held_bytes(self.response)


class Responses:
    """Answers requests, and stores the responses that they may continue, separately for each
    tenant."""

    def __init__(self, context: ServingContext, limit_bytes: int) -> None:
        self._context = context
        self._store = BoundedMemory[tuple[Tenant, str], StoredResponse](limit_bytes)

    async def create(self, request: Request, body: ResponsesRequest) -> Response:
        """Answer one request. Raises APIError 400 if the response to continue is not stored."""
        context, size = self._context, len(await request.body())
        context.check_limit(body.max_output_tokens, "max_output_tokens")
        tenant = context.tenant_of(request, body.cache_salt)
        before = None
        if body.previous_response_id is not None:
            before = self._store.get((tenant, body.previous_response_id))
            if before is None:
                raise APIError(
                    400,
                    f"Previous response with id {quoted(body.previous_response_id)} not found: "
                    "send the conversation as 'input'.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            size += before.items_bytes
        earlier = [] if before is None else before.items
        earlier_bytes = 0 if before is None else before.items_bytes

        def read() -> tuple[ChatRequest, list[dict[str, Any]], int]:
            new = body.items
            return body.as_chat(earlier), new, earlier_bytes + held_bytes(new)

        chat, new, items_bytes = await context.workers.run(size, read)
        chat = settle_system(context, chat)
        answer_id = AnswerId.random("resp", "_")
        session = await ask(context, chat, size, tenant, answer_id, prompt_name="input")
        writer = _ResponsesWriter(context, body, session)

        def keep(response: dict[str, Any]) -> None:
            if body.store:
                output = response["output"]
                items = [*earlier, *new, *output]
                stored = StoredResponse(items, response, items_bytes + held_bytes(output))
                self._store.put((tenant, response["id"]), stored, stored.num_bytes)

        if body.stream:
            late = session.diagnostics.headers
            return EventStream(writer.events(keep), late, writer.failed, context.pause_s)
        [answer] = await unless_gone(request.receive, session.answers())
        num_tokens = len(answer.output.output)

        def work() -> dict[str, Any]:
            for _ in writer.items.write(answer.events):
                pass
            return writer.ended(answer.finish, answer.output, answer.warning)

        response = await context.workers.run(num_tokens, work)
        keep(response)
        content = await context.workers.run(num_tokens, lambda: to_json(response))
        headers = session.diagnostics.headers()
        return Response(content, media_type="application/json", headers=headers)

    async def retrieve(self, request: Request, response_id: str) -> Response:
        """Return a stored response. Raises APIError 404 if the tenant has none with this id."""
        if request.query_params.get("stream", "false").lower() == "true":
            raise APIError(400, "'stream' is not supported: omit it.", param="stream")
        stored = self._store.get((self._context.tenant_of(request), response_id))
        if stored is None:
            raise self._unknown(response_id)
        content = await self._context.workers.run(
            stored.items_bytes, lambda: to_json(stored.response)
        )
        return Response(content, media_type="application/json")

    async def delete(self, request: Request, response_id: str) -> dict[str, Any]:
        """Remove a stored response; the newest one of a chain ends its session. Raises APIError as
        ``retrieve``."""
        if not self._store.delete((self._context.tenant_of(request), response_id)):
            raise self._unknown(response_id)
        await self._context.engine.end_session(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    def _unknown(self, response_id: str) -> APIError:
        return APIError(
            404,
            f"Response with id {quoted(response_id)} not found: it was not stored, or was evicted "
            "to make room.",
        )


class _ResponsesWriter:
    """Writes one response, as a whole or as events."""

    def __init__(
        self, context: ServingContext, body: ResponsesRequest, session: ChatSession
    ) -> None:
        self._body = body
        self._session = session
        self.items = ResponseItems(body.namespaces)
        self._num_events = 0
        choice = body.tool_choice
        self._head = {
            "id": session.diagnostics.answer_id,
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": context.model_name,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {
                "effort": None if body.reasoning is None else body.reasoning.effort,
                "summary": None,
            },
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": (body.text or TextConfig()).as_asked()},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [_tool(tool.model_dump()) for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    async def events(self, keep: Callable[[dict[str, Any]], None]) -> AsyncIterator[bytes]:
        """Yield ``response.created`` with the first output, which has the cached length, then the
        items, and the whole response at the end."""
        has_begun = False
        async for news in self._session.news():
            if not has_begun:
                has_begun = True
                yield self._started()
            said = b"".join(map(self._event, self.items.write(news.events)))
            if said:
                yield said
            if news.finish is not None:
                closing = self._close(news.finish)
                response = self.ended(news.finish, news.output, news.warning)
                keep(response)
                last = {"type": f"response.{response['status']}", "response": response}
                yield b"".join(map(self._event, [*closing, last]))

    def failed(self, failure: APIError) -> bytes:
        """Return the event of a failure in the middle of a stream."""
        error = {"code": failure.code or "server_error", "message": str(failure)}
        response = self._response("failed", self.items.output, None) | {"error": error}
        return self._event({"type": "response.failed", "response": response})

    def _started(self) -> bytes:
        response = self._response("in_progress", [], None)
        names = ("created", "in_progress")
        events = ({"type": f"response.{name}", "response": response} for name in names)
        return b"".join(map(self._event, events))

    def ended(
        self, finish: Finish | None, output: RequestOutput, warning: str | None = None
    ) -> dict[str, Any]:
        """Return the response with everything written so far."""
        self._close(finish)
        status = "incomplete" if finish == "length" else "completed"
        response = self._response(status, self.items.output, self._usage(output))
        return response if warning is None else response | {"warning": warning}

    def _close(self, finish: Finish | None) -> list[dict[str, Any]]:
        return list(self.items.close("incomplete" if finish == "length" else "completed"))

    def _response(
        self, status: str, output: Sequence[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        is_cut = status == "incomplete"
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": list(output),
            "usage": usage,
            **({} if usage is None else self._session.diagnostics.told()),
        }

    def _event(self, data: dict[str, Any]) -> bytes:
        number = self._num_events
        self._num_events += 1
        return named_event({**data, "sequence_number": number})

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        """Return the token counts."""
        num_prompt, num_new = len(output.prompt_token_ids), len(output.output)
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {
                "cached_tokens": output.cached_len,
                **self._session.written(output),
            },
            "output_tokens": num_new,
            "output_tokens_details": {
                "reasoning_tokens": self._session.num_reasoning_tokens(),
            },
            "total_tokens": num_prompt + num_new,
        }


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as part of a response, in which a missing schema is empty."""
    if tool["type"] == "namespace":
        return tool | {"tools": [_tool(one) for one in tool["tools"]]}
    return tool | {"parameters": tool["parameters"] or {}, "strict": bool(tool["strict"])}
