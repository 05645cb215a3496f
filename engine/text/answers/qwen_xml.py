"""Calls as Qwen3-Coder and Qwen3.5 write them: ``<tool_call><function=NAME>``, a
``<parameter=NAME>`` for each argument with its value on lines of its own, and what closes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.answers.calls import CLOSE, MAX_NAME, OPEN, CallReader, State
from engine.text.answers.marks import MarkSearch
from engine.text.json_text import read_json

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_WITHIN = (PARAMETER, END_FUNCTION, CLOSE, OPEN, FUNCTION)
"""What may follow a value."""
MAX_DEPTH = 64
"""Schemas that are looked into for the types of one parameter."""


class QwenXMLReader(CallReader):
    """Values of strings go out as they come; others are read as JSON once they are whole, and are
    strings where they are none. What the schema does not name is a string."""

    MARKS = (OPEN, FUNCTION)

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(tools)
        self._before = ""
        """What opened the call that is being read."""
        self._types: dict[str, frozenset[str]] = {}
        self._num_given = 0
        self._is_string = False
        self._pieces: list[str] = []

    def _opened(self, mark: str) -> State:
        self._held, self._before = "", mark
        return self._wrapped if mark == OPEN else self._name

    def _wrapped(self, text: str) -> str | None:
        """After ``<tool_call>``: only white space, then a function."""
        self._held += text
        begin = self._held.lstrip()
        num_blank = len(self._held) - len(begin)
        if num_blank <= MAX_NAME:
            if len(begin) < len(FUNCTION) and FUNCTION.startswith(begin):
                return None
            if begin.startswith(FUNCTION):
                self._before += self._held[:num_blank] + FUNCTION
                self._held, self._state = "", self._name
                return begin[len(FUNCTION) :]
        held, self._held = self._held, ""
        self._give_back(self._before)
        return held

    def _name(self, text: str) -> str | None:
        name, rest = self._until_bracket(text)
        if rest is None:
            return None
        if name is None:
            self._give_back(self._before)
            return rest
        self._begin(name)
        self._types = _types_of(self._tools, name)
        self._num_given = 0
        self._state = self._between
        return rest

    def _until_bracket(self, text: str) -> tuple[str | None, str | None]:
        """(a name, what follows its ``>``); (None, all there was) where it is none; (None, None):
        it is not known yet."""
        held = self._held + text
        name, bracket, rest = held.partition(">")
        if len(name) > MAX_NAME or "<" in name or "\n" in name or (bracket and not name.strip()):
            self._held = ""
            return None, held
        self._held = "" if bracket else held
        return (name.strip(), rest) if bracket else (None, None)

    def _between(self, text: str) -> str | None:
        """Between the values of a call: the next one, or its end."""
        held = self._held + text if self._held else text.lstrip()
        if any(len(held) < len(mark) and mark.startswith(held) for mark in _WITHIN):
            self._held = held
            return None
        self._held = ""
        if held.startswith(PARAMETER):
            self._state = self._parameter
            return held[len(PARAMETER) :]
        self._add("}" if self._num_given else "{}")
        self._finish()
        return held.removeprefix(END_FUNCTION)

    def _parameter(self, text: str) -> str | None:
        name, rest = self._until_bracket(text)
        if rest is None:
            return None
        if name is None:
            self._add("}" if self._num_given else "{}")
            self._finish()
            self._give_back(PARAMETER)
            return rest
        self._add((", " if self._num_given else "{") + json.dumps(name, ensure_ascii=False) + ": ")
        self._num_given += 1
        self._allowed = self._types.get(name, frozenset({"string"}))
        self._is_string = self._allowed == {"string"}
        if self._is_string:
            self._add('"')
        self._is_first_line = True
        self._ends = MarkSearch(END_PARAMETER, END_FUNCTION, PARAMETER)
        self._line_end = ""
        self._state = self._value
        return rest

    def _value(self, text: str) -> str | None:
        before, mark, rest = self._ends.push(text)
        self._add_value(before)
        if mark is None:
            return None
        if self._is_string:
            self._add('"')
        else:
            self._add(_as_json("".join(self._pieces), self._allowed))
            self._pieces.clear()
        self._state = self._between
        return rest if mark == END_PARAMETER else mark + rest

    def _add_value(self, text: str) -> None:
        """More of a value, without the line breaks around it."""
        if self._is_first_line and text:
            self._is_first_line = False
            text = text.removeprefix("\n")
        if text:
            text, self._line_end = self._line_end + text, ""
            if text.endswith("\n"):
                text, self._line_end = text[:-1], "\n"
        if not self._is_string:
            self._pieces.append(text)
        else:
            self._add(json.dumps(text, ensure_ascii=False)[1:-1])

    def _end(self, is_cut: bool) -> None:
        if self._state in (self._wrapped, self._name):
            self._give_back(self._before + self._held)
        elif self._state == self._between:
            if not is_cut:
                self._add("}" if self._num_given else "{}")
            held, self._held = self._held, ""
            self._finish(is_whole=not is_cut)
            self._give_back(held)
        elif self._state == self._parameter:
            held, self._held = self._held, ""
            self._finish(is_whole=False)
            self._give_back(PARAMETER + held)
        elif self._state == self._value:
            self._add_value(self._ends.flush())
            self._add("".join(self._pieces))
            self._finish(is_whole=False)
        elif self._state == self._closing and not is_cut:
            self._give_back(self._held)


def _types_of(tools: Sequence[Mapping[str, Any]], name: str) -> dict[str, frozenset[str]]:
    """JSON types that each parameter of the tool ``name`` may have, as far as its schema says."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            schema = function.get("parameters")
            named = schema.get("properties") if isinstance(schema, Mapping) else None
            if isinstance(named, Mapping):
                return {str(key): _types(entry) for key, entry in named.items()}
    return {}


def _types(schema: Any) -> frozenset[str]:
    """JSON types that ``schema`` names; ``string`` where it names none."""
    found: set[str] = set()
    waiting = [schema]
    for _ in range(MAX_DEPTH):
        if not waiting:
            break
        one = waiting.pop()
        if not isinstance(one, Mapping):
            continue
        kind = one.get("type")
        found.update(each for each in (kind if isinstance(kind, list) else [kind]) if each)
        for many in ("anyOf", "oneOf", "allOf"):
            if isinstance(one.get(many), list):
                waiting.extend(one[many])
        if "$ref" in one:
            found.add("object")
    return frozenset(found) or frozenset({"string"})


def _as_json(text: str, types: frozenset[str]) -> str:
    """A value as the JSON that its schema asks for; a string where it is none."""
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
    """The JSON types of a parsed value."""
    if value is None or isinstance(value, bool):
        return frozenset({"null" if value is None else "boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    return frozenset({{float: "number", str: "string", list: "array", dict: "object"}[type(value)]})
