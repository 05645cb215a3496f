"""Anthropic's messages and OpenAI's responses, translated to and from chats. Their common parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from engine.server.bodies import APIError, event, run, settled
from engine.server.schemas import ChatRequest
from engine.server.writers import Call, ChatWriter
from engine.text.answers import AnswerReader, Event, ToolCall


def named_event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event named after its ``type``."""
    return event(data, data["type"])


def as_tool(
    name: str, description: str | None, parameters: Any, strict: bool | None
) -> dict[str, Any]:
    """Return a function of another dialect as a tool of a chat."""
    function = {"name": name, "description": description, "strict": strict}
    return {"type": "function", "function": settled(function | {"parameters": parameters})}


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
        self._place = 0
        """Number of completed parts, which is the index of the open one."""

    @property
    def _answer(self) -> AnswerReader:
        return self.readers[0]

    def parts(self, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        """Yield the next parts of the answer."""
        for one in events:
            if self._kind is not type(one):
                yield from self.close()
                self._kind = type(one)
                yield from self.open(one)
            yield from self.extend(one)
            if isinstance(one, ToolCall):
                yield from self.close()

    def close(self, is_cut: bool = False) -> Iterator[dict[str, Any]]:
        """End the open part, if there is one. ``is_cut``: a limit ended the answer inside it."""
        if self._kind is not None:
            yield from self.complete(is_cut)
            self._kind = None
            self._place += 1

    @abstractmethod
    def open(self, one: Event) -> Iterator[dict[str, Any]]:
        """Yield the beginning of a part."""

    @abstractmethod
    def extend(self, one: Event) -> Iterator[dict[str, Any]]:
        """Yield the next piece of the open part."""

    @abstractmethod
    def complete(self, is_cut: bool) -> Iterator[dict[str, Any]]:
        """Yield the end of the open part."""
