"""Tests of reasoning and tool calls in answer texts: every form, broken calls, and any split into
pieces."""

from __future__ import annotations

import json
from types import NoneType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plugins.tool_calls.forms import Form, Hermes, Xml, tool_calls
from engine.server.bodies import APIError
from engine.server.schemas import ChatRequest
from engine.text.answers import Event, ReasoningDelta, TextDelta, ToolCall, joined
from engine.text.tokenizer import ChatTemplate

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "deep": {"type": "object"},
        "sure": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["number", "string"]},
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    *({"type": "function", "function": {"name": name}} for name in "fgh"),
]

HERMES, XML = Hermes(TOOLS), Xml(TOOLS)


def read(
    form: Form, text: str, size: int | None = None, **options: Any
) -> tuple[str, str, list[tuple[str, str]]]:
    """Return (reasoning, text, calls as (name, arguments)) of an answer read ``size`` characters at
    a time."""
    is_cut = options.pop("is_cut", False)
    reader = form.reader(thinks=True, **options)
    size = size or max(1, len(text))
    events = [event for at in range(0, len(text), size) for event in reader.push(text[at:][:size])]
    return parts_of([*events, *reader.flush(is_cut)])


def parts_of(events: list[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    reasoning = text = ""
    calls: list[tuple[str, str]] = []
    for event in joined(events):
        match event:
            case ReasoningDelta(more):
                reasoning += more
            case TextDelta(more):
                text += more
            case ToolCall(name, arguments):
                calls.append((name, arguments))
    return reasoning, text, calls


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(name: str, **values: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (HERMES, "<think>\nhm\n</think>\n\nHello", ("hm", "Hello", [])),
        (HERMES, "  \n<think>hm</think>", ("hm", "", [])),
        (HERMES, "<think>never closed ", ("never closed", "", [])),
        (HERMES, "a <think>b</think>", ("", "a <think>b</think>", [])),
        (HERMES, " <thin", ("", " <thin", [])),
        (HERMES, "Ends. \n", ("", "Ends. \n", [])),
        (HERMES, hermes("f", '{"city": "Bonn"}'), ("", "", [("f", '{"city": "Bonn"}')])),
        (
            HERMES,
            "Both:\n" + hermes("f", "{}") + "\n" + hermes("g", '{"a": {"b": ["}</tool_call>"]}}'),
            ("", "Both:", [("f", "{}"), ("g", '{"a": {"b": ["}</tool_call>"]}}')]),
        ),
        (HERMES, hermes("f", "{}") + "\n\nDone. ", ("", "\n\nDone.", [("f", "{}")])),
        (HERMES, hermes("f", r'{"a": "\"}\\"}'), ("", "", [("f", r'{"a": "\"}\\"}')])),
        (HERMES, hermes("f", r'{"a": "\ud800"}'), ("", "", [("f", '{"a": "\ufffd"}')])),
        (HERMES, hermes("f", r'"{\"a\": \"\\uDFFF\"}"'), ("", "", [("f", '{"a": "\ufffd"}')])),
        (
            XML,
            xml("weather", deep=r'{"a": "\ud800"}'),
            ("", "", [("weather", '{"deep": {"a": "\ufffd"}}')]),
        ),
        (
            HERMES,
            r'<tool_call>{"arguments": {"a": "\ud800"}, "name": "f"}</tool_call>',
            ("", "", [("f", '{"a": "\ufffd"}')]),
        ),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            ("", "", [("f", '{"a": 1}')]),
        ),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", "{}")])),
        (HERMES, "x <tool_call>no</tool_call> y", ("", "x <tool_call>no</tool_call> y", [])),
        (
            HERMES,
            "<tool_call>no " + hermes("f", "{}"),
            ("", "<tool_call>no", [("f", "{}")]),
        ),
        (HERMES, '<tool_call>{"name": "f"', ("", '<tool_call>{"name": "f"', [])),
        *(
            (HERMES, text, ("", text, []))
            for text in (
                '<tool_call>{"name": "f", "arguments": {"a',
                '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>!',
                '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>',
                '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
                '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
                '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
                '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
                '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
                '<tool_call>' + '{"name": "f", "arguments": {"a": ' + '[' * 5000,
            )
        ),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {"a": "x}}</tool_call>\n' + hermes("g", "{}"),
            (
                "",
                '<tool_call>{"name": "f", "arguments": {"a": "x}}</tool_call>',
                [("g", "{}")],
            ),
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}} x', ("", "x", [("f", "{}")])),
        (HERMES, "<tool_call>" + "[" * 5000, ("", "<tool_call>" + "[" * 5000, [])),
        (
            XML,
            "Look:\n\n" + xml("weather", city="Bonn\nam Rhein", days="3"),
            ("", "Look:", [("weather", '{"city": "Bonn\\nam Rhein", "days": 3}')]),
        ),
        (
            XML,
            xml("weather", deep='{"a": [1]}', sure="True", maybe="null", either="1.5"),
            ("", "", [("weather", '{"deep": {"a": [1]}, "sure": true, "maybe": null, "either": 1.5}')]),
        ),
        (
            XML,
            xml("weather", days="soon", maybe="[1]", either="x", other="5"),
            ("", "", [("weather", '{"days": "soon", "maybe": "[1]", "either": "x", "other": "5"}')]),
        ),
        (XML, xml("weather", days="NaN"), ("", "", [("weather", '{"days": "NaN"}')])),
        (XML, xml("f") + "\n" + xml("g"), ("", "", [("f", "{}"), ("g", "{}")])),
        (XML, "<function=f>\n</function>", ("", "", [("f", "{}")])),
        (XML, "<function=f></function><function=g>", ("", "", [("f", "{}"), ("g", "{}")])),
        (
            XML,
            "<function=f><parameter=a>1<parameter=b>2</function>!",
            ("", "!", [("f", '{"a": "1", "b": "2"}')]),
        ),
        (XML, "<tool_call>words", ("", "<tool_call>words", [])),
        (XML, "<tool_call>\n<tool_call>\n<function=f>", ("", "<tool_call>", [("f", "{}")])),
        (XML, "a <function=b c\n> d", ("", "a <function=b c\n> d", [])),
        *(
            (XML, text, ("", text, []))
            for text in (
                "<function=f>stray </function>",
                "<function=f><parameter=a",
                "<function=f><parameter=a b\nc>1</parameter></function>",
                xml("other", a="1"),
                "<function=f>\n<parameter=a>\n1",
            )
        ),
        (XML, xml("weather", days="1e999"), ("", "", [("weather", '{"days": "1e999"}')])),
        (XML, xml("weather", city='say "<b>" é'), ("", "", [("weather", '{"city": "say \\"<b>\\" é"}')])),
    ],
)  # fmt: skip
def test_answers_are_read_the_same_in_any_pieces(
    form: Form, text: str, expected: tuple[str, str, list[tuple[str, str]]]
) -> None:
    assert read(form, text) == expected
    for size in (1, 2, 3, 7) if len(text) < 1000 else (1000,):
        assert read(form, text, size) == expected


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("form", "mark"), [(HERMES, '<tool_call>{\\"'), (XML, "<function=f>x")])
def test_broken_calls_are_read_in_linear_time(form: Form, mark: str) -> None:
    """In quadratic time it would take more than an hour."""
    text = mark * 20_000
    assert read(form, text) == ("", text, [])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, hermes("f", '{"a": {"b": ["}"]}}') + "\n" + hermes("g", "{}")),
        (XML, xml("weather", city="Bonn", deep='{"a": 1}') + "\n" + xml("g") + xml("h", a="}")),
    ],
)
def test_truncated_answers_have_only_calls_with_json_arguments(form: Form, text: str) -> None:
    found = set()
    for cut in range(len(text) + 1):
        reader = form.reader(thinks=True)
        events = [*reader.push(text[:cut]), *reader.flush(is_cut=True)]
        _, rest, made = parts_of(events)
        is_broken = reader.warning is not None
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in made)
        assert is_broken == ("<tool_call>" in rest)
        found.add((len(made), is_broken))
    assert {is_broken for _, is_broken in found} == {True, False}
    assert max(number for number, _ in found) == text.count("</tool_call>")


PIECES = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>",
        "city>", "days>", "weather>", "<think>", "</think>", "\n", "  ", "<", "</", ">", "f", '"',
        "\\", "{", "}", '{"name": "f"', ', "arguments": {', '"arguments"', "[1]", "x" * 300, " " * 300,
        "é", "null",
    ]
)  # fmt: skip


@settings(max_examples=400)
@given(
    st.sampled_from([HERMES, XML]),
    st.lists(PIECES, max_size=14).map("".join),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_random_texts_are_read_the_same_in_any_pieces(
    form: Form, text: str, thinking: bool, is_cut: bool, data: st.DataObject
) -> None:
    options = {"is_thinking": thinking, "is_cut": is_cut}
    whole = read(form, text, **options)
    assert read(form, text, 1, **options) == whole
    size = data.draw(st.integers(1, max(1, len(text))))
    assert read(form, text, size, **options) == whole
    reasoning, *rest = read(form, text, **options | {"starts_text": False})
    assert not thinking or read(form, "A" + text, **options) == ("A" + reasoning, *rest)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ tools }} <tool_call> <function=x> </think>", Xml),
        ('{{ tools }} <tool_call>{"name"', Hermes),
        ("{{ tools }}", NoneType),
    ],
)
def test_the_form_is_recognised_in_the_template(source: str, expected: type) -> None:
    messages: Any = [{"role": "user", "content": "Hi."}]
    body = ChatRequest(messages=messages, tools=TOOLS, tool_choice="none")
    assert type(tool_calls(body, ChatTemplate(source))) is expected
    body.tool_choice = None
    for without, why in (("{{ messages }}", "has no tools"), ("{{ tools }}", "is not supported")):
        with pytest.raises(APIError, match=why):
            tool_calls(body, ChatTemplate(without))
