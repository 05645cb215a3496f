"""Calls as one JSON object each, between marks of their own."""

from __future__ import annotations

import json

from engine.front.server.tool_calls.form import CallForm, Calls, ParsedCall
from engine.front.server.tool_calls.parameters import STRING_PARTS, Parameters, read_leniently
from engine.text.tokenizer import CALL_CLOSE, CALL_OPEN

NOT_JSON = "it is not a JSON object with a name and arguments"


class Hermes(CallForm):
    """Form of Hermes, Qwen3, Granite 4, Falcon-H1 and the built-in model:
    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

    NAME = "Hermes"
    SIGNS = (CALL_OPEN,)
    MARKS = (CALL_OPEN,)
    ENDS = (CALL_CLOSE,)
    BEGIN = f"{CALL_OPEN}\n"
    BETWEEN = f"\n{CALL_CLOSE}\n{CALL_OPEN}\n"
    END = f"\n{CALL_CLOSE}"
    CLOSE = CALL_CLOSE

    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Calls | str | None:
        start = len(text) - len(text.removeprefix(CALL_OPEN).lstrip())
        found = read_object(text, start)
        if isinstance(found, str):
            return found if is_certain(text, start, (CALL_OPEN, CALL_CLOSE)) else None
        return Calls([found[0]], found[1])

    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        return [f"{name}: {object_rule(tool, parameters)}"]

    def after(self, mark: str) -> str:
        """Also without the line breaks, in which models differ."""
        return f'"\\n"? function "\\n"? "{CALL_CLOSE}"'


_JSON = json.JSONDecoder(strict=False)


def end_of_json(text: str, start: int) -> int:
    """Return the end of the JSON value at ``start``. Raises ValueError or RecursionError."""
    return _JSON.raw_decode(text, start)[1]


def read_object(text: str, start: int) -> tuple[ParsedCall, int] | str:
    """Return the call whose JSON object begins at ``start``, and its end, or the reason why there
    is none."""
    if not text.startswith("{", start):
        return NOT_JSON
    try:
        end = end_of_json(text, start)
        call = read_leniently(text[start:end])
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        arguments = read_leniently(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return NOT_JSON
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return NOT_JSON
    return ParsedCall(name, arguments), end


def is_certain(text: str, start: int, ends: tuple[str, ...]) -> bool:
    """Return True if JSON from ``start`` on that cannot be read stays so with more text: another
    value begins, or one of ``ends`` is at its end and not in a string."""
    if text[start : start + 1] not in ("", "{"):
        return True
    in_string = any(not string["end"] for string in STRING_PARTS.finditer(text, start))
    return text.endswith(ends) and not in_string


def object_rule(tool: str, parameters: Parameters) -> str:
    """Return an expression of Lark for the JSON object of a call. Raises GrammarError."""
    arguments = {"type": "object", **parameters.root}
    fields = {"name": {"const": tool}, "arguments": arguments}
    schema = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    return parameters.json(schema)
