"""What an answer is made of, in the order in which it comes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass


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


def joined(events: Iterable[Event]) -> list[Event]:
    """The same with neighbours of one kind in one event. O(length)."""
    merged: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        if issubclass(kind, _TEXTS):
            merged.append(kind("".join(event.text for event in group if isinstance(event, _TEXTS))))
        else:
            merged.extend(group)
    return merged
