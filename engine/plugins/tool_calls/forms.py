"""Forms in which models write calls of tools: their readers and their grammars."""

from __future__ import annotations

import itertools
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any, NamedTuple

from msgspec import structs

from engine.server.bodies import APIError
from engine.server.schemas import ChatRequest, Choice, NamedTool
from engine.text.answers import (
    MAX_NAME,
    AnswerReader,
    Event,
    RequestOutput,
    TextDelta,
    ToolCall,
    ToolCalls,
)
from engine.text.bounded import read_json
from engine.text.grammar import Grammar, GrammarError, json_rule, quoted
from engine.text.tokenizer import CALL_CLOSE, CALL_OPEN, OPEN, ChatTemplate, any_of

MAX_RETRIES = 8
"""Maximum number of broken calls of an answer that are searched for calls again, so that an answer
is read in linear time."""
GROWTH = 1.125
"""Factor by which a call must grow before it is parsed again, so that it is read in linear time."""
BROKEN = "A call of a tool was left in the text, because "
"""Start of the warning about an answer; the reason follows."""
BROKEN_OFF = "it breaks off"
AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as written by ``json.dumps`` and chat templates, so that a call that comes back has
the same tokens."""
ANY_OBJECT = {"type": "object"}
ANY = "/(?s:.*)/"
"""Any text, as an expression of Lark."""
Function = Mapping[str, Any]
"""An offered tool: its name, the schema of its parameters, and whether it is strict."""


class Call(NamedTuple):
    """A call that was read."""

    name: str
    arguments: dict[str, Any]
    end: int
    """End of the call in the text."""


class Form(ToolCalls):
    """Common part of the forms, whose calls are between the same marks."""

    MARKS: tuple[str, ...]
    ENDS: tuple[str, ...]
    """Texts with which a call begins, and may end."""
    CALLS: tuple[str, ...]
    """Rules of Lark: ``calls`` is a call without the marks around it, with ``function`` for any of
    the functions."""

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: Choice | NamedTool | None = None,
        is_single: bool = False,
    ) -> None:
        """``tools``: as in OpenAI's API; without any, every call is text with a warning.
        ``choice``: as in its ``tool_choice``. ``is_single``: the answer ends with its first
        call."""
        self._offered: list[Function] = [tool["function"] for tool in tools]
        self.functions = {function["name"]: function for function in self._offered}
        self.marks = self.MARKS if tools else ()
        self.is_single, self._choice = is_single, choice

    @abstractmethod
    def parse(self, text: str, is_end: bool) -> Call | str | None:
        """Return the call at the beginning of ``text``, the reason why it cannot be made, or None
        if it is not complete. ``is_end``: the answer ends behind the text."""

    @abstractmethod
    def rules(self, name: str, function: Function) -> list[str]:
        """Return the rule ``name`` of a call of ``function``, and its parts. Raises
        GrammarError."""

    def reader(self, **options: Any) -> AnswerReader:
        return CallReader(self, options)

    def restrict(
        self, forms: dict[str, Callable[[], Grammar]], format_name: str, may_think: bool
    ) -> None:
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

        With ``text``, arguments are any object unless the tool is ``strict``. Raises GrammarError
        if no tool has this name, or the schema of one cannot be used.
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
        return Grammar("lark", "\n".join([start, call, *self._rules(wanted)]))

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
                lines += [f"{line} // {tool}" for line in self.rules(rule, function)]
            except GrammarError as error:
                raise GrammarError(f"{tool}: {error}") from None
        return lines


class CallReader(AnswerReader):
    """Reader of an answer with calls."""

    def __init__(self, form: Form, options: Mapping[str, Any]) -> None:
        """``options``: those of ``AnswerReader``."""
        super().__init__(**options)
        self._form = form
        self.warning: str | None = None
        """Reason why the first of the calls that cannot be made is part of the text."""
        self._is_broken_off = False
        """True if a limit or a stop string ended the answer inside a call."""

    @property
    def warned(self) -> dict[str, str]:
        is_over = self.finish is not None and self.warning is not None
        return {"warning": f"{BROKEN}{self.warning}."} if is_over else {}

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

    def _read_text(self) -> Iterator[Event | None]:
        """Read text and calls. White space around a call is not text."""
        marks, functions = self._form.MARKS, self._form.functions
        num_retries, has_calls = MAX_RETRIES, False
        begins, breaks = any_of(marks), any_of((CALL_CLOSE, *marks))
        while True:
            found = begins.search(self._rest)
            text = self._rest[: found.start()].rstrip() if found else self._certain(marks)
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
            parsed, end = yield from self._parse_call(start, found.end() - len(text))
            if isinstance(parsed, Call) and parsed.name not in functions:
                unknown = f"no tool {parsed.name[:MAX_NAME]!r} was offered"
                parsed = unknown if functions else "'tool_choice' is 'none'"
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
            mark = breaks.search(self._rest, start + 1, end) if num_retries else None
            if mark is not None:
                num_retries -= 1
                end = mark.end() if mark.group() == CALL_CLOSE else mark.start()
            broken = self._rest[:end].rstrip()
            yield TextDelta(broken)
            self._rest = self._rest[len(broken) :]

    def _parse_call(self, start: int, at: int) -> Generator[None, None, tuple[Call | str, int]]:
        """Return the call at ``start`` of the rest, or the reason why there is none, and the end of
        the text that it was read from. Its mark ends ``at``. Yields None where more is needed."""
        form, tried = self._form, 0
        marks = *form.ENDS, *form.MARKS
        ends, longest = any_of(marks), max(map(len, marks))
        while True:
            end = ends.search(self._rest, at)
            if end is not None:
                at = end.end()
                if at - start >= GROWTH * tried:
                    tried = at - start
                    parsed = form.parse(self._rest[start:at], False)
                    if parsed is not None:
                        return parsed, at
            elif self._is_whole:
                parsed = form.parse(self._rest[start:], not self._is_cut)
                return parsed or BROKEN_OFF, len(self._rest)
            else:
                at = max(at, len(self._rest) - longest)
                yield None


def _parameters(function: Function) -> Mapping[str, Any]:
    """Return the schema of the arguments. A tool without parameters takes none."""
    return function.get("parameters") or {"type": "object", "properties": {}}


def _lifted(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the definitions that references point to. They are at the root of the schema, which
    becomes an inner part here."""
    return {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}


# --- JSON -----------------------------------------------------------------------------------------

NOT_JSON = "it is not a JSON object with a name and arguments"


class Hermes(Form):
    """Form of Hermes, Qwen3 and the built-in model:
    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

    MARKS = (CALL_OPEN,)
    ENDS = (CALL_CLOSE,)
    CALLS = ("calls: function",)

    def parse(self, text: str, is_end: bool) -> Call | str | None:
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

    def rules(self, name: str, function: Function) -> list[str]:
        parameters = _parameters(function)
        fields = {
            "name": {"const": function["name"]},
            "arguments": {"type": "object", **parameters},
        }
        schema = {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
        return [f"{name}: {json_rule(schema | _lifted(parameters), AS_DUMPED)}"]


_JSON = json.JSONDecoder()
_STRING_PARTS = re.compile(r'"(?:[^"\\]|\\.)*+(?P<end>"?)', re.DOTALL)
"""A string of JSON, or its beginning up to the end of the text."""


# --- XML ------------------------------------------------------------------------------------------

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MALFORMED = "it is not written as a function with parameters"
END_OF_VALUE = r'"\n</parameter>\n"'
VALUE = (
    r"VALUE: /(?s:.*)\n<\/parameter>\n/ & ~/(?s:.*)<\/parameter>(?s:..+)/ "
    r"& ~/(?s:.*)(<\/function>|<parameter=)(?s:.*)/"
)
"""Text up to the closing tag of its parameter, without a tag that would end the value."""
STRING_LIMITS = ("pattern", "format", "minLength", "maxLength")
"""Keywords for strings that cannot be enforced if values are not quoted."""


class Xml(Form):
    """Form of Qwen3-Coder and Qwen3.5: ``<tool_call><function=NAME>``, then a ``<parameter=NAME>``
    per argument with its value on separate lines, and closing tags."""

    MARKS = (CALL_OPEN, FUNCTION)
    ENDS = (CALL_CLOSE, END_FUNCTION)
    CALLS = (f'calls: "{FUNCTION}" function', VALUE)

    def __init__(self, tools: Sequence[Mapping[str, Any]], *options: Any) -> None:
        """Raises GrammarError if the name of a tool cannot be written."""
        super().__init__(tools, *options)
        for name in self.functions:
            tag(name)

    def parse(self, text: str, is_end: bool) -> Call | str | None:
        head = _HEAD.match(text)
        if head is None:
            return None if _HEAD_BEGIN.fullmatch(text) else MALFORMED
        name, at, arguments = head[1].strip(), head.end(), dict[str, Any]()
        named = (self.functions.get(name, {}).get("parameters") or {}).get("properties")
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

    def rules(self, name: str, function: Function) -> list[str]:
        """See ``Form``. Parameters are in the order of the schema."""
        parameters, begin = _parameters(function), tag(function["name"])
        if parameters == ANY_OBJECT:
            anything = f'("{PARAMETER}" /[^<>\\n]{{1,64}}/ ">\\n" VALUE)*'
            return [f'{name}: {begin} {anything} "{END_FUNCTION}"']
        required, named, lines = parameters.get("required"), parameters.get("properties"), []
        parts = []
        for number, (key, schema) in enumerate(named.items() if isinstance(named, Mapping) else ()):
            is_required = isinstance(required, list) and key in required
            parts.append(f"{name}_{number}" + ("" if is_required else "?"))
            value = _xml_value(key, schema if isinstance(schema, Mapping) else {}, parameters)
            lines.append(f'{name}_{number}: "{PARAMETER}" {tag(key)} {value}')
        return [f'{name}: {begin} {" ".join(parts)} "{END_FUNCTION}"', *lines]


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


def tag(name: str) -> str:
    """Return a name with the end of its tag, as a string of Lark."""
    if not name.strip() or name != name.strip() or any(letter in name for letter in "<>\n"):
        raise GrammarError(
            f"{name[:MAX_NAME]!r} cannot be written as a tag, which this model uses: choose a "
            "name without <, > and blanks around it."
        )
    return quoted(f"{name}>\n")


def _xml_value(name: str, schema: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Return the value of one parameter with its closing tag, as part of a Lark rule. Strings are
    written unquoted, other values as JSON."""
    fixed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(fixed, list) and fixed and all(isinstance(value, str) for value in fixed):
        return f"({' | '.join(map(quoted, fixed))}) {END_OF_VALUE}"
    kinds = json_types(schema)
    if kinds == {"string"} and (fixed is not None or any(one in schema for one in STRING_LIMITS)):
        raise GrammarError(
            f"the limits of the string {name[:MAX_NAME]!r} cannot be enforced in the form in "
            "which this model writes calls: remove them, or 'strict'."
        )
    if "string" in kinds:
        return "VALUE"
    return f"({json_rule({**schema, **_lifted(parameters)}, AS_DUMPED)}) {END_OF_VALUE}"


MAX_SCHEMAS = 64
"""Maximum number of schemas that are searched for the types of one parameter."""


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


def tool_calls(body: ChatRequest, template: ChatTemplate) -> ToolCalls | None:
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
