"""OpenAI's /v1/responses through its own client: items, events and stored conversations."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import openai
import pytest

from engine.plugins.dialects.responses import StoredResponse, held_bytes
from engine.text.bounded_memory import BoundedMemory

from .conftest import Live, ServeAnswer
from .test_tools import BONN, HERMES_CALL, QWEN_XML, SCHEMA, XML_CALL

ASK: dict[str, Any] = {"model": "builtin", "input": "Rain in Bonn?"}
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
FORMS = [(None, HERMES_CALL, "<think>"), (QWEN_XML, XML_CALL, "")]


@pytest.mark.parametrize(("template", "call", "opening"), FORMS, ids=["hermes", "xml"])
def test_reasoning_text_and_calls_agree_whole_and_streamed(
    serve_answer: ServeAnswer, template: str | None, call: str, opening: str
) -> None:
    live = serve_answer(f"{opening}Hm.\n</think>\n\nLook.\n{call}\n{call}", template)
    whole = live.client.responses.create(**ASK, tools=TOOLS)
    assert (whole.status, whole.output_text) == ("completed", "Look.")
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item.type for item in whole.output] == kinds
    assert whole.output[0].content[0].text == "Hm."
    assert [json.loads(item.arguments) for item in whole.output[2:]] == [BONN, BONN]
    assert len({item.call_id for item in whole.output[2:]}) == 2
    usage = whole.usage
    assert usage is not None and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    with live.client.responses.stream(**ASK, tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"

    def bare(items: Any) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in item.model_dump().items() if "id" not in name}
            for item in items
        ]

    client_fields = "parsed", "parsed_arguments"
    streamed = [
        {k: v for k, v in item.items() if k not in client_fields} for item in bare(final.output)
    ]
    for item in streamed:
        for part in item.get("content") or ():
            part.pop("parsed", None)
    assert streamed == bare(whole.output)
    assert final.usage is not None and final.usage.output_tokens == usage.output_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_functions_of_a_namespace_are_called_by_both_names(
    serve_answer: ServeAnswer, stream: bool
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
    assert answer.tools[0].model_dump()["tools"][0]["name"] == "weather"
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


def test_events_build_up_each_item(serve_answer: ServeAnswer) -> None:
    live = serve_answer(f"<think>H</think>L{HERMES_CALL}")
    added: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for event in live.client.responses.create(**ASK, tools=TOOLS, stream=True):
        if event.type == "response.output_item.added":
            assert event.output_index == len(added) and event.item.id is not None
            added[event.item.id] = event.item
            texts[event.item.id] = ""
        elif event.type.endswith(".delta"):
            texts[event.item_id] += event.delta
        elif event.type.endswith("_text.done"):
            assert event.text == texts[event.item_id]
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == texts[event.item_id] and event.name == "weather"
    assert list(texts.values()) == ["H", "L", json.dumps(BONN)]


def test_stored_conversation_has_the_prompt_of_a_whole_one(serve_answer: ServeAnswer) -> None:
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


def test_stored_responses_are_retrieved_and_deleted(serve_answer: ServeAnswer) -> None:
    client = serve_answer("Yes.").client
    whole = client.responses.create(**ASK, metadata={"a": "b"})
    with client.responses.stream(**ASK) as stream:
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        found = client.responses.retrieve(response.id)
        assert (found.output_text, found.metadata) == ("Yes.", response.metadata)
        client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.delete(response.id)
    unstored = client.responses.create(**ASK, store=False)
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.responses.create(**ASK, previous_response_id=unstored.id)


def test_stored_responses_are_private_to_their_salt(serve_answer: ServeAnswer) -> None:
    client = serve_answer("Yes.").client
    mine = client.responses.create(**ASK, extra_body={"cache_salt": "me"})
    for salt in ({}, {"cache_salt": "you"}):
        with pytest.raises(openai.BadRequestError, match="not found"):
            client.responses.create(**ASK, previous_response_id=mine.id, extra_body=salt)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(mine.id)
    assert client.responses.retrieve(mine.id, extra_headers={"x-cache-salt": "me"}).id == mine.id


def test_answer_cut_by_the_limit_is_incomplete(serve_answer: ServeAnswer) -> None:
    client = serve_answer("Yes and more").client
    for stream in (False, True):
        if stream:
            with client.responses.stream(**ASK, max_output_tokens=3) as events:
                cut = list(events)[-1].response
        else:
            cut = client.responses.create(**ASK, max_output_tokens=3)
        assert (cut.status, cut.output_text) == ("incomplete", "Yes")
        assert cut.incomplete_details.reason == "max_output_tokens"
        assert cut.output[0].status == "incomplete"


def test_conversation_continues_after_a_broken_call(serve_answer: ServeAnswer) -> None:
    client = serve_answer(HERMES_CALL).client
    cut = client.responses.create(**ASK, tools=TOOLS, max_output_tokens=60)
    assert cut.status == "incomplete" and cut.output[0].type == "message"
    assert HERMES_CALL.startswith(cut.output_text) and "breaks off" in cut.warning
    serve_answer("Again.")
    next_answer = client.responses.create(**ASK, tools=TOOLS, previous_response_id=cut.id)
    assert next_answer.output_text == "Again."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": []}, "'input' is empty"),
        ({"input": [{"type": {}, "role": "user", "content": "x"}]}, "items are not supported"),
        ({"text": {"format": {}}}, "'text.format.type' is missing"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "'text.format' of type json_schema requires a 'schema'",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "b"}}}},
            "'text.format': this grammar cannot be used",
        ),
        (
            {"text": {"format": {"type": "json_object", "schema": {}}}},
            "'text.format' of type json_object must not have other fields",
        ),
        (
            {"text": {"format": {"type": "json_schema", "schema": {}, "x": 1}}},
            "'text.format.x' is not a parameter",
        ),
        ({"input": None}, "'input' is missing"),
        ({"input": [{"type": "web_search_call"}]}, "'web_search_call' items are not supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference' items are not"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "remove the 'input_image' part",
        ),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
            "Encrypted reasoning is not",
        ),
        (
            {"tools": [{"type": "function", "name": ""}]},
            "'tools.0.name' must be text that is not empty",
        ),
        ({"tools": [{"type": "web_search"}]}, "'web_search' tools are not supported"),
        (
            {
                "tools": [
                    {"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "c"}]}
                ]
            },
            "'custom' tools are not supported",
        ),
        ({"background": True}, "'background' is not supported"),
        ({"truncation": "auto"}, "'truncation' is not supported"),
        ({"conversation": "c"}, "'conversation' is not supported"),
        ({"include": ["message.output_text.logprobs"]}, "'include.0' must be 'reasoning.encrypted"),
        ({"max_output_tokens": 0}, "'max_output_tokens' must be at least 1 (got 0)."),
        ({"reasoning": {"effort": "bogus"}}, "'reasoning.effort' must be 'none', 'minimal'"),
        ({"text": {"verbosity": "bogus"}}, "'text.verbosity' must be 'low', 'medium' or 'high'"),
        ({"service_tier": "gold"}, "'service_tier' must be 'auto', 'default'"),
        ({"nonsense": 1}, "'nonsense' is not a parameter of this endpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_responses_requests_are_refused(
    serve_answer: ServeAnswer, changes: dict[str, Any], message: str
) -> None:
    answer = serve_answer("x").post("/v1/responses", ASK | changes)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_options_without_effect_are_accepted(serve_answer: ServeAnswer) -> None:
    answer = serve_answer("a</think>b").client.responses.create(
        **ASK,
        include=["reasoning.encrypted_content"],
        text={"format": {"type": "text"}, "verbosity": "low"},
        truncation="disabled",
        user="me",
        prompt_cache_key="k",
        store=False,
        extra_body={  # Fields that Codex sends.
            "client_metadata": {"turn_id": "1", "x-codex-window-id": "2:0"},
            "reasoning": {"effort": "low", "summary": "auto", "context": "all_turns"},
        },
    )
    assert [item.type for item in answer.output] == ["reasoning", "message"]


@pytest.mark.parametrize("summary", [[], [{"type": "summary_text", "text": "So."}]])
def test_answer_with_only_reasoning_can_be_sent_back(
    serve_answer: ServeAnswer, summary: list[Any]
) -> None:
    question = {"role": "user", "content": "Rain?"}
    items = [question, {"type": "reasoning", "summary": summary}, question]
    answer = serve_answer("Dry.").post("/v1/responses", ASK | {"input": items})
    assert answer.status_code == 200, answer.text


def test_response_repeats_the_requested_format(serve_answer: ServeAnswer) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "a", "schema": schema}
    answer = serve_answer('{"a": 1}').post("/v1/responses", ASK | {"text": {"format": form}})
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"]["format"] == form
    assert serve_answer("x").post("/v1/responses", ASK).json()["text"]["format"] == {"type": "text"}


def test_bounded_memory_evicts_the_least_recently_used() -> None:
    store = BoundedMemory[tuple[str | None, str], str](100)
    for name in "abc":
        store.put((None, name), name, 40)
    assert store.get((None, "a")) is None and len(store) == 2
    assert store.get((None, "b")) == "b"
    store.put((None, "d"), "d", 40)
    assert store.get((None, "c")) is None and store.get((None, "b"), is_use=False) == "b"
    store.put((None, "e"), "e", 101)
    assert store.get((None, "e")) is None and store.num_bytes == 80 and store.has_forgotten
    store.put((None, "b"), "b", 10)
    assert [name for (_, name), _ in store.listed()] == ["d", "b"]
    assert store.num_bytes == 50 and store.delete((None, "b")) and not store.delete(("x", "d"))
    assert store.num_bytes == 40
    store.check()


def test_store_counts_the_memory_it_takes(serve_answer: Callable[[str], Live]) -> None:
    body = ASK | {"input": [{"role": "user", "content": "word " * 20} for _ in range(20)]}
    response = json.dumps(serve_answer("x").post("/v1/responses", body).json())
    items = json.dumps(body["input"])
    store = BoundedMemory[str, StoredResponse](1 << 19)
    tracemalloc.start()
    try:
        for number in range(200):
            copied_items = json.loads(items)
            entry = StoredResponse(copied_items, json.loads(response), held_bytes(copied_items))
            store.put(str(number), entry, entry.num_bytes)
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store) < 100
    assert 0.8 * store.num_bytes < num_bytes < 1.1 * store.num_bytes < 1.1 * (1 << 19)
