"""OpenAI's Python client: completions, chats and streams, synchronous and asynchronous."""

from __future__ import annotations

import itertools
import json
import re
from datetime import datetime
from typing import Any

import openai
import pytest

from engine.text.tokenizer_files import HFTokenizer
from tests.refused import refused

from .conftest import Live, Serve

GREEDY: dict[str, Any] = {"model": "builtin", "temperature": 0}
LONG = "The quick brown fox jumps over the lazy dog. " * 12
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
CHAT = [
    {"role": "system", "content": "Be brief. " * 20},
    {"role": "user", "content": "Hello there"},
]


def test_chats_and_responses_count_the_same_written_tokens(live: Live) -> None:
    chat = {"messages": CHAT, "max_tokens": 4, "temperature": 0, "cache_salt": "written"}
    first_details = live.post("/v1/chat/completions", chat).json()["usage"]["prompt_tokens_details"]
    events = live.post("/v1/chat/completions", chat | STREAMED).text.split("data: ")
    later_details = json.loads(events[-2])["usage"]["prompt_tokens_details"]
    request = {"input": CHAT, "max_output_tokens": 4, "cache_salt": "written too"}
    response_details = live.post("/v1/responses", request).json()["usage"]["input_tokens_details"]
    [boundary] = live.post("/tokenize", {"messages": CHAT}).json()["boundaries"][-1:]
    assert first_details["cache_write_tokens"] == response_details["cache_write_tokens"] == boundary
    assert later_details["cached_tokens"] > 0
    assert later_details["cached_tokens"] + later_details["cache_write_tokens"] == boundary


@pytest.mark.parametrize("server", ["live", "builtin"])
def test_streamed_completion_equals_whole_one(server: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(server).client
    options = {"prompt": "fourth " + LONG, "max_tokens": 20, "logprobs": 2, "echo": True, **GREEDY}
    whole = client.completions.create(**options)
    events = list(
        client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    )
    assert "".join(event.choices[0].text for event in events[:-1]) == whole.choices[0].text
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].choices == [] and events[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    scores = whole.choices[0].logprobs
    for name in ("tokens", "token_logprobs", "text_offset"):
        pieces = [getattr(event.choices[0].logprobs, name) for event in events[:-1]]
        assert list(itertools.chain(*pieces)) == getattr(scores, name)


@pytest.mark.parametrize("server", ["live", "builtin"])
def test_streamed_chat_equals_whole_one(server: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(server).client
    options = {
        "messages": CHAT,
        "max_completion_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
        **GREEDY,
    }
    whole = client.chat.completions.create(**options)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    events = list(
        client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events[:-1])
    assert text == whole.choices[0].message.content
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    scores = [
        entry
        for event in events[:-1]
        if event.choices[0].logprobs
        for entry in event.choices[0].logprobs.content
    ]
    assert len(scores) == whole.usage.completion_tokens
    assert scores == whole.choices[0].logprobs.content


@pytest.mark.parametrize("thinking", [True, False])
def test_decode_saves_no_state_in_dropped_reasoning(serve_oracle: Serve, thinking: bool) -> None:
    live = serve_oracle()
    options: dict[str, Any] = {
        "chat_template_kwargs": {"enable_thinking": thinking},
        "ignore_eos": True,
    }
    live.client.chat.completions.create(
        messages=CHAT, max_completion_tokens=200, extra_body=options, **GREEDY
    )
    live.wait_until_idle()
    tree = "\n".join(live.report()["tree"])
    assert " boundary" in tree
    assert (" decode" in tree) == (not thinking)


def test_token_ids_and_batches_equal_single_texts(live: Live) -> None:
    tokenizer = HFTokenizer()
    texts = ["fifth " + LONG, "sixth " + LONG]
    ids = [tokenizer.encode(text) for text in texts]

    def texts_of(prompt: Any) -> list[str]:
        answer = live.client.completions.create(prompt=prompt, max_tokens=6, **GREEDY)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    single_texts = [texts_of(text)[0] for text in texts]
    assert texts_of(texts) == texts_of(ids) == single_texts
    assert texts_of(ids[1]) == single_texts[1:]


def test_n_choices_are_ordered_by_prompt(builtin: Live) -> None:
    options: dict[str, Any] = {"model": "builtin", "temperature": 1.5, "max_tokens": 12, "seed": 7}
    twice = [
        builtin.client.completions.create(prompt=["seventh", "eighth"], n=3, **options)
        for _ in range(2)
    ]
    texts = [[choice.text for choice in answer.choices] for answer in twice]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 6 and len(set(texts[0])) > 1
    single = builtin.client.completions.create(prompt="eighth", n=3, **options)
    assert [choice.text for choice in single.choices] == texts[0][3:]
    assert twice[0].usage.prompt_tokens == len("seventh") + len("eighth")


def test_echo_scores_the_prompt_without_the_cache(builtin: Live) -> None:
    """Evaluation harnesses use this: no new tokens, a score for each prompt token but the first."""
    prompt = "tenth " + LONG
    builtin.client.completions.create(prompt=prompt, max_tokens=1, **GREEDY)
    scored = [
        builtin.client.completions.create(
            prompt=prompt, max_tokens=num_new, echo=True, logprobs=3, **GREEDY
        )
        for num_new in (0, 1)
    ]
    for num_new, answer in enumerate(scored):
        scores = answer.choices[0].logprobs
        assert answer.choices[0].text.startswith(prompt)
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert answer.usage.completion_tokens == num_new
        assert len(scores.tokens) == len(prompt) + num_new
        assert scores.token_logprobs[0] is None and all(
            score < 0 for score in scores.token_logprobs[1:]
        )
        assert all(len(top) == 3 for top in scores.top_logprobs[1:])
        assert scores.text_offset == list(range(len(prompt) + num_new))
        assert "".join(scores.tokens[: len(prompt)]) == prompt
    first, second = (answer.choices[0].logprobs.token_logprobs for answer in scored)
    assert first == second[: len(prompt)]


def test_model_cards(serve_oracle: Serve) -> None:
    from engine.front.server.settings import ServerConfig

    live = serve_oracle(ServerConfig(served_model_name=("org/mine",)))
    [card] = live.client.models.list().data
    page = live.get("/v1/models").json()  # The fields that Anthropic's clients read.
    assert page["first_id"] == page["last_id"] == "org/mine" and page["has_more"] is False
    assert (card.type, card.display_name) == ("model", "org/mine")
    assert card.max_input_tokens == card.max_tokens == 4096
    assert datetime.fromisoformat(card.created_at).timestamp() == card.created
    assert card.id == "org/mine" and live.client.models.retrieve("org/mine").max_model_len == 4096
    refused("use 'org/mine'", live.client.models.retrieve, "other", kind=openai.NotFoundError)
    answer = live.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200, "the model's name is optional"


def test_model_has_several_names_or_any(serve_oracle: Serve) -> None:
    """As Claude Code names one model for its work and others for its subagents."""
    from engine.front.server.settings import ServerConfig

    live = serve_oracle(ServerConfig(served_model_name=("opus", "haiku")))
    assert [card.id for card in live.client.models.list().data] == ["opus", "haiku"]
    assert live.client.models.retrieve("haiku").id == "haiku"
    body = {"prompt": "x", "max_tokens": 1}
    for name in ("opus", "haiku"):
        assert live.post("/v1/completions", body | {"model": name}).json()["model"] == "opus"
    assert live.post("/v1/completions", body | {"model": "opus,haiku"}).status_code == 404
    live = serve_oracle(ServerConfig(served_model_name=("*",)))
    answer = live.post("/v1/completions", body | {"model": "claude-anything"})
    assert (
        answer.status_code == 200 and answer.json()["model"] == live.client.models.list().data[0].id
    )


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/api/chat", "use /v1/chat/completions"),
        ("/api/generate", "use /v1/completions"),
        ("/api/tags", "use /v1/models"),
        ("/api/embed", "Embeddings are not served"),
        ("/v1/embeddings", "Embeddings are not served"),
        ("/v1/load_lora_adapter", "merge the adapter"),
        ("/v1/none", "see /openapi.json"),
        ("/chat/completions", "an address with /v1"),
    ],
)
def test_paths_of_other_servers_name_the_nearest_that_works(
    live: Live, path: str, said: str
) -> None:
    answer = live.post(path, {})
    assert answer.status_code == 404 and said in answer.json()["error"]["message"]


def test_tokenize_and_detokenize(live: Live) -> None:
    answer = live.post("/tokenize", {"prompt": "hé<|im_end|>"}).json()
    assert answer == {"count": 4, "max_model_len": 4096, "tokens": [104, 195, 169, 258]}
    assert live.post("/detokenize", {"tokens": answer["tokens"]}).json() == {
        "prompt": "hé<|im_end|>"
    }
    chat = live.post("/tokenize", {"messages": CHAT}).json()
    assert chat["count"] == len(chat["tokens"]) == chat["boundaries"][-1]


def test_answers_follow_the_requested_grammar(live: Live) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    named = {"name": "kinds", "schema": schema, "strict": True}
    chat = live.client.chat.completions.create(
        model="builtin",
        messages=[{"role": "user", "content": "Which?"}],
        response_format={"type": "json_schema", "json_schema": named},
        max_tokens=600,
        n=2,
    )
    assert all(json.loads(c.message.content or "")["kind"] in "ab" for c in chat.choices)
    for form, expected in (
        ({"structured_outputs": {"json": json.dumps(schema)}}, r'\{\s*"kind"\s*:\s*"[ab]"\s*\}'),
        ({"structured_outputs": {"regex": "x[0-9]{2}"}}, "x[0-9]{2}"),
        ({"structured_outputs": {"grammar": 'root ::= "l" | "r"'}}, "l|r"),
        ({"structured_outputs": {"choice": ["up", "down"]}}, "up|down"),
        ({"structured_outputs": {"json": schema}}, r'\{\s*"kind"\s*:\s*"[ab]"\s*\}'),
    ):
        stream = live.client.completions.create(
            model="builtin", prompt="Which?", max_tokens=600, stream=True, extra_body=form
        )
        text = "".join(event.choices[0].text for event in stream)
        assert re.fullmatch(expected, text), (form, text)
    live.check_conserved()
