"""What an answer is made of, in the order in which it comes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
"""Marks around a tool call in the text of an answer."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool is called; its arguments follow, until ``CallEnd``. A call is whole when it begins:
    what follows is JSON, and the tool was offered."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of the arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments are done."""


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """The answer has a call that cannot be made; it is part of the text."""

    why: str


Event = ReasoningDelta | TextDelta | CallBegin | CallArguments | CallEnd | BrokenCall
_TEXTS = (ReasoningDelta, TextDelta, CallArguments)


class CallReading(Protocol):
    """Reads one answer's text and calls as the answer grows."""

    def push(self, text: str) -> list[Event]:
        """Return what became certain."""
        ...

    def flush(self, is_cut: bool) -> list[Event]:
        """Return what was held back: there is no more text."""
        ...


class CallForm(Protocol):
    """One form of tool calls."""

    FORM: str
    """Name of the form, for grammars of calls."""

    def __call__(self, tools: Sequence[Mapping[str, Any]]) -> CallReading:
        """Return a reader of one answer that may call ``tools``."""
        ...


def joined(events: Iterable[Event]) -> list[Event]:
    """The same with neighbours of one kind in one event. O(length)."""
    merged: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        if issubclass(kind, _TEXTS):
            merged.append(kind("".join(event.text for event in group if isinstance(event, _TEXTS))))
        else:
            merged.extend(group)
    return merged


def as_message(events: Sequence[Event]) -> dict[str, Any]:
    """Return an answer in the form that chat templates take. O(length)."""
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
