"""Tests of reasoning and tool calls in answer texts: every form, broken calls, and any split into
pieces."""

from __future__ import annotations

import json
from types import NoneType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.front.server.bodies import APIError, decode
from engine.front.server.schemas import ChatRequest
from engine.front.server.settings import ServerConfig
from engine.front.server.tool_calls.form import CallForm, forms, tool_calls
from engine.front.server.tool_calls.hermes import Hermes
from engine.front.server.tool_calls.tags import Xml
from engine.text.answers import Event, ReasoningDelta, TextDelta, ToolCall, joined
from engine.text.tokenizer import ChatTemplate
from tests.refused import refused

from .templates import TOY

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
    {"type": "function", "function": {"name": "needy", "parameters": {"required": ["a", "b"]}}},
]

HERMES, XML = Hermes(TOOLS), Xml(TOOLS)
OTHERS = [form(TOOLS) for form in (*forms().values(), TOY) if form not in (Hermes, Xml)]


def read(
    form: CallForm, text: str, size: int | None = None, **options: Any
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
        *(
            (XML, xml("weather", city=f"{begin}{mark}{end}", days="1"), ("", "", [("weather", json.dumps({"city": f"{begin}{mark}{end}", "days": 1}))]))
            for mark in ("</parameter>", "<parameter=x>", "</function>", "<parameter=x>\n1\n</parameter>", "</tool_call>", xml("f", city="B", x="1"), xml("weather", city="B"))
            for begin, end in (("a ", " b"), ("a\n", "\nb"), ("\n", "\n"))
        ),
        (XML, xml("weather", city="a\n<parameter=x>\nb") + "\n" + xml("f"), ("", "", [("weather", '{"city": "a\\n<parameter=x>\\nb"}'), ("f", "{}")])),
        (XML, "<tool_call>\n<function=f>\n<parameter=a>\n1</parameter>\n<parameter=b>2\n</parameter></function></tool_call>!", ("", "!", [("f", '{"a": "1", "b": "2"}')])),
        (XML, "<tool_call>\n<function=needy>\n<parameter=a>\n1\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>", ("", "", [("needy", '{"a": "1", "b": "2"}')])),
        (XML, "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>", ("", "", [("f", '{"a": "1"}')])),
        (XML, xml("f", a="1").replace("</function>", "<parameter=a>\n2\n</parameter>\n</function>"), ("", xml("f", a="1").replace("</function>", "<parameter=a>\n2\n</parameter>\n</function>"), [])),
        (XML, xml("f", a="1") + "\nso\n</tool_call>", ("", "\nso\n</tool_call>", [("f", '{"a": "1"}')])),
        (HERMES, hermes("f", '{"a": "x\ny\tz"}'), ("", "", [("f", '{"a": "x\\ny\\tz"}')])),
        (HERMES, hermes("f", '"{\\"a\\": \\"x\ny\\"}"'), ("", "", [("f", '{"a": "x\\ny"}')])),
        (HERMES, hermes("f", r'{"a": "\d"}'), ("", hermes("f", r'{"a": "\d"}'), [])),
        (HERMES, hermes("f", '{"a": {"b": 1}')[:-13] + "\n</tool_call>", ("", hermes("f", '{"a": {"b": 1}')[:-13] + "\n</tool_call>", [])),
        (HERMES, hermes("f", "{}}"), ("", "}\n</tool_call>", [("f", "{}")])),
        (HERMES, f"<think>\nI read.\n{hermes('f', '{}')}", ("I read.", "", [("f", "{}")])),
        (XML, f"<think>\nI read.\n{xml('f', a='1')}\n{xml('g')}\n</think>\n\n", ("I read.", "", [("f", '{"a": "1"}'), ("g", "{}")])),
        (XML, f"<think>{xml('f')}", ("", "", [("f", "{}")])),
        (HERMES, f"<think>{hermes('f', '{}')}</think>{hermes('g', '{}')}", (hermes("f", "{}"), "", [("g", "{}")])),
        (XML, f"<think>a {xml('f')} b\n</think>\n\nc", (f"a {xml('f')} b", "c", [])),
        (XML, "<think>a <tool_call>\n<function=f>\n<parameter=a>\n1\n</think>\n\nc", ("a <tool_call>\n<function=f>\n<parameter=a>\n1", "c", [])),
        (XML, xml("weather", days="1e999"), ("", "", [("weather", '{"days": "1e999"}')])),
        (XML, xml("weather", city='say "<b>" é'), ("", "", [("weather", '{"city": "say \\"<b>\\" é"}')])),
    ],
)  # fmt: skip
def test_answers_are_read_the_same_in_any_pieces(
    form: CallForm, text: str, expected: tuple[str, str, list[tuple[str, str]]]
) -> None:
    assert read(form, text) == expected
    for size in (1, 2, 3, 7) if len(text) < 1000 else (1000,):
        assert read(form, text, size) == expected


ONCE = "<function=f>\n<parameter=a>\n"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("opening", ["", "<think>"])
@pytest.mark.parametrize(
    ("form", "mark"), [(HERMES, '<tool_call>{\\"'), (XML, "<function=f>x"), (XML, ONCE)]
)
def test_broken_calls_are_read_in_linear_time(form: CallForm, mark: str, opening: str) -> None:
    """In quadratic time it would take ten minutes."""
    text = (mark * 8_000).strip()
    expected = (text, "", []) if opening else ("", text, [])
    assert read(form, opening + text, is_cut=True) == expected


@pytest.mark.parametrize(
    ("form", "text", "is_cut", "said"),
    [
        (HERMES, hermes("f", "{}}"), False, "inside of its marks"),
        (HERMES, hermes("f", "{}}\n{}"), False, "inside of its marks"),
        (HERMES, hermes("f", r'{"a": "\d"}'), False, "not a JSON object"),
        (XML, xml("f", a="x\n</parameter>\n</function>\n</tool_call>\ny"), False, "inside of its marks"),
        (XML, xml("f", a="1").replace("</tool_call>", "so </tool_call>"), False, "inside of its marks"),
        (XML, xml("weather", days="soon"), False, "'days' of a call is not of the type"),
        (XML, xml("weather", deep="{'a': set()}"), False, "'deep' of a call is not of the type"),
        (XML, xml("weather", city="a\n<parameter=x>\nb" + xml("f"))[:-20], True, "breaks off"),
        (XML, xml("f", a="1").removesuffix("</function>\n</tool_call>"), True, "breaks off"),
        (XML, "<think>" + xml("f"), True, "in the reasoning, because it breaks off behind it"),
        (XML, f"<think>{xml('f')} and", False, "in the reasoning, because more reasoning"),
        (HERMES, f"<think>{hermes('rm', '{}')}</think>\n", False, "no tool 'rm' was offered"),
        (HERMES, "<think>" + hermes("f", "{}")[:-16], False, "in the reasoning, because it"),
        (HERMES, f"<think>{hermes('f', '{}')}<tool_call></think>\nNo.", False, "left in the"),
        (HERMES, f"<think>{hermes('rm', '{}')} or</think>\nNo.", False, "no tool 'rm' was offered"),
        *((form, text, False, None) for form, text in (
            (HERMES, f"<think>{hermes('f', '{}')} or</think>\nNo. {hermes('f', '{}')}"),
            (HERMES, "<think>Not <tool_call>.</think>\nNo."),
            (HERMES, f"<think>{hermes('rm', '{}')} or {hermes('f', '{}')}</think>\n"),
            (XML, xml("weather", days="5", deep="{'a': [True, None]}", sure="True") + "\n" + xml("f")),
            (XML, "<function=f>\n</function> so"),
        )),
    ],
)  # fmt: skip
def test_lost_and_doubtful_parts_of_calls_have_a_warning(
    form: CallForm, text: str, is_cut: bool, said: str | None
) -> None:
    reader = form.reader(thinks=True)
    for letter in text:
        reader.push(letter)
    reader.flush(is_cut)
    warning = reader.warning  # type: ignore[attr-defined]
    assert (said is None) == (warning is None) and (said or "") in (warning or "")


def test_calls_of_strict_tools_are_not_made_from_reasoning() -> None:
    """Their schema is enforced behind the reasoning only."""
    strict = Xml([{"function": {**TOOLS[1]["function"], "strict": True}}])
    text = "<think>" + xml("f")
    assert read(strict, text) == (text[7:], "", [])


DEFINITIONS = {
    "Size": {"type": "string", "enum": ["1", "2", "none", "true"]},
    "Count": {"type": "integer"},
    "Loop": {"$ref": "#/$defs/Loop"},
}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"enum": [1, 2, 3]}, "2", 2),
        ({"const": 7}, "7", 7),
        ({"enum": [True, False]}, "true", True),
        ({"enum": ["a", 1]}, "1", 1),
        ({"items": {"type": "string"}}, '["a"]', ["a"]),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', {"a": 1}),
        ({"minimum": 3}, "5", 5),
        ({"$ref": "#/$defs/Count"}, "5", 5),
        ({"$ref": "#/$defs/Size"}, "1", "1"),
        ({"$ref": "#/$defs/Size"}, " true", "true"),
        ({"anyOf": [{"$ref": "#/$defs/Size"}, {"type": "null"}]}, "none", "none"),
        ({"anyOf": [{"$ref": "#/$defs/Size"}, {"type": "null"}]}, "None", None),
        ({"allOf": [{"$ref": "#/$defs/Size"}], "default": "1"}, "2", "2"),
        ({"allOf": [{"type": ["integer", "string"]}, {"type": "number"}]}, "2", 2),
        ({"type": "array", "items": {"type": "string"}}, "['a', 'b']", ["a", "b"]),
        ({"type": "array"}, "(1, 'a')", [1, "a"]),
        ({"type": "object"}, "{'a': True, 'b': None}", {"a": True, "b": None}),
        ({"type": "object"}, '{"a": "x\ny"}', {"a": "x\ny"}),
        ({"type": ["string", "array"]}, "['a']", ["a"]),
        ({"type": ["string", "array"]}, "(1, 2)", "(1, 2)"),
        ({"type": "str"}, "5", "5"),
        ({"type": "INTEGER"}, "5", 5),
        ({"type": "any"}, "5", "5"),
        ({"type": "integer", "nullable": True}, "None", None),
        ({"type": ["string", "null"]}, "nullable", "nullable"),
        ({"type": ["string", "null"]}, "null ", "null "),
        ({"type": ["string", "integer"]}, "5", 5),
        ({"type": "string"}, "5", "5"),
        ({"$ref": "#/$defs/Loop"}, "5", "5"),
        ({"$ref": "#/nowhere"}, "5", "5"),
        ({"$ref": "#/properties/other"}, "5", 5),
        (True, "5", "5"),
        ({}, "5", "5"),
    ],
)
@pytest.mark.parametrize("is_reference", [False, True])
def test_values_have_the_types_of_their_schema(
    schema: Any, text: str, value: Any, is_reference: bool
) -> None:
    root = {"type": "object", "properties": {"n": schema, "other": {"type": "integer"}}}
    parameters = root | {"$defs": DEFINITIONS}
    if is_reference:
        parameters = {"allOf": [{"$ref": "#/$defs/Root"}], "$defs": DEFINITIONS | {"Root": root}}
        parameters |= {"properties": {"other": {"type": "integer"}}}
    form = Xml([{"function": {"name": "f", "parameters": parameters}}])
    assert read(form, xml("f", n=text)) == ("", "", [("f", json.dumps({"n": value}))])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, hermes("f", '{"a": {"b": ["}"]}}') + "\n" + hermes("g", "{}")),
        (XML, xml("weather", city="Bonn", deep='{"a": 1}') + "\n" + xml("g") + xml("h", a="}")),
    ],
)
def test_truncated_answers_have_only_calls_with_json_arguments(form: CallForm, text: str) -> None:
    found = set()
    for cut in range(len(text) + 1):
        reader = form.reader(thinks=True)
        events = [*reader.push(text[:cut]), *reader.flush(is_cut=True)]
        _, rest, made = parts_of(events)
        is_broken = reader.warning is not None
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in made)
        assert is_broken == (len(rest.strip()) > 1)  # A mark, or a part of it.
        found.add((len(made), is_broken))
    assert {is_broken for _, is_broken in found} == {True, False}
    assert max(number for number, _ in found) == text.count("</tool_call>")


PIECES = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>",
        "city>", "days>", "weather>", "<think>", "</think>", "\n", "  ", "<", "</", ">", "f", '"',
        "\\", "{", "}", '{"name": "f"', ', "arguments": {', '"arguments"', "[1]", "x" * 300, " " * 300,
        "é", "null", "<tool_call>\n<function=f>\n", "<parameter=a>\n", "\n</parameter>\n",
        "</function>\n</tool_call>", '<tool_call>\n{"name": "f", "arguments": {}}',
        *(mark for form in OTHERS for mark in (*form.MARKS, form.BEGIN, form.END, form.CLOSE)),
        "[", "]", "f(a='", "'", "', b=", ")", ", ", "weather(days=1)", "functions.f:0", "True",
        "<|tool_call_argument_begin|>{}", '{"name": "g", "arguments": {}}',
    ]
)  # fmt: skip


@settings(max_examples=400)
@given(
    st.sampled_from([HERMES, XML, *OTHERS]),
    st.lists(PIECES, max_size=14).map("".join),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_random_texts_are_read_the_same_in_any_pieces(
    form: CallForm, text: str, thinking: bool, is_cut: bool, data: st.DataObject
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
    sent = {"messages": [{"role": "user", "content": "Hi."}], "tools": TOOLS, "tool_choice": "none"}
    body = decode(ChatRequest, json.dumps(sent).encode(), ServerConfig())
    assert type(tool_calls(body, ChatTemplate(source))) is expected
    body.tool_choice = None
    for without, why in (("{{ messages }}", "has no tools"), ("{{ tools }}", "is not supported")):
        refused(why, tool_calls, body, ChatTemplate(without), kind=APIError)


@pytest.mark.parametrize("form", (*forms().values(), TOY), ids=lambda form: form.NAME)
@pytest.mark.parametrize("start", ["", "<think>so</think>", "Now: ", "<think>I call "])
def test_an_answer_that_is_cut_inside_of_a_mark_has_a_warning(
    form: type[CallForm], start: str
) -> None:
    def warning(text: str, choice: Any = "auto", is_cut: bool = True) -> str | None:
        reader = form(TOOLS, choice).reader(thinks=True)
        events = [event for letter in start + text for event in reader.push(letter)]
        read = parts_of([*events, *reader.flush(is_cut)])
        assert "".join(read[:2]).endswith(text.strip()) and not read[2]
        return reader.warning  # type: ignore[attr-defined]

    for mark in form.MARKS:
        for size in range(1, len(mark)):
            assert "breaks off" in (warning(mark[:size], "required") or "")
            assert (warning(mark[:size]) is not None) == (size > 1)
            assert warning(mark[:size], is_cut=False) is None
        assert warning(mark[: min(2, len(mark) - 1)] + " and more") is None
