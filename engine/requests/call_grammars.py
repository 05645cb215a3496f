"""Grammars of tool calls, in the forms in which models write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from engine.requests.grammar import (
    CALL,
    MAX_CHARS,
    Grammar,
    GrammarError,
    bounded,
    json_rule,
    quoted,
)
from engine.text.answers import CALL_CLOSE as CLOSE
from engine.text.answers import CALL_OPEN as OPEN
from engine.text.answers import END_FUNCTION, FUNCTION, PARAMETER, json_types

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
MAX_SHOWN = 64
"""Maximum length of a name in an error."""


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
    lines = [start, f'call: "{OPEN}\\n" calls "\\n{CLOSE}"', *_calls(wanted, form)]
    return Grammar("lark", bounded("the tools' schemas", "\n".join(lines), MAX_CHARS))


def grammar_of_strict_calls(
    tools: Sequence[Mapping[str, Any]], form: Form = "hermes", *, may_think: bool = False
) -> Grammar:
    """Return the grammar of an answer that may call ``tools``.

    The answer is free except for calls. Each call names a tool and has arguments that match its
    schema, or any object if the tool is not ``strict``. ``may_think``: the answer may begin with
    reasoning. Raises GrammarError if the schema of a strict tool cannot be used.
    """
    rules = _calls(_only_strict(tools), form)
    starts = {OPEN: f'start: "\\n"? calls "\\n"? "{CLOSE}"'}
    if form == "xml":
        starts[FUNCTION] = "start: function"
    marks = tuple(
        (mark, bounded("the tools' schemas", "\n".join([start, *rules]), MAX_CHARS))
        for mark, start in starts.items()
    )
    return Grammar("marks", marks=marks, may_think=may_think)


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
    parameters, name = _parameters(function), _tag(function["name"])
    if parameters == ANY_OBJECT:
        anything = f'("{PARAMETER}" /[^<>\\n]{{1,64}}/ ">\\n" VALUE)*'
        return [f'{rule}: {name} {anything} "{END_FUNCTION}"']
    required, named, lines = parameters.get("required"), parameters.get("properties"), []
    parts = []
    for number, (key, schema) in enumerate(named.items() if isinstance(named, Mapping) else ()):
        is_required = isinstance(required, list) and key in required
        parts.append(f"{rule}_{number}" + ("" if is_required else "?"))
        value = _xml_value(key, schema if isinstance(schema, Mapping) else {}, parameters)
        lines.append(f'{rule}_{number}: "{PARAMETER}" {_tag(key)} {value}')
    return [f'{rule}: {name} {" ".join(parts)} "{END_FUNCTION}"', *lines]


def _tag(name: str) -> str:
    """Return a name with the end of its tag, as a string of Lark."""
    if not name.strip() or name != name.strip() or any(letter in name for letter in "<>\n"):
        raise GrammarError(
            f"{name[:MAX_SHOWN]!r} cannot be written as a tag, which this model uses: choose a "
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
            f"the limits of the string {name[:MAX_SHOWN]!r} cannot be enforced in the form in "
            "which this model writes calls: remove them, or 'strict'."
        )
    if "string" in kinds:
        return "VALUE"
    return f"({json_rule({**schema, **_lifted(parameters)}, AS_DUMPED)}) {END_OF_VALUE}"
