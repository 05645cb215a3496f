"""Calls in the form of Qwen3-Coder and Qwen3.5: ``<tool_call><function=NAME>``, then a
``<parameter=NAME>`` per argument with its value on separate lines, and closing tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.answers import CALL_CLOSE as CLOSE
from engine.text.answers import CALL_OPEN as OPEN
from engine.text.answers import MarkSearch
from engine.text.calls import (
    BROKEN_OFF,
    MAX_NAME,
    CallReader,
    State,
)
from engine.text.json_text import read_json

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_WITHIN = (PARAMETER, END_FUNCTION, CLOSE, OPEN, FUNCTION)
"""Tags that may follow a value."""
MALFORMED = "it is not written as a function with parameters"
_STRING = frozenset({"string"})
MAX_DEPTH = 64
"""Maximum number of schemas that are searched for the types of one parameter."""


class QwenXMLReader(CallReader):
    """Reads calls with tags. Values of types other than string are read as JSON, and are strings if
    they are not valid JSON. Parameters without a schema are strings."""

    MARKS = (OPEN, FUNCTION)
    FORM = "xml"

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(tools)
        self._name = ""
        self._arguments: list[str] = []
        """JSON texts of the arguments so far, each with its name."""
        self._types: dict[str, frozenset[str]] = {}
        self._pieces: list[str] = []

    def _opened(self, mark: str) -> State:
        self._held = ""
        return self._wrapped if mark == OPEN else self._function

    def _wrapped(self, text: str) -> str | None:
        """State after ``<tool_call>``: white space, then a function."""
        self._held += text
        begin = self._held.lstrip()
        num_blank = len(self._held) - len(begin)
        if num_blank <= MAX_NAME:
            if len(begin) < len(FUNCTION) and FUNCTION.startswith(begin):
                return None
            if begin.startswith(FUNCTION):
                self._held, self._state = "", self._function
                return begin[len(FUNCTION) :]
        return self._fail(MALFORMED, self._held)

    def _function(self, text: str) -> str | None:
        name, rest = self._until_bracket(text)
        if rest is None:
            return None
        if name is None:
            return self._fail(MALFORMED, rest)
        if name not in self._names:
            return self._fail(self._not_offered(name), rest)
        self._name, self._arguments = name, []
        self._types = _types_of(self._tools, name)
        self._state = self._between
        return rest

    def _until_bracket(self, text: str) -> tuple[str | None, str | None]:
        """Return (name, text after its ``>``), or (None, all text) if there is no valid name, or
        (None, None) if that is not known yet."""
        held = self._held + text
        name, bracket, rest = held.partition(">")
        if len(name) > MAX_NAME or "<" in name or "\n" in name or (bracket and not name.strip()):
            self._held = ""
            return None, held
        self._held = "" if bracket else held
        return (name.strip(), rest) if bracket else (None, None)

    def _between(self, text: str) -> str | None:
        """State between the values of a call: the next value, or the end."""
        held = self._held + text if self._held else text.lstrip()
        if any(len(held) < len(mark) and mark.startswith(held) for mark in _WITHIN):
            self._held = held
            return None
        self._held = ""
        if held.startswith(PARAMETER):
            self._state = self._parameter
            return held[len(PARAMETER) :]
        if not held.startswith(_WITHIN):
            return self._fail(MALFORMED, held)
        self._finish()
        return held.removeprefix(END_FUNCTION)

    def _finish(self) -> None:
        self._make(self._name, "{" + ", ".join(self._arguments) + "}")

    def _parameter(self, text: str) -> str | None:
        name, rest = self._until_bracket(text)
        if rest is None:
            return None
        if name is None:
            return self._fail(MALFORMED, rest)
        self._parameter_name = name
        self._pieces.clear()
        self._ends = MarkSearch(END_PARAMETER, END_FUNCTION, PARAMETER)
        self._state = self._value
        return rest

    def _value(self, text: str) -> str | None:
        before, mark, rest = self._ends.push(text)
        self._pieces.append(before)
        if mark is None:
            return None
        value = "".join(self._pieces).removeprefix("\n").removesuffix("\n")
        types = self._types.get(self._parameter_name, _STRING)
        name = json.dumps(self._parameter_name, ensure_ascii=False)
        self._arguments.append(f"{name}: {_as_json(value, types)}")
        self._state = self._between
        return rest if mark == END_PARAMETER else mark + rest

    def _end(self, is_cut: bool) -> str | None:
        if self._state == self._between and not self._held and not is_cut:
            self._finish()
        if self._state == self._closing:
            self._end_closing(is_cut)
        elif self._state != self._text:
            return self._fail(BROKEN_OFF)
        return None


def _types_of(tools: Sequence[Mapping[str, Any]], name: str) -> dict[str, frozenset[str]]:
    """Return the JSON types that the schema allows for each parameter of the tool ``name``."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            schema = function.get("parameters")
            named = schema.get("properties") if isinstance(schema, Mapping) else None
            if isinstance(named, Mapping):
                return {str(key): json_types(entry) for key, entry in named.items()}
    return {}


def json_types(schema: Any) -> frozenset[str]:
    """Return the JSON types that ``schema`` names, or ``string`` if it names none."""
    found: set[str] = set()
    waiting = [schema]
    for _ in range(MAX_DEPTH):
        if not waiting:
            break
        one = waiting.pop()
        if not isinstance(one, Mapping):
            continue
        kind = one.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        found.update(each for each in kinds if isinstance(each, str) and each)
        for many in ("anyOf", "oneOf", "allOf"):
            if isinstance(one.get(many), list):
                waiting.extend(one[many])
        if "$ref" in one:
            found.add("object")
    return frozenset(found) or _STRING


def _as_json(text: str, types: frozenset[str]) -> str:
    """Return a value as JSON of one of ``types``, or as a string if it is not such JSON."""
    if types == _STRING:
        return json.dumps(text, ensure_ascii=False)
    plain = text.strip()
    lowered = plain.lower()
    if ("null" in types and lowered in ("null", "none")) or (
        "boolean" in types and lowered in ("true", "false")
    ):
        return "null" if lowered in ("null", "none") else lowered
    try:
        value = read_json(plain)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    if "string" in types and not _kinds(value) & types:
        return json.dumps(text, ensure_ascii=False)
    return plain


def _kinds(value: Any) -> frozenset[str]:
    """Return the JSON types of a parsed value."""
    if value is None or isinstance(value, bool):
        return frozenset({"null" if value is None else "boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    return frozenset({{float: "number", str: "string", list: "array", dict: "object"}[type(value)]})
