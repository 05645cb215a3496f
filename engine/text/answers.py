"""Parts of an answer (reasoning, text and tool calls) as events in their order, and their reader.

Calls are read in the forms in which models write them, and emitted when they are complete. A call
that cannot be made (its arguments are not JSON, its tool was not offered, or it breaks off) is
text, with a warning.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import Any, Literal, NamedTuple, cast

from msgspec import structs

from engine.text.bounded import read_json
from engine.text.outputs import FinishReason, RequestOutput, begin_of
from engine.text.tokenizer import CALL_CLOSE, CALL_OPEN, CLOSE, OPEN, any_of


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


Event = ReasoningDelta | TextDelta | ToolCall


def joined(events: Iterable[Event]) -> list[Event]:
    """Merge adjacent events of one kind. O(length)."""
    merged: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        if kind is ToolCall:
            merged.extend(group)
        else:
            merged.append(
                kind("".join(event.text for event in group if not isinstance(event, ToolCall)))
            )
    return merged


def as_message(events: Sequence[Event]) -> dict[str, Any]:
    """Return an answer as the message that chat templates take. O(length)."""
    calls = [
        {"type": "function", "function": {"name": one.name, "arguments": one.arguments}}
        for one in events
        if isinstance(one, ToolCall)
    ]
    thoughts = [one.text for one in events if isinstance(one, ReasoningDelta)]
    texts = [one.text for one in events if isinstance(one, TextDelta)]
    return {
        "role": "assistant",
        "content": "".join(texts),
        "reasoning_content": "".join(thoughts),
        "tool_calls": calls,
    }


BROKEN = "A call of a tool was left in the text, because "
"""Start of the warning about an answer; the reason follows."""
Finish = FinishReason | Literal["tool_calls"]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Form in which a model writes reasoning and tool calls."""

    thinks: bool
    offers_tools: bool
    """True if the template shows tools to the model."""
    calls: CallForm | None
    """Form of the model's calls, or None if it makes none or their form is not supported."""

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, template: str) -> AnswerForm:
        """Return the form for the source of a chat template. O(len(template)) for a new one."""
        offers_tools = "tools" in template
        # The last mark of the first form is in no template of the second.
        forms = (form for form in (XML, HERMES) if offers_tools and form.marks[-1] in template)
        return cls(CLOSE in template, offers_tools, next(forms, None))


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
        self._calls = form.calls if tools is not None else None
        self._functions = {f["name"]: f for tool in tools or () if (f := tool["function"])}
        self._thinks = form.thinks
        self.is_thinking = form.thinks and is_thinking
        """True if the next text is reasoning, as far as is known."""
        self._has_thoughts = self.is_thinking and not starts_text
        """True if the prompt or an event has a part of the reasoning."""
        self._rest = ""
        """Text that is not read yet: it may begin a mark, or depends on the text after it."""
        self._is_whole = self._is_cut = False
        """True if no text follows ``_rest``, and if it was cut off there."""
        self._parts = self._read_parts()
        self._is_single, self._ends = is_single, end_token_ids
        self.output: RequestOutput
        """Latest output that was read. With ``is_over`` it ends with the first call."""
        self.finish: Finish | None = None
        """Reason why the answer ended, or None if it goes on."""
        self._is_broken_off = False
        """True if a limit or a stop string ended the answer inside a call."""
        self.warning: str | None = None
        """Reason why the first of the calls that cannot be made is part of the text."""
        self.new: list[Event] = []
        """Events of the latest output."""
        self.events: list[Event] = []
        """All events so far."""
        self.is_over = False
        """True if the first call ended and the rest is ignored."""
        self.num_reasoning_tokens = 0

    @property
    def warned(self) -> dict[str, str]:
        """Field ``warning`` of an answer with a part that looks like a call and cannot be made; {}
        without one, and before the end of the answer."""
        is_over = self.finish is not None and self.warning is not None
        return {"warning": f"{BROKEN}{self.warning}."} if is_over else {}

    def read(self, output: RequestOutput) -> None:
        """Read the new part of the answer in ``output``."""
        if self.is_over:  # How much was generated since depends on the time of the abort.
            output = structs.replace(
                self.output,
                new_token_ids=(),
                new_text="",
                new_logprobs=(),
                finish_reason=output.finish_reason,
            )
        self.output = output
        was_thinking = self.is_thinking
        events = self.push(output.new_text)
        if was_thinking or self.is_thinking:
            self.num_reasoning_tokens += len(output.new_token_ids)
        if output.is_finished and not self.is_over:
            is_cut = output.finish_reason != "stop" or int(output.output[-1]) not in self._ends
            events = joined([*events, *self.flush(is_cut)])
        if self._is_single:
            ends = (at for at, one in enumerate(events, 1) if isinstance(one, ToolCall))
            end = next(ends, None)
            self.is_over = self.is_over or end is not None
            events = events[:end]
        self.new = events
        self.events += events
        self.finish = self._finish(output.finish_reason)

    def _finish(self, reason: FinishReason | None) -> Finish | None:
        """Return the reason why the answer ended, given that of its last output."""
        if reason is None or not any(isinstance(one, ToolCall) for one in self.events):
            return reason
        has_stopped = reason == "stop" and not self._is_broken_off
        # A call that ends exactly at the limit is complete: the client can run it.
        is_whole = reason == "length" and isinstance(self.events[-1], ToolCall)
        return "tool_calls" if self.is_over or has_stopped or is_whole else reason

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``. O(len(text)), over an answer, and a
        copy of the call or white space in progress."""
        self._rest += text
        events = itertools.takewhile(lambda event: event is not None, self._parts)
        return joined(cast("Iterator[Event]", events))

    def flush(self, is_cut: bool = False) -> list[Event]:
        """Return the events held back, after the end of the text. ``is_cut``: the answer was cut
        off, so a call in progress is text."""
        self._is_whole, self._is_cut = True, is_cut
        return self.push("")

    def _read_parts(self) -> Iterator[Event | None]:
        """Yield the events in the order of the text, and None where more of it is needed."""
        if self._thinks and not self.is_thinking:
            while self._may_begin(OPEN):
                yield None
            begin = self._rest.lstrip()
            if begin.startswith(OPEN):  # Reasoning starts only at the beginning of an answer.
                self._rest, self.is_thinking = begin.removeprefix(OPEN), True
        if self.is_thinking:
            yield from self._read_reasoning()
        if self._calls is not None:
            yield from self._read_calls(self._calls)
        while self._calls is None:
            if self._rest:
                yield TextDelta(self._rest)
                self._rest = ""
            yield None

    def _may_begin(self, mark: str) -> bool:
        """Return True if more text could complete ``mark`` after white space."""
        begin = self._rest.lstrip()
        return not self._is_whole and len(begin) < len(mark) and mark.startswith(begin)

    def _certain(self, marks: Sequence[str]) -> str:
        """Return the beginning of the rest that cannot be part of one of ``marks``, without white
        space at its end."""
        ends = [len(self._rest) if self._is_whole else begin_of(self._rest, m) for m in marks]
        return self._rest[: min(ends)].rstrip()

    def _read_reasoning(self) -> Iterator[Event | None]:
        """Read up to ``</think>``, without the white space around the reasoning and after it. An
        answer that ends before is all reasoning."""
        while self.is_thinking:
            before, close, behind = self._rest.partition(CLOSE)
            text = before.rstrip() if close else self._certain([CLOSE])
            self._rest, self.is_thinking = behind if close else self._rest[len(text) :], not close
            if thoughts := text if self._has_thoughts else text.lstrip():
                self._has_thoughts = True
                yield ReasoningDelta(thoughts)
            if not close:
                yield None
        while not self._rest.strip():
            yield None
        self._rest = self._rest.lstrip()

    def _read_calls(self, form: CallForm) -> Iterator[Event | None]:
        """Read text and calls. White space around a call is not text."""
        begins, num_retries, has_calls = any_of(form.marks), MAX_RETRIES, False
        while True:
            found = begins.search(self._rest)
            text = self._rest[: found.start()].rstrip() if found else self._certain(form.marks)
            if text:
                yield TextDelta(text)
            self._rest = self._rest[len(text) :]
            if found is None:
                if self._is_whole and not has_calls and self._rest:
                    yield TextDelta(self._rest)
                    self._rest = ""
                yield None
                continue
            start = found.start() - len(text)
            parsed, end = yield from self._parse_call(form, start, found.end() - len(text))
            if isinstance(parsed, Call) and parsed.name not in self._functions:
                unknown = f"no tool {parsed.name[:MAX_NAME]!r} was offered"
                parsed = unknown if self._functions else "'tool_choice' is 'none'"
            if isinstance(parsed, Call):
                has_calls = True
                yield ToolCall(parsed.name, json.dumps(parsed.arguments, ensure_ascii=False))
                self._rest = self._rest[start + parsed.end :]
                while self._may_begin(CALL_CLOSE):
                    yield None
                behind = self._rest.lstrip()
                is_part = self._is_cut and CALL_CLOSE.startswith(behind)
                self._rest = "" if is_part else behind.removeprefix(CALL_CLOSE)
                continue
            self.warning = self.warning or parsed
            self._is_broken_off = self._is_cut
            # It is text up to the next mark.
            breaks = any_of((CALL_CLOSE, *form.marks))
            mark = breaks.search(self._rest, start + 1, end) if num_retries else None
            if mark is not None:
                num_retries -= 1
                end = mark.end() if mark.group() == CALL_CLOSE else mark.start()
            broken = self._rest[:end].rstrip()
            yield TextDelta(broken)
            self._rest = self._rest[len(broken) :]

    def _parse_call(
        self, form: CallForm, start: int, at: int
    ) -> Generator[None, None, tuple[Call | str, int]]:
        """Return the call at ``start`` of the rest, or the reason why there is none, and the end of
        the text that it was read from. Its mark ends ``at``. Yields None where more is needed."""
        marks, tried = (*form.ends, *form.marks), 0
        ends, longest = any_of(marks), max(map(len, marks))
        while True:
            end = ends.search(self._rest, at)
            if end is not None:
                at = end.end()
                if at - start >= GROWTH * tried:
                    tried = at - start
                    parsed = form.parse(self._rest[start:at], self._functions, False)
                    if parsed is not None:
                        return parsed, at
            elif self._is_whole:
                parsed = form.parse(self._rest[start:], self._functions, not self._is_cut)
                return parsed or BROKEN_OFF, len(self._rest)
            else:
                at = max(at, len(self._rest) - longest)
                yield None


MAX_NAME = 256
"""Maximum length of a name; a longer one is not a call."""
MAX_RETRIES = 8
"""Maximum number of broken calls of an answer that are searched for calls again, so that an answer
is read in linear time."""
GROWTH = 1.125
"""Factor by which a call must grow before it is parsed again, so that it is read in linear time."""
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
BROKEN_OFF = "it breaks off"
NOT_JSON = "it is not a JSON object with a name and arguments"
MALFORMED = "it is not written as a function with parameters"
MAX_SCHEMAS = 64
"""Maximum number of schemas that are searched for the types of one parameter."""


class Call(NamedTuple):
    """A call that was read."""

    name: str
    arguments: dict[str, Any]
    end: int
    """End of the call in the text."""


Parsed = Call | str | None
"""A call, the reason why it cannot be made, or None if it is not complete."""
Functions = Mapping[str, Mapping[str, Any]]
"""Offered tools by name."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """Form in which a model writes calls."""

    name: Literal["hermes", "xml"]
    marks: tuple[str, ...]
    """Marks with which a call begins."""
    ends: tuple[str, ...]
    """Marks with which a call may end."""
    parse: Callable[[str, Functions, bool], Parsed]
    """Function that reads the call at the beginning of a text. The last argument is True if the
    answer ends behind it."""


def _parse_hermes(text: str, functions: Functions, is_end: bool) -> Parsed:
    """Read a call of Hermes, Qwen3 and the built-in model:
    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""
    start = len(text) - len(text.removeprefix(CALL_OPEN).lstrip())
    if not text.startswith("{", start):
        return NOT_JSON if text[start:] else None
    try:
        end = _JSON.raw_decode(text, start)[1]
        call = read_json(text[start:end])  # It is stricter.
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        arguments = read_json(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        in_string = any(not string["end"] for string in _STRING_PARTS.finditer(text, start))
        return None if in_string or not text.endswith((CALL_OPEN, CALL_CLOSE)) else NOT_JSON
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return NOT_JSON
    return Call(name, arguments, end)


_JSON = json.JSONDecoder()
_STRING_PARTS = re.compile(r'"(?:[^"\\]|\\.)*+(?P<end>"?)', re.DOTALL)
"""A string of JSON, or its beginning up to the end of the text."""


def _parse_xml(text: str, functions: Functions, is_end: bool) -> Parsed:
    """Read a call of Qwen3-Coder and Qwen3.5: ``<tool_call><function=NAME>``, then a
    ``<parameter=NAME>`` per argument with its value on separate lines, and closing tags."""
    head = _HEAD.match(text)
    if head is None:
        return None if _HEAD_BEGIN.fullmatch(text) else MALFORMED
    name, at, arguments = head[1].strip(), head.end(), dict[str, Any]()
    named = (functions.get(name, {}).get("parameters") or {}).get("properties")
    schemas = named if isinstance(named, Mapping) else {}
    while found := _PARAMETER.match(text, at):
        if found["end"] is None:
            return None
        value, key = found["value"].removeprefix("\n").removesuffix("\n"), found["name"].strip()
        arguments[key] = _typed(value, json_types(schemas.get(key)))
        at = found.end("end") if found["end"] == END_PARAMETER else found.start("end")
    end = _END.match(text, at)
    assert end is not None, "white space always matches"
    if end["tag"] is None and end.end() < len(text):
        return None if _PARAMETER_BEGIN.fullmatch(text, at) else MALFORMED
    if end["tag"] is None and not is_end:
        return None
    has_own_end = end["tag"] in (END_FUNCTION, None)
    return Call(name, arguments, end.end() if has_own_end else end.start("tag"))


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


HERMES = CallForm("hermes", (CALL_OPEN,), (CALL_CLOSE,), _parse_hermes)
XML = CallForm("xml", (CALL_OPEN, FUNCTION), (CALL_CLOSE, END_FUNCTION), _parse_xml)


def json_types(schema: Any) -> set[str]:
    """Return the JSON types that ``schema`` names, or ``string`` if it names none."""
    found, schemas = set[str](), [schema]
    for one in itertools.islice(schemas, MAX_SCHEMAS):
        if isinstance(one, Mapping):
            kind = one.get("type", "object" if "$ref" in one else None)
            kinds = kind if isinstance(kind, list) else [kind]
            found.update(each for each in kinds if isinstance(each, str))
            for many in ("anyOf", "oneOf", "allOf"):
                if isinstance(one.get(many), list):
                    schemas.extend(one[many])
    return found or {"string"}


_WORDS = {"true": True, "false": False, "null": None, "none": None}
"""Values as models write them, also in the form of Python."""
_KINDS = {
    NoneType: {"null"},
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    str: {"string"},
    list: {"array"},
    dict: {"object"},
}


def _typed(text: str, types: set[str]) -> Any:
    """Return a value of one of ``types``, or the text if it is not such JSON."""
    word = text.strip().lower()
    if types == {"string"}:
        return text
    try:
        value = _WORDS[word] if word in _WORDS else read_json(text.strip())
    except ValueError:
        return text
    return value if "string" not in types or _KINDS[type(value)] & types else text
