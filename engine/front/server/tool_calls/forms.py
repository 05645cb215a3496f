"""Forms in which models write calls of tools: their readers and their grammars."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from msgspec import structs

from engine.errors import Json, JsonObject
from engine.front.server.bodies import APIError
from engine.front.server.schemas import ChatRequest, Choice, NamedTool
from engine.front.server.tool_calls.parameters import (
    STRING_PARTS,
    Pairs,
    Parameters,
    read_leniently,
)
from engine.text.answers import MAX_NAME, AnswerReader, Event, RequestOutput, TextDelta, ToolCall
from engine.text.grammar import Grammar, GrammarError, quoted
from engine.text.tokenizer import CALL_CLOSE, CALL_OPEN, CLOSE, OPEN, ChatTemplate, any_of

MAX_RETRIES = 8
"""Maximum number of broken calls of an answer that are searched for calls again, so that an answer
is read in linear time."""
GROWTH = 1.125
"""Factor by which a call must grow before it is parsed again, after as many further times, so that
it is read in linear time."""
BROKEN = "A call of a tool was left in the text, because "
THOUGHT = "A call of a tool was left in the reasoning, because "
"""Starts of warnings about an answer; the reason follows."""
BROKEN_OFF = "it breaks off"
LEFT_OVER = "Text next to a call of a tool, inside of its marks, is part of the answer"
MISTYPED = "The argument {!r} of a call is not of the type in the schema of the tool"
ANY_OBJECT = {"type": "object"}
ANY = "/(?s:.*)/"
"""Any text, as an expression of Lark."""
Function = Mapping[str, Any]
"""An offered tool: its name, the schema of its parameters, and whether it is strict."""


class Call(NamedTuple):
    """A call that was read."""

    name: str
    arguments: JsonObject
    end: int
    """End of the call in the text."""
    doubt: str | None = None
    """Warning about the arguments."""


class Form(ABC):
    """Calls of tools in the answers to one chat, between the marks of a form."""

    MARKS: tuple[str, ...]
    ENDS: tuple[str, ...]
    """Texts with which a call begins, and may end."""
    CALLS: tuple[str, ...]
    """Rules of Lark: ``calls`` is a call without the marks around it, with ``function`` for any of
    the functions."""

    def __init__(
        self,
        tools: Sequence[Mapping[str, Function]],
        choice: Choice | NamedTool | None = None,
        is_single: bool = False,
    ) -> None:
        """``tools``: as in OpenAI's API; without any, every call is text with a warning.
        ``choice``: its ``tool_choice``. ``is_single``: the first call ends the answer."""
        self._offered: list[Function] = [tool["function"] for tool in tools]
        self.functions = {one["name"]: Parameters(one) for one in self._offered}
        self.marks = self.MARKS if tools else ()
        """Texts with which a call begins; () if every call is text."""
        self.is_single, self._choice = is_single, choice

    @abstractmethod
    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Call | str | None:
        """Return the call at the beginning of ``text``, the reason why it cannot be made, or None
        if it is not complete. ``is_whole``: no text follows; ``is_cut``: because a limit or a stop
        string ended the answer. A call that was returned does not depend on the text after it."""

    @abstractmethod
    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        """Return the rule ``name`` of a call of ``tool``, and its parts. Raises GrammarError."""

    def refused(self, parsed: Call | str) -> str | None:
        """Return the reason why ``parsed`` is not a call of an offered tool, or None if it is."""
        if isinstance(parsed, str) or parsed.name in self.functions:
            return parsed if isinstance(parsed, str) else None
        unknown = f"no tool {parsed.name[:MAX_NAME]!r} was offered"
        return unknown if self.functions else "'tool_choice' is 'none'"

    def reader(self, **options: Any) -> AnswerReader:
        """Return a reader of an answer with calls, with the ``options`` of ``AnswerReader``."""
        return CallReader(self, options)

    def restrict(
        self, forms: dict[str, Callable[[], Grammar]], format_name: str, may_think: bool
    ) -> None:
        """Add required or strict calls to the requested forms of an answer: parameter of the body
        -> function that makes its grammar. The form ``format_name`` is then that of an answer
        without calls. ``may_think``: the answer may begin with reasoning."""
        functions, choice = self._offered, self._choice
        if choice not in (None, "none", "auto"):
            name = choice.function.name if isinstance(choice, NamedTool) else None
            forms["tool_choice"] = partial(self.grammar, name)
        elif functions and (text := forms.get(format_name)) is not None:
            forms[format_name] = partial(self.grammar, text=text)
        elif not forms and any(function.get("strict") is True for function in functions):
            forms["tools"] = partial(self.free_grammar, may_think)

    def grammar(
        self, name: str | None = None, text: Callable[[], Grammar] | None = None
    ) -> Grammar:
        """Return the grammar of an answer that must call a tool, that of this ``name`` if given, or
        must be a ``text`` of this grammar in Lark.

        With ``text``, arguments are any object unless the tool is ``strict``. Limits of other tools
        are dropped if they cannot be enforced. Raises GrammarError if no tool has this name, or the
        schema of a strict one cannot be enforced.
        """
        functions = self._offered if text is None else self._only_strict()
        wanted = [f for f in functions if name in (None, f["name"])]
        if not wanted:
            names = ", ".join(function["name"] for function in self._offered)
            raise GrammarError(f"{name!r} is none of the tools: {names}.")
        more = "" if self.is_single or name is not None else '("\\n" call)*'
        start = f"start: call {more}"
        if text is not None:
            start += "\n" + text().text.replace("start:", "| ", 1)
        call = f'call: "{CALL_OPEN}\\n" calls "\\n{CALL_CLOSE}"'
        loosely = [f for f in self._only_strict() if name in (None, f["name"])]
        looser = None
        if wanted != loosely:
            looser = Grammar("lark", "\n".join([start, call, *self._rules(loosely)]))
        try:
            return Grammar("lark", "\n".join([start, call, *self._rules(wanted)]), looser=looser)
        except GrammarError:
            if looser is None:
                raise
            return looser

    def free_grammar(self, may_think: bool = False) -> Grammar:
        """Return the grammar of an answer that is free except for calls.

        Each call names a tool and has arguments that match its schema, or any object if the tool is
        not ``strict``. ``may_think``: the answer may begin with reasoning. Raises GrammarError if
        the schema of a strict tool cannot be used.
        """
        rests = {CALL_OPEN: f'"\\n"? calls "\\n"? "{CALL_CLOSE}"', FUNCTION: "function"}

        def free(rule: str, expression: str) -> list[str]:
            """Return the rules of text with calls, and reasoning outside of it."""
            texts, lines = rule.upper(), list[str]()
            kinds = [texts]
            for number, mark in enumerate(self.MARKS):
                kinds.append(f"{rule}_{number} {rests[mark]} text")
                lines.append(f'{rule}_{number}[lazy]: {texts} "{mark}"')
            return [f"{texts}: {expression}", f"{rule}: {' | '.join(kinds)}", *lines]

        lines = ["start: text", *free("text", ANY), *self._rules(self._only_strict())]
        if may_think:
            lines[0] = "start: first | thought text"
            lines += free("first", rf"{ANY} & ~/\s*{OPEN}(?s:.*)/")
            lines += ["thought[lazy]: THOUGHT", rf"THOUGHT: /\s*{OPEN}(?s:.*)<\/think>/"]
        return Grammar("lark", "\n".join(lines))

    def _only_strict(self) -> list[Function]:
        """Return the functions; those that are not strict take any object."""
        return [
            f if f.get("strict") is True else {"name": f["name"], "parameters": ANY_OBJECT}
            for f in self._offered
        ]

    def _rules(self, functions: Sequence[Function]) -> list[str]:
        """Return the rules of calls, with comments that errors of their compilation quote. Raises
        GrammarError with the name of the tool."""
        rules = [f"call_{number}" for number in range(len(functions))]
        lines = [*self.CALLS, f"function: {' | '.join(rules)}"]
        for rule, function in zip(rules, functions, strict=True):
            tool = f"tool {function['name']!r}"
            try:
                made = self.rules(rule, function["name"], Parameters(function))
            except GrammarError as error:
                raise GrammarError(f"{tool}: {error}") from None
            lines += [f"{line} // {tool}" for line in made]
        return lines


class CallReader(AnswerReader):
    """Reader of an answer with calls."""

    def __init__(self, form: Form, options: Mapping[str, Any]) -> None:
        """``options``: those of ``AnswerReader``."""
        super().__init__(**options)
        self._form = form
        self.warning: str | None = None
        """Sentence about the first call that cannot be made, or is doubtful."""
        self._is_broken_off = False
        """True if a limit or a stop string ended the answer inside a call."""

    @property
    def warned(self) -> dict[str, str]:
        is_over = self.finish is not None and self.warning is not None
        return {"warning": f"{self.warning}."} if is_over else {}

    def read(self, output: RequestOutput) -> None:
        reason = output.finish_reason
        if self.is_over:  # How much was generated since depends on the time of the abort.
            self.output = structs.replace(
                self.output, new_token_ids=(), new_text="", new_logprobs=(), finish_reason=reason
            )
            self.new, self.finish = [], reason
        else:
            super().read(output)
        if self._form.is_single:
            ends = (at for at, one in enumerate(self.new, 1) if isinstance(one, ToolCall))
            if (end := next(ends, None)) is not None:
                self.is_over = True
                self.events = self.events[: len(self.events) - len(self.new) + end]
                self.new = self.new[:end]
        if reason is not None and any(isinstance(one, ToolCall) for one in self.events):
            has_stopped = reason == "stop" and not self._is_broken_off
            # A call that ends exactly at the limit is complete: the client can run it.
            is_whole = reason == "length" and isinstance(self.events[-1], ToolCall)
            if self.is_over or has_stopped or is_whole:
                self.finish = "tool_calls"

    def _warn(self, why: str) -> None:
        self.warning = self.warning or why

    def _made(self, call: Call) -> ToolCall:
        if call.doubt is not None:
            self._warn(call.doubt)
        return ToolCall(call.name, json.dumps(call.arguments, ensure_ascii=False))

    def _read_reasoning(self) -> Iterator[Event | None]:
        """Read up to ``</think>``. Calls are part of the reasoning, unless the answer ends behind
        them: then they are made, or there is a warning."""
        marks, num_retries, why = self._form.MARKS, MAX_RETRIES, None
        while self.is_thinking:
            marks = marks if num_retries else ()
            found = any_of((CLOSE, *marks)).search(self._rest)
            if found is None or found[0] == CLOSE:
                if found is None and self._is_whole and why is not None:
                    self._warn(THOUGHT + why)
                yield from self._read_thought((CLOSE, *marks))
                continue
            yield from self._as_thought(text := self._rest[: found.start()].rstrip())
            at, end = found.start() - len(text), found.end() - len(text)
            calls, why = list[Call](), None
            while why is None:
                parsed, _ = yield from self._parse_call(at, end, CLOSE)
                why = self._form.refused(parsed)
                if isinstance(parsed, str) or why is not None:
                    num_retries -= 1
                    break
                calls.append(parsed)
                while (next_at := self._behind(at + parsed.end)) is None:
                    yield None
                at = end = next_at
                if at == len(self._rest):
                    break
                if (mark := any_of(marks).match(self._rest, at)) is None:
                    why = "more reasoning or an answer follows it"
                else:
                    end = mark.end()
            if why is None and any(self._form.functions[one.name].is_strict for one in calls):
                why = "the schema of a strict tool is not enforced there"
            if why is None and self._is_cut:
                why = f"{BROKEN_OFF} behind it"
            if why is None:
                yield from map(self._made, calls)
                self._rest, self.is_thinking = "", False
            else:
                yield from self._as_thought(self._rest[:end].rstrip())
        while not self._rest.strip():
            if self._is_whole and why is not None:
                self._warn(THOUGHT + why)
            yield None
        self._rest = self._rest.lstrip()

    def _behind(self, at: int) -> int | None:
        """Return the position of the text behind a call in reasoning that ends ``at``: the end of
        the rest if the answer has no more text. None if that is not known yet."""
        after = self._rest[at:].lstrip()
        if not self._is_whole and any(m.startswith(after) for m in (CALL_CLOSE, CLOSE)):
            return None
        after = after.removeprefix(CALL_CLOSE).lstrip()
        marks = CLOSE, *self._form.MARKS
        if not after.removeprefix(CLOSE).strip():
            return len(self._rest) if self._is_whole else None
        if not self._is_whole and any(m != after and m.startswith(after) for m in marks):
            return None
        return len(self._rest) - len(after)

    def _read_text(self) -> Iterator[Event | None]:
        """Read text and calls. White space around a call is not text."""
        marks, num_retries, has_calls = self._form.MARKS, MAX_RETRIES, False
        begins, breaks = any_of(marks), any_of((CALL_CLOSE, *marks))
        while True:
            found = begins.search(self._rest)
            certain = self._certain((*marks, CALL_CLOSE))
            text = self._rest[: found.start()].rstrip() if found else certain
            if text:
                if has_calls and CALL_CLOSE in text:
                    self._warn(LEFT_OVER)
                yield TextDelta(text)
            self._rest = self._rest[len(text) :]
            if found is None:
                if self._is_whole and not has_calls and self._rest:
                    yield TextDelta(self._rest)
                    self._rest = ""
                yield None
                continue
            start = found.start() - len(text)
            parsed, end = yield from self._parse_call(start, found.end() - len(text))
            why = self._form.refused(parsed)
            if isinstance(parsed, Call) and why is None:
                has_calls = True
                yield self._made(parsed)
                self._rest = self._rest[start + parsed.end :]
                while any(map(self._may_begin, (CALL_CLOSE, *marks))):
                    yield None
                behind = self._rest.lstrip()
                is_part = self._is_cut and CALL_CLOSE.startswith(behind)
                self._rest = "" if is_part else behind.removeprefix(CALL_CLOSE)
                if self._rest == behind and found[0] == CALL_OPEN and not begins.match(behind):
                    self._warn(LEFT_OVER) if behind else None
                continue
            self._warn(f"{BROKEN}{why}")
            self._is_broken_off = self._is_cut
            # It is text up to the next mark.
            mark = breaks.search(self._rest, start + 1, end) if num_retries else None
            if mark is not None:
                num_retries -= 1
                end = mark.end() if mark.group() == CALL_CLOSE else mark.start()
            broken = self._rest[:end].rstrip()
            yield TextDelta(broken)
            self._rest = self._rest[len(broken) :]

    def _parse_call(
        self, start: int, at: int, stop: str | None = None
    ) -> Generator[None, None, tuple[Call | str, int]]:
        """Return the call at ``start`` of the rest, or the reason why there is none, and the end of
        the text that it was read from. Its mark ends ``at``; a mark ``stop`` ends the text. Yields
        None where more is needed."""
        form, tried, num_retries = self._form, 0, MAX_RETRIES
        closes = (CALL_CLOSE,) if self._rest.startswith(CALL_OPEN, start) else form.ENDS
        marks = *closes, *form.MARKS, *([stop] if stop else ())
        ends, longest = any_of(marks), max(map(len, marks))
        while True:
            end = ends.search(self._rest, at)
            if end is not None and end[0] != stop:
                at = end.end()
                has_grown = at - start >= GROWTH * tried
                if has_grown or num_retries:
                    tried, num_retries = at - start, num_retries - (not has_grown)
                    parsed = form.parse(self._rest[start:at])
                    if parsed is not None:
                        return parsed, at
            elif end is not None or self._is_whole:
                until = len(self._rest) if end is None else end.start()
                is_cut = self._is_cut or end is not None
                return form.parse(self._rest[start:until], True, is_cut) or BROKEN_OFF, until
            else:
                at = max(at, len(self._rest) - longest)
                yield None


# --- JSON -----------------------------------------------------------------------------------------

NOT_JSON = "it is not a JSON object with a name and arguments"


class Hermes(Form):
    """Form of Hermes, Qwen3 and the built-in model:
    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

    MARKS = (CALL_OPEN,)
    ENDS = (CALL_CLOSE,)
    CALLS = ("calls: function",)

    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Call | str | None:
        start = len(text) - len(text.removeprefix(CALL_OPEN).lstrip())
        if not text.startswith("{", start):
            return NOT_JSON if text[start:] else None
        try:
            end = _JSON.raw_decode(text, start)[1]
            call = read_leniently(text[start:end])
            name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
            arguments = read_leniently(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            in_string = any(not string["end"] for string in STRING_PARTS.finditer(text, start))
            return None if in_string or not text.endswith((CALL_OPEN, CALL_CLOSE)) else NOT_JSON
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return NOT_JSON
        return Call(name, arguments, end)

    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        arguments = {"type": "object", **parameters.root}
        fields = {"name": {"const": tool}, "arguments": arguments}
        schema = {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
        return [f"{name}: {parameters.json(schema)}"]


_JSON = json.JSONDecoder(strict=False)


# --- XML ------------------------------------------------------------------------------------------

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MALFORMED = "it is not written as a function with parameters"
REPEATED = "it gives one argument twice"
END_OF_VALUE = r'"\n</parameter>\n"'
VALUE = (
    f"value[suffix={END_OF_VALUE}]: VALUE",
    r"VALUE: /(?s:.*)/ & ~/((?s:.*)\n)?(<\/parameter>|<parameter=[^<>\n]+>)\n(?s:.*)/",
)
"""Text up to the closing tag of its parameter, without a line that is a tag of a parameter."""


class Xml(Form):
    """Form of Qwen3-Coder and Qwen3.5: ``<tool_call><function=NAME>``, then a ``<parameter=NAME>``
    per argument with its value on separate lines, and closing tags."""

    MARKS = (CALL_OPEN, FUNCTION)
    ENDS = (CALL_CLOSE, END_FUNCTION)
    CALLS = (f'calls: "{FUNCTION}" function', *VALUE)

    def __init__(self, tools: Sequence[Mapping[str, Function]], *options: Any) -> None:
        """Raises GrammarError if the name of a tool cannot be written."""
        super().__init__(tools, *options)
        for name in self.functions:
            tag(name)

    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Call | str | None:
        """See ``Form``. A call as the chat template writes it is read first, because values may
        contain tags. Other ways of writing are read at the end of the answer, or where the first
        tag shows them."""
        head = _HEAD.match(text)
        if head is None:
            return None if _HEAD_BEGIN.fullmatch(text) else MALFORMED
        found: Arguments | str | None = _read_written(text, head.end())
        parameters = self.functions.get(name := head[1].strip())
        if found is None and (is_whole or not _WRITTEN_BEGIN.match(text, head.end())):
            flat = _read_flat(text, head.end()) if is_whole else None
            found = _read_loosely(text, head.end(), is_whole and not is_cut)
            if flat is not None and not (
                isinstance(found, tuple) and parameters and parameters.needs(found[0], flat[0])
            ):
                found = flat
            if is_cut and isinstance(found, tuple) and not _is_certain(text, *found):
                return None
        if not isinstance(found, tuple):
            return found
        pairs, end = found
        if len({key for key, _ in pairs}) < len(pairs):
            return REPEATED
        arguments, doubt = dict[str, Json](), None
        for key, value in pairs:
            arguments[key] = value
            if parameters is not None:
                arguments[key], is_typed = parameters.read(key, value)
                doubt = doubt if is_typed or doubt else MISTYPED.format(key[:MAX_NAME])
        return Call(name, arguments, end, doubt)

    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        """See ``Form``. Parameters are in the order of the schema."""
        begin = tag(tool)
        if parameters.is_open:
            anything = f'("{PARAMETER}" /[^<>\\n]{{1,64}}/ ">\\n" value)*'
            return [f'{name}: {begin} {anything} "{END_FUNCTION}"']
        arguments, lines = parameters.tagged(name, END_OF_VALUE)
        parts = []
        for number, (key, is_required, value) in enumerate(arguments):
            parts.append(f"{name}_{number}" + ("" if is_required else "?"))
            lines.append(f'{name}_{number}: "{PARAMETER}" {tag(key)} {value}')
        return [f'{name}: {begin} {" ".join(parts)} "{END_FUNCTION}"', *lines]


_NAME = rf"\s*[^<>\s][^<>\n]{{0,{MAX_NAME - 1}}}"
_HEAD = re.compile(rf"(?:{CALL_OPEN}\s{{0,{MAX_NAME}}})?{FUNCTION}({_NAME})>")
_HEAD_BEGIN = re.compile(rf"{CALL_OPEN}\s*|(?:{CALL_OPEN}\s*)?{FUNCTION}[^<>\n]{{0,{MAX_NAME}}}")
Arguments = tuple[Pairs, int]
"""Names and texts of the arguments of a call, and its end."""
_WRITTEN = re.compile(rf"{PARAMETER}({_NAME})>\n")
_WRITTEN_BEGIN = re.compile(rf"\n?\Z|\n{PARAMETER}[^<>\n]{{0,{MAX_NAME}}}(?:>?\Z|>\n)")
_LINE_TAG = re.compile(rf"(?<=\n)(?:{PARAMETER}{_NAME}>|{END_PARAMETER})(?=\n)")


def _read_written(text: str, at: int) -> Arguments | None:
    """Read arguments as the chat template writes them, with tags on separate lines; ``at`` is the
    end of the tag of the function. A value may contain other tags, and pairs of such lines. None if
    they are not complete, or not written so."""
    close = f"{END_FUNCTION}\n{CALL_CLOSE}" if text.startswith(CALL_OPEN) else END_FUNCTION
    pairs, depth, at = Pairs(), 0, at + 1
    if text[at - 1 : at] != "\n":
        return None
    while opening := _WRITTEN.match(text, at):
        for line in _LINE_TAG.finditer(text, opening.end()):
            at = line.end() + 1
            if line[0] != END_PARAMETER:
                depth += 1
            elif depth:
                depth -= 1
            elif text.startswith(close, at) or _WRITTEN.match(text, at):
                value = text[opening.end() : max(opening.end(), line.start() - 1)]
                pairs.append((opening[1].strip(), value))
                break
        else:
            return None
    return (pairs, at + len(END_FUNCTION)) if text.startswith(close, at) else None


_FLAT = re.compile(rf"\s*{PARAMETER}({_NAME})>\n?")
_FLAT_END = re.compile(
    rf"\n?{END_PARAMETER}\s*(?:(?={PARAMETER}{_NAME}>)|"
    rf"{END_FUNCTION}(?P<end>)\s*(?:\Z|{CALL_CLOSE}|{CALL_OPEN}|{FUNCTION}))"
)


def _read_flat(text: str, at: int) -> Arguments | None:
    """Read arguments that end with a closing tag before the next tag of the call."""
    pairs = Pairs()
    while opening := _FLAT.match(text, at):
        end = _FLAT_END.search(text, opening.end())
        if end is None:
            return None
        pairs.append((opening[1].strip(), text[opening.end() : end.start()]))
        if end["end"] is not None:
            return pairs, end.end("end")
        at = end.end()
    return None


_PARAMETER = re.compile(
    rf"\s*{PARAMETER}(?P<name>{_NAME})>"
    rf"(?P<value>.*?)(?:(?P<end>{END_PARAMETER}|{END_FUNCTION}|{PARAMETER})|\Z)",
    re.DOTALL,
)
_PARAMETER_BEGIN = re.compile(rf"\s*{PARAMETER}[^<>\n]{{0,{MAX_NAME}}}")
_END = re.compile(rf"\s*(?P<tag>{END_FUNCTION}|{CALL_CLOSE}|{CALL_OPEN}|{FUNCTION})?")


def _read_loosely(text: str, at: int, is_end: bool) -> Arguments | str | None:
    """Read arguments that may lack closing tags. ``is_end``: the answer ends behind the text."""
    pairs = Pairs()
    while found := _PARAMETER.match(text, at):
        if found["end"] is None:
            return None
        value = found["value"].removeprefix("\n").removesuffix("\n")
        pairs.append((found["name"].strip(), value))
        at = found.end("end") if found["end"] == END_PARAMETER else found.start("end")
    end = _END.match(text, at)
    assert end is not None, "white space always matches"
    if end["tag"] is None and end.end() < len(text):
        return None if _PARAMETER_BEGIN.fullmatch(text, at) else MALFORMED
    if end["tag"] is None and not is_end:
        return None
    return pairs, end.end() if end["tag"] in (END_FUNCTION, None) else end.start("tag")


def _is_certain(text: str, pairs: Pairs, end: int) -> bool:
    """Return True if a call that ends at ``end`` of an answer that was cut off is whole: the call
    of a value that has tags may go on."""
    rest = text[end:].lstrip().removeprefix(CALL_CLOSE).lstrip()
    is_next = any(mark.startswith(rest) for mark in (CALL_CLOSE, *Xml.MARKS))
    has_tags = any(mark in value for _, value in pairs for mark in Xml.MARKS)
    return (is_next or rest.startswith(Xml.MARKS)) and not has_tags


def tag(name: str) -> str:
    """Return a name with the end of its tag, as a string of Lark."""
    if not name.strip() or name != name.strip() or any(letter in name for letter in "<>\n"):
        raise GrammarError(
            f"{name[:MAX_NAME]!r} cannot be written as a tag, which this model uses: choose a "
            "name without <, > and blanks around it."
        )
    return quoted(f"{name}>\n")


def tool_calls(body: ChatRequest, template: ChatTemplate) -> Form | None:
    """Return the calls in the answers to a chat with tools, or None if they are text. Raises
    APIError 400 if this model does not call tools."""
    choice, source = body.tool_choice, template.source
    if "tools" not in source:
        raise APIError(400, "The chat template of this model has no tools: omit 'tools'.")
    # The last mark of the first form is in no template of the second.
    form = next((form for form in (Xml, Hermes) if form.MARKS[-1] in source), None)
    if form is None:
        if choice == "none":
            return None
        message = "This model's form of calls is not supported: omit 'tools', or read calls in the "
        raise APIError(400, message + "text with 'tool_choice' 'none'.")
    try:
        return form(
            () if choice == "none" else body.tools or (), choice, not body.parallel_tool_calls
        )
    except ValueError as error:
        raise APIError(400, f"'tools': {error}") from None
