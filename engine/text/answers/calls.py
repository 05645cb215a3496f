"""What the forms of tool calls share: text around them, and one state after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.text.answers.events import CallArguments, CallBegin, CallEnd, Event, TextDelta
from engine.text.answers.marks import MarkSearch, Space

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_NAME = 256
"""Characters of a name; what is longer is no call."""

State = Callable[[str], str | None]
"""Reads a text and returns what is left for the next state; None: all was read."""


class CallReader:
    """Reads one answer's text and calls. White space around a call is no text, and what looks like
    a call and is none is text, as it stands."""

    MARKS: tuple[str, ...] = (OPEN,)
    """What a call begins with."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tools = tools
        self._search = MarkSearch(*self.MARKS)
        self._space = Space()
        self._events: list[Event] = []
        self._state: State = self._text
        self._held = ""
        self._is_first = True

    def push(self, text: str) -> list[Event]:
        """What became certain. O(len(text)) over an answer."""
        left: str | None = text
        while left:
            left = self._state(left)
        return self._take()

    def flush(self, is_cut: bool) -> list[Event]:
        """What was held back: there is no more text. ``is_cut``: the model had not ended."""
        self._end(is_cut)
        self._write(self._space.push(self._search.flush()))
        space = self._space.take()
        if self._is_first:
            self._write(space)
        return self._take()

    def _opened(self, mark: str) -> State:
        """What reads on after ``mark``."""
        raise TypeError("a form of calls says what follows its marks")

    def _end(self, is_cut: bool) -> None:
        """Give out what was held of a call that breaks off."""

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _text(self, text: str) -> str | None:
        before, mark, rest = self._search.push(text)
        self._write(self._space.push(before))
        if mark is None:
            return None
        self._state = self._opened(mark)
        return rest

    def _write(self, text: str) -> None:
        if text:
            self._events.append(TextDelta(text))

    def _give_back(self, text: str) -> None:
        """``text`` was no call."""
        self._write(self._space.push(text))
        self._state = self._text

    def _begin(self, name: str) -> None:
        self._space.take()
        self._is_first = False
        self._events.append(CallBegin(name))

    def _add(self, arguments: str) -> None:
        if arguments:
            self._events.append(CallArguments(arguments))

    def _finish(self, is_whole: bool = True) -> None:
        """The call is done; its closing mark may follow."""
        self._events.append(CallEnd(is_whole))
        self._held = ""
        self._state = self._closing

    def _closing(self, text: str) -> str | None:
        """Drop white space and one closing mark."""
        held = self._held + text if self._held else text.lstrip()
        if len(held) < len(CLOSE) and CLOSE.startswith(held):
            self._held = held
            return None
        self._held = ""
        self._state = self._text
        return held.removeprefix(CLOSE)
