"""Calls in the form of Hermes, Qwen3 and the built-in model: ``<tool_call>{"name": ...,
"arguments": {...}}</tool_call>``."""

from __future__ import annotations

import json
import re
from typing import Any

from engine.text.calls import (
    BROKEN_OFF,
    MAX_NAME,
    NOT_JSON,
    CallReader,
    State,
)
from engine.text.json_text import read_json

_BEFORE_ARGUMENTS = re.compile(
    r'\s*\{\s*"name"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class HermesReader(CallReader):
    """Reads calls that are one JSON object each."""

    def _opened(self, mark: str) -> State:
        self._pieces: list[str] = []
        self._nesting = Nesting()
        self._has_begun = False
        return self._object

    def _object(self, text: str) -> str | None:
        """Collect the object of a call, and read it once it is complete."""
        if not self._has_begun:
            begin = text.lstrip()
            if not begin:
                return None
            if not begin.startswith("{"):
                return self._fail(NOT_JSON, begin)
            self._has_begun, text = True, begin
        end = self._nesting.end(text)
        self._pieces.append(text if end is None else text[:end])
        if end is None:
            return None
        left = text[end:]
        written = "".join(self._pieces)
        try:
            call = read_json(written)
        except ValueError:
            return self._fail(NOT_JSON, left)
        name, arguments = _call_of(call, written)
        if name is None or arguments is None:
            return self._fail(NOT_JSON, left)
        if name not in self._names:
            return self._fail(self._not_offered(name), left)
        self._make(name, arguments)
        return left

    def _end(self, is_cut: bool) -> str | None:
        if self._state == self._object:
            return self._fail(BROKEN_OFF)
        if self._state == self._closing:
            self._end_closing(is_cut)
        return None


class Nesting:
    """Finds the end of a JSON object or list in a text that arrives in pieces."""

    __slots__ = ("_depth", "_is_escaped", "_is_string")

    _STEPS = re.compile(r'["\\{}\[\]<]')

    def __init__(self, depth: int = 0) -> None:
        """``depth``: number of objects and lists that are open already."""
        self._depth = depth
        self._is_string = self._is_escaped = False

    def end(self, text: str) -> int | None:
        """Return the end of the outermost object in ``text``, or None. A ``<`` outside strings,
        which JSON does not contain, also ends it. O(len(text))."""
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


def _call_of(call: Any, written: str) -> tuple[str | None, str | None]:
    """Return name and arguments of a parsed ``call``, or None for each that is missing. Arguments
    after the name are returned as they were ``written``."""
    if not isinstance(call, dict):
        return None, None
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        return None, None
    if isinstance(arguments, str):
        return name, arguments if _is_object(arguments) else None
    if not isinstance(arguments, dict):
        return name, None
    found = _BEFORE_ARGUMENTS.match(written)
    end = None if found is None else Nesting().end(written[found.end() :])
    if found is not None and end is not None:
        as_written = written[found.end() : found.end() + end]
        if read_json(as_written) == arguments:
            return name, as_written
    return name, json.dumps(arguments, ensure_ascii=False)


def _is_object(text: str) -> bool:
    try:
        return isinstance(read_json(text), dict)
    except ValueError:
        return False
