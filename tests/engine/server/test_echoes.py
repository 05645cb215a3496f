"""Earlier answers as client classes serialise them: with every field, absent ones as null."""

from __future__ import annotations

from typing import Any

import pytest

from . import test_messages, test_responses
from .conftest import Live, ServeAnswer
from .test_tools import CHAT, HERMES_CALL, OPTIONS, TOOLS

SCRIPT = f"<think>Hm.</think>Look.\n{HERMES_CALL}"
NULLS = {"toolset_name": None, "x": None}


def prompt_of(live: Live, **body: Any) -> str:
    tokens = live.post("/tokenize", body).json()["tokens"]
    return str(live.post("/detokenize", {"tokens": tokens}).json()["prompt"])


def test_anthropic_blocks_with_nulls_are_accepted(serve_answer: ServeAnswer) -> None:
    anthropic = pytest.importorskip("anthropic")
    live = serve_answer(SCRIPT, then="Dry.")
    client = anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)
    request = test_messages.ASK | {"tools": test_messages.TOOLS}
    message = client.messages.create(**request)
    blocks = [block.model_dump() for block in message.content]
    assert any(value is None for value in blocks[-1].values())
    result = {"type": "tool_result", "tool_use_id": blocks[-1]["id"], "content": "dry"}
    chat = [
        *request["messages"],
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(**request | {"messages": chat}).content[0].text == "Dry."


def test_nulls_in_openai_messages_do_not_reach_the_template(serve_answer: ServeAnswer) -> None:
    live = serve_answer(SCRIPT)
    echoed = live.client.chat.completions.create(**OPTIONS).choices[0].message.model_dump()
    assert echoed["audio"] is None
    [call] = echoed["tool_calls"]
    nulls = call | NULLS | {"function": call["function"] | NULLS}
    [tool] = TOOLS
    tool_with_nulls = tool | NULLS | {"function": tool["function"] | {"description": None}}
    for message in (echoed, echoed | {"tool_calls": [nulls]}):
        prompt = prompt_of(live, messages=[*CHAT, message], tools=[tool_with_nulls])
        plain = {k: v for k, v in echoed.items() if v is not None}
        assert prompt == prompt_of(live, messages=[*CHAT, plain], tools=TOOLS)
        assert "null" not in prompt and HERMES_CALL in prompt


def test_nulls_in_arguments_and_schemas_are_kept(serve_answer: ServeAnswer) -> None:
    live = serve_answer("x")
    function = {"name": "f", "arguments": {"city": None}}
    call = {"id": "1", "type": "function", "function": function}
    parameters = {"type": "object", "properties": {"a": {"default": None}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    chat = [*CHAT, {"role": "assistant", "tool_calls": [call]}]
    prompt = prompt_of(live, messages=chat, tools=[tool])
    assert '{"city": null}' in prompt and '"default": null' in prompt


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_openai_items_with_nulls_are_accepted(serve_answer: ServeAnswer, stream: bool) -> None:
    client = serve_answer(SCRIPT, then="Dry.").client
    request = test_responses.ASK | {"tools": test_responses.TOOLS}
    if stream:
        with client.responses.stream(**request) as events:
            response = events.get_final_response()
    else:
        response = client.responses.create(**request)
    items = [item.model_dump() for item in response.output]
    assert any(value is None for value in items[-1].values())
    result = {
        "type": "function_call_output",
        "call_id": response.output[-1].call_id,
        "output": "dry",
    }
    question = {"role": "user", "content": "Rain in Bonn?"}
    whole: Any = [question, *items, result]
    assert client.responses.create(**request | {"input": whole}).output_text == "Dry."


BLOCK = {"type": "text", "text": "x"}
CHATS = ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2})
MESSAGES = ("/v1/messages", test_messages.ASK | {"max_tokens": 2})
RESPONSES = ("/v1/responses", test_responses.ASK)
NESTED: list[tuple[tuple[str, dict[str, Any]], str, Any]] = [
    (CHATS, "messages.0.content.0", lambda more: [{"role": "user", "content": [BLOCK | more]}]),
    (CHATS, "stream_options", lambda more: {"include_usage": True} | more),
    (CHATS, "response_format", lambda more: {"type": "text"} | more),
    (
        MESSAGES,
        "messages.0.content.0",
        lambda more: [{"role": "user", "content": [BLOCK | more]}],
    ),
    (MESSAGES, "messages.0", lambda more: [{"role": "user", "content": "x"} | more]),
    (
        MESSAGES,
        "system.0.cache_control",
        lambda more: [BLOCK | {"cache_control": {"type": "ephemeral"} | more}],
    ),
    (MESSAGES, "thinking", lambda more: {"type": "disabled"} | more),
    (RESPONSES, "input.0", lambda more: [{"role": "user", "content": "x"} | more]),
    (RESPONSES, "text.format", lambda more: {"format": {"type": "text"} | more}),
]


@pytest.mark.parametrize(
    ("endpoint", "place", "make"),
    NESTED,
    ids=[f"{endpoint[0]} {place}" for endpoint, place, _ in NESTED],
)
def test_null_counts_as_absent_at_every_depth(
    serve_answer: ServeAnswer, endpoint: Any, place: str, make: Any
) -> None:
    """Unknown fields with a value are still refused by name."""
    path, body = endpoint
    live, name = serve_answer("x"), place.split(".")[0]
    stream = {"stream": True} if name == "stream_options" else {}
    accepted = live.post(path, body | {name: make(NULLS)} | stream)
    assert accepted.status_code == 200, accepted.text
    refused = live.post(path, body | {name: make({"toolset_name": "x"})} | stream)
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert f"'{place}.toolset_name' is not a parameter of this endpoint" in message


def test_null_selects_the_default_of_a_field(serve_answer: ServeAnswer) -> None:
    live = serve_answer("x")
    thinking = {"type": "thinking", "thinking": "a", "signature": None}
    chat = [
        CHAT[0],
        {"role": "assistant", "content": [thinking]},
        {"role": "user", "content": [BLOCK | {"type": None}]},
    ]
    refused = live.post("/v1/messages", test_messages.ASK | {"messages": chat})
    assert "messages.2.content" in refused.json()["error"]["message"]
    chat[2]["content"] = "x"
    assert live.post("/v1/messages", test_messages.ASK | {"messages": chat}).status_code == 200
    item = {"type": None, "role": "user", "content": "x"}
    assert live.post("/v1/responses", {"input": [item]}).status_code == 200
