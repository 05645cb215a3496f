"""Readers of tool calls in the text of an answer, in the forms in which models write them.

A call is emitted when it is complete. A call cannot be made if its arguments are not JSON, if its
tool was not offered, or if it breaks off. It is then text, with a ``BrokenCall`` that gives the
reason.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from engine.text.answers import CALL_CLOSE as CLOSE
from engine.text.answers import CALL_OPEN as OPEN
from engine.text.answers import (
    BrokenCall,
    Event,
    MarkSearch,
    Space,
    TextDelta,
    ToolCall,
)
from engine.text.json_text import read_json, write_json
from engine.text.tokenizer import any_of

MAX_NAME = 256
"""Maximum length of a name; a longer one is not a call."""
MAX_RETRIES = 8
"""Maximum number of broken calls of an answer that are searched for calls again. Later ones become
text as far as they were read, so that an answer is read in linear time."""
GROWTH = 1.125
"""Factor by which a call must grow before it is parsed again, so that it is read in linear time."""
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
BROKEN_OFF = "it breaks off"
NOT_JSON = "it is not a JSON object with a name and arguments"
MALFORMED = "it is not written as a function with parameters"
_STRING = frozenset({"string"})
MAX_DEPTH = 64
"""Maximum number of schemas that are searched for the types of one parameter."""


class Call(NamedTuple):
    """A call that was read. ``arguments`` is a JSON object as the model wrote it; ``end`` is the
    end of the call in the text."""

    name: str
    arguments: str
    end: int


Parsed = Call | str | None
"""A call, the reason why it cannot be made, or None if it is not complete."""


class CallReader(ABC):
    """Reads the text and calls of one answer. White space around a call is not text."""

    MARKS: tuple[str, ...] = (OPEN,)
    """Marks with which a call begins."""
    ENDS: tuple[str, ...] = (CLOSE,)
    """Marks with which a call may end."""
    FORM: Literal["hermes", "xml"] = "hermes"

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._functions = {f["name"]: f for tool in tools if (f := tool["function"])}
        self._search = MarkSearch(*self.MARKS)
        self._next_mark = any_of((CLOSE, *self.MARKS))
        self._space = Space()
        self._events: list[Event] = []
        self._is_first = True
        self._call: list[str] | None = None
        """Text of the call that is being read, from its mark on. None outside a call."""
        self._call_len = self._tried_len = 0
        """Length of ``_call``, and its length when it was last parsed."""
        self._closing: str | None = None
        """Text after a call that may be part of its closing mark, or None elsewhere."""
        self._num_retries = 0

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``. O(len(text)) over an answer."""
        while text:
            if self._closing is not None:
                text = self._skip_closing(text)
            elif self._call is not None:
                text = self._inside(text)
            else:
                text = self._text(text)
        return self._take()

    def flush(self, is_cut: bool) -> list[Event]:
        """Return the events held back, after the end of the text. ``is_cut``: the answer was cut
        off."""
        events = self.push("")
        while self._call is not None:
            self._call.append(self._search.flush())
            events += self.push(self._end("".join(self._call), is_cut, is_end=True) or "")
        if self._closing is not None and not is_cut:
            self._write(self._space.push(self._closing))
        self._write(self._space.push(self._search.flush()))
        space = self._space.take()
        if self._is_first:
            self._write(space)
        return [*events, *self._take()]

    @abstractmethod
    def parse(self, text: str, is_end: bool) -> Parsed:
        """Read the call at the beginning of ``text``. With ``is_end`` the answer ends behind it."""

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _write(self, text: str) -> None:
        if text:
            self._events.append(TextDelta(text))

    def _text(self, text: str) -> str:
        """Read text outside calls, and return the rest."""
        before, mark, rest = self._search.push(text)
        self._write(self._space.push(before))
        if mark is not None:
            self._call, self._call_len, self._tried_len = [mark], len(mark), 0
            self._search = MarkSearch(*self.ENDS, *self.MARKS)
        return rest

    def _inside(self, text: str) -> str:
        """Read the text of a call up to the next mark, and return the rest."""
        assert self._call is not None, "outside a call"
        before, mark, rest = self._search.push(text)
        self._call.append(before)
        self._call_len += len(before)
        if mark is not None:
            self._call.append(mark)
            self._call_len += len(mark)
            if self._call_len >= GROWTH * self._tried_len:
                left = self._end("".join(self._call), False, is_end=False)
                return rest if left is None else left + rest
        return rest

    def _end(self, text: str, is_cut: bool, *, is_end: bool) -> str | None:
        """End the call if ``text``, all of it so far, is one or cannot become one. Returns the text
        to read again, or None if the call goes on."""
        parsed = self.parse(text, is_end and not is_cut)
        if parsed is None and not is_end:
            self._tried_len = self._call_len
            return None
        self._call, self._search = None, MarkSearch(*self.MARKS)
        if isinstance(parsed, Call) and parsed.name not in self._functions:
            offered = f"no tool {parsed.name[:MAX_NAME]!r} was offered"
            parsed = offered if self._functions else "'tool_choice' is 'none'"
        if not isinstance(parsed, Call):
            return self._fail(text, parsed or BROKEN_OFF)
        arguments = parsed.arguments
        if r"\ud" in arguments.lower():  # It may escape a lone surrogate.
            arguments = write_json(read_json(arguments))
        self._space.take()
        self._is_first = False
        self._events.append(ToolCall(parsed.name, arguments))
        self._closing = ""
        return text[parsed.end :]

    def _fail(self, text: str, why: str) -> str:
        """Turn a call that cannot be made into text, up to the next mark, and return the rest."""
        found = self._next_mark.search(text, 1) if self._num_retries < MAX_RETRIES else None
        end = len(text)
        if found is not None:
            self._num_retries += 1
            end = found.end() if found.group() == CLOSE else found.start()
        self._events.append(BrokenCall(why))
        self._write(self._space.push(text[:end]))
        return text[end:]

    def _skip_closing(self, text: str) -> str:
        """Skip white space and one closing mark, and return the rest."""
        held = self._closing + text if self._closing else text.lstrip()
        is_open = len(held) < len(CLOSE) and CLOSE.startswith(held)
        self._closing = held if is_open else None
        return "" if is_open else held.removeprefix(CLOSE)


class HermesReader(CallReader):
    """Reads calls in the form of Hermes, Qwen3 and the built-in model: ``<tool_call>{"name": ...,
    "arguments": {...}}</tool_call>``."""

    def parse(self, text: str, is_end: bool) -> Parsed:
        start = len(OPEN) + len(text[len(OPEN) :]) - len(text[len(OPEN) :].lstrip())
        if not text.startswith("{", start):
            return NOT_JSON if text[start:] else BROKEN_OFF
        try:
            call, end = _JSON.raw_decode(text, start)
            read_json(text[start:end])  # It is stricter.
        except (ValueError, RecursionError):
            in_string = any(not string["end"] for string in _STRING_PARTS.finditer(text, start))
            return (
                (None if in_string else NOT_JSON)
                if text.endswith((*self.ENDS, *self.MARKS))
                else None
            )
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            return NOT_JSON
        if isinstance(arguments, str):
            written = arguments
        elif found := _BEFORE_ARGUMENTS.match(text, start):
            written = text[found.end() : _JSON.raw_decode(text, found.end())[1]]
        else:
            written = json.dumps(arguments, ensure_ascii=False)
        try:
            is_object = isinstance(read_json(written), dict)
        except ValueError:
            is_object = False
        return Call(name, written, end) if is_object else NOT_JSON


_JSON = json.JSONDecoder()
_STRING_PARTS = re.compile(r'"(?:[^"\\]|\\.)*+(?P<end>"?)', re.DOTALL)
"""A string of JSON, or its beginning up to the end of the text."""
_BEFORE_ARGUMENTS = re.compile(
    r'\s*\{\s*"name"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class QwenXMLReader(CallReader):
    """Reads calls in the form of Qwen3-Coder and Qwen3.5: ``<tool_call><function=NAME>``, then a
    ``<parameter=NAME>`` per argument with its value on separate lines, and closing tags.

    Values of types other than string are read as JSON, and are strings if they are not valid JSON.
    Parameters without a schema are strings.
    """

    MARKS = (OPEN, FUNCTION)
    ENDS = (CLOSE, END_FUNCTION)
    FORM = "xml"

    def parse(self, text: str, is_end: bool) -> Parsed:
        if text == OPEN + FUNCTION:
            return None
        head = _HEAD.match(text)
        if head is None:
            return None if _HEAD_BEGIN.fullmatch(text) else MALFORMED
        name, at, arguments = head[1].strip(), head.end(), list[str]()
        if name not in self._functions:
            return Call(name, "{}", at)
        types = _types_of(self._functions[name])
        while found := _PARAMETER.match(text, at):
            if found["end"] is None:
                return None
            value = found["value"].removeprefix("\n").removesuffix("\n")
            key = found["name"].strip()
            written = _as_json(value, types.get(key, _STRING))
            arguments.append(f"{json.dumps(key, ensure_ascii=False)}: {written}")
            at = found.end("end") if found["end"] == END_PARAMETER else found.start("end")
        end = _END.match(text, at)
        assert end is not None, "white space always matches"
        whole = Call(name, "{" + ", ".join(arguments) + "}", end.end())
        if end["tag"] == END_FUNCTION:
            return whole
        if end["tag"] is not None:
            return whole._replace(end=end.start("tag"))
        if end.end() == len(text):
            return whole if is_end else None
        return None if _PARAMETER_BEGIN.fullmatch(text, at) else MALFORMED


_HEAD = re.compile(
    rf"(?:{OPEN}\s{{0,{MAX_NAME}}})?{FUNCTION}(\s*[^<>\s][^<>\n]{{0,{MAX_NAME - 1}}})>"
)
_HEAD_BEGIN = re.compile(rf"{OPEN}\s*|(?:{OPEN}\s*)?{FUNCTION}[^<>\n]{{0,{MAX_NAME}}}")
_PARAMETER = re.compile(
    rf"\s*{PARAMETER}(?P<name>\s*[^<>\s][^<>\n]{{0,{MAX_NAME - 1}}})>"
    rf"(?P<value>.*?)(?:(?P<end>{END_PARAMETER}|{END_FUNCTION}|{PARAMETER})|\Z)",
    re.DOTALL,
)
_PARAMETER_BEGIN = re.compile(rf"\s*{PARAMETER}[^<>\n]{{0,{MAX_NAME}}}")
_END = re.compile(rf"\s*(?P<tag>{END_FUNCTION}|{CLOSE}|{OPEN}|{FUNCTION})?")


def call_form(template: str) -> type[CallReader] | None:
    """Return the reader of the calls in the source of a chat template, or None without calls in a
    supported form. O(len(template))."""
    if FUNCTION in template:
        return QwenXMLReader
    return HermesReader if OPEN in template else None


def _types_of(function: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Return the JSON types that the schema of a function allows for each parameter."""
    schema = function.get("parameters")
    named = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(named, Mapping):
        return {}
    return {str(key): json_types(entry) for key, entry in named.items()}


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
    plain = text.strip()
    lowered = plain.lower()
    if types != _STRING:
        if "null" in types and lowered in ("null", "none"):
            return "null"
        if "boolean" in types and lowered in ("true", "false"):
            return lowered
        try:
            value = read_json(plain)
            if "string" not in types or _kinds(value) & types:
                return plain
        except ValueError:
            pass
    return json.dumps(text, ensure_ascii=False)


def _kinds(value: Any) -> frozenset[str]:
    """Return the JSON types of a parsed value."""
    if value is None or isinstance(value, bool):
        return frozenset({"null" if value is None else "boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    return frozenset({{float: "number", str: "string", list: "array", dict: "object"}[type(value)]})
