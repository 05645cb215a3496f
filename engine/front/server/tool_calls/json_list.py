"""Calls as the objects of one JSON list."""

from __future__ import annotations

import re

from engine.front.server.tool_calls.form import CallForm, Calls, ParsedCall
from engine.front.server.tool_calls.hermes import NOT_JSON, is_certain, object_rule, read_object
from engine.front.server.tool_calls.parameters import Parameters

NOT_A_LIST = "it is not a JSON list of calls"
_GAP = re.compile(r"\s*")
_SEPARATOR = re.compile(r"\s*(?P<sign>[],]?)")


def read_list(text: str, start: int, ends: tuple[str, ...]) -> Calls | str | None:
    """Return the calls whose list begins at ``start``, without its white space, the reason why
    there are none, or None if the list is not complete. ``ends`` are marks behind lists."""
    calls = list[ParsedCall]()
    if not text.startswith("[", start):
        return NOT_A_LIST if text[start:] else None
    at = start + 1
    while True:
        gap = _GAP.match(text, at)
        assert gap is not None, "white space always matches"
        found = read_object(text, gap.end())
        if isinstance(found, str):
            return found if is_certain(text, gap.end(), ends) else None
        calls.append(found[0])
        separator = _SEPARATOR.match(text, found[1])
        assert separator is not None, "white space always matches"
        if separator["sign"] == "]":
            return Calls(calls, separator.end("sign"))
        if not separator["sign"]:
            return NOT_JSON if text[separator.end() :] else None
        at = separator.end()


class JsonList(CallForm):
    """Form with a mark, a list of objects and a closing mark."""

    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Calls | str | None:
        start = len(text) - len(text.removeprefix(self.MARKS[0]).lstrip())
        return read_list(text, start, (self.CLOSE,) if self.CLOSE else ())

    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        return [f"{name}: {object_rule(tool, parameters)}"]


class JambaCalls(JsonList):
    """Form of Jamba 1.5 and later: the list has a call per line."""

    NAME = "Jamba"
    SIGNS = MARKS = ("<tool_calls>",)
    ENDS = ("</tool_calls>",)
    CLOSE = ENDS[0]
    BEGIN = "<tool_calls>[\n    "
    BETWEEN = ",\n    "
    END = "\n]</tool_calls>"


class Nemotron(JsonList):
    """Form of Nemotron-H and Nemotron Nano 2."""

    NAME = "Nemotron"
    SIGNS = MARKS = ("<TOOLCALL>",)
    ENDS = ("</TOOLCALL>",)
    CLOSE = ENDS[0]
    BEGIN = "<TOOLCALL>["
    BETWEEN = ", "
    END = "]</TOOLCALL>"


class GraniteList(JsonList):
    """Form of Granite 3 and the preview of Granite 4, without a closing mark."""

    NAME = "Granite list"
    SIGNS = MARKS = ("<|tool_call|>",)
    ENDS = ("]",)
    BEGIN = "<|tool_call|>["
    BETWEEN = ", "
    END = "]"
