"""Calls as Hermes writes them, and Qwen3 and the built-in model after it:
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

import json
import re
from typing import Any

from engine.text.answers.calls import CLOSE, MAX_NAME, OPEN, CallReader, State
from engine.text.answers.marks import MarkSearch
from engine.text.json_text import read_json

MAX_HEADER = 2 * MAX_NAME
"""Characters before the arguments of a call that are tried again with every piece."""
_HEADER = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\<]|\\["\\/bfnrtu])*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class HermesReader(CallReader):
    """Arguments go out as they come where the name stands before them; another order, or arguments
    as a string, is read once the call is whole."""

    def _opened(self, mark: str) -> State:
        self._held = ""
        return self._header

    def _header(self, text: str) -> str | None:
        self._held += text
        found = _HEADER.match(self._held, 0, MAX_HEADER)
        name = _parsed(found.group(1)) if found else None
        if found and isinstance(name, str) and 0 < len(name) <= MAX_NAME:
            held, self._held = self._held, ""
            self._begin(name)
            self._nesting = Nesting()
            self._state = self._arguments
            return held[found.end() :]
        if "<" not in self._held and len(self._held) < MAX_HEADER:
            return None
        held, self._held = self._held, ""
        self._pieces: list[str] = []
        self._close = MarkSearch(CLOSE, OPEN)
        self._state = self._whole
        return held

    def _arguments(self, text: str) -> str | None:
        end = self._nesting.end(text)
        self._add(text if end is None else text[:end])
        if end is None:
            return None
        self._nesting = Nesting(depth=1)
        self._state = self._behind
        return text[end:]

    def _behind(self, text: str) -> str | None:
        """The rest of the object that the arguments stand in."""
        end = self._nesting.end(text)
        if end is None:
            return None
        self._finish()
        return text[end:]

    def _whole(self, text: str) -> str | None:
        before, mark, rest = self._close.push(text)
        self._pieces.append(before)
        if mark is None:
            return None
        self._read("".join(self._pieces), CLOSE if mark == CLOSE else "")
        if mark == OPEN:
            self._state = self._header
        return rest

    def _read(self, inside: str, close: str) -> None:
        """A call that was held until its end, or text."""
        call = _parsed(inside)
        arguments = _arguments(call) if isinstance(call, dict) else None
        if arguments is None:
            self._give_back(OPEN + inside + close)
            return
        self._begin(call["name"])
        self._add(arguments)
        self._finish()
        self._state = self._text

    def _end(self, is_cut: bool) -> None:
        if self._state == self._header:
            held, self._held = self._held, ""
            self._read(held, "")
        elif self._state == self._whole:
            self._read("".join((*self._pieces, self._close.flush())), "")
        elif self._state in (self._arguments, self._behind):
            self._finish(is_whole=self._state == self._behind)
        elif self._state == self._closing and not is_cut:
            self._give_back(self._held)


class Nesting:
    """Where a JSON object or list ends in a text that comes in pieces."""

    __slots__ = ("_depth", "_is_escaped", "_is_string")

    _STEPS = re.compile(r'["\\{}\[\]<]')

    def __init__(self, depth: int = 0) -> None:
        """``depth``: how many are open already."""
        self._depth = depth
        self._is_string = self._is_escaped = False

    def end(self, text: str) -> int | None:
        """Where the outermost one ends in ``text``; also before a ``<`` that stands in no string,
        which no JSON has. O(len(text))."""
        at = 0
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = self._STEPS.search(text, at)
            if found is None:
                return None
            at = found.end()
            letter = found.group()
            if self._is_string:
                self._is_escaped = letter == "\\"
                self._is_string = letter != '"'
            elif letter == "<":
                return at - 1
            elif letter == '"':
                self._is_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return None


def _parsed(text: str) -> Any:
    """JSON, or None."""
    try:
        return read_json(text)
    except ValueError:
        return None


def _arguments(call: dict[str, Any]) -> str | None:
    """The JSON text of a call's arguments; None: it is no call."""
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        return None
    if isinstance(arguments, str):
        return arguments if isinstance(_parsed(arguments), dict) else None
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else None
