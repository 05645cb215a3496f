"""Parts of an answer: reasoning, text and tool calls, as events in the order of the answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
"""Marks around the reasoning before an answer; the first may be in the prompt."""
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
"""Marks around a tool call in the text of an answer."""
MARKS = (OPEN, CLOSE, CALL_OPEN, CALL_CLOSE)
"""Marks of the parts of an answer. They are part of the text, even if the vocabulary lists them as
tokens that are not shown."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Next part of the model's reasoning before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Next part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Complete call of an offered tool. ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """A call in the answer that cannot be made; it is part of the text."""

    why: str


Event = ReasoningDelta | TextDelta | ToolCall | BrokenCall
_TEXTS = (ReasoningDelta, TextDelta)


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
    functions: list[dict[str, str]] = []
    for one in events:
        match one:
            case TextDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCall(name, arguments):
                functions.append({"name": name, "arguments": arguments})
    return {
        "role": "assistant",
        "content": "".join(content),
        "reasoning_content": "".join(reasoning),
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


WINDOW = 256
"""Number of characters that are searched for all marks at a time. Without it, a frequent mark would
repeat the search for a rare one in the whole rest of a text."""


class MarkSearch:
    """Finds the first of some marks, such as stop strings, in a text that arrives in pieces. Text
    that may be the beginning of a mark is held back.

    >>> search = MarkSearch("</think>")
    >>> search.push("so </th"), search.push("en </think> x")
    (('so ', None, ''), ('</then ', '</think>', ' x'))
    """

    __slots__ = ("_held", "_marks")

    def __init__(self, *marks: str) -> None:
        """``marks``: one or more."""
        self._marks = tuple(map(_Mark, marks))
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Return (text before the mark or certainly without one, the mark if found, the text after
        it). O(len(text)) per mark, over an answer."""
        found: list[tuple[int, int]] = []
        for at in range(0, len(text), WINDOW):
            for mark in self._marks:
                if (start := mark.read(text[at : at + WINDOW])) is not None:
                    found.append((at + start, len(mark.text)))
            if found:
                break
        num_before = len(self._held)
        text = self._held + text
        if found:
            self._held = ""
            for mark in self._marks:
                mark.matched = 0
            start, size = min(found)
            start += num_before
            return text[:start], text[start : start + size], text[start + size :]
        cut = len(text) - max(mark.matched for mark in self._marks)
        self._held = text[cut:]
        return text[:cut], None, ""

    def flush(self) -> str:
        """Return the text held back, after the end of the text."""
        held, self._held = self._held, ""
        return held


class _Mark:
    """Search for one mark in a text that arrives in pieces (Knuth, Morris, Pratt).

    ``borders[i]`` is the length of the longest proper prefix of ``text[: i + 1]`` that is also its
    suffix: the position at which to continue after a mismatch. It is computed as far as the text
    was ever matched.
    """

    __slots__ = ("borders", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.borders = [0]
        self.matched = 0
        """Length of the longest suffix of the text read so far that is a proper prefix of
        ``text``."""

    def read(self, new: str) -> int | None:
        """Return the start of the mark relative to the start of ``new``, or None if it is
        not complete.

        Negative if it starts in an earlier piece. O(len(new)), amortised.
        """
        text = self.text
        at = 0
        while at < len(new):
            if not self.matched:
                at = new.find(text[0], at)
                if at < 0:
                    return None
            while self.matched and new[at] != text[self.matched]:
                self.matched = self._border(self.matched)
            if new[at] == text[self.matched]:
                self.matched += 1
            at += 1
            if self.matched == len(text):
                return at - len(text)
        return None

    def _border(self, length: int) -> int:
        """Return the length of the longest proper prefix of ``text[:length]`` that is also its
        suffix."""
        text, borders = self.text, self.borders
        while len(borders) < length:
            border = borders[-1]
            letter = text[len(borders)]
            while border and text[border] != letter:
                border = borders[border - 1]
            borders.append(border + (text[border] == letter))
        return borders[length - 1]
