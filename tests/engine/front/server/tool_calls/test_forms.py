"""Forms of calls of the supported families: recognised, read, and enforced as templates write
them."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engine.front.server.tool_calls.form import form_of, forms, prepared, words_of
from engine.front.server.tool_calls.parameters import Parameters
from engine.front.server.tool_calls.tags import Xml
from engine.models import families
from engine.text.grammar import Grammar, GrammarError
from engine.text.tokenizer import BackendTokenizer, ChatTemplate

from .templates import FORMS, KIMI, LFM2, LFM25, TEMPLATES
from .templates import written as written_by
from .test_answers import OTHERS, parts_of, read
from .test_strict_tools import accepts

MODELS = Path(__file__).parents[5] / "docs/engine/models.md"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "sure": {"type": ["boolean", "null"]},
        "deep": {"type": "object", "additionalProperties": {"type": "number"}},
    },
    "required": ["days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "stop", "strict": True}},
]


written = partial(written_by, tools=TOOLS)
WRITTEN = [name for name in FORMS if name != "lfm2-json"]
"""Templates in the forms of grammars. LFM2's also reads a list of objects."""


def test_each_family_has_the_forms_of_the_table() -> None:
    """The table of families in the documentation names the form of each template."""
    assert TEMPLATES.keys() == families().keys()
    rows = re.findall(r"^\| (`.*`) \| ([^|]*) \| .*\|$", MODELS.read_text(), re.MULTILINE)
    told = {name: said for names, said in rows for name in re.findall(r"`(\w+)`", names)}
    for model_type, sources in TEMPLATES.items():
        found = [form_of(source) for source in sources]
        names = dict.fromkeys(form.NAME for form in found if form is not None)
        assert None not in found and told[model_type] == ", ".join(names), model_type


def test_each_form_has_a_template() -> None:
    assert {form_of(source) for source in FORMS.values()} == {*forms().values()}


def test_a_template_without_a_sign_has_no_form() -> None:
    assert form_of("{{ tools }}") is None and form_of("") is None


@pytest.mark.parametrize("name", FORMS)
def test_a_call_that_is_cut_breaks_off_wherever_it_is_cut(name: str) -> None:
    form = form_of(FORMS[name])
    assert form is not None
    text, num_broken = written(FORMS[name], ("weather", {"city": "Bonn", "days": 3})), 0
    for end in range(1, len(text) + 1):
        reader = form(TOOLS, "required").reader(thinks=True)
        *_, calls = parts_of([*reader.push(text[:end]), *reader.flush(is_cut=True)])
        if not calls:
            num_broken += 1
            assert "breaks off" in reader.warning  # type: ignore[attr-defined]
    assert len(form.MARKS[0]) < num_broken < len(text)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_required_call_has_the_form_of_the_template(name: str) -> None:
    """The grammar admits exactly what the template writes for arguments of the schema."""
    form = form_of(FORMS[name])
    assert form is not None
    grammar = form(TOOLS).grammar()
    right = [{"days": 1}, {"city": 'é "x" it\'s', "days": -2, "deep": {"a": 1.5}}, {"days": 0}]
    wrong = [{}, {"days": "x"}, {"days": 1, "more": 1}, {"days": 1, "deep": {"a": "b"}}]
    if name == "lfm2.5":  # Strings are written between quotes as they are.
        right[1].pop("city")
    if name in ("lfm2", "lfm2.5", "olmo", "hermes"):
        right += [{"days": 1, "sure": value} for value in (True, None)]
    for arguments in right:
        assert accepts(grammar, written(FORMS[name], ("weather", arguments))), arguments
    for arguments in wrong:
        assert not accepts(grammar, written(FORMS[name], ("weather", arguments))), arguments
    both = written(FORMS[name], ("weather", {"days": 1}), ("stop", {}))
    assert accepts(grammar, both) and not accepts(form(TOOLS, None, True).grammar(), both)
    named = form(TOOLS).grammar("stop")
    assert accepts(named, written(FORMS[name], ("stop", {}))) and not accepts(named, both)
    assert not accepts(named, written(FORMS[name], ("weather", {"days": 1})))
    text = form(TOOLS).grammar(text=lambda: Grammar.of_choices(["No."]))
    assert accepts(text, "No.") and accepts(text, both) and not accepts(text, "Yes.")


@pytest.mark.parametrize("name", WRITTEN)
def test_strict_calls_are_enforced_in_a_free_answer(name: str) -> None:
    form = form_of(FORMS[name])
    assert form is not None
    grammar = form(TOOLS).free_grammar(may_think=True)
    right, wrong = (written(FORMS[name], ("weather", {"days": days})) for days in (1, "x"))
    both = written(FORMS[name], ("stop", {}), ("weather", {"days": 1}))
    for text in ("", "Words.", right, f"Look: {right} so.", both, f"<think>{wrong}</think>{right}"):
        assert accepts(grammar, text), text
    for text in (wrong, f"Look: {wrong}", f"{right}{wrong}"):
        assert not accepts(grammar, text), text


CASES: dict[str, list[tuple[str, tuple[str, str, list[tuple[str, str]]]]]] = {
    "Jamba": [
        ('<tool_calls>[{"name": "f", "arguments": {}}]', ("", "", [("f", "{}")])),
        ("<tool_calls>[]</tool_calls>", ("", "<tool_calls>[]</tool_calls>", [])),
        ('<tool_calls>{"name": "f"}</tool_calls>', ("", '<tool_calls>{"name": "f"}</tool_calls>', [])),
        ('<tool_calls>[{"name": "f"}, {"name": "rm"}]</tool_calls>', ("", '<tool_calls>[{"name": "f"}, {"name": "rm"}]</tool_calls>', [])),
        ('<tool_calls>[{"name": "f"} {"name": "g"}]</tool_calls> so', ("", '<tool_calls>[{"name": "f"} {"name": "g"}]</tool_calls> so', [])),
        ('<tool_calls>[{"name": "f"}, {"na', ("", '<tool_calls>[{"name": "f"}, {"na', [])),
        ('a <tool_calls> [ {"name": "f"} , {"name": "g"} ] </tool_calls> b', ("", "a b", [("f", "{}"), ("g", "{}")])),
    ],
    "Granite list": [
        ('<|tool_call|>[{"name": "f", "arguments": {"a": [[]]}}] b', ("", "b", [("f", '{"a": [[]]}')])),
        ("<|tool_call|>so", ("", "<|tool_call|>so", [])),
    ],
    "Kimi": [
        ('<|tool_call_begin|>f:3<|tool_call_argument_begin|>{"a": "<|tool_call_end|>"}<|tool_call_end|>', ("", "", [("f", '{"a": "<|tool_call_end|>"}')])),
        ("<|tool_call_begin|>f<|tool_call_argument_begin|>{}", ("", "", [("f", "{}")])),
        ("<|tool_call_begin|>f<|tool_call_argument_begin|>[]<|tool_call_end|>", ("", "<|tool_call_begin|>f<|tool_call_argument_begin|>[]<|tool_call_end|>", [])),
        ("<|tool_call_begin|>f g<|tool_call_argument_begin|>{}<|tool_call_end|>", ("", "<|tool_call_begin|>f g<|tool_call_argument_begin|>{}<|tool_call_end|>", [])),
    ],
    "LFM2": [
        (r"<|tool_call_start|>[f(a='it\'s\n', b='\d')]<|tool_call_end|>", ("", "", [("f", json.dumps({"a": "it's\n", "b": r"\d"}))])),
        ("<|tool_call_start|>[f(a={'k': [True, None, (1, 'x)]')]})]<|tool_call_end|> so", ("", "so", [("f", '{"a": {"k": [true, null, [1, "x)]"]]}}')])),
        ("<|tool_call_start|>f(), g( b = -1.5e3 )<|tool_call_end|>", ("", "", [("f", "{}"), ("g", '{"b": -1500.0}')])),
        ("<|tool_call_start|>[f(a=1)]", ("", "", [("f", '{"a": 1}')])),
        ("<|tool_call_start|>[f(1)]<|tool_call_end|> so", ("", "<|tool_call_start|>[f(1)]<|tool_call_end|> so", [])),
        ("<|tool_call_start|>[f(a=x)]<|tool_call_end|>", ("", "<|tool_call_start|>[f(a=x)]<|tool_call_end|>", [])),
        ("<|tool_call_start|>[f(a='x]<|tool_call_end|>", ("", "<|tool_call_start|>[f(a='x]<|tool_call_end|>", [])),
        ("<think>hm <|tool_call_start|>[f()]<|tool_call_end|>", ("hm", "", [("f", "{}")])),
        ("<think>hm <|tool_call_start|>[f()]<|tool_call_end|> or</think>No", ("hm <|tool_call_start|>[f()]<|tool_call_end|> or", "No", [])),
    ],
    "Olmo": [
        ('<function_calls>\nf(a="x\\u00e9", b=null)\ng(c=true)\n</function_calls> so', ("", "so", [("f", '{"a": "xé", "b": null}'), ("g", '{"c": true}')])),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "expected"), [(name, *case) for name, cases in CASES.items() for case in cases]
)
def test_calls_are_read_the_same_in_any_pieces(
    name: str, text: str, expected: tuple[str, str, list[tuple[str, str]]]
) -> None:
    [form] = [one for one in OTHERS if name == one.NAME]
    for size in (None, 1, 2, 5):
        assert read(form, text, size) == expected


@pytest.mark.parametrize("form", OTHERS, ids=lambda form: form.NAME)
def test_truncated_calls_are_text(form: Any) -> None:
    """Nothing of a list that breaks off is called, except for complete calls with own marks."""
    has_own_marks = any(mark in form.BETWEEN for mark in form.MARKS)
    source = next(text for text in FORMS.values() if form_of(text) is type(form))
    text = written(source, ("f", {"a": "'x' ]"}), ("g", {}))
    for cut in range(len(text)):
        _, said, calls = read(form, text[:cut], is_cut=True)
        assert not calls or has_own_marks or said == "", (text[:cut], said, calls)
        assert calls or said.rstrip() == text[:cut].rstrip()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("form", OTHERS, ids=lambda form: form.NAME)
def test_broken_calls_are_read_in_linear_time(form: Any) -> None:
    pieces = {"Kimi": form.BEGIN + "f", "LFM2": form.BEGIN + "f(a='", "Olmo": form.BEGIN + "f(a='"}
    text = pieces.get(form.NAME, form.BEGIN + '{\\"') * 3_000
    assert read(form, text, is_cut=True)[1] == text
    for begin in ("f()", "f(a='x'", "f(a=[1", "", '{"name": "f"}'):
        text = f"{form.BEGIN}{begin}" + "\n" * 50_000 + "!"
        assert read(form, text + form.ENDS[0])[2] == []


@pytest.mark.parametrize("form", [one for one in OTHERS if one.NAME in ("LFM2", "Olmo", "Kimi")])
def test_names_that_cannot_be_written_are_refused(form: Any) -> None:
    with pytest.raises(GrammarError, match="cannot be written"):
        type(form)([{"function": {"name": "a b<"}}]).grammar()


def test_templates_that_leave_calls_out_get_them_as_text() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": [True], "b": None, "c": "é"}}}
    chat = [{"role": "assistant", "content": "So", "tool_calls": [call]}]
    [message] = prepared(chat, ChatTemplate(LFM2))
    calls = '<|tool_call_start|>[f(a=[true], b=None, c="é")]<|tool_call_end|>'
    assert message == {"role": "assistant", "content": f"So{calls}"}
    assert prepared(chat, ChatTemplate(LFM25)) == chat


def test_results_name_calls_as_the_model_numbered_them() -> None:
    """A later call goes on counting; a result of an unknown call keeps its id."""
    made = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": {}}}
        for n in "ab"
    ]
    chat = []
    for call in made:
        chat += [{"role": "assistant", "content": "", "tool_calls": [call]}]
        chat += [{"role": "tool", "tool_call_id": call["id"], "content": "x"}]
    chat += [{"role": "tool", "tool_call_id": "other", "content": "x"}]
    first, result, second, last, unknown = prepared(chat, ChatTemplate(KIMI))
    for number, message in enumerate((first, second)):
        assert message["tool_calls"] == [made[number] | {"id": f"functions.f:{number}"}]
    named = [message["tool_call_id"] for message in (result, last, unknown)]
    assert named == ["functions.f:0", "functions.f:1", "other"]


def test_a_limit_that_is_no_object_is_ignored() -> None:
    """Schemas of clients are not checked against the standard."""
    form = Xml([{"function": {"name": "f", "parameters": {"patternProperties": 5}}}])
    text = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
    assert read(form, text)[2] == [("f", '{"x": "1"}')]


def test_equal_keywords_do_not_hide_different_ones() -> None:
    """In any order of their names."""
    first = {"minimum": 1, "maximum": 9}
    for name in first:
        found = Parameters({}).branches({"allOf": [first, first | {name: 5}]})
        assert found == [first | {"allOf": [{name: 5}]}]


def test_the_pattern_is_the_first_limit_that_is_refused() -> None:
    schema = {"type": "string", "not": {"const": "a"}, "pattern": "(?=a)b"}
    tool = {"name": "f", "strict": True, "parameters": {"properties": {"x": schema}}}
    with pytest.raises(GrammarError, match="'pattern' of 'x' cannot be enforced"):
        Xml([{"function": tool}]).grammar()


def test_templates_without_a_known_form_are_named() -> None:
    found = words_of(ChatTemplate("{{ tools }}"))
    assert found == "not supported: the chat template has no known form"


def test_marks_of_calls_are_part_of_the_text() -> None:
    """Vocabularies list them as special tokens, which are not shown otherwise. The toy's are none."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    marks = [
        mark
        for form in forms().values()
        for mark in (*form.MARKS, *form.ENDS, form.CLOSE)
        if "call" in mark.lower()
    ]
    backend.add_special_tokens([*dict.fromkeys(marks), "<|im_end|>", "<|tool_response_start|>"])
    tokenizer = BackendTokenizer(backend, {})
    text = "a".join(marks)
    ids = tokenizer.encode(f"{text}<|im_end|><|tool_response_start|>")
    assert tokenizer.decode(ids) == text and len(ids) == 2 * len(marks) + 1


CODE = (
    "plt.plot(x, 'r', label='a')", 'print("a", end="")', "open('f', mode='w')", "it's, n=1",
    "fetch('/x', {method: 'POST'}).then(r => r)", 'const a = "x", b = "y";', "f(`${a}`, b='c');",
    'printf("%d", n = 1);', "char c = 'x', d = ')';", "fn f<'a, T>(x: &'a str) -> &'a str { x }",
    "update t set a = 'x', b = 'y' where c = ''", "<a href='x', class='y'>it's</a>", '<p id="x">',
    """psql -c "select 'a', b='c'" | awk -F',' '{print $1}'""", "run(code='x', name='y')",
)  # fmt: skip
"""Lines of Python, JavaScript, C, Rust, SQL, HTML and shell with quotes and commas."""
RAW = ("lfm2'", 'lfm2"', "olmo'", 'olmo"')
"""Forms whose quotes are not escaped, with the quote."""


@pytest.mark.parametrize("name", [*FORMS, *RAW])
@given(st.lists(st.sampled_from(CODE), min_size=1, max_size=4), st.data())
def test_code_is_a_value_in_any_form(name: str, lines: list[str], data: st.DataObject) -> None:
    """The schema, not the code, decides where a value ends; without one there is a warning."""
    wanted: dict[str, Any] = {"code": "\n".join(lines)}
    wanted |= data.draw(st.sampled_from([{}, {"wait_s": 1}]))
    kinds = {"code": {"type": "string"}, "wait_s": {"type": "integer"}}
    schema = data.draw(st.sampled_from([None, {"properties": kinds}]))
    function = {"name": "run"} | ({"parameters": schema} if schema else {})
    tools, template = [{"type": "function", "function": function}], FORMS[name.rstrip("'\"")]
    form = form_of(template)
    assert form is not None
    text = written_by(template, ("run", wanted), tools=tools)
    if name in RAW:
        rest = ", wait_s=1" if "wait_s" in wanted else ""
        text = f"{form.BEGIN}run(code={name[-1]}{wanted['code']}{name[-1]}{rest}){form.END}"
    reader, at, events = form(tools).reader(thinks=False), 0, []
    while at < len(text):
        size = data.draw(st.integers(1, len(text)))
        events += reader.push(text[at : at + size])
        at += size
    *_, calls = parts_of([*events, *reader.flush()])
    warning = reader.warning  # type: ignore[attr-defined]
    if schema is not None:
        assert [json.loads(one) for _, one in calls] == [wanted] and warning is None
    elif calls != [("run", json.dumps(wanted, ensure_ascii=False))]:
        assert warning is not None or (form is Xml and "wait_s" in wanted)  # Its values are texts.


@pytest.mark.parametrize(
    ("inside", "expected", "warned"),
    [
        ("f(a='x', c='y')", {"a": "x", "c": "y"}, "'c' of a call is not in the schema"),
        ("f(a='g('x', b=2)', b=1)", {"a": "g('x', b=2)", "b": 1}, None),
        ("f(a='g('x'), f(b='y')')", {"a": "g('x'), f(b='y')"}, None),
        ("""f(a='''g('x', "y")''', b=1)""", {"a": "g('x', \"y\")", "b": 1}, None),
        ("f(a=f'', b=+7)", {"a": "", "b": 7}, None),
        (r"f(a=r'C:\new', b=1_000)", {"a": r"C:\new", "b": 1000}, None),
        (r"""f(a="x\", b=1", b="y\\")""", {"a": 'x", b=1', "b": "y\\"}, None),
        (r"""f(a="C:\", b="D:\")""", {"a": "C:\\", "b": "D:\\"}, None),
        (r"f(a='x\ty 'z'', b=1)", {"a": "x\ty 'z'", "b": 1}, None),
        ("g(a='it's', c='y')", {"a": "it's", "c": "y"}, "'a' of a call are not escaped"),
    ],
)
def test_quotes_end_a_value_where_the_schema_permits_it(
    inside: str, expected: dict[str, Any] | None, warned: str | None
) -> None:
    schema = {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    functions = {"name": "f", "parameters": schema}, {"name": "g"}
    form = forms()["LFM2"]([{"type": "function", "function": one} for one in functions])
    reader = form.reader(thinks=False)
    *_, calls = parts_of([*reader.push(form.BEGIN + inside + form.END), *reader.flush()])
    assert [json.loads(arguments) for _, arguments in calls] == ([expected] if expected else [])
    warning = reader.warning  # type: ignore[attr-defined]
    assert (warning is None) if warned is None else warned in str(warning)
