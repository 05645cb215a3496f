"""Events of an answer, in the order of the answer: reasoning, text and tool calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
"""Marks around a tool call in the text of an answer."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Next part of the model's reasoning before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Next part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Start of a tool call; its arguments follow, until ``CallEnd``. Emitted only for a complete
    JSON call of an offered tool."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Next part of the JSON text of the arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """End of the arguments."""


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """A call in the answer that cannot be made; it is part of the text."""

    why: str


Event = ReasoningDelta | TextDelta | CallBegin | CallArguments | CallEnd | BrokenCall
_TEXTS = (ReasoningDelta, TextDelta, CallArguments)


class CallReading(Protocol):
    """Reads one answer's text and calls as the answer grows."""

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``."""
        ...

    def flush(self, is_cut: bool) -> list[Event]:
        """Return the events held back, after the end of the text."""
        ...


class CallForm(Protocol):
    """One form of tool calls."""

    FORM: str
    """Name of the form, for grammars of calls."""
    MARKS: tuple[str, ...]
    """Texts with which a call begins."""

    def __call__(self, tools: Sequence[Mapping[str, Any]]) -> CallReading:
        """Return a reader of one answer that may call ``tools``."""
        ...


def joined(events: Iterable[Event]) -> list[Event]:
    """Merge adjacent events of one kind. O(length)."""
    merged: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        if issubclass(kind, _TEXTS):
            merged.append(kind("".join(event.text for event in group if isinstance(event, _TEXTS))))
        else:
            merged.extend(group)
    return merged


def as_message(events: Sequence[Event]) -> dict[str, Any]:
    """Return an answer as the message that chat templates take. O(length)."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for one in events:
        match one:
            case TextDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case CallBegin(name):
                calls.append((name, []))
            case CallArguments(text):
                calls[-1][1].append(text)
    functions = [{"name": name, "arguments": "".join(pieces)} for name, pieces in calls]
    return {
        "role": "assistant",
        "content": "".join(content),
        "reasoning_content": "".join(reasoning),
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }
