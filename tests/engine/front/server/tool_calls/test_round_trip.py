"""Calls of tools that chat templates write are read back as the same calls."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.front.server.tool_calls.form import form_of, prepared
from engine.front.server.tool_calls.pythonic import IDENTIFIER
from engine.front.server.tool_calls.tags import Xml
from engine.text.answers import Event
from engine.text.tokenizer import ChatTemplate

from .templates import FORMS
from .test_answers import parts_of

Typed = tuple[dict[str, Any], st.SearchStrategy[Any]]
"""A schema, and a strategy for values that match it."""
MARKUP = (
    "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=x>", "</parameter>",
    "<tool_calls>", "]</tool_calls>", "</TOOLCALL>", "<|tool_call_end|>", "')]<|tool_call_end|>",
    "<|tool_calls_section_begin|>", "</function_calls>", "f(", ")", "=", "'}]", "<|tool_call|>[",
    "<parameter=content>", "<think>", "</think>", "\n", "\n\n", " ", '"', "'", "\\", "{", "}", "[",
    "]", ",", ":", "null", "None", "True", "5", "é", "漢字", "🙂", "\t", "\r", "\u2028", "a", "<",
    "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(MARKUP), max_size=8).map("".join)
NAMES = st.sampled_from(["path", "content", "x", "a-b", "straße", "名前", "$id", "type", "enum"])
DEFINED: dict[str, Typed] = {
    "Size": ({"type": "string", "enum": ["1", "2", "none", "true"]}, st.sampled_from("12")),
    "Count": ({"type": "integer", "minimum": 0}, st.integers(0, 2**60)),
    "a/b~c": ({"enum": [1, 2.5, True, None]}, st.sampled_from([1, 2.5, True, None])),
    "Point": (
        {"type": "object", "properties": {"at": {"$ref": "#/$defs/Count"}}},
        st.fixed_dictionaries({"at": st.integers(0, 9)}),
    ),
}
SIMPLE: list[Typed] = [
    ({"type": "string"}, TEXTS),
    ({"type": "string", "minLength": 0, "title": "T"}, TEXTS),
    ({"description": "A text without a type."}, TEXTS),
    ({"type": "integer"}, st.integers(-(2**63), 2**63 - 1)),
    ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9)),
    ({"type": "boolean"}, st.booleans()),
    ({"type": "null"}, st.none()),
    ({"enum": [1, 2, 3]}, st.sampled_from([1, 2, 3])),
    ({"enum": ["a", 5, None, False]}, st.sampled_from(["a", 5, None, False])),
    ({"const": 7}, st.just(7)),
    ({"const": "true", "type": "string"}, st.just("true")),
    ({"items": {"type": "string"}}, st.lists(TEXTS, max_size=3)),
    ({"additionalProperties": {"type": "number"}}, st.dictionaries(TEXTS, st.integers(0, 9))),
    *(
        ({"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1")}, values)
        for name, (_, values) in DEFINED.items()
    ),
]


def wrapped(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    """Return types with an inner one, in the styles of pydantic, zod and OpenAPI."""

    def options(typed: Typed) -> st.SearchStrategy[Typed]:
        schema, values = typed
        maybe, kind = values | st.none(), schema.get("type")
        made: list[Typed] = [
            ({"anyOf": [schema, {"type": "null"}], "default": None}, maybe),
            ({"oneOf": [{"type": "null"}, schema]}, maybe),
            ({"allOf": [schema], "description": "D"}, values),
            ({"type": "array", "items": schema}, st.lists(values, max_size=3)),
            (
                {"type": "object", "properties": {"in": schema}, "required": ["in"]},
                st.fixed_dictionaries({"in": values}),
            ),
            ({"type": "object", "additionalProperties": schema}, st.dictionaries(TEXTS, values)),
        ]
        if isinstance(kind, str) and "const" not in schema:
            made += [({"anyOf": [schema, {"type": "boolean"}]}, values | st.booleans())]
            made += [({**schema, "type": [kind, "null"]}, maybe)]
            made += [({**schema, "nullable": True}, maybe)]
        return st.sampled_from(made)

    return inner.flatmap(options)


TYPED = st.recursive(st.sampled_from(SIMPLE), wrapped, max_leaves=4)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a tool and the arguments of a call."""
    properties: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    required = []
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        properties[name], values = draw(TYPED)
        if draw(st.booleans()):
            required.append(name)
        if name in required or draw(st.booleans()):
            arguments[name] = draw(values)
    root = {"type": "object", "properties": properties, "required": required}
    defined = {name: schema for name, (schema, _) in DEFINED.items()}
    if draw(st.booleans()):
        parameters = root | {"$defs": defined}
    else:
        parameters = {"$ref": "#/$defs/Root", "$defs": {**defined, "Root": root}}
    return {"name": "f", "description": "D", "parameters": parameters}, arguments


LINES = re.compile(r"(?<=\n)(?:(<parameter=[^<>\n]+>)|</parameter>)(?=\n)")
QUOTED = re.compile(rf"\\\\|'\s*(?:,\s*{IDENTIFIER}\s*=|\)|$)")
"""Text that cannot stand between quotes as it is: it has escapes, or ends the string."""
ENDS = re.compile(r"</parameter>\s*(?:<parameter=[^<>\n]+>|</function>\s*(?:<|$))")


def is_ambiguous(arguments: dict[str, Any], tool: dict[str, Any]) -> bool:
    """Return True if values with tags could be read in two ways: an opening line without a closing
    one, or the reverse in front of another tag; or if a text is also another allowed value."""
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in arguments.items()}
    is_open = False
    for name, text in texts.items():
        depth, lined = 0, f"\n{text}\n"
        for line in LINES.finditer(lined):
            depth += 1 if line[1] else -1 if depth else 0
            is_lone = not line[1] and depth == 0
            if is_lone and re.match(r"\n(<parameter=|</function>)", lined[line.end() :]):
                return True
        is_open = is_open or depth > 0
        value, schema = arguments[name], json.dumps(tool)
        is_union = any(word in schema for word in ('"null"', '"boolean"', '"nullable"', "~1b"))
        if (
            isinstance(value, str)
            and is_union
            and value in ("null", "None", "True", "true", "false")
        ):
            return True
    joined = "\n".join(texts.values())
    return is_open and ("</parameter>" in joined or ENDS.search(joined) is not None)


TOOL_NAMES = st.lists(
    st.sampled_from(["f", "get_weather", "mcp__files-read", "straße", "名前", "a.b"]),
    min_size=2, max_size=2, unique=True,
)  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@given(
    st.lists(calls(), min_size=1, max_size=2),
    TOOL_NAMES,
    st.sampled_from(["", "Look.", "{"]),
    st.data(),
)
def test_calls_are_read_as_the_template_writes_them(
    name: str,
    drawn: list[tuple[dict[str, Any], dict[str, Any]]],
    names: list[str],
    said: str,
    data: st.DataObject,
) -> None:
    template = FORMS[name]
    form = form_of(template)
    assert form is not None
    tools = [
        {"type": "function", "function": {**tool, "name": names[number]}}
        for number, (tool, _) in enumerate(drawn)
    ]
    made = [
        {"type": "function", "id": "call_1", "function": {"name": names[number], "arguments": each}}
        for number, (_, each) in enumerate(drawn)
    ]
    if form is Xml and any(is_ambiguous(arguments, tool) for tool, arguments in drawn):
        return
    if name == "lfm2.5" and any(
        isinstance(one, str) and QUOTED.search(one) for _, each in drawn for one in each.values()
    ):
        return
    ask = {"role": "user", "content": "Do it."}
    answer = {"role": "assistant", "content": said, "tool_calls": made}
    source = ChatTemplate(template)
    whole = source.render(prepared([ask, answer], source), tools=tools)
    written = whole.partition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
    reader = form(tools).reader(thinks=True)
    events, at = list[Event](), 0
    while at < len(written):
        size = data.draw(st.integers(1, len(written)))
        events += reader.push(written[at : at + size])
        at += size
    events += reader.flush()
    _, text, found = parts_of(events)
    expected = [(names[number], arguments) for number, (_, arguments) in enumerate(drawn)]
    assert [(name, json.loads(arguments)) for name, arguments in found] == expected
    assert text == said and reader.warning is None  # type: ignore[attr-defined]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        same = json.dumps(json.loads(one), sort_keys=True)
        assert same == json.dumps(other, sort_keys=True)  # True is not 1.
