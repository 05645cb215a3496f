"""An answer as the items of a response, and the events that say how they came to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from engine.server.tenants import new_id
from engine.text.answer_events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Event,
    ReasoningDelta,
    TextDelta,
)

Kind = Literal["reasoning", "message", "function_call"]
PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
WORDS: dict[Kind, str] = {
    "reasoning": "reasoning_text",
    "message": "output_text",
    "function_call": "function_call_arguments",
}
"""What the text of an item is called in its events."""


class ResponseItems:
    """Writes events; one item is open at a time."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        """The items that are done."""
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
                    yield from self._turn_to("function_call", call)
                case CallArguments(text):
                    yield self._delta(text)
                case CallEnd():
                    pass  # It closes with what follows, or as the answer ends.

    def close(self, status: Literal["completed", "incomplete"]) -> Iterator[dict[str, Any]]:
        """End the item that is open, if one is."""
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
