"""Base of the readers of tool calls: text between calls, and transitions between states.

A call is emitted when it is complete. A call cannot be made if its arguments are not JSON, if its
tool was not offered, or if it breaks off. It is then text, with a ``BrokenCall`` that gives the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from engine.text.answers import CALL_CLOSE as CLOSE
from engine.text.answers import CALL_OPEN as OPEN
from engine.text.answers import (
    BrokenCall,
    CallArguments,
    CallBegin,
    CallEnd,
    Event,
    MarkSearch,
    Space,
    TextDelta,
)
from engine.text.json_text import read_json, write_json
from engine.text.tokenizer import any_of

MAX_NAME = 256
"""Maximum length of a name; a longer one is not a call."""
MAX_RETRIES = 8
"""Maximum number of broken calls of an answer that are searched for calls again. Later ones become
text as far as they were read, so that an answer is read in linear time."""
BROKEN_OFF = "it breaks off"
NOT_JSON = "it is not a JSON object with a name and arguments"

State = Callable[[str], str | None]
"""Reads a text and returns the rest for the next state, or None if all was read. The rest is always
the end of the text pushed so far."""


class CallReader:
    """Reads the text and calls of one answer. White space around a call is not text."""

    MARKS: tuple[str, ...] = (OPEN,)
    """Marks with which a call begins."""
    FORM: Literal["hermes", "xml"] = "hermes"

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tools = tools
        self._names = {_name_of(tool) for tool in tools}
        self._search = MarkSearch(*self.MARKS)
        self._next_mark = any_of((CLOSE, *self.MARKS))
        self._space = Space()
        self._events: list[Event] = []
        self._state: State = self._text
        self._held = ""
        self._is_first = True
        self._raw: list[str] | None = None
        """Text pushed since the mark of the call that is being read, or None outside a call."""
        self._num_retries = 0

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``. O(len(text)) over an answer."""
        if self._raw is not None:
            self._raw.append(text)
        self._read(text)
        return self._take()

    def flush(self, is_cut: bool) -> list[Event]:
        """Return the events held back, after the end of the text. ``is_cut``: the answer was cut
        off."""
        while left := self._end(is_cut):
            self._read(left)
        self._write(self._space.push(self._search.flush()))
        space = self._space.take()
        if self._is_first:
            self._write(space)
        return self._take()

    def _read(self, text: str) -> None:
        left: str | None = text
        while left:
            left = self._state(left)

    def _opened(self, mark: str) -> State:
        """Return the state after ``mark``."""
        raise TypeError("a form of calls must define the state after its marks")

    def _end(self, is_cut: bool) -> str | None:
        """End a call that breaks off. Returns the rest to read."""
        raise TypeError("a form of calls must define where a call may end")

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _text(self, text: str) -> str | None:
        before, mark, rest = self._search.push(text)
        self._write(self._space.push(before))
        if mark is None:
            return None
        self._state = self._opened(mark)
        self._raw = [mark, rest]
        return rest

    def _write(self, text: str) -> None:
        if text:
            self._events.append(TextDelta(text))

    def _make(self, name: str, arguments: str) -> None:
        """Emit a complete call; its closing mark may follow. ``arguments`` is a JSON object, which
        is emitted as the model wrote it, unless it escapes a lone surrogate."""
        if r"\ud" in arguments.lower():
            arguments = write_json(read_json(arguments))
        self._space.take()
        self._is_first = False
        self._events += [CallBegin(name), CallArguments(arguments), CallEnd()]
        self._raw, self._held = None, ""
        self._state = self._closing

    def _fail(self, why: str, left: str = "") -> str:
        """Turn a call that cannot be made into text, up to the next mark, and return the rest to
        read, which ends with ``left``."""
        assert self._raw is not None, "a call that did not begin"
        read = "".join(self._raw)
        read = read[: len(read) - len(left)]
        found = self._next_mark.search(read, 1) if self._num_retries < MAX_RETRIES else None
        if found is not None:
            self._num_retries += 1
            end = found.end() if found.group() == CLOSE else found.start()
            read, left = read[:end], read[end:] + left
        self._events.append(BrokenCall(why))
        self._write(self._space.push(read))
        self._raw, self._held = None, ""
        self._state = self._text
        return left

    def _not_offered(self, name: str) -> str:
        """Return the reason why a call of a tool that was not offered cannot be made."""
        if not self._names:
            return "'tool_choice' is 'none'"
        return f"no tool {name[:MAX_NAME]!r} was offered"

    def _closing(self, text: str) -> str | None:
        """Skip white space and one closing mark."""
        held = self._held + text if self._held else text.lstrip()
        if len(held) < len(CLOSE) and CLOSE.startswith(held):
            self._held = held
            return None
        self._held = ""
        self._state = self._text
        return held.removeprefix(CLOSE)

    def _end_closing(self, is_cut: bool) -> None:
        """Turn part of a closing mark into text, unless the answer was cut off inside it."""
        if not is_cut:
            self._write(self._space.push(self._held))
        self._held = ""
        self._state = self._text


def _name_of(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None
