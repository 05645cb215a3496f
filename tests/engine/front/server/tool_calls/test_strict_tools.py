"""Grammars of tools: those of strict tools accept the values that a validator of JSON schemas
accepts, and those of others do not refuse a schema."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.front.server.tool_calls.form import CallForm, form_of
from engine.front.server.tool_calls.hermes import Hermes
from engine.front.server.tool_calls.kimi import Kimi
from engine.front.server.tool_calls.pythonic import Lfm2Calls, Pythonic
from engine.front.server.tool_calls.tags import Xml
from engine.plugins.guided.guides import check_beginning, make_matcher, make_vocabulary
from engine.text.answers import ToolCall
from engine.text.grammar import Grammar, GrammarError
from engine.text.tokenizer_files import HFTokenizer

from .templates import FORMS
from .templates import written as written_by

llguidance = pytest.importorskip("llguidance")

TOKENIZER = HFTokenizer()
DEFINED = {
    "Count": {"type": "integer", "minimum": 2},
    "Word": {"type": "string", "minLength": 1, "maxLength": 2},
    "Tree": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/Tree"}},
        "additionalProperties": False,
    },
}


@cache
def vocabulary() -> Any:
    return make_vocabulary(llguidance, TOKENIZER, TOKENIZER.vocab_size)


def accepts(grammar: Grammar, text: str) -> bool:
    """Return True if ``text`` is a whole answer in ``grammar``."""
    matcher = make_matcher(llguidance, vocabulary(), grammar)
    ids = [*TOKENIZER.encode(text, add_special_tokens=False), min(TOKENIZER.eos_token_ids)]
    return bool(matcher.validate_tokens(ids) == len(ids))


def tools(schema: Any, strict: bool) -> list[dict[str, Any]]:
    parameters = {
        "type": "object",
        "properties": {"n": schema},
        "required": ["n"],
        "additionalProperties": False,
        "$defs": DEFINED,
    }
    return [{"function": {"name": "f", "parameters": parameters, "strict": strict}}]


def written(form: type[CallForm], value: Any) -> str:
    """Return a call as the chat template writes it."""
    text = json.dumps(value, ensure_ascii=False)
    if issubclass(form, Xml):
        text = value if isinstance(value, str) else text
        call = f"f>\n<parameter=n>\n{text}\n</parameter>\n</function>"
    elif issubclass(form, Kimi):
        call = f'functions.f:0<|tool_call_argument_begin|>{{"n": {text}}}'
    elif issubclass(form, Pythonic):
        call = f"f(n={text})"
    else:
        call = f'{{"name": "f", "arguments": {{"n": {text}}}}}'
    return f"{form.BEGIN}{call}{form.END}"


KINDS = [Hermes, Xml, Kimi, Lfm2Calls]
"""A form of each kind: calls as objects, tags, JSON behind a name, and literals."""
PATTERNS = [
    "a",
    "^a",
    "b$",
    "^[ab]+$",
    "^a|b$",
    "a{2}",
    r"^\d$",
    "/",
    r"\.",
    "(a|b)c",
    "[^|^$]",
    "",
]
BOUNDS = st.integers(-3, 4)
SIZES = st.integers(0, 3)
NUMBERS = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={
        "minimum": BOUNDS,
        "maximum": BOUNDS | st.just(2.5),
        "exclusiveMinimum": BOUNDS,
        "exclusiveMaximum": BOUNDS,
        "multipleOf": st.sampled_from([1, 2, 3, 0.5]),
    },
)
WORDS = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={"minLength": SIZES, "maxLength": SIZES, "pattern": st.sampled_from(PATTERNS)},
)
TEXTS = st.text("ab.c/1é|\n", max_size=4).filter(lambda text: not text.endswith("\n"))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from([0.5, -1.25]), TEXTS
)
LEAVES = st.one_of(
    NUMBERS,
    WORDS,
    st.builds(lambda members: {"enum": members}, st.lists(SCALARS, min_size=1, max_size=3)),
    st.builds(lambda member: {"const": member}, SCALARS),
    st.fixed_dictionaries(
        {"type": st.just("string"), "enum": st.lists(TEXTS, min_size=1, max_size=3)},
        optional={"minLength": SIZES, "pattern": st.sampled_from(PATTERNS)},
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}]),
    st.sampled_from([{"$ref": f"#/$defs/{name}"} for name in DEFINED]),
    st.sampled_from([{"$ref": "#/$defs/Word", "pattern": "a"}, {"not": {}}]),
)


def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={
            "minItems": SIZES,
            "maxItems": SIZES,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "uniqueItems": st.booleans(),
        },
    )
    objects = st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.lists(inner, max_size=2).map(
                lambda types: dict(zip("ab", types, strict=False))
            ),
            "required": st.sampled_from([[], ["a"], ["a", "b"]]),
            "additionalProperties": st.booleans() | inner,
            "patternProperties": st.fixed_dictionaries({}, optional={"^c": inner}),
            "propertyNames": st.sampled_from(
                [{"type": "string"}, {"enum": ["a", "c"]}, {"pattern": "^a"}, {"minLength": 2}]
            ),
            "minProperties": SIZES,
            "maxProperties": SIZES,
        },
    )
    unions = st.builds(
        lambda name, options: {name: options},
        st.sampled_from(["anyOf", "oneOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=2),
    )
    return (
        lists | objects | unions | st.builds(lambda one: {"anyOf": [one, {"type": "null"}]}, inner)
    )


SCHEMAS = st.recursive(LEAVES, composed, max_leaves=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner).map(lambda one: dict(sorted(one.items()))),
    ),
    max_leaves=4,
)
"""Names are in the order of the schema, in which a grammar expects them."""


def is_valid(schema: Any, value: Any) -> bool:
    root = tools(schema, True)[0]["function"]["parameters"]
    return bool(jsonschema.Draft202012Validator(root).is_valid({"n": value}))


@pytest.mark.parametrize("form", KINDS)
@given(SCHEMAS, st.lists(VALUES, min_size=4, max_size=8))
@example({"allOf": [{"type": "integer"}, {"type": "string", "enum": [""]}]}, [""])
def test_strict_tools_accept_the_values_that_match_their_schema(
    form: type[CallForm], schema: Any, values: list[Any]
) -> None:
    """Values with tags are compared as they are read. A refusal names a keyword of the schema, or
    says that no value matches."""
    offered = tools(schema, True)
    try:
        grammar = form(offered).grammar()
        make_matcher(llguidance, vocabulary(), grammar)
    except GrammarError as error:
        named = re.findall(r"""['"]([$\w]+)['"]""", str(error).removeprefix("tool 'f': "))
        assert "nsatisfiable" in str(error) or any(
            name in json.dumps(offered) for name in named[:1]
        )
        return
    for value in values:
        text = written(form, value)
        [call] = list(form(offered).reader(thinks=False).push(text))
        assert isinstance(call, ToolCall)
        read = json.loads(call.arguments)["n"]
        assert accepts(grammar, text) == is_valid(schema, read), (text, read)


@pytest.mark.parametrize("form", KINDS)
def test_a_tool_with_many_limits_is_not_too_complex(form: type[CallForm]) -> None:
    text, large = {"type": "string", "minLength": 1}, {"type": "string", "maxLength": 4000}
    kinds = [text, large, {"anyOf": [large, {"type": "null"}]}, USUAL["date"]]
    properties = {f"p{number}": kinds[number % 4] for number in range(40)}
    parameters = {"type": "object", "properties": properties, "additionalProperties": False}
    function = {"parameters": parameters, "strict": True}
    offered = [{"function": {"name": f"f{number}", **function}} for number in range(10)]
    for grammar in (form(offered).grammar(), form(offered).free_grammar(may_think=True)):
        matcher = make_matcher(llguidance, vocabulary(), grammar)
        check_beginning(matcher, np.array(sorted(TOKENIZER.eos_token_ids)))
        call = written(form, "a").replace("=f>", "=f3>").replace("=n>", "=p0>")
        call = call.replace('"f"', '"f3"').replace('"n"', '"p0"')
        call = call.replace("functions.f:", "functions.f3:").replace("f(n=", "f3(p0=")
        assert accepts(grammar, call)
        assert not accepts(grammar, call.replace("\na\n", "\n\n").replace('"a"', '""'))


USUAL: dict[str, Any] = {
    "length": {"type": "string", "minLength": 1, "maxLength": 9},
    "date": {"type": "string", "format": "date-time"},
    "email": {"type": "string", "format": "email", "pattern": r"^(?!\.)(?!.*\.\.)[a-z.]+@[a-z.]+$"},
    "word": {"type": "string", "pattern": r"\bfoo\b"},
    "broken": {"type": "string", "pattern": "("},
    "set": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    "record": {"type": "object", "propertyNames": {"type": "string"}},
    "choice": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 5}]},
    "other": {"if": {"type": "string"}, "then": {"minLength": 1}, "type": "integer"},
    "large": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "nowhere": {"$ref": "#/$defs/Missing"},
    "remote": {"$ref": "https://example.org/schema"},
    "unknown": {"type": "any"},
    "never": {"type": "integer", "minimum": 3, "maximum": 2},
    "nothing": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "parts": {"$ref": "#/properties/n/items", "items": {"type": "integer"}},
}


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("name", USUAL)
def test_other_tools_are_not_refused_for_their_schema(form: type[CallForm], name: str) -> None:
    """Limits that cannot be enforced are dropped; only a tool without a valid call takes all."""
    grammar: Grammar | None = form(tools(USUAL[name], strict=False)).grammar()
    assert grammar is not None
    try:
        make_matcher(llguidance, vocabulary(), grammar)
    except GrammarError:
        assert name in ("never", "nothing")
        grammar = grammar.looser
        assert grammar is not None
        make_matcher(llguidance, vocabulary(), grammar)
    value: Any = {"set": ["a"], "record": {}, "email": "a@b", "date": "2026-01-01T00:00:00Z"}
    assert accepts(grammar, written(form, value.get(name, 5 if "type" in USUAL[name] else 7))) or (
        USUAL[name].get("type") == "string" and accepts(grammar, written(form, "foo"))
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "root", [{}, {"$ref": "#/$defs/Any"}, {"properties": {}, "additionalProperties": True}]
)
def test_tools_that_name_no_arguments_take_any(root: dict[str, Any], strict: bool) -> None:
    """Unknown keywords do not change that."""
    parameters = {"type": "object", "x-order": 1, "$defs": {"Any": {"type": "object"}}, **root}
    offered = [{"function": {"name": "f", "parameters": parameters, "strict": strict}}]
    for name in FORMS.keys() - {"lfm2-json", "lfm2.5"}:  # "lfm2" has their grammar.
        source = FORMS[name]
        form, call = form_of(source), written_by(source, ("f", {"n": "a"}), tools=offered)
        assert form is not None and accepts(form(offered).grammar(), call), name


@pytest.mark.parametrize("form", KINDS)
def test_a_text_next_to_a_list_does_not_break_the_limits_of_the_list(form: type[CallForm]) -> None:
    """With tags, a text in brackets would be read as a list. One item is always unique."""
    listed = {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 1}
    grammar = form(tools({"anyOf": [{"type": "string"}, listed]}, strict=True)).grammar()
    values: list[Any] = ["a", "a [1]", ["a"], [], [1]]
    assert [accepts(grammar, written(form, one)) for one in values] == 4 * [True] + [False]


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date", "2026-02-28", "2026-13-28"),
        ("time", "23:59:60.5+01:30", "24:00:00Z"),
        ("date-time", "2026-02-28T12:00:00Z", "2026-02-28 12:00:00"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567e89b12d3a456426614174000"),
        ("ipv4", "127.0.0.1", "127.0.0.256"),
    ],
)
def test_formats_of_strict_tools_are_enforced(
    form: type[CallForm], name: str, right: str, wrong: str
) -> None:
    grammar = form(tools({"type": "string", "format": name}, strict=True)).grammar()
    assert [accepts(grammar, written(form, one)) for one in (right, wrong)] == [True, False]


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        (USUAL["set"], "uniqueItems"),
        (USUAL["email"] | {"format": "uuid"}, "pattern"),
        (USUAL["word"], "pattern"),
        (USUAL["choice"], "oneOf"),
        (USUAL["other"], "if"),
        ({"type": "string", "format": "color"}, "format"),
        ({"type": "object", "propertyNames": {"minLength": 2}}, "propertyNames"),
    ],
)
def test_a_strict_tool_is_refused_by_the_name_of_the_keyword(
    form: type[CallForm], schema: Any, keyword: str
) -> None:
    with pytest.raises(GrammarError, match=f"tool 'f'.*['\"]{keyword}['\"]"):
        make_matcher(llguidance, vocabulary(), form(tools(schema, strict=True)).grammar())


@pytest.mark.parametrize(
    ("root", "keyword"),
    [
        ({"minProperties": 1}, "minProperties"),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "anyOf"),
        ({"additionalProperties": {"type": "integer"}}, "additionalProperties"),
        ({"required": ["c"]}, "required"),
        (
            {"properties": {}, "patternProperties": {"^a": {}}, "required": ["b"]},
            "patternProperties",
        ),
    ],
)
def test_keywords_of_all_arguments_are_enforced_or_refused(
    root: dict[str, Any], keyword: str
) -> None:
    """In the form with tags, which has no place for them."""
    named = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    parameters = {"type": "object", "properties": named, **root}
    with pytest.raises(GrammarError, match=f"'{keyword}' of the arguments cannot be enforced"):
        Xml([{"function": {"name": "f", "parameters": parameters, "strict": True}}]).grammar()
    make_matcher(
        llguidance,
        vocabulary(),
        Xml([{"function": {"name": "f", "parameters": parameters}}]).grammar(),
    )
    same = {"$ref": "#/$defs/Root", "$defs": {"Root": {"type": "object", "properties": named}}}
    grammar = Xml([{"function": {"name": "f", "parameters": same, "strict": True}}]).grammar()
    call = "<tool_call>\n<function=f>\n<parameter=b>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert [accepts(grammar, call.format(value)) for value in ("5", "x")] == [True, False]
