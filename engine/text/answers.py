"""Parts of an answer (reasoning, text and tool calls) as events in their order, and their reader.

Calls are read in the forms in which models write them, and emitted when they are complete. A call
cannot be made if its arguments are not JSON, if its tool was not offered, or if it breaks off. It
is then text, with a ``BrokenCall`` that gives the reason.
"""

from __future__ import annotations

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from msgspec import structs

from engine.text.json_text import read_json, whole_text, write_json
from engine.text.outputs import MarkSearch, RequestOutput
from engine.text.tokenizer import any_of

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


PIECE = 512
"""Number of characters that are read at a time."""
BROKEN = "A call of a tool was left in the text, because "
"""Start of the warning about an answer; the reason follows."""
Finish = Literal["stop", "length", "tool_calls", "abort", "error"]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Form in which a model writes reasoning and tool calls."""

    thinks: bool
    offers_tools: bool
    """True if the template shows tools to the model."""
    calls: type[CallReader] | None
    """Reader of the model's calls, or None if it makes none or their form is not supported."""

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, template: str) -> AnswerForm:
        """Return the form for the source of a chat template. O(len(template)) for a new one."""
        offers_tools = "tools" in template
        readers = (QwenXMLReader, HermesReader) if offers_tools else ()
        # The last mark of the first form is in no template of the second.
        calls = next((reader for reader in readers if reader.MARKS[-1] in template), None)
        return cls(CLOSE in template, offers_tools, calls)


class AnswerReader:
    """Reads the text of one answer as it grows. The events do not depend on the pieces in which the
    text arrives."""

    def __init__(
        self,
        form: AnswerForm,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        is_thinking: bool = False,
        starts_text: bool = True,
        is_single: bool = False,
        end_token_ids: Container[int] = (),
    ) -> None:
        """``tools``: tools with calls that are read, or None to treat calls as text. Without any
        tool, every call is text with a warning. ``is_thinking``: the prompt ends inside reasoning.
        ``starts_text``: False if the answer continues a text, so that its first white space counts.
        ``is_single``: the answer is read only up to the end of its first call. ``end_token_ids``:
        tokens with which the model ends its answer."""
        self._reasoning = ReasoningReader(is_thinking, starts_text) if form.thinks else None
        self._calls = form.calls(tools) if form.calls and tools is not None else None
        self._is_single, self._ends = is_single, end_token_ids
        self.output: RequestOutput
        """Latest output that was read. With ``is_over`` it ends with the first call."""
        self.finish: Finish | None = None
        """Reason why the answer ended, or None if it goes on."""
        self._is_broken_off = False
        """True if a limit or a stop string ended the answer inside a call."""
        self._warning: str | None = None
        """Reason why the first of the calls that cannot be made is part of the text."""
        self.new: list[Event] = []
        """Events of the latest output."""
        self.events: list[Event] = []
        """All events so far."""
        self.is_over = False
        """True if the first call ended and the rest is ignored."""
        self.num_reasoning_tokens = 0

    @property
    def is_thinking(self) -> bool:
        """True if the next text is reasoning, as far as is known."""
        return self._reasoning is not None and self._reasoning.is_inside

    @property
    def warned(self) -> dict[str, str]:
        """Field ``warning`` of an answer with a part that looks like a call and cannot be made; {}
        without one, and before the end of the answer."""
        is_over = self.finish is not None and self._warning is not None
        return {"warning": f"{BROKEN}{self._warning}."} if is_over else {}

    def read(self, output: RequestOutput) -> None:
        """Read the new part of the answer in ``output``."""
        if self.is_over:  # How much was generated since depends on the time of the abort.
            self.new = []
            self.output = structs.replace(
                self.output,
                new_token_ids=(),
                new_text="",
                new_logprobs=(),
                new_prompt_logprobs=None,
                finish_reason=output.finish_reason,
            )
        else:
            self.output = output
            self.new = self._read(output)
        self.finish = self._finish(output)

    def _read(self, output: RequestOutput) -> list[Event]:
        was_thinking = self.is_thinking
        events = self.push(output.new_text)
        if was_thinking or self.is_thinking:
            self.num_reasoning_tokens += len(output.new_token_ids)
        if output.is_finished:
            is_cut = output.finish_reason != "stop" or int(output.output[-1]) not in self._ends
            rest = self.flush(is_cut)
            self._is_broken_off = is_cut and any(isinstance(one, BrokenCall) for one in rest)
            events = [*events, *rest]
        for one in events:
            if isinstance(one, BrokenCall) and self._warning is None:
                self._warning = one.why
        events = joined(one for one in events if not isinstance(one, BrokenCall))
        if self._is_single:
            ends = (at for at, one in enumerate(events, 1) if isinstance(one, ToolCall))
            end = next(ends, None)
            self.is_over = end is not None
            events = events[:end]
        self.events += events
        return events

    def _finish(self, output: RequestOutput) -> Finish | None:
        """Return the reason why the answer ended, or None."""
        if output.finish_reason is None:
            return None
        has_stopped = output.finish_reason == "stop" and not self._is_broken_off
        has_calls = any(isinstance(one, ToolCall) for one in self.events)
        # A call that ends exactly at the limit is complete: the client can run it.
        ends_in_call = has_calls and isinstance(self.events[-1], ToolCall)
        is_whole = output.finish_reason == "length" and ends_in_call
        if self.is_over or (has_calls and has_stopped) or is_whole:
            return "tool_calls"
        return output.finish_reason

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``. O(len(text)), over an answer."""
        events: list[Event] = []
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            if self._reasoning is not None:
                thoughts, piece = self._reasoning.push(piece)
                events += thoughts
            events += self._parts(piece)
        return joined(events)

    def flush(self, is_cut: bool = False) -> list[Event]:
        """Return the events held back, after the end of the text.

        ``is_cut``: the answer was cut off, so a call in progress stays as it is and may be
        incomplete JSON.
        """
        events: list[Event] = []
        if self._reasoning is not None:
            thoughts, rest = self._reasoning.flush()
            events = [*thoughts, *self._parts(rest)]
        if self._calls is not None:
            events.extend(self._calls.flush(is_cut))
        return joined(events)

    def _parts(self, text: str) -> list[Event]:
        """Return the events in text after the reasoning."""
        if not text:
            return []
        return [TextDelta(text)] if self._calls is None else self._calls.push(text)


class Space:
    """White space at the end of a text, held back until other text follows."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def push(self, text: str) -> str:
        """Return the held space and ``text``, without the white space at its end."""
        kept = text.rstrip()
        if not kept:
            if text:
                self._pieces.append(text)
            return ""
        before = self.take()
        if len(kept) < len(text):
            self._pieces.append(text[len(kept) :])
        return before + kept

    def take(self) -> str:
        """Return the held space and forget it. O(its length)."""
        held = "".join(self._pieces)
        self._pieces.clear()
        return held


class ReasoningReader:
    """Separates reasoning from the answer and strips the white space around it.

    Reasoning can start only at the beginning of an answer, and only ``</think>`` ends it: an answer
    that ends before is all reasoning.
    """

    def __init__(self, is_open: bool, starts_text: bool = True) -> None:
        """``is_open``: the prompt ends inside reasoning, of which it has a part unless
        ``starts_text``."""
        self._close = MarkSearch(CLOSE)
        self._space = Space()
        self._begin = ""
        self._has_text = is_open and not starts_text
        self._state: Callable[[str], tuple[list[Event], str]]
        self._state = self._inside if is_open else self._before

    @property
    def is_inside(self) -> bool:
        """True if the next text is reasoning, as far as is known."""
        return self._state == self._inside

    def push(self, text: str) -> tuple[list[Event], str]:
        """Return (reasoning that is certain, text of the answer). O(len(text))."""
        return self._state(text)

    def flush(self) -> tuple[list[Event], str]:
        """Return the text held back in the same form, after the end of the text."""
        if self.is_inside:
            return self._thoughts(self._close.flush()), ""
        begin, self._begin = self._space.take() + self._begin, ""
        return [], begin if self._state == self._before else ""

    def _before(self, text: str) -> tuple[list[Event], str]:
        """State before any text other than white space or part of the mark."""
        if not self._begin:
            kept = text.lstrip()
            self._space.push(text[: len(text) - len(kept)])
            text = kept
        self._begin += text
        if len(self._begin) < len(OPEN) and OPEN.startswith(self._begin):
            return [], ""
        begin, self._begin = self._begin, ""
        if begin.startswith(OPEN):
            self._space.take()
            self._state = self._inside
            return self._inside(begin[len(OPEN) :])
        self._state = self._behind
        return [], self._space.take() + begin

    def _inside(self, text: str) -> tuple[list[Event], str]:
        thoughts, mark, rest = self._close.push(text)
        events = self._thoughts(thoughts)
        if mark is None:
            return events, ""
        self._space.take()
        self._state = self._between
        return events, self._between(rest)[1]

    def _between(self, text: str) -> tuple[list[Event], str]:
        text = text.lstrip()
        if text:
            self._state = self._behind
        return [], text

    def _behind(self, text: str) -> tuple[list[Event], str]:
        return [], text

    def _thoughts(self, text: str) -> list[Event]:
        if not self._has_text:
            text = text.lstrip()
        certain = self._space.push(text)
        self._has_text = self._has_text or bool(certain)
        return [ReasoningDelta(certain)] if certain else []


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

    MARKS: tuple[str, ...] = (CALL_OPEN,)
    """Marks with which a call begins."""
    ENDS: tuple[str, ...] = (CALL_CLOSE,)
    """Marks with which a call may end."""
    FORM: Literal["hermes", "xml"] = "hermes"

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._functions = {f["name"]: f for tool in tools if (f := tool["function"])}
        self._search = MarkSearch(*self.MARKS)
        self._next_mark = any_of((CALL_CLOSE, *self.MARKS))
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
        arguments = whole_text(parsed.arguments)
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
            end = found.end() if found.group() == CALL_CLOSE else found.start()
        self._events.append(BrokenCall(why))
        self._write(self._space.push(text[:end]))
        return text[end:]

    def _skip_closing(self, text: str) -> str:
        """Skip white space and one closing mark, and return the rest."""
        held = self._closing + text if self._closing else text.lstrip()
        is_open = len(held) < len(CALL_CLOSE) and CALL_CLOSE.startswith(held)
        self._closing = held if is_open else None
        return "" if is_open else held.removeprefix(CALL_CLOSE)


class HermesReader(CallReader):
    """Reads calls in the form of Hermes, Qwen3 and the built-in model: ``<tool_call>{"name": ...,
    "arguments": {...}}</tool_call>``."""

    def parse(self, text: str, is_end: bool) -> Parsed:
        start = len(CALL_OPEN) + len(text[len(CALL_OPEN) :]) - len(text[len(CALL_OPEN) :].lstrip())
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

    MARKS = (CALL_OPEN, FUNCTION)
    ENDS = (CALL_CLOSE, END_FUNCTION)
    FORM = "xml"

    def parse(self, text: str, is_end: bool) -> Parsed:
        if text == CALL_OPEN + FUNCTION:
            return None
        head = _HEAD.match(text)
        if head is None:
            return None if _HEAD_BEGIN.fullmatch(text) else MALFORMED
        name, at, arguments = head[1].strip(), head.end(), list[str]()
        if name not in self._functions:
            return Call(name, "{}", at)
        schema = self._functions[name].get("parameters")
        named = schema.get("properties") if isinstance(schema, Mapping) else None
        schemas = named if isinstance(named, Mapping) else {}
        while found := _PARAMETER.match(text, at):
            if found["end"] is None:
                return None
            value = found["value"].removeprefix("\n").removesuffix("\n")
            key = found["name"].strip()
            written = _as_json(value, json_types(schemas.get(key)))
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
    rf"(?:{CALL_OPEN}\s{{0,{MAX_NAME}}})?{FUNCTION}(\s*[^<>\s][^<>\n]{{0,{MAX_NAME - 1}}})>"
)
_HEAD_BEGIN = re.compile(rf"{CALL_OPEN}\s*|(?:{CALL_OPEN}\s*)?{FUNCTION}[^<>\n]{{0,{MAX_NAME}}}")
_PARAMETER = re.compile(
    rf"\s*{PARAMETER}(?P<name>\s*[^<>\s][^<>\n]{{0,{MAX_NAME - 1}}})>"
    rf"(?P<value>.*?)(?:(?P<end>{END_PARAMETER}|{END_FUNCTION}|{PARAMETER})|\Z)",
    re.DOTALL,
)
_PARAMETER_BEGIN = re.compile(rf"\s*{PARAMETER}[^<>\n]{{0,{MAX_NAME}}}")
_END = re.compile(rf"\s*(?P<tag>{END_FUNCTION}|{CALL_CLOSE}|{CALL_OPEN}|{FUNCTION})?")


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
