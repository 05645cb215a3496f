"""OpenAI's /v1/responses through its own client: items, events and stored conversations."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from engine.text.bounded import BoundedMemory
from tests.engine.front.server.conftest import Serve
from tests.engine.front.server.dialects import BONN, SCHEMA, STREAMED
from tests.engine.front.server.test_tools import HERMES_CALL
from tests.refused import refused

ASK: dict[str, Any] = {"model": "builtin", "input": "Rain in Bonn?"}
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]


@STREAMED
def test_functions_of_a_namespace_are_called_by_both_names(
    serve_answer: Serve, stream: bool
) -> None:
    """As Codex offers the tools of a server, and sends their calls back."""
    call = HERMES_CALL.replace('"weather"', '"home__weather"')
    live = serve_answer(f"<think>H</think>{call}", then="Dry.")
    tools: Any = [
        {"type": "namespace", "name": "home", "description": "Of the house.", "tools": TOOLS}
    ]
    if stream:
        with live.client.responses.stream(**ASK, tools=tools) as events:
            answer = events.get_final_response()
    else:
        answer = live.client.responses.create(**ASK, tools=tools)
    [told] = answer.tools[0].model_dump(exclude_unset=True)["tools"]
    assert told == TOOLS[0] | {"description": None}
    [made] = [item for item in answer.output if item.type == "function_call"]
    assert (made.namespace, made.name, json.loads(made.arguments)) == ("home", "weather", BONN)
    result = {"type": "function_call_output", "call_id": made.call_id, "output": "dry"}
    chat = [{"role": "user", "content": "Rain?"}, made.model_dump(exclude_none=True), result]
    later = live.client.responses.create(model="builtin", input=chat, tools=tools)
    assert later.output_text == "Dry."
    chat = [*chat[:1], chat[1] | {"name": "home__weather", "namespace": None}, result]
    joined = [TOOLS[0] | {"name": "home__weather", "description": "Of the house."}]
    same = live.client.responses.create(model="builtin", input=chat, tools=joined)
    assert same.usage.input_tokens == later.usage.input_tokens


def test_stored_conversation_has_the_prompt_of_a_whole_one(serve_answer: Serve) -> None:
    """Turns with ``previous_response_id``, tool calls included, give the same prompt as the whole
    conversation."""
    live = serve_answer(f"<think>Hm.</think>{HERMES_CALL}")
    client = live.client
    options: dict[str, Any] = {"model": "builtin", "tools": TOOLS, "instructions": "Be brief."}
    first = client.responses.create(input="Rain in Bonn?", **options)
    result: Any = {
        "type": "function_call_output",
        "call_id": first.output[-1].call_id,
        "output": "dry",
    }
    serve_answer("It is dry.")
    second = client.responses.create(input=[result], previous_response_id=first.id, **options)
    assert second.previous_response_id == first.id and second.output_text == "It is dry."
    third = client.responses.create(input="Sure?", previous_response_id=second.id, **options)
    whole = [
        {"role": "user", "content": "Rain in Bonn?"},
        *(item.model_dump() for item in first.output),
        result,
        *(item.model_dump() for item in second.output),
        {"role": "user", "content": "Sure?"},
    ]
    same = client.responses.create(input=whole, **options)
    assert third.usage is not None and same.usage is not None
    assert third.usage.input_tokens == same.usage.input_tokens
    assert same.usage.input_tokens_details.cached_tokens >= third.usage.input_tokens // 64 * 64 - 64


def test_references_stand_for_stored_items(serve_answer: Serve) -> None:
    """Reasoning, text and calls by their ids, as AI SDK sends them, give the same prompt as the
    items themselves; they are known to their tenant only, and until their response is deleted."""
    client = serve_answer(f"<think>Hm.</think>So:{HERMES_CALL}", then="Dry.").client
    options: dict[str, Any] = {"model": "builtin", "tools": TOOLS}
    first = client.responses.create(input="Rain in Bonn?", **options)
    kinds = [item.type for item in first.output]
    assert kinds == ["reasoning", "message", "function_call"]
    start = {"role": "user", "content": "Rain in Bonn?"}
    call_id = first.output[-1].call_id
    result = {"type": "function_call_output", "call_id": call_id, "output": "dry"}
    named: Any = [{"type": "item_reference", "id": item.id} for item in first.output]
    second = client.responses.create(input=[start, *named, result], **options)
    items = [item.model_dump() for item in first.output]
    same = client.responses.create(input=[start, *items, result], **options)
    assert second.output_text == same.output_text == "Dry."
    assert second.usage.input_tokens == same.usage.input_tokens
    third = client.responses.create(input="Sure?", previous_response_id=second.id, **options)
    assert third.usage.input_tokens > second.usage.input_tokens
    salted = {"x-cache-salt": "other"}
    with pytest.raises(openai.BadRequestError, match="not found: its response") as caught:
        client.responses.create(input=[start, *named], **options, extra_headers=salted)
    assert caught.value.param == "input.1.id"
    refused("not found", client.responses.retrieve, named[0]["id"], kind=openai.NotFoundError)
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="Send the item itself"):
        client.responses.create(input=[start, *named], **options)


def test_stored_responses_are_retrieved_and_deleted(serve_answer: Serve) -> None:
    client = serve_answer("Yes.").client
    whole = client.responses.create(**ASK, metadata={"a": "b"})
    with client.responses.stream(**ASK) as stream:
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        found = client.responses.retrieve(response.id)
        assert (found.output_text, found.metadata) == ("Yes.", response.metadata)
        client.responses.delete(response.id)
        refused("not found", client.responses.retrieve, response.id, kind=openai.NotFoundError)
        refused("not found", client.responses.delete, response.id, kind=openai.NotFoundError)
    unstored = client.responses.create(**ASK, store=False)
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.responses.create(**ASK, previous_response_id=unstored.id)


def test_bounded_memory_evicts_the_least_recently_used() -> None:
    store = BoundedMemory[tuple[str | None, str], str](100)
    for name in "abc":
        store.put((None, name), name, 40)
    assert store.get((None, "a")) is None
    assert store.get((None, "b")) == "b"
    store.put((None, "d"), "d", 40)
    assert store.get((None, "c")) is None and store.get((None, "b"), is_use=False) == "b"
    store.put((None, "e"), "e", 101)
    assert store.get((None, "e")) is None and store.num_bytes == 80
    store.put((None, "b"), "b", 10)
    assert [name for (_, name), _ in store.listed()] == ["d", "b"]
    assert store.num_bytes == 50 and store.delete((None, "b")) and not store.delete(("x", "d"))
    assert store.num_bytes == 40
    store.check()
