"""Calls with a tag per argument."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import Json
from engine.front.server.tool_calls.form import CallForm, Calls, Function, ParsedCall
from engine.front.server.tool_calls.parameters import Pairs, Parameters
from engine.text.answers import MAX_NAME
from engine.text.grammar import GrammarError, quoted
from engine.text.tokenizer import CALL_CLOSE, CALL_OPEN

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MISTYPED = "The argument {!r} of a call is not of the type in the schema of the tool"
MALFORMED = "it is not written as a function with parameters"
REPEATED = "it gives one argument twice"
END_OF_VALUE = r'"\n</parameter>\n"'
VALUE = (
    f"value[suffix={END_OF_VALUE}]: VALUE",
    r"VALUE: /(?s:.*)/ & ~/((?s:.*)\n)?(<\/parameter>|<parameter=[^<>\n]+>)\n(?s:.*)/",
)
"""Text up to the closing tag of its parameter, without a line that is a tag of a parameter."""


class Xml(CallForm):
    """Form of Qwen3-Coder and Qwen3.5: ``<tool_call><function=NAME>``, then a ``<parameter=NAME>``
    per argument with its value on separate lines, and closing tags."""

    NAME = "tags"
    SIGNS = (FUNCTION,)
    MARKS = (CALL_OPEN, FUNCTION)
    ENDS = (CALL_CLOSE, END_FUNCTION)
    BEGIN = f"{CALL_OPEN}\n{FUNCTION}"
    BETWEEN = f"\n{CALL_CLOSE}\n{BEGIN}"
    END = f"\n{CALL_CLOSE}"
    CLOSE = CALL_CLOSE
    LINES = VALUE

    def __init__(self, tools: Sequence[Mapping[str, Function]], *options: Any) -> None:
        super().__init__(tools, *options)
        for name in self.functions:
            tag(name)

    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Calls | str | None:
        """See ``CallForm``. A call as the chat template writes it is read first, because values may
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
        return Calls([ParsedCall(name, arguments, doubt)], end)

    def after(self, mark: str) -> str:
        """Also without the line breaks, in which models differ."""
        whole = f'"\\n"? "{FUNCTION}" function "\\n"? "{CALL_CLOSE}"'
        return whole if mark == CALL_OPEN else "function"

    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        """See ``CallForm``. Parameters are in the order of the schema."""
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
