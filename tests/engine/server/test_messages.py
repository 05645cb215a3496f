"""Anthropic's /v1/messages: blocks and events, checked with its client if installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from engine.plugins.dialects.anthropic_body import MessagesRequest
from engine.server.settings import ServerConfig

from .conftest import Live, ServeAnswer
from .test_tools import BONN, HERMES_CALL, QWEN_XML, SCHEMA, XML_CALL

ASK: dict[str, Any] = {
    "model": "builtin",
    "max_tokens": 400,
    "messages": [{"role": "user", "content": "Rain in Bonn?"}],
}
TOOLS = [{"name": "weather", "description": "Weather of a city.", "input_schema": SCHEMA}]
EPHEMERAL = {"type": "ephemeral"}
LONG = "The quick brown fox jumps over the lazy dog. " * 6


def message(live: Live, **changes: Any) -> dict[str, Any]:
    answer = live.post("/v1/messages", ASK | changes)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def events(live: Live, **changes: Any) -> list[dict[str, Any]]:
    """Return the events of a streamed answer, after a check of their names."""
    text = live.post("/v1/messages", ASK | changes | {"stream": True}).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize(
    ("template", "call", "opening"),
    [(None, HERMES_CALL, "<think>"), (QWEN_XML, XML_CALL, "")],
    ids=["hermes", "xml"],
)
def test_thinking_text_and_tools_agree_whole_and_streamed(
    serve_answer: ServeAnswer, template: str | None, call: str, opening: str
) -> None:
    live = serve_answer(f"{opening}Hm.\n</think>\n\nLet me look.\n{call}\n{call}", template)
    whole = message(live, tools=TOOLS)
    assert (whole["type"], whole["role"], whole["stop_reason"]) == (
        "message",
        "assistant",
        "tool_use",
    )
    thinking, text, *uses = whole["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "Hm.")
    assert text == {"type": "text", "text": "Let me look."}
    assert [use["input"] for use in uses] == [BONN, BONN] and uses[0]["id"] != uses[1]["id"]
    streamed = events(live, tools=TOOLS)
    kinds = [event["type"] for event in streamed]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    blocks: list[dict[str, Any]] = []
    for event in streamed:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"partial": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            for name, value in event["delta"].items():
                field = {"partial_json": "partial"}.get(name, name)
                if field != "type":
                    blocks[-1][field] += value
    assert blocks[0]["thinking"] == "Hm." and blocks[0]["signature"] == thinking["signature"] != ""
    assert blocks[1]["text"] == "Let me look."
    assert [json.loads(block["partial"]) for block in blocks[2:]] == [BONN, BONN]
    last = streamed[-2]
    assert last["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_returned_conversation_reaches_the_template(serve_answer: ServeAnswer) -> None:
    """Thinking, tool uses and results reach the template; errors are marked."""
    live = serve_answer(f"Hm.</think>Now.\n{XML_CALL}", QWEN_XML)
    content = message(live, tools=TOOLS)["content"]
    result = {
        "type": "tool_result",
        "tool_use_id": content[-1]["id"],
        "content": [{"type": "text", "text": "no such city"}],
        "is_error": True,
    }
    extra_text = {"type": "text", "text": "Hurry."}
    chat = [
        *ASK["messages"],
        {"role": "assistant", "content": content},
        {"role": "user", "content": [result, extra_text]},
    ]
    body = {"model": "builtin", "messages": chat, "tools": TOOLS, "system": "Be brief."}
    counted = live.post("/v1/messages/count_tokens", body).json()
    call = {"function": {"name": "weather", "arguments": json.dumps(BONN)}}
    same = [
        {"role": "system", "content": "Be brief."},
        *ASK["messages"],
        {
            "role": "assistant",
            "content": "Now.",
            "reasoning_content": "Hm.",
            "tool_calls": [call],
        },
        {"role": "tool", "content": "Error: no such city"},
        {"role": "user", "content": "Hurry."},
    ]
    function = {"name": "weather", "description": "Weather of a city.", "parameters": SCHEMA}
    tools = [{"type": "function", "function": function}]
    assert counted == {
        "input_tokens": live.post("/tokenize", {"messages": same, "tools": tools}).json()["count"]
    }


def test_only_text_after_a_call_is_joined_without_a_line_break() -> None:
    texts = [{"type": "text", "text": text} for text in "abcd"]
    texts[0]["cache_control"] = texts[2]["cache_control"] = {"type": "ephemeral"}
    call = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}
    content = [texts[0], texts[1], call, texts[2], texts[3]]
    turns = [*ASK["messages"], {"role": "assistant", "content": content}, *ASK["messages"]]
    chat = MessagesRequest.model_validate(ASK | {"messages": turns}).as_chat()
    assert chat.messages[1].as_template_input()["content"] == "a\nbc\nd"
    assert list(chat.messages[1].marks()) == [1, 2]


def test_usage_counts_cache_reads_and_writes(serve_answer: ServeAnswer) -> None:
    live = serve_answer("Yes.")
    system = [{"type": "text", "text": "Marked. " + LONG, "cache_control": EPHEMERAL}]
    plain = {"system": LONG + "other", "messages": [{"role": "user", "content": "a" * 90}]}
    marked = {"system": system, "messages": [{"role": "user", "content": "b" * 90}]}
    for options, is_marked in ((plain, False), (marked, True)):
        first, second = (message(live, **options)["usage"] for _ in range(2))
        count = live.post(
            "/v1/messages/count_tokens", {"model": "builtin", **ASK | options, "max_tokens": None}
        ).json()["input_tokens"]
        for usage in (first, second):
            names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
            assert sum(usage[name] for name in names) == count
        assert second["cache_read_input_tokens"] > 0
        written = first["cache_creation_input_tokens"]
        assert len(LONG) <= written < count - 90 if is_marked else written == 0


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_stop_reasons(serve_answer: ServeAnswer, tools: Any) -> None:
    live = serve_answer("One STOP two")
    options = {"stop_sequences": ["never", "STOP"]} | ({"tools": tools} if tools else {})
    stopped = message(live, **options)
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "STOP")
    assert stopped["content"] == [{"type": "text", "text": "One "}] or tools
    assert message(live)["stop_reason"] == "end_turn"
    assert message(live, max_tokens=3)["stop_reason"] == "max_tokens"
    live = serve_answer(HERMES_CALL)
    cut = message(live, tools=TOOLS, max_tokens=60)
    assert cut["stop_reason"] == "max_tokens"
    [text] = cut["content"]
    assert HERMES_CALL.startswith(text["text"]) and "breaks off" in cut["warning"]
    broken_options = {"tools": TOOLS, "stop_sequences": ["Bonn"]}
    stopped = message(live, **broken_options)
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "Bonn")
    assert stopped["content"] == [{"type": "text", "text": HERMES_CALL.partition("Bonn")[0]}]
    delta = events(live, **broken_options)[-2]["delta"]
    assert delta["stop_reason"] == "stop_sequence" and "breaks off" in delta["warning"]


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "'max_tokens' is missing"),
    ({"max_tokens": 0}, "'max_tokens' must be at least 1 (got 0)."),
    ({"messages": []}, "'messages' must have at least 1 entry"),
    ({"container": "x"}, "'container' is not a parameter of this endpoint"),
    ({"messages": [{"role": "assistant", "content": "I"}]}, "end with a message of the user"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "'image' blocks are not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "'messages.0.content.0.text' must be text (got 5).",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "thinking", "thinking": "a", "signature": ""}]}
            ]
        },
        "A 'thinking' must be in a message of the assistant",
    ),
    ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, "'web_search_20250305' tools are not"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "no tool 'g'"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "must have a 'name'"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2**31}}, "'thinking.budget_tokens' must"),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 8}, "max_tokens": 8},
        "'thinking.budget_tokens' must be below 'max_tokens', 8 (got 8).",
    ),
    ({"output_config": {"effort": "none"}}, "'output_config.effort' must be 'low', 'medium'"),
    ({"service_tier": "flex"}, "'service_tier' must be 'auto' or 'standard_only'"),
    ({"thinking": {"type": "enabled", "display": "updates"}}, "'thinking.display' must be 'summarized'"),
    ({"speed": "fast"}, "'speed' must be 'standard'"),
    ({"tools": [TOOLS[0] | {"defer_loading": True}]}, "defer_loading' must be"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": EPHEMERAL}] * 6}]},
        "at most 4",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"), BAD_REQUESTS, ids=[expected for _, expected in BAD_REQUESTS]
)
def test_errors_have_anthropics_shape(
    serve_answer: ServeAnswer, changes: dict[str, Any], expected: str
) -> None:
    answer = serve_answer("x").post("/v1/messages", ASK | changes)
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert expected in body["error"]["message"], body


def test_other_errors_have_their_types(
    serve_answer: ServeAnswer, serve_oracle: Callable[..., Live]
) -> None:
    live = serve_answer("x")
    unknown = live.post("/v1/messages", ASK | {"model": "claude"})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    wrong = live.get("/v1/messages")
    assert wrong.json()["type"] == "error"
    assert (
        wrong.json()["request_id"] == wrong.headers["request-id"] == wrong.headers["x-request-id"]
    )
    broken = httpx.post(f"{live.url}/v1/messages", content=b"{")
    assert broken.json()["error"]["type"] == "invalid_request_error"
    small = serve_oracle(ServerConfig(max_body_mib=0.001))
    large = small.post("/v1/messages", ASK | {"system": LONG * 10})
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")


def test_thinking_can_be_switched(serve_answer: ServeAnswer) -> None:
    live = serve_answer("a</think>b")
    on = message(live, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048)
    assert [block["type"] for block in on["content"]] == ["thinking", "text"]
    off = message(live, thinking={"type": "disabled"}, metadata={"user_id": "me"})
    assert off["content"] == [{"type": "text", "text": "a</think>b"}]


def test_thinking_budget_may_exceed_the_limit_with_tools(serve_answer: ServeAnswer) -> None:
    """With Anthropic's interleaved thinking, the budget is that of the whole turn."""
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = message(serve_answer("a</think>b"), thinking=thinking, max_tokens=400, tools=TOOLS)
    assert [block["type"] for block in answer["content"]] == ["thinking", "text"]


def test_omitted_thinking_keeps_its_signature(serve_answer: ServeAnswer) -> None:
    live = serve_answer("a</think>b")
    summarized = {"type": "enabled", "budget_tokens": 99}
    omitted = summarized | {"display": "omitted"}
    [full, _] = message(live, thinking=summarized)["content"]
    [block, text] = message(live, thinking=omitted)["content"]
    assert block == full | {"thinking": ""} and text["text"] == "b"
    deltas = [
        event["delta"]
        for event in events(live, thinking=omitted)
        if "content_block_d" in event["type"]
    ]
    assert deltas == [
        {"type": "signature_delta", "signature": full["signature"]},
        {"type": "text_delta", "text": "b"},
    ]


AGENT = {
    "metadata": {"user_id": "user_1_account__session_2"},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "medium"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "speed": "standard",
    "temperature": 1,
    "tools": [
        TOOLS[0]
        | {
            "cache_control": {"type": "ephemeral", "ttl": "1h"},
            "defer_loading": False,
            "allowed_callers": ["direct"],
            "eager_input_streaming": True,
        }
    ],
}
"""Fields that coding agents send with each request."""


def test_billing_header_is_not_part_of_the_prompt(serve_answer: ServeAnswer) -> None:
    """A coding agent sends it, with another digest in each request."""
    live = serve_answer("Dry.")

    def ask(digest: str) -> dict[str, Any]:
        header = f"x-anthropic-billing-header: cc_version=2.1.1; cc_entrypoint=cli; cch={digest};"
        rules = {"text": LONG, "cache_control": {"type": "ephemeral", "scope": "global"}}
        system = [{"type": "text", "text": header}, {"type": "text", **rules}]
        path = "/v1/messages?beta=true"
        answer = live.post(path, ASK | AGENT | {"system": system}, **{"anthropic-beta": "a,b"})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    first, second = ask("1f00a"), ask("c4d1e")
    assert first["context_management"] == {"applied_edits": []}
    usage = second["usage"]
    total = usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    assert usage["cache_read_input_tokens"] >= (total + usage["input_tokens"]) // 64 * 64 - 64
    only = {"system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}]}
    body = {name: ASK[name] for name in ("model", "messages")}
    count = "/v1/messages/count_tokens"
    assert live.post(count, body | only).json() == live.post(count, body).json()


def num_input(usage: dict[str, int]) -> int:
    return sum(value for name, value in usage.items() if "input_tokens" in name)


@pytest.mark.parametrize("budget", [5, 40])
def test_thinking_ends_at_its_budget(live: Live, budget: int) -> None:
    """The answer equals that of /v1/chat/completions, which returns token ids."""
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "How so?"}]}
    chat = request | {"max_tokens": 90, "chat_template_kwargs": {"enable_thinking": True}}
    chat |= {"thinking_token_budget": budget, "return_token_ids": True}
    [choice] = live.post("/v1/chat/completions", chat).json()["choices"]
    assert choice["token_ids"][budget : budget + 4] == [10, 260, 10, 10]
    assert 260 not in choice["token_ids"][:budget]
    thinking = {"type": "enabled", "budget_tokens": budget}
    [reasoning, text] = message(live, **request, thinking=thinking, max_tokens=90)["content"]
    assert reasoning["thinking"] == choice["message"]["reasoning_content"]
    assert text["text"] == choice["message"]["content"]


def test_guided_output_follows_thinking_cut_by_its_budget(live: Live) -> None:
    pytest.importorskip("llguidance")
    body = {"messages": ASK["messages"], "chat_template_kwargs": {"enable_thinking": True}}
    body |= {"max_tokens": 90, "thinking_token_budget": 9, "guided_choice": ["yes", "no"]}
    [choice] = live.post("/v1/chat/completions", body).json()["choices"]
    assert choice["message"]["content"].strip() in ("yes", "no")


FIRST_ONLY = """\
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be first.') }}{% endif %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}"""


def test_system_message_in_the_middle_keeps_its_place(serve_answer: ServeAnswer) -> None:
    """It becomes a user message if the template accepts no system message there."""
    late = {"role": "system", "content": "Hurry."}
    chat = [*ASK["messages"], {"role": "assistant", "content": "Hm."}, late, ASK["messages"][0]]
    body = {"model": "builtin", "messages": chat, "system": "Be brief."}
    for template, role in ((FIRST_ONLY, "user"), (None, "system")):
        live = serve_answer("x", template)
        same = [{"role": "system", "content": "Be brief."}, *chat]
        same[3] = late | {"role": role}
        count = live.post("/tokenize", {"messages": same}).json()["count"]
        assert live.post("/v1/messages/count_tokens", body).json() == {"input_tokens": count}
    live = serve_answer("Yes.", FIRST_ONLY)
    developer = {"role": "developer", "content": "Be exact."}
    items = [developer, *chat]
    answer = live.client.responses.create(model="builtin", instructions="Be brief.", input=items)
    assert answer.output_text == "Yes."


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/chat/completions"])
def test_closed_connection_frees_its_memory(serve_oracle: Callable[..., Live], path: str) -> None:
    live = serve_oracle(step_s=0.01)
    question = {"messages": ASK["messages"]} | {"input": "x"}
    limit = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    field = "input" if path.endswith("responses") else "messages"
    body = {"model": "builtin", limit: 3000, "stream": True, field: question[field]}
    for read in (0, 300):
        connection = live.send(path, body)
        live.wait_for(lambda report: report["kv"]["held"] > 0)
        if read:
            connection.recv(read)
        connection.close()
        live.wait_until_idle()
    live.check_conserved()


def test_anthropic_client_runs_a_tool_loop(serve_answer: ServeAnswer) -> None:
    """Whole and streamed answers, token counts and errors through Anthropic's package."""
    anthropic = pytest.importorskip("anthropic")
    live = serve_answer(f"<think>Hm.</think>Look.\n{HERMES_CALL}")
    client = anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)
    whole = client.messages.create(**ASK, tools=TOOLS)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert whole.content[2].input == BONN and whole.usage.cache_read_input_tokens >= 0
    with client.messages.stream(**ASK, tools=TOOLS) as stream:
        assert "".join(stream.text_stream) == "Look."
        final = stream.get_final_message()
    assert final.content[2].input == BONN and final.stop_reason == "tool_use"
    assert final.content[0].signature == whole.content[0].signature
    result = {"type": "tool_result", "tool_use_id": whole.content[2].id, "content": "dry"}
    chat = [
        *ASK["messages"],
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    counted = client.messages.count_tokens(model="builtin", messages=chat, tools=TOOLS)
    assert counted.input_tokens > 100
    serve_answer("It is dry.")
    answer = client.messages.create(**ASK | {"messages": chat}, tools=TOOLS)
    assert answer.content[0].text == "It is dry." and answer.stop_reason == "end_turn"
    with pytest.raises(anthropic.NotFoundError, match="use 'builtin'"):
        client.messages.create(**ASK | {"model": "claude"})
