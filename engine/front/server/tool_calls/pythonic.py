"""Calls written like calls of Python functions, with values as literals of JSON or Python.

Templates write strings between quotes as they are, so that code in them may have the same quotes.
The first quote ends a string if more of a call follows it, as in Python. A later one ends it only
in front of another argument of the tool, a call of an offered tool, or the end.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from engine.errors import Json, JsonObject
from engine.front.server.tool_calls.form import CallForm, Calls, Function, ParsedCall
from engine.front.server.tool_calls.hermes import end_of_json
from engine.front.server.tool_calls.json_list import read_list
from engine.front.server.tool_calls.parameters import (
    LIMITS,
    Parameters,
    kinds_of,
    read_leniently,
    read_literal,
)
from engine.text.answers import MAX_NAME
from engine.text.bounded import read_json
from engine.text.grammar import GrammarError, quoted

MALFORMED = "it is not a list of calls with named arguments"
REPEATED = "it gives one argument twice"
IDENTIFIER = r"""[^\s()\[\]{}=,;:'"<>|]{1,256}"""
_OBJECTS = re.compile(r"\[\s*\{")
_CALL = re.compile(rf"\s*({IDENTIFIER})\(\s*")
_KEY = re.compile(rf"\s*({IDENTIFIER})\s*=\s*")
_WORD = re.compile(r"""[^\s,()\[\]{}'"=]+""")
_BEGIN = re.compile(r"""([fFrRuU]?)(?=['"])""")
_STRING = re.compile(r"""(?P<quote>'{3}|"{3}|['"])(?:[^\\]|\\.)*?(?P=quote)""", re.DOTALL)
_AFTER_ARGUMENT = re.compile(r"\s*([,)])")
OPENING = ("[", "{", "(")
MAX_ENDS = 1000
"""Maximum number of quotes that are compared as the end of a text."""
UNCERTAIN = "The quotes in the argument {!r} of a call are not escaped, so its end is uncertain"


class Incomplete(Exception):
    """The calls go on behind the text."""


class Pythonic(CallForm):
    """Form with calls such as ``f(a=1, b="x")`` between two marks."""

    SEPARATOR: ClassVar[str]
    """Expression of the text between two calls."""
    WORDS: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(Type, expression of Lark of its values) of types that are not written as in JSON."""

    def __init__(self, tools: Sequence[Mapping[str, Function]], *options: Any) -> None:
        super().__init__(tools, *options)
        for name in self.functions:
            _checked(name)
        close = rf"\s*+\]?\s*+(?:{re.escape(self.ENDS[0])}|\Z)"
        self._close = re.compile(close)
        self._separator = re.compile(self.SEPARATOR)
        further = rf"{self.SEPARATOR}\s*(?P<tool>{IDENTIFIER})\("
        self._behind_string = re.compile(
            rf"\s*(?:,\s*(?P<name>{IDENTIFIER})\s*=(?!=)|\)(?:{further}|{close}))"
        )

    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Calls | str | None:
        start = len(text) - len(text.removeprefix(self.MARKS[0]).lstrip())
        if _OBJECTS.match(text, start):
            found = read_list(text, start, self.ENDS)
            close = self._close.match(text, found.end) if isinstance(found, Calls) else None
            return Calls(found.calls, close.end()) if isinstance(found, Calls) and close else found
        if not text.endswith(self.ENDS) and (is_cut or not is_whole):
            return None
        try:
            return self._read(text, start + text.startswith("[", start))
        except Incomplete:
            return None
        except (ValueError, RecursionError) as error:
            return REPEATED if str(error) == REPEATED else MALFORMED

    def _read(self, text: str, at: int) -> Calls:
        """Return the calls from ``at`` up to the closing mark, or to the end of the text. Raises
        Incomplete, and ValueError for any other text."""
        calls = list[ParsedCall]()
        while True:
            name, at = _read_head(_CALL, text, at)
            arguments: JsonObject = {}
            doubt, tool = None, self.functions.get(name)
            names = tool.properties().keys() if tool else None
            is_over = text.startswith(")", at)
            at += is_over
            while not is_over:
                key, at = _read_head(_KEY, text, at)
                if key in arguments:
                    raise ValueError(REPEATED)
                others = names - {*arguments, key} if names else None
                string = _STRING.match(text, at)
                arguments[key], at = self._read_value(text, at, others)
                if others is None and string is not None and string.end() < at:
                    doubt = doubt or UNCERTAIN.format(key[:MAX_NAME])
                sign, at = _read_head(_AFTER_ARGUMENT, text, at)
                is_over = sign == ")"
            calls.append(ParsedCall(name, arguments, doubt))
            if close := self._close.match(text, at):
                return Calls(calls, close.end())
            if (separator := self._separator.match(text, at)) is None:
                raise ValueError(MALFORMED)
            at = separator.end()

    def _read_value(self, text: str, at: int, others: Collection[str] | None) -> tuple[Json, int]:
        """Return a value and its end; ``others`` are the names of arguments that may follow, or
        None for any. Raises Incomplete or ValueError."""
        if begin := _BEGIN.match(text, at):
            end, quote = self._end_of_string(text, begin.end(), others)
            body = text[begin.end() + len(quote) : end]
            return _unquoted(begin[1].lower(), quote[0], body), end + len(quote)
        if text.startswith(OPENING, at):
            try:
                end = end_of_json(text, at)
                return read_leniently(text[at:end]), end
            except ValueError:
                end = _end_of_brackets(text, at)
                return read_literal(text[at:end], may_be_text=False), end
        word = _WORD.match(text, at)
        if word is None:
            raise ValueError(MALFORMED)
        return read_literal(word[0], may_be_text=False), word.end()

    def _end_of_string(
        self, text: str, start: int, others: Collection[str] | None
    ) -> tuple[int, str]:
        """Return the end of the text of the string at ``start``, and its quotes. Raises Incomplete.

        It ends at its first quote if more of a call follows. Else at the first quote in front of
        one of the ``others``, an offered tool or the end, of these preferably one that is not
        escaped, and has brackets in pairs before it."""
        for quote in (text[start] * 3, text[start]):
            counted, depth, is_first = start + len(quote), 0, True
            found = list[tuple[bool, bool, bool, int]]()
            signs = re.compile(rf"\\.|{quote}", re.DOTALL).finditer(text, counted)
            for sign in signs if text.startswith(quote, start) else ():
                at, is_escaped = sign.end() - len(quote), sign[0] != quote
                further = self._behind_string.match(text, sign.end())
                if further and sign[0].endswith(quote):
                    name, tool = further.group("name", "tool")
                    is_other = name in others if name and others is not None else not tool
                    is_known = is_other or others is None or tool in self.functions
                    piece, counted = text[counted:at], at
                    depth += sum(map(piece.count, "([{")) - sum(map(piece.count, ")]}"))
                    found.append((is_escaped, not is_known, depth != 0, at))
                    if is_first and not is_escaped:
                        return at, quote
                    if not any(found[-1][:3]) or len(found) == MAX_ENDS:
                        break
                is_first = is_first and is_escaped
            if found:
                return min(found)[-1], quote
        raise Incomplete

    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        """See ``CallForm``. Arguments are in the order of the schema."""
        begin = quoted(f"{_checked(tool)}(")
        if parameters.is_open:
            value = f'/{IDENTIFIER}/ "=" {name}_any'
            lines = [f"{name}_any: {self._value({}, parameters)}"]
            return [f'{name}: {begin} ({value} (", " {value})*)? ")"', *lines]
        named, lines = parameters.arguments(), list[str]()
        for number, (key, is_required, schema) in enumerate(named):
            maybe = "" if is_required else "?"
            lines.append(f"{name}_{number}: {quoted(f'{_checked(key)}=')} {name}_{number}_value")
            lines.append(f"{name}_{number}_value: {self._value(schema, parameters)}")
            rest = f"{name}_after_{number + 1}" if number + 1 < len(named) else ""
            lines.append(f'{name}_after_{number}: (", " {name}_{number}){maybe} {rest}')
            first = f"{name}_{number} {rest}" if rest else f"{name}_{number}{maybe}"
            others = f"| {name}_from_{number + 1}" if rest and not is_required else ""
            lines.append(f"{name}_from_{number}: {first} {others}")
        first = f"{name}_from_0" if named else ""
        return [f'{name}: {begin} {first} ")"', *lines]

    def _value(self, schema: Any, parameters: Parameters) -> str:
        """Return an expression of a value. Raises GrammarError."""
        words = set[str]()
        for one in parameters.branches(schema):
            if {*one}.isdisjoint(LIMITS | {"enum", "const"}):
                kinds = kinds_of(one) if one else {kind for kind, _ in self.WORDS}
                words |= {expression for kind, expression in self.WORDS if kind in kinds}
        return " | ".join([f"({parameters.json(schema)})", *sorted(words)])


class Lfm2Calls(Pythonic):
    """Form of LFM2 and LFM2.5, also with a list of JSON objects."""

    NAME = "LFM2"
    SIGNS = ("<|tool_call_start|>", "<|tool_list_start|>", "List of tools: ")
    MARKS = ("<|tool_call_start|>",)
    ENDS = ("<|tool_call_end|>",)
    BEGIN = "<|tool_call_start|>["
    BETWEEN = ", "
    END = "]<|tool_call_end|>"
    SEPARATOR = r"\s*+,"
    WORDS = (("boolean", '"True" | "False"'), ("null", '"None"'))

    @classmethod
    def prepared(cls, messages: list[JsonObject], source: str) -> list[JsonObject]:
        """Return the chat with calls in the content, if the template leaves calls out."""
        if cls.MARKS[0] in source:
            return messages
        chat = list[JsonObject]()
        for message in messages:
            calls = message.get("tool_calls")
            if isinstance(calls, list) and calls:
                rest = {key: value for key, value in message.items() if key != "tool_calls"}
                message = rest | {"content": f"{message.get('content') or ''}{_written(calls)}"}
            chat.append(message)
        return chat


class Olmo(Pythonic):
    """Form of Olmo 3 and Olmo Hybrid, with a call per line."""

    NAME = "Olmo"
    SIGNS = MARKS = ("<function_calls>",)
    ENDS = ("</function_calls>",)
    BEGIN = "<function_calls>"
    BETWEEN = "\n"
    END = "</function_calls>"
    SEPARATOR = r"[^\S\n]*+[\n,]"


def _written(calls: Sequence[Any]) -> str:
    """Return calls as LFM2 was trained to write them."""

    def literal(value: Json) -> str:
        is_word = value is None or isinstance(value, bool)
        return str(value) if is_word else json.dumps(value, ensure_ascii=False)

    written = []
    for call in calls:
        function = call["function"]
        arguments = function.get("arguments") or {}
        arguments = read_json(arguments) if isinstance(arguments, str) else arguments
        inside = ", ".join(f"{key}={literal(value)}" for key, value in arguments.items())
        written.append(f"{function['name']}({inside})")
    return Lfm2Calls.BEGIN + Lfm2Calls.BETWEEN.join(written) + Lfm2Calls.END


def _read_head(pattern: re.Pattern[str], text: str, at: int) -> tuple[str, int]:
    """Return the name or the sign at ``at``, and the end of ``pattern``. Raises ValueError."""
    if (found := pattern.match(text, at)) is None:
        raise ValueError(MALFORMED)
    return found[1], found.end()


def _unquoted(sign: str, quote: str, body: str) -> str:
    """Return the value of the text ``body`` between quotes: with escapes if they are valid ones,
    else as it is. ``sign``: the letter before it. Raises ValueError for fields of an f-string."""
    if sign == "f" and {"{", "}"} & {*body}:
        raise ValueError(MALFORMED)
    if "\\" not in body or sign == "r":
        return body
    escaped = re.sub(rf"(\\.)|{quote}", lambda one: one[1] or f"\\{quote}", body, flags=re.DOTALL)
    if quote == '"':
        try:
            return str(read_leniently(f'"{escaped}"'))
        except ValueError:
            pass
    try:
        with warnings.catch_warnings():  # About escapes.
            warnings.simplefilter("ignore")
            # JSON replaces halves of characters.
            return str(read_json(json.dumps(ast.literal_eval(f"{quote * 3}{escaped}{quote * 3}"))))
    except (SyntaxError, ValueError):
        return body


def _end_of_brackets(text: str, start: int) -> int:
    """Return the end of the literal in brackets at ``start``. Raises Incomplete."""
    depth, at = 0, start
    while at < len(text):
        if text[at] in "'\"":
            if (string := _STRING.match(text, at)) is None:
                raise Incomplete
            at = string.end()
            continue
        depth += (text[at] in "[{(") - (text[at] in "]})")
        at += 1
        if not depth:
            return at
    raise Incomplete


def _checked(name: str) -> str:
    """Return a name. Raises GrammarError if it cannot be written in a call."""
    if not re.fullmatch(IDENTIFIER, name):
        raise GrammarError(
            f"{name[:MAX_NAME]!r} cannot be written in a call of this model: choose a name of "
            "letters and digits."
        )
    return name
