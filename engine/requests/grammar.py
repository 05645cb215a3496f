"""Grammars of answers: a JSON schema, a regular expression, a choice, a Lark or GBNF grammar, or
calls of tools in the forms in which models write them.

Compilation must not delay other requests, so a grammar that would take long to compile is refused
first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from typing import Any, Literal

from engine.text.answers import END_FUNCTION, FUNCTION, MAX_NAME, PARAMETER, json_types
from engine.text.bounded import read_json
from engine.text.tokenizer import CALL_CLOSE, CALL_OPEN, OPEN

MAX_CHARS = 256 * 1024
"""Maximum length of a schema, of an expression, or of all choices or tools together."""
MAX_CHOICES = 4096
MAX_GIVEN_CHARS = 16 * 1024
"""Maximum length of a grammar that a client has written."""
MAX_MULTIPLE = 10_000
"""Maximum product of the ``multipleOf`` values in a schema, without their factors of ten. The
matcher has that many states, and the time to build them grows with the square."""
WHITESPACE = r" |\n {0,8}"
"""White space between the parts of a JSON answer, at most once: a blank, or a new line with its
indent. More would let a model spend ``max_tokens`` on white space."""
NESTED = ("%json", "%regex")
CALL = "call_"
"""Prefix of the names of the rules that are tool calls."""


class GrammarError(ValueError):
    """The grammar cannot be used; the message gives the reason in one sentence."""


class TooComplex(GrammarError):
    """The matcher reached its limits, at the beginning of an answer or later in it."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"this grammar is too complex to follow: use fewer repetitions or choices ({why})."
        )


@dataclass(frozen=True, slots=True)
class Grammar:
    """Grammar of a whole answer. Its constructors raise GrammarError. Equal grammars are compiled
    once."""

    kind: Literal["lark", "regex", "given"]
    """Form of ``text``. ``lark``: llguidance's dialect of Lark; ``given``: that, or GBNF."""
    text: str
    end_of_reasoning: str | None = None
    """Text that ends the reasoning before the guided part, or None if there is no reasoning."""

    def __post_init__(self) -> None:
        most = MAX_GIVEN_CHARS if self.kind == "given" else MAX_CHARS
        if len(self.text) > most:
            raise GrammarError(
                f"its grammar may have at most {most} characters (got {len(self.text)})."
            )

    @classmethod
    def of_schema(cls, schema: str | bool | Mapping[str, Any]) -> Grammar:
        """Return the grammar of JSON that matches a schema, given as an object or as its text."""
        if isinstance(schema, str):
            try:
                schema = read_json(schema)
            except ValueError as error:
                raise GrammarError(f"a JSON schema cannot be read: {error}.") from None
        if not isinstance(schema, bool | Mapping):
            raise GrammarError("a JSON schema must be an object, or the text of one.")
        return cls("lark", f"start: {json_rule(schema, {'whitespace_pattern': WHITESPACE})}")

    @classmethod
    def of_regex(cls, regex: str) -> Grammar:
        """Return the grammar of text that matches a regular expression as a whole."""
        return cls("regex", regex)

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> Grammar:
        """Return the grammar of one of the given texts. Raises GrammarError if one is empty."""
        if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
            raise GrammarError(f"send 1 to {MAX_CHOICES} choices, none of them empty.")
        return cls("lark", f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, choices))}")

    @classmethod
    def of_text(cls, text: str) -> Grammar:
        """Return the grammar given in llguidance's Lark (start symbol ``start``) or in GBNF
        (``root``). It has no nested schema or expression."""
        if any(word in text for word in NESTED):
            raise GrammarError(
                f"a grammar must not contain {' or '.join(NESTED)}: use a JSON schema or a regular "
                "expression instead."
            )
        return cls("given", text)


def json_rule(schema: bool | Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return a Lark expression for JSON that matches ``schema``."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _check_multiples(schema)
    return f"%json {json.dumps({**schema, 'x-guidance': dict(options)})}"


def _check_multiples(schema: Mapping[str, Any]) -> None:
    """Raise GrammarError if the ``multipleOf`` values of a schema would take long to compile."""
    multiples, parts = set[int](), list[Any]([schema])
    for part in parts:
        if isinstance(part, list):
            parts += part
        elif isinstance(part, Mapping):
            parts += part.values()
            number = part.get("multipleOf")
            if type(number) in (int, float) and number:
                digits = Decimal(str(number)).normalize().as_tuple().digits
                multiples.add(int("".join(map(str, digits))))
    if prod(multiples) > MAX_MULTIPLE:
        raise GrammarError(
            f"the product of the multipleOf values of a schema must be at most {MAX_MULTIPLE}, "
            "not counting factors of ten: remove some."
        )


def quoted(text: str) -> str:
    """Return ``text`` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


Form = Literal["hermes", "xml"]
"""Form of calls: JSON objects, or a tag per argument as in Qwen3-Coder."""
AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as written by ``json.dumps`` and chat templates, so that a call that comes back has
the same tokens."""
END_OF_VALUE = r'"\n</parameter>\n"'
VALUE = (
    r"VALUE: /(?s:.*)\n<\/parameter>\n/ & ~/(?s:.*)<\/parameter>(?s:..+)/ "
    r"& ~/(?s:.*)(<\/function>|<parameter=)(?s:.*)/"
)
"""Text up to the closing tag of its parameter, without a tag that would end the value."""
STRING_LIMITS = ("pattern", "format", "minLength", "maxLength")
"""Keywords for strings that cannot be enforced if values are not quoted."""
ANY_OBJECT = {"type": "object"}
ANY = "/(?s:.*)/"
"""Any text, as an expression of Lark."""


def grammar_of_calls(
    tools: Sequence[Mapping[str, Any]],
    choice: str = "required",
    form: Form = "hermes",
    *,
    in_parallel: bool = True,
    text: Callable[[], Grammar] | None = None,
) -> Grammar:
    """Return the grammar of an answer that must call one of ``tools``, or several if
    ``in_parallel``, or must be a ``text`` of this grammar in Lark.

    ``tools`` are described as in OpenAI's API. ``choice`` is "required", or the name of the tool to
    call. With ``text``, arguments are any object unless the tool is ``strict``. Raises GrammarError
    if no tool has this name, or the schema of one cannot be used.
    """
    every = [tool["function"] for tool in tools]
    functions = every if text is None else _only_strict(tools)
    wanted = [f for f in functions if choice in ("required", f["name"])]
    if not wanted:
        names = [function["name"] for function in functions]
        raise GrammarError(f"tool_choice must be one of {', '.join(names) or 'no tools'}.")
    more = '("\\n" call)*' if in_parallel and choice == "required" else ""
    start = f"start: call {more}"
    if text is not None:
        start += "\n" + text().text.replace("start:", "| ", 1)
    lines = [start, f'call: "{CALL_OPEN}\\n" calls "\\n{CALL_CLOSE}"', *_calls(wanted, form)]
    return Grammar("lark", "\n".join(lines))


def grammar_of_strict_calls(
    tools: Sequence[Mapping[str, Any]], form: Form = "hermes", *, may_think: bool = False
) -> Grammar:
    """Return the grammar of an answer that may call ``tools``.

    The answer is free except for calls. Each call names a tool and has arguments that match its
    schema, or any object if the tool is not ``strict``. ``may_think``: the answer may begin with
    reasoning. Raises GrammarError if the schema of a strict tool cannot be used.
    """
    rests = {CALL_OPEN: f'"\\n"? calls "\\n"? "{CALL_CLOSE}"'}
    if form == "xml":
        rests[FUNCTION] = "function"

    def free(rule: str, expression: str) -> list[str]:
        """Return the rules of text with calls, and reasoning outside of it."""
        texts, opened = rule.upper(), enumerate(rests.items())
        return [
            f"{texts}: {expression}",
            " | ".join([f"{rule}: {texts}", *(f"{rule}_{n} {r} text" for n, (_, r) in opened)]),
            *(f'{rule}_{n}[lazy]: {texts} "{mark}"' for n, mark in enumerate(rests)),
        ]

    lines = ["start: text", *free("text", ANY), *_calls(_only_strict(tools), form)]
    if may_think:
        lines[0] = "start: first | thought text"
        lines += free("first", rf"{ANY} & ~/\s*{OPEN}(?s:.*)/")
        lines += ["thought[lazy]: THOUGHT", rf"THOUGHT: /\s*{OPEN}(?s:.*)<\/think>/"]
    return Grammar("lark", "\n".join(lines))


def _only_strict(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the functions of ``tools``; those that are not strict take any object."""
    return [
        f if f.get("strict") is True else {"name": f["name"], "parameters": ANY_OBJECT}
        for f in (tool["function"] for tool in tools)
    ]


def _calls(functions: Sequence[Mapping[str, Any]], form: Form) -> list[str]:
    """Return rules of Lark for a call of any of ``functions``.

    ``calls`` is the call without the marks around it; in XML, ``function`` is the part after
    ``<function=``. Raises GrammarError with the name of the tool.
    """
    kinds = " | ".join(f"{CALL}{number}" for number in range(len(functions)))
    lines = [f"calls: {kinds}"]
    if form == "xml":
        lines = [f'calls: "{FUNCTION}" function', f"function: {kinds}", VALUE]
    for number, function in enumerate(functions):
        try:
            rule = f"{CALL}{number}"
            if form == "xml":
                lines += _xml_rules(rule, function)
            else:
                lines.append(f"{rule}: {json_rule(_call(function), AS_DUMPED)}")
        except GrammarError as error:
            raise GrammarError(f"tool {function['name']!r}: {error}") from None
    return lines


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of the arguments. A tool without parameters takes none."""
    return function.get("parameters") or {"type": "object", "properties": {}}


def _lifted(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the definitions that references point to. They are at the root of the schema, which
    becomes an inner part here."""
    return {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a call in Hermes' form."""
    parameters = _parameters(function)
    fields = {"name": {"const": function["name"]}, "arguments": {"type": "object", **parameters}}
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    } | _lifted(parameters)


def _xml_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    """Return the rules of a call in XML after ``<function=``. Its parameters are in the order of
    the schema."""
    parameters, name = _parameters(function), tag(function["name"])
    if parameters == ANY_OBJECT:
        anything = f'("{PARAMETER}" /[^<>\\n]{{1,64}}/ ">\\n" VALUE)*'
        return [f'{rule}: {name} {anything} "{END_FUNCTION}"']
    required, named, lines = parameters.get("required"), parameters.get("properties"), []
    parts = []
    for number, (key, schema) in enumerate(named.items() if isinstance(named, Mapping) else ()):
        is_required = isinstance(required, list) and key in required
        parts.append(f"{rule}_{number}" + ("" if is_required else "?"))
        value = _xml_value(key, schema if isinstance(schema, Mapping) else {}, parameters)
        lines.append(f'{rule}_{number}: "{PARAMETER}" {tag(key)} {value}')
    return [f'{rule}: {name} {" ".join(parts)} "{END_FUNCTION}"', *lines]


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
