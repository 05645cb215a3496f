"""Rules that hold alike in chat completions, responses and messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.front.server.settings import ServerConfig

from .conftest import Live, Serve
from .dialects import BONN, CHAT, DIALECT, DIALECTS, PROMPTS, STREAMED, TOOL, Dialect, prompt
from .test_tools import HERMES_CALL, QWEN_XML, XML_CALL

WITH_STOP = [one for one in DIALECTS if not one.path.endswith("responses")]
"""Dialects with stop strings."""
FORM = pytest.mark.parametrize(
    ("template", "call", "opening"),
    [(None, HERMES_CALL, "<think>\n"), (QWEN_XML, XML_CALL, "")],
    ids=["hermes", "xml"],
)


@DIALECT
@FORM
def test_reasoning_text_and_calls_agree_whole_and_streamed(
    serve_answer: Serve, dialect: Dialect, template: str | None, call: str, opening: str
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
    serve_answer: Serve, dialect: Dialect, template: str | None, call: str, opening: str
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


@pytest.mark.parametrize(
    ("dialect", "limits", "reason"),
    [
        *((one, {"limit": 60}, "length") for one in DIALECTS),
        *((one, {"stop": "Bonn"}, "stop") for one in WITH_STOP),
    ],
)
@STREAMED
@pytest.mark.parametrize("choice", [None, "required"])
def test_truncated_call_is_text_with_a_warning(
    serve_answer: Serve,
    dialect: Dialect,
    choice: str | None,
    limits: dict[str, Any],
    reason: str,
    stream: bool,
) -> None:
    if choice:
        pytest.importorskip("llguidance")
    live = serve_answer(HERMES_CALL)
    answer = dialect.ask(live, stream=stream, tools=[TOOL], choice=choice, **limits)
    assert answer.reason == reason and not answer.calls
    assert answer.text and HERMES_CALL.startswith(answer.text)
    assert answer.warning and "breaks off" in answer.warning


@DIALECT
@pytest.mark.parametrize("num_more", [0, 4], ids=["at the end", "in the next call"])
@pytest.mark.parametrize("choice", [None, "required"])
def test_limit_after_a_complete_call_keeps_the_call(
    serve_answer: Serve, dialect: Dialect, choice: str | None, num_more: int
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
    serve_answer: Serve,
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


@pytest.mark.parametrize("dialect", WITH_STOP, ids=lambda one: one.path)
@STREAMED
@FORM
def test_stop_strings_and_tokens_count_behind_the_reasoning(
    serve_answer: Serve,
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


def test_stop_strings_of_text_completions_count_behind_the_reasoning(serve_answer: Serve) -> None:
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


def test_continued_reasoning_has_its_budget_and_no_stop_strings(serve_answer: Serve) -> None:
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
    serve_answer: Serve,
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
        (
            "first only",
            [S, D, U, A, S, U],
            "<s:sy\n+\n\nde\n+><u:us\n+><a:as\n+><u:sy\n+><u:us\n+>",
        ),
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
    serve_answer: Serve, name: str, chat: list[dict[str, Any]], expected: str
) -> None:
    """The template decides: what it rejects or leaves out is joined, or said by the user. The own
    field of a dialect is a first message."""
    live = serve_answer("x", TEMPLATES[name])
    tokens = prompt(live, "/tokenize", chat)
    assert live.post("/detokenize", {"tokens": tokens}).json()["prompt"] == expected
    items = [
        one | {"content": [part | {"type": "input_text"} for part in one["content"]]}
        for one in chat
    ]
    for path in PROMPTS[1:]:
        if D not in chat or "messages" not in path:
            is_items = path.endswith("responses")
            said = items if is_items else chat
            assert prompt(live, path, said) == len(tokens), path
            if chat[0] is S and name != "parts" and "chat" not in path:
                own = {"instructions": "sy\n+"} if is_items else {"system": S["content"]}
                assert prompt(live, path, said[1:], **own) == len(tokens), path


def test_marks_of_parts_stay_in_joined_messages(serve_answer: Serve) -> None:
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
    serve_answer: Serve, dialect: Dialect, template: str | None
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
    serve_answer: Serve, dialect: Dialect, template: str | None, call: str, opening: str
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
def test_reasoning_can_be_switched(serve_answer: Serve, dialect: Dialect) -> None:
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
    serve_answer: Serve, dialect: Dialect, place: str, make: Any
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
    serve_answer: Serve, dialect: Dialect
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


# --- Histories with one meaning -----------------------------------------------------------------

TEXT = {"type": "text", "text": "Yes."}
CHATS, BLOCKS = ("/tokenize", "/v1/chat/completions"), ("/v1/messages", "/v1/messages/count_tokens")
ITEMS = ("/v1/responses",)
BILLING = "x-anthropic-billing-header: cc_version=2.1.222.a1; cc_entrypoint=cli;"
RULES = "You are an agent. Never delete files."
HEADERS: list[tuple[Any, Any]] = [
    *((f"{BILLING} cch={digest};\n{RULES}", RULES) for digest in ("1f00a", "c4d1e")),
    (f"{BILLING}\r\n{RULES}", RULES),
    (f"{BILLING} cch=1f00a;{RULES}", RULES),
    (f"{BILLING} cc_prev_req=req_011Cdk3\n{RULES}", RULES),
    (f"x-anthropic-billing-header: ...;\n{RULES}", RULES),
    (f"{RULES}\n{BILLING} cch=1;\nBe brief.", f"{RULES}\nBe brief."),
    (BILLING, ""),
]
"""System messages of Claude Code, whose blocks gateways join, and the text that is kept."""
USED = {"type": "server_tool_use", "id": "a", "name": "web_search", "input": {"query": "rain"}}
FOUND = {"type": "web_search_result", "title": "Rain", "url": "u"}
HIDDEN = FOUND | {"encrypted_content": "x" * 99}
PICTURE = "QUJj" * 500
"""A long text in base64."""
LEFT_OUT = "[1,500 bytes were left out here.]"
SERVED: list[tuple[dict[str, Any], str]] = [
    ({"type": "image_generation_call", "id": "i", "status": "completed", "result": PICTURE},
     f'[image_generation was called with {{"result": "{LEFT_OUT}"}}.]'),
    ({"type": "mcp_call", "name": "f", "output": f"[{PICTURE}]"},
     f'[f was called with {{"output": "[{LEFT_OUT}]"}}.]'),
    ({"type": "mcp_list_tools", "tools": [{"name": "f"}]}, "[The tools f were found.]"),
    ({"type": "mcp_approval_request", "name": "f"}, "[f was called with {}.]"),
    ({"type": "mcp_approval_response", "approve": True}, '[Result: {"approve": true}]'),
]  # fmt: skip
"""Items of tools that another server ran, and their text."""
LINES: list[tuple[dict[str, Any], str]] = [
    (USED, '[web_search was called with {"query": "rain"}.]'),
    (
        {"type": "web_search_tool_result", "tool_use_id": "a", "content": [HIDDEN]},
        f"[Result: [{json.dumps(FOUND)}]]",
    ),
    ({"type": "tool_reference", "tool_name": "grep"}, "[The tool grep was found.]"),
    ({"type": "search_result", "title": "Rain", "source": "u", "content": [TEXT]}, "Rain\nu\nYes."),
    ({"type": "refusal", "refusal": "I cannot."}, "I cannot."),
    ({"type": "container_upload", "file_id": "f"}, '[Result: {"file_id": "f"}]'),
    ({"type": "mcp_tool_result", "content": [TEXT, PICTURE]}, f'[Result: Yes.\n"{LEFT_OUT}"]'),
]
"""Blocks of history that no template writes, and their text."""
OMITTED = "[{} was left out here, because the model reads text only.]"


def of_system(system: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}] * bool(system) + CHAT


def said(*parts: dict[str, Any], role: str = "assistant") -> list[dict[str, Any]]:
    return [*CHAT, {"role": role, "content": [TEXT, *parts]}, *CHAT]


def found(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a chat with a part in the result of a tool."""
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [part]}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    return [*CHAT, *turns]


def call(name: str, arguments: Any, output: Any) -> list[dict[str, Any]]:
    """Return the items of a call of a function and its result."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    made = {"type": "function_call", "call_id": "a", "name": name, "arguments": text}
    return [*CHAT, made, {"type": "function_call_output", "call_id": "a", "output": output}]


def called(kind: str, output: Any, **fields: Any) -> list[dict[str, Any]]:
    """Return the items of a call of another kind of tool and its result."""
    made = {"type": f"{kind}_call", "call_id": "a"} | fields
    return [*CHAT, made, {"type": f"{kind}_call_output", "call_id": "a", "output": output}]


def media(name: str) -> dict[str, Any]:
    return {"type": name, "source": {"data": "x"}, "image_url": "x", "file": {}}


def in_call(**fields: Any) -> list[dict[str, Any]]:
    """Return a chat with a call of these fields."""
    return [*CHAT, {"role": "assistant", "tool_calls": [{"id": "a"} | fields]}]


FUNCTION = {"type": "function", "function": {"name": "f", "arguments": '{"input": "x"}'}}
CUSTOM = {"type": "custom", "custom": {"name": "f", "input": "x"}}
RESULT = {"role": "tool", "tool_call_id": "a"}
SCREENSHOT = {"type": "computer_screenshot", "image_url": "data:x"}
SEARCH = {"type": "web_search_call", "id": "w", "status": "completed", "action": {"query": "q"}}
Pair = tuple[tuple[str, ...], list[dict[str, Any]], list[dict[str, Any]]]
MEDIA: list[Pair] = []
for _kind, *_names in (
    ("An image", "image_url", "image", "input_image"),
    ("A document", "file", "document", "input_file"),
):
    _line = {"type": "text", "text": OMITTED.format(_kind)}
    _part, _block, _item = map(media, _names)
    MEDIA += [
        (CHATS, said(_part, role="user"), said(_line, role="user")),
        (BLOCKS, found(_block), found(_line)),
        (ITEMS, call("f", {}, [_item]), call("f", {}, [_line])),
    ]
SAME: list[Pair] = [
    *((PROMPTS, of_system(system), of_system(kept)) for system, kept in HEADERS),
    (PROMPTS, of_system([{"type": "text", "text": f"{BILLING} cch=1;"}, TEXT]), of_system([TEXT])),
    *((PROMPTS, said(block), said({"type": "text", "text": line})) for block, line in LINES),
    *((BLOCKS, found(block), found({"type": "text", "text": line})) for block, line in LINES),
    *MEDIA,
    (
        ITEMS,
        called("custom_tool", "Done.", name="apply_patch", input="*** End"),
        call("apply_patch", {"input": "*** End"}, "Done."),
    ),
    (
        ITEMS,
        called("local_shell", "x", action={"command": ["ls"]}),
        call("local_shell", {"action": {"command": ["ls"]}}, "x"),
    ),
    (
        ITEMS,
        called("computer", SCREENSHOT, action={"type": "screenshot"}),
        call("computer", {"action": {"type": "screenshot"}}, OMITTED.format("An image")),
    ),
    (
        ITEMS,
        [*CHAT, SEARCH],
        [
            *CHAT,
            {
                "role": "assistant",
                "content": '[web_search was called with {"action": {"query": "q"}}.]',
            },
        ],
    ),
    *((ITEMS, [*CHAT, item], [*CHAT, {"role": "assistant", "content": t}]) for item, t in SERVED),
    (ITEMS, called("shell", [[PICTURE]], a=1), call("shell", {"a": 1}, f'[["{LEFT_OUT}"]]')),
    (CHATS, in_call(**CUSTOM), in_call(**FUNCTION)),
    *(
        (
            CHATS,
            [*in_call(**FUNCTION), RESULT | {"content": one}],
            [*in_call(**FUNCTION), RESULT | {"content": ""}],
        )
        for one in (None, [])
    ),
    (
        BLOCKS,
        said({"type": "redacted_thinking", "data": "x"}),
        said({"type": "thinking", "thinking": "", "signature": "x"}),
    ),
]
"""Endpoints, a history as clients send it, and a plain one that means the same."""


@pytest.mark.parametrize(("paths", "chat", "plain"), SAME)
def test_histories_with_one_meaning_have_one_prompt(
    live: Live, paths: tuple[str, ...], chat: list[dict[str, Any]], plain: list[dict[str, Any]]
) -> None:
    """A part that the template cannot write becomes text or is left out: a refused one would end
    the session, and another text would lose the hits of the next turn."""
    for path in paths:
        assert prompt(live, path, chat) == prompt(live, path, plain), path


@pytest.mark.parametrize(("system", "kept"), HEADERS)
def test_the_billing_header_is_left_out_of_own_fields(live: Live, system: str, kept: str) -> None:
    for path, name in ((BLOCKS[1], "system"), ("/v1/responses", "instructions")):
        plain = {name: kept} if kept else {}
        assert prompt(live, path, CHAT, **{name: system}) == prompt(live, path, CHAT, **plain)


def test_images_are_refused_if_the_server_says_so(serve_oracle: Serve) -> None:
    live = serve_oracle(ServerConfig(images="refuse", served_model_name=("builtin",)))
    for number, (paths, chat, plain) in enumerate(MEDIA):
        for path in paths:
            body = {"input" if path in ITEMS else "messages": chat, "model": "builtin"}
            answer = live.post(path, body | ({"max_tokens": 1} if path == "/v1/messages" else {}))
            kind = "An image" if number < len(MEDIA) // 2 else "A document"
            assert answer.status_code == 400 and f"{kind} is not supported" in answer.text
            assert prompt(live, path, plain)


WRITES_THOUGHTS = """\
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.reasoning_content or '') }}
{{- '|' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}"""


def test_thoughts_are_read_under_all_names(serve_answer: Serve) -> None:
    live = serve_answer("x", WRITES_THOUGHTS)
    thoughts: list[dict[str, Any]] = [
        *({name: "Hm."} for name in ("reasoning_content", "reasoning", "thinking")),
        {"reasoning": "Hm.", "reasoning_content": "Hm."},
        {"reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        {"content": [{"type": "thinking", "thinking": "Hm."}, TEXT]},
        {"content": [{"type": "reasoning", "text": "Hm."}, TEXT]},
    ]
    turn = {"role": "assistant", "content": "Yes."}
    first, *others = (prompt(live, "/tokenize", [*CHAT, turn | one]) for one in thoughts)
    assert b"\nHm.|Yes." in bytes(token for token in first if token < 256)
    assert all(one == first for one in others)
