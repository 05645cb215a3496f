"""Anthropic's /v1/messages: blocks and events, checked with its client if installed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.front.server.bodies import decode
from engine.front.server.endpoints.anthropic import CountRequest
from engine.front.server.settings import ServerConfig
from tests.engine.front.server.conftest import Live, Serve
from tests.engine.front.server.dialects import BONN, SCHEMA
from tests.engine.front.server.test_tools import HERMES_CALL

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


@pytest.mark.parametrize("said", ["no such file", "Error: no such file"])
def test_a_failed_result_says_so_and_keeps_its_mark(said: str) -> None:
    parts = [{"type": "text", "text": said, "cache_control": EPHEMERAL}]
    result = {"type": "tool_result", "tool_use_id": "a", "content": parts, "is_error": True}
    sent = {"model": "builtin", "messages": [{"role": "user", "content": [result]}]}
    [told] = decode(CountRequest, json.dumps(sent).encode(), ServerConfig()).as_chat().messages
    assert told.as_template_input()["content"] == "Error: no such file"
    assert told.cache_control == EPHEMERAL


def test_usage_counts_cache_reads_and_writes(serve_answer: Serve) -> None:
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


def test_omitted_thinking_keeps_its_signature(serve_answer: Serve) -> None:
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


def test_billing_header_is_not_part_of_the_prompt(serve_answer: Serve) -> None:
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


def test_anthropic_client_runs_a_tool_loop(serve_answer: Serve) -> None:
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
    answer = client.beta.messages.tool_runner(**ASK | {"messages": chat}, tools=[]).until_done()
    assert answer.content[0].text == "It is dry." and answer.stop_reason == "end_turn"
    with pytest.raises(anthropic.NotFoundError, match="use 'builtin'"):
        client.messages.create(**ASK | {"model": "claude"})
