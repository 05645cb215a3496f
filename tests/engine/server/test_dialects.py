"""Rules that hold alike in chat completions, responses and messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from .conftest import ServeAnswer
from .dialects import BONN, CHAT, DIALECT, DIALECTS, STREAMED, TOOL, Dialect
from .test_tools import HERMES_CALL, QWEN_XML, XML_CALL

FORM = pytest.mark.parametrize(
    ("template", "call", "opening"),
    [(None, HERMES_CALL, "<think>\n"), (QWEN_XML, XML_CALL, "")],
    ids=["hermes", "xml"],
)


@DIALECT
@FORM
def test_reasoning_text_and_calls_agree_whole_and_streamed(
    serve_answer: ServeAnswer, dialect: Dialect, template: str | None, call: str, opening: str
) -> None:
    live = serve_answer(f"{opening}Hm.\n</think>\n\nLook.\n{call}\n{call}", template)
    usage = {"stream_options": {"include_usage": True}} if "chat" in dialect.path else {}
    whole = dialect.ask(live, tools=[TOOL])
    assert (whole.reasoning, whole.text, whole.reason) == ("Hm.", "Look.", "call")
    assert whole.calls == [("weather", BONN)] * 2 and whole.warning is None
    assert whole.num_thought == len("Hm.\n</think>") + (len(">\n") if opening else 0)
    assert dialect.ask(live, stream=True, tools=[TOOL], **usage) == whole


@DIALECT
@FORM
def test_next_turn_accepts_the_returned_answer_and_has_its_prompt(
    serve_answer: ServeAnswer, dialect: Dialect, template: str | None, call: str, opening: str
) -> None:
    """The template gets the reasoning, the call and the result."""
    live = serve_answer(f"{opening}Hm.</think>Now.\n{call}", template)
    answer = dialect.ask(live, tools=[TOOL])
    chat = [*CHAT, *answer.turn, *dialect.results(answer, "dry")]
    function = {"name": "weather", "arguments": json.dumps(BONN)}
    same = [
        *CHAT,
        {
            "role": "assistant",
            "content": "Now.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "dry"},
    ]
    tools = [{"type": "function", "function": TOOL}]
    tokens = live.post("/tokenize", {"messages": same, "tools": tools}).json()["tokens"]
    prompt = live.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert call in prompt and "dry" in prompt
    later = serve_answer("Dry.</think>It is." if template else "It is.", template)
    assert dialect.ask(later, chat=chat, tools=[TOOL]).num_prompt == len(tokens)


@DIALECT
@STREAMED
@pytest.mark.parametrize(
    ("limits", "reason"), [({"stop": "Bonn"}, "stop"), ({"limit": 60}, "length")]
)
@pytest.mark.parametrize("choice", [None, "required"])
def test_truncated_call_is_text_with_a_warning(
    serve_answer: ServeAnswer,
    dialect: Dialect,
    choice: str | None,
    limits: dict[str, Any],
    reason: str,
    stream: bool,
) -> None:
    if choice:
        pytest.importorskip("llguidance")
    if "stop" in limits and dialect.path.endswith("responses"):
        pytest.skip("this dialect has no stop strings")
    live = serve_answer(HERMES_CALL)
    answer = dialect.ask(live, stream=stream, tools=[TOOL], choice=choice, **limits)
    assert answer.reason == reason and not answer.calls
    assert answer.text and HERMES_CALL.startswith(answer.text)
    assert answer.warning and "breaks off" in answer.warning


@DIALECT
@pytest.mark.parametrize("num_more", [0, 4], ids=["at the end", "in the next call"])
@pytest.mark.parametrize("choice", [None, "required"])
def test_limit_after_a_complete_call_keeps_the_call(
    serve_answer: ServeAnswer, dialect: Dialect, choice: str | None, num_more: int
) -> None:
    """An agent loop that repeats on the reason "call" continues. A truncated next call is
    dropped."""
    if choice:
        pytest.importorskip("llguidance")
    live = serve_answer(f"{HERMES_CALL}\n{HERMES_CALL}")
    limit = len(HERMES_CALL) + num_more
    answer = dialect.ask(live, tools=[TOOL], choice=choice, limit=limit)
    assert answer.calls == [("weather", BONN)]
    assert (answer.reason == "length") == bool(num_more)


@DIALECT
@pytest.mark.parametrize(
    ("tools", "choice", "call"),
    [
        ([TOOL], None, '{"name": "weather", "arguments": {"city": }}'),
        ([TOOL], None, '{"name": "weather", "arguments": {"city": "Bonn}}'),
        ([TOOL], None, '{"name": "rm", "arguments": {}}'),
        ([TOOL], None, '{"name": "weather", "arguments": {"days": 1e999}}'),
        ([TOOL], "none", json.dumps({"name": "weather", "arguments": BONN})),
        ([], None, "plain"),
        (None, None, json.dumps({"name": "weather", "arguments": BONN})),
    ],
    ids=["no JSON", "open", "not offered", "infinite", "not allowed", "empty", "no tools"],
)
def test_text_that_is_no_call_stays_text(
    serve_answer: ServeAnswer,
    dialect: Dialect,
    tools: list[dict[str, Any]] | None,
    choice: str | None,
    call: str,
) -> None:
    script = f"Well.\n<tool_call>\n{call}\n</tool_call>"
    live = serve_answer(script)
    whole = dialect.ask(live, tools=tools, choice=choice)
    assert (whole.text, whole.calls, whole.reason) == (script, [], "stop")
    assert bool(whole.warning) == bool(tools)
    streamed = dialect.ask(live, stream=True, tools=tools, choice=choice)
    counts = {"num_written": whole.num_written, "num_thought": whole.num_thought}
    assert replace(streamed, **counts) == whole


@DIALECT
@STREAMED
@FORM
def test_stop_strings_and_tokens_count_behind_the_reasoning(
    serve_answer: ServeAnswer,
    dialect: Dialect,
    template: str | None,
    call: str,
    opening: str,
    stream: bool,
) -> None:
    """Also those in the white space behind it, where evaluations would get empty answers."""
    live = serve_answer(
        f"{opening}Hm. Question: so.\n\nQ.\n</think>\n\nYes. Question: no", template
    )
    options: list[dict[str, Any]] = [{"stop": "Question:"}]
    if "chat" in dialect.path:
        options += [{"stop": ["\n\n", "Question:"]}, {"stop_token_ids": [ord("Q")]}]
    if dialect.path.endswith("responses"):
        pytest.skip("this dialect has no stop strings")
    for one in options:
        answer = dialect.ask(live, stream=stream, **one)
        assert (answer.text.rstrip(), answer.reason) == ("Yes.", "stop")
        assert answer.reasoning == "Hm. Question: so.\n\nQ."
    if "chat" in dialect.path:
        whole = dialect.ask(live, stream=stream)
        for one in ({"stop": "</think>"}, {"stop_token_ids": [ord(">")]}):
            answer = dialect.ask(live, stream=stream, **one)
            assert (answer.text, answer.reason) == ("", "stop")
            assert answer.reasoning == whole.reasoning and whole.text == "Yes. Question: no"


def test_stop_strings_of_text_completions_count_behind_the_reasoning(
    serve_answer: ServeAnswer,
) -> None:
    """If the prompt opens it, or the answer does, of a model that writes reasoning."""
    live = serve_answer("Q so.\n</think>\n\nYes. Q no", QWEN_XML)

    def ask(prompt: str) -> str:
        body = {"prompt": prompt, "stop": "Q", "max_tokens": 99}
        text: str = live.post("/v1/completions", body).json()["choices"][0]["text"]
        return text

    assert ask("Why? <think>\n") == "Q so.\n</think>\n\nYes. "
    assert ask("Why?") == ""
    serve_answer("<think>Q so.\n</think>\n\nYes. Q no", QWEN_XML)
    assert ask("Why?") == "<think>Q so.\n</think>\n\nYes. "
    serve_answer("<think>Q so.\n</think>\n\nYes. Q no", "{{ messages[0].content }}")
    assert ask("Why?") == "<think>"


def test_continued_reasoning_has_its_budget_and_no_stop_strings(serve_answer: ServeAnswer) -> None:
    """The last tokens of the prompt do not show that it ends inside reasoning."""
    live = serve_answer("abcdefgh</think>ok abc")
    chat = [*CHAT, {"role": "assistant", "content": "<think>\n" + "I wonder. " * 9}]
    body = {"messages": chat, "continue_final_message": True, "max_tokens": 40, "stop": "b"}
    for budget, said in ((3, "abc"), (99, "abcdefgh")):
        answer = live.post("/v1/chat/completions", body | {"thinking_token_budget": budget}).json()
        [choice] = answer["choices"]
        assert choice["message"]["reasoning_content"] == said


@DIALECT
@STREAMED
@FORM
@pytest.mark.parametrize("end", ["", "\n</think>\n\n"])
def test_a_call_at_the_end_of_the_reasoning_is_made(
    serve_answer: ServeAnswer,
    dialect: Dialect,
    template: str | None,
    call: str,
    opening: str,
    end: str,
    stream: bool,
) -> None:
    live = serve_answer(f"{opening}Hm.\n{call}{end}", template)
    answer = dialect.ask(live, stream=stream, tools=[TOOL])
    assert (answer.calls, answer.reason) == ([("weather", BONN)], "call")
    assert (answer.reasoning, answer.text, answer.warning) == ("Hm.", "", None)
    if not stream:  # The agent goes on.
        chat = [*CHAT, *answer.turn, *dialect.results(answer, "dry")]
        assert dialect.ask(live, chat=chat, tools=[TOOL]).num_prompt > answer.num_prompt
    other = dialect.ask(live, stream=stream, tools=[TOOL | {"name": "other"}])
    assert not other.calls and other.warning and "left in the reasoning" in other.warning


PARTS = """\
{% macro text(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ '|' if not loop.first }}
{{- p.text }}{% endfor %}{% endif %}{% endmacro %}"""
FIRST_ONLY = """\
{%- for m in messages %}{% if m.role == 'system' and not loop.first %}
{{- raise_exception('System message must be at the beginning.') }}{% endif %}"""
WRITTEN = "<{{ m.role[0] }}:{{ m.content }}>{% endfor %}"
ANY_ORDER = "{%- for m in messages %}"
TEMPLATES = {
    "first only": FIRST_ONLY + WRITTEN,
    "any order": ANY_ORDER + WRITTEN,
    "developer": ANY_ORDER + "{# developer #}" + WRITTEN,
    "silent": ANY_ORDER
    + WRITTEN.replace(
        "{{ m.content", "{{ '' if m.role == 'system' and not loop.first else m.content"
    ),
    "parts": PARTS + FIRST_ONLY + WRITTEN.replace("m.content", "text(m.content)"),
}
S, U, A, D = (
    {"role": role, "content": [{"type": "text", "text": role[:2]}, {"type": "text", "text": "+"}]}
    for role in ("system", "user", "assistant", "developer")
)


@pytest.mark.parametrize(
    ("name", "chat", "expected"),
    [
        ("first only", [S, S, U], "<s:sy\n+\n\nsy\n+><u:us\n+>"),
        ("first only", [S, U, A, S, U], "<s:sy\n+><u:us\n+><a:as\n+><u:sy\n+><u:us\n+>"),
        ("first only", [S, D, U], "<s:sy\n+\n\nde\n+><u:us\n+>"),
        ("first only", [U, A, D, U], "<u:us\n+><a:as\n+><u:de\n+><u:us\n+>"),
        ("any order", [S, D, U], "<s:sy\n+><s:de\n+><u:us\n+>"),
        ("any order", [U, A, S, U], "<u:us\n+><a:as\n+><s:sy\n+><u:us\n+>"),
        ("developer", [D, U], "<d:de\n+><u:us\n+>"),
        ("silent", [S, D, U], "<s:sy\n+\n\nde\n+><u:us\n+>"),
        ("silent", [U, A, S, U], "<u:us\n+><a:as\n+><u:sy\n+><u:us\n+>"),
        ("parts", [D, U], "<s:de|+><u:us|+>"),
        ("parts", [S, S, U], "<s:sy|+\n\nsy|+><u:us|+>"),
        ("parts", [U, A, U], "<u:us|+><a:as|+><u:us|+>"),
    ],
)
def test_all_endpoints_have_one_rule_for_system_messages_and_parts(
    serve_answer: ServeAnswer, name: str, chat: list[dict[str, Any]], expected: str
) -> None:
    """The template decides: what it rejects or leaves out is joined, or said by the user."""
    live = serve_answer("x", TEMPLATES[name])
    tokens = live.post("/tokenize", {"messages": chat}).json()["tokens"]
    assert live.post("/detokenize", {"tokens": tokens}).json()["prompt"] == expected
    items = [
        one | {"content": [part | {"type": "input_text"} for part in one["content"]]}
        for one in chat
    ]
    answers = [
        live.post("/v1/chat/completions", {"messages": chat, "max_tokens": 1}),
        live.post("/v1/responses", {"input": items, "max_output_tokens": 1}),
    ]
    counts = [next(iter(one.json()["usage"].values())) for one in answers]
    if D not in chat:
        body = {"model": "builtin", "messages": chat}
        count = live.post("/v1/messages/count_tokens", body).json()["input_tokens"]
        usage = live.post("/v1/messages", body | {"max_tokens": 1}).json()["usage"]
        read = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        counts += [count, sum(usage[one] for one in read)]
    assert counts == [len(tokens)] * len(counts)


def test_marks_of_parts_stay_in_joined_messages(serve_answer: ServeAnswer) -> None:
    live = serve_answer("x", TEMPLATES["first only"])
    marked = {"type": "text", "cache_control": {"type": "ephemeral"}}
    chat = [
        {"role": "system", "content": [marked | {"text": "A" * 100}]},
        {"role": "system", "content": [marked | {"text": "B" * 9}, {"type": "text", "text": "C"}]},
        {"role": "user", "content": "D"},
    ]
    marks = live.post("/tokenize", {"messages": chat}).json()["boundaries"]
    assert {len("<s:") + 100, len("<s:") + 100 + len("\n\n") + 9} <= {*marks}


STRICT = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Bonn", "Ulm"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "deep": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WRONG_CALLS = {
    None: 'Sure.\n<tool_call>\n{"name": "wether", '
    '"arguments": {"city": "Rome", "x": [], "days": 77}}',
    QWEN_XML: "<tool_call>\n<function=wether>\n<parameter=town>\nRome\n</parameter>\n"
    "<parameter=days>\n77\n</parameter>\n</function>\n</tool_call>",
}
"""Calls that break the schema, in both forms: wrong tool, names and values."""


@DIALECT
@pytest.mark.parametrize("template", [None, QWEN_XML], ids=["hermes", "xml"])
def test_strict_tool_call_follows_its_schema(
    serve_answer: ServeAnswer, dialect: Dialect, template: str | None
) -> None:
    """The schema applies from the start of the call on. Without ``strict``, the same answer has no
    call. A schema that cannot be followed is refused."""
    pytest.importorskip("llguidance")
    reasoning = "Hm. <tool_call> {</think>" if template else "<think>a <tool_call> {</think>"
    live = serve_answer(f"{reasoning}Well, < 5.\n{WRONG_CALLS[template]}", template)
    for strict in (True, False):
        answer = dialect.ask(
            live, tools=[{"name": "weather", "parameters": STRICT, "strict": strict}]
        )
        assert answer.text.startswith("Well, < 5.")
        if not strict:
            assert not answer.calls and "wether" in answer.text
            continue
        [(name, arguments)] = answer.calls[:1]
        assert name == "weather" and arguments["city"] in ("Bonn", "Ulm")
        assert 1 <= arguments["days"] <= 9 and set(arguments) <= {"city", "days", "deep"}
    bad = {"name": "f", "strict": True, "parameters": {"properties": {"a": {"pattern": "(a"}}}}
    refused = live.post(dialect.path, dialect.body(CHAT, tools=[bad]))
    assert refused.status_code == 400 and "'f'" in refused.json()["error"]["message"]
    no_tag = live.post(dialect.path, dialect.body(CHAT, tools=[{"name": "a<b", "parameters": {}}]))
    assert no_tag.status_code == (400 if template else 200)


@DIALECT
@FORM
def test_a_required_call_of_a_tool_with_any_schema_is_served(
    serve_answer: ServeAnswer, dialect: Dialect, template: str | None, call: str, opening: str
) -> None:
    """Limits that cannot be enforced are dropped, and the whole schema if none of it can be."""
    pytest.importorskip("llguidance")
    city = {"type": "string", "pattern": r"^(?!\.)[A-Z]", "format": "city"}
    properties = {"city": city, "days": {"type": "integer"}}
    end = "</think>" if template else ""
    live = serve_answer(f"{end}{call}", template)
    for more in ({}, {"days": {"type": "integer", "minimum": 9, "maximum": 1}}):
        named = {"properties": properties | more, "required": ["days"]}
        tool = {"name": "weather", "parameters": {"type": "object", **named}}
        answer = dialect.ask(live, tools=[tool], choice="required")
        assert answer.calls == [("weather", BONN)]


@DIALECT
def test_reasoning_can_be_switched(serve_answer: ServeAnswer, dialect: Dialect) -> None:
    live = serve_answer("a</think>b")
    on, off = (dialect.ask(live, effort=effort) for effort in ("low", "none"))
    assert (on.reasoning, on.text) == ("a", "b")
    assert not off.reasoning and "b" in off.text


NULLS = {"toolset_name": None, "x": None}
BLOCK = {"type": "text", "text": "x"}
NESTED: list[tuple[Dialect, str, Callable[[dict[str, Any]], Any]]] = [
    *((one, f"{one.field}.0", lambda more: [CHAT[0] | more]) for one in DIALECTS[1:]),
    *(
        (one, f"{one.field}.0.content.0", lambda more: [CHAT[0] | {"content": [BLOCK | more]}])
        for one in (DIALECTS[0], DIALECTS[2])
    ),
    (DIALECTS[0], "response_format", lambda more: {"type": "text"} | more),
    (DIALECTS[1], "text.format", lambda more: {"format": {"type": "text"} | more}),
    (DIALECTS[2], "thinking", lambda more: {"type": "disabled"} | more),
]


@pytest.mark.parametrize(
    ("dialect", "place", "make"), NESTED, ids=[f"{one.path} {place}" for one, place, _ in NESTED]
)
def test_null_counts_as_absent_at_every_depth(
    serve_answer: ServeAnswer, dialect: Dialect, place: str, make: Any
) -> None:
    """Clients send answers back with every field. Unknown options are refused, unknown fields of
    messages are not."""
    live, name = serve_answer("x"), place.split(".")[0]
    accepted = live.post(dialect.path, dialect.body(CHAT) | {name: make(NULLS)})
    assert accepted.status_code == 200, accepted.text
    unknown = live.post(dialect.path, dialect.body(CHAT) | {name: make({"toolset_name": "x"})})
    is_option = name != dialect.field
    assert unknown.status_code == (400 if is_option else 200)
    assert not is_option or f"{place}.toolset_name" in unknown.json()["error"]["message"]


@DIALECT
def test_nulls_of_a_returned_answer_do_not_reach_the_template(
    serve_answer: ServeAnswer, dialect: Dialect
) -> None:
    live = serve_answer(f"<think>Hm.</think>Look.\n{HERMES_CALL}", then="Dry.")
    answer = dialect.ask(live, tools=[TOOL])
    result = dialect.results(answer, "dry")
    first = answer.turn[0]
    nulls = [first | NULLS] if "chat" in dialect.path else answer.turn
    if isinstance(first.get("content"), list) and dialect.path.endswith("messages"):
        nulls = [first | {"content": [block | NULLS for block in first["content"]]}]
    elif dialect.path.endswith("responses"):
        nulls = [item | NULLS for item in answer.turn]
    same, other = (
        dialect.ask(live, chat=[*CHAT, *turn, *result], tools=[TOOL]).num_prompt
        for turn in (answer.turn, nulls)
    )
    assert same == other > 0
