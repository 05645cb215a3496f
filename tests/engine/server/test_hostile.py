"""Hostile requests must not stop other clients: limits, few errors, short messages.

The tests count costs instead of timing them: number of errors, size of the answer, the thread that
works. ``python -m tests.endurance hostile`` measures times.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from engine import EngineConfig, RequestSpec, server_config
from engine.requests.request import Intake
from engine.server import serve
from engine.server.api_errors import APIError
from engine.server.bodies import LONG, BodyReader, Workers, _num_marks, to_json
from engine.server.context import CompletionScores, chat_scores
from engine.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest
from engine.server.serve import (
    FEWEST,
    MOST_DESCRIPTORS,
    RESERVED,
    most_connections,
    raise_descriptor_limit,
)
from engine.server.settings import ACCEPTED_AT_ONCE, ServerConfig
from engine.text.json_text import read_json, write_json
from engine.text.outputs import SampledToken
from engine.text.tokenizer import ByteTokenizer

from .conftest import Live
from .test_bad_input import check_error
from .test_living import http_answer

CHAT = [{"role": "user", "content": "hi"}]
SMALL = ServerConfig(
    max_values=2000,
    max_names=2000,
    max_prompt_ids=100,
    max_detokenize_ids=100,
    max_messages=10,
    max_parts=10,
    max_stops=4,
    max_stop_chars=16,
)
PART = {"type": "text", "text": "x"}
CALL = {
    "call_id": "1",
    "name": "f",
    "arguments": json.dumps(dict.fromkeys(map(str, range(600)), 1)),
}
"""1,200 commas and colons."""
MANY_NAMES = {"id": "1", "type": "function", "function": CALL}
TOO_MANY: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": [1] * 3000}, "more than 2000 commas .* raise --max-values"),
    ("/v1/completions", {"prompt": [[]] * 2000}, "more than 2000 colons .* raise --max-names"),
    (
        "/v1/chat/completions",
        {"messages": CHAT, "tools": [{"a": [1] * 3000}]},
        "more than 2000 commas .* raise --max-names",
    ),
    ("/tokenize", {"prompt": "x" * 101}, "This makes 101 tokens .* raise --max-prompt-ids"),
    ("/v1/completions", {"prompt": [1] * 101}, "'prompt' has 101 .* raise --max-prompt-ids"),
    ("/v1/completions", {"prompt": [[1] * 51] * 2}, "'prompt' has 102 .* raise --max-prompt-ids"),
    ("/v1/completions", {"prompt": ["x"] * 101}, "'prompt' has 101 .* raise --max-prompt-ids"),
    (
        "/v1/completions",
        {"prompt": "x", "n": 11, "allowed_token_ids": [1] * 10},
        "'allowed_token_ids' has 110 .* raise --max-prompt-ids",
    ),
    ("/v1/completions", {"prompt": "x", "stop": ["y"] * 5}, "'stop' has 5 .* raise --max-stops"),
    (
        "/v1/completions",
        {"prompt": "x", "bad_words": ["y" * 17]},
        "'bad_words' has 17 .* raise --max-stop-chars",
    ),
    ("/v1/completions", {"prompt": "x", "stop": "y" * 17}, "'stop' has 17 .* --max-stop-chars"),
    ("/v1/completions", {"prompt": "x", "stop": ["y" * 17]}, "'stop' has 17 .* --max-stop-chars"),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [1] * 5}, "'stop_token_ids' has 5"),
    ("/v1/chat/completions", {"messages": [1] * 11}, "'messages' has 11 .* raise --max-messages"),
    ("/tokenize", {"messages": CHAT * 11}, "'messages' has 11 .* raise --max-messages"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [PART] * 6}] * 2},
        "'messages' has 12 text parts, more than 10: send fewer, or raise --max-parts",
    ),
    ("/detokenize", {"tokens": [1] * 101}, "'tokens' has 101 .* raise --max-detokenize-ids"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "assistant", "tool_calls": [MANY_NAMES, MANY_NAMES]}]},
        "calls in 'messages' have more than 2000 commas, .* raise --max-names",
    ),
    (
        "/v1/responses",
        {"input": [{"type": "function_call", **CALL}, {"type": "function_call", **CALL}]},
        "calls in 'input' have more than 2000 commas, .* raise --max-names",
    ),
]


@pytest.mark.parametrize(("path", "body", "message"), TOO_MANY, ids=[m for *_, m in TOO_MANY])
def test_exceeded_limit_names_its_flag(
    serve_oracle: Callable[..., Live], path: str, body: dict[str, Any], message: str
) -> None:
    live = serve_oracle(SMALL)
    error = check_error(live.post(path, body), 400, "")
    first, *rest = message.split(" .* ")
    assert first in error["message"] and all(part in error["message"] for part in rest)
    live.check_conserved()


def test_request_at_the_limits_is_served(serve_oracle: Callable[..., Live]) -> None:
    live = serve_oracle(SMALL)
    for path, body in (
        ("/v1/completions", {"prompt": [1] * 100, "stop": ["y" * 16] * 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [PART]}] * 10}),
        ("/detokenize", {"tokens": [65] * 100}),
    ):
        assert live.post(path, body).status_code == 200, path


WRONG_EVERYWHERE: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatRequest, {"messages": [1] * 4096}),
    (ChatRequest, {"messages": [{"role": "user", "content": [1] * 4096}]}),
    (ChatRequest, {"messages": [{"role": "user", "tool_calls": [1] * 10_000}]}),
    (ChatRequest, {"messages": CHAT, "tools": [1] * 10_000}),
    (CompletionRequest, {"prompt": "x", "stop": [1] * 64}),
    (CompletionRequest, {"prompt": "x", "stop_token_ids": ["x"] * 64}),
    (CompletionRequest, {"prompt": "x"} | {f"name{n}": 1 for n in range(10_000)}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{f"n{n}": 1 for n in range(9999)}]}]}),
    (DetokenizeRequest, {"tokens": ["x"] * 10_000}),
]


@pytest.mark.parametrize(("kind", "body"), WRONG_EVERYWHERE)
def test_many_wrong_entries_give_few_errors(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as failure:
        kind.model_validate(body)
    assert failure.value.error_count() <= 3


def test_refusal_of_a_million_entries_takes_little_memory() -> None:
    reader = BodyReader(ServerConfig(), Workers())
    raw = b'{"messages": [' + b",".join([b"1"] * 1_000_000) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(APIError, match="raise --max-names"):
            reader._parse(raw, True, ChatRequest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(raw)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "x" * 2**20, "content": "hi"}]}),
        ("/v1/completions", {"prompt": "x", "model": "m" * 2**20}),
        ("/v1/completions", {"prompt": "x", "n" * 2**20: 1}),
        ("/v1/completions", {"prompt": "x", "n": "9" * 2**20}),
        ("/v1/completions", {"prompt": "x", "stream_options": {"s" * 2**20: 1}}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "t" * 2**20}]}]},
        ),
    ],
    ids=["role", "model", "name", "value", "inner name", "part"],
)
def test_error_does_not_quote_a_long_value(live: Live, path: str, body: dict[str, Any]) -> None:
    answer = live.post(path, body)
    assert answer.status_code in (400, 404) and len(answer.content) < 1000


def test_commas_inside_texts_are_not_counted(serve_oracle: Callable[..., Live]) -> None:
    live = serve_oracle(replace(SMALL, max_prompt_ids=12_000))
    body = {"prompt": ',:[{\\"' * 2000}
    assert live.post("/tokenize", body).status_code == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a,:[{"\\é'), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


def _expected_marks(value: Any) -> tuple[int, int]:
    """Return the number of commas, and of colons and opening brackets, outside texts."""
    if not isinstance(value, dict | list):
        return 0, 0
    inner = [
        _expected_marks(entry) for entry in (value.values() if isinstance(value, dict) else value)
    ]
    names = 1 + (len(value) if isinstance(value, dict) else 0)
    return (
        max(len(value) - 1, 0) + sum(commas for commas, _ in inner),
        names + sum(others for _, others in inner),
    )


@given(values, st.booleans())
def test_json_values_are_counted_without_parsing(value: Any, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    for marks, num in zip((b",", b":[{"), _expected_marks(value), strict=True):
        assert _num_marks(raw, marks, num, 1000) == num
        assert num == 0 or _num_marks(raw, marks, num - 1, 1000) > num - 1


def test_unterminated_text_is_scanned_once() -> None:
    """A retry at each quote in it took half an hour for a megabyte."""
    assert _num_marks(b'{"a":"' + b'\\",' * 100, b",", 50, 1000) == 0
    assert _num_marks(b'{"a":"b,c,\\', b",", 1, 1000) == 0


def test_number_of_skipped_strings_is_limited() -> None:
    raw = b'"" ' * 20 + b"," * 10
    assert _num_marks(raw, b",", 5, 10) == 0  # Ten adjacent strings are not JSON.
    assert _num_marks(raw, b",", 5, 21) == 10


def test_choices_share_what_is_checked_and_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 choices with many token ids or words would stop the event loop for seconds."""
    body = {"prompt": "x", "n": 8, "seed": 3, "allowed_token_ids": [5] * 10, "bad_words": ["ab"]}
    first, *others = CompletionRequest.model_validate(body).samplings(4, None, {})
    assert all(other.allowed_token_ids is first.allowed_token_ids for other in others)
    assert [each.seed for each in (first, *others)] == list(range(3, 11))
    tokenizer, encoded = ByteTokenizer(), list[str]()
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, how: encoded.append(text) or encode(text, how)
    )
    intake = Intake(EngineConfig(), tokenizer, vocab_size=320, max_model_len=4096)
    for sampling in (first, *others):
        intake.make(intake.validate(RequestSpec([1], sampling)))
    assert encoded == ["ab", " ab"]


@given(values)
def test_written_json_is_read_as_the_same_value(value: Any) -> None:
    assert json.loads(to_json(value)) == value == read_json(to_json(value).decode())


class ThreadRecorder:
    """Tokenizer that records the threads in which it is used."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.threads: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.threads.add(threading.current_thread().name.split("_")[0])
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x" * 2 * LONG}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * LONG}),
        ("/tokenize", {"messages": [{"role": "user", "content": ""}] * LONG}),
        ("/detokenize", {"tokens": [65] * 2 * LONG}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_long_work_leaves_the_event_loop(
    serve_oracle: Callable[..., Live], path: str, body: dict[str, Any]
) -> None:
    live = serve_oracle()
    served: Any = live.server._engine
    tokenizer = served.tokenizer = ThreadRecorder(served.tokenizer)
    live.post(path, body)
    tokenizer.threads.discard("engine")
    # The event loop may read a field (the size of the vocabulary), so only the presence of a worker
    # is checked.
    assert "server" in tokenizer.threads


def test_long_echoed_prompts_are_returned_whole(serve_oracle: Callable[..., Live]) -> None:
    live = serve_oracle(num_kv_tokens=16_384)
    prompt = "echo " * 700
    for n in (1, 3):
        body = {"prompt": prompt, "echo": True, "max_tokens": 1, "logprobs": 0, "n": n}
        answer = live.post("/v1/completions", body).json()
        assert all(choice["text"].startswith(prompt) for choice in answer["choices"])


def _nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize("depth", [600, 100_000])
def test_deep_tool_arguments_are_no_server_error(live: Live, depth: int) -> None:
    call = {"function": {"name": "f", "arguments": '{"a":' + "[" * depth + "]" * depth + "}"}}
    chat = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [call]}]
    answer = live.post("/v1/chat/completions", {"messages": chat, "max_tokens": 1})
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize("depth", [200, 600, 900])
def test_deep_nesting_is_served_or_refused(live: Live, depth: int) -> None:
    deep = _nested(depth)
    call = {"function": {"name": "f", "arguments": {"a": deep}}}
    for body in (
        {"messages": [*CHAT, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"messages": CHAT, "tools": [{"type": "function", "function": {"name": deep}}]},
        {"messages": [{**CHAT[0], "extra": deep}]},
        {"messages": CHAT, "chat_template_kwargs": {"deep": deep}},
        {"messages": CHAT, "response_format": {"type": deep}},
    ):
        answer = live.post("/v1/chat/completions", body | {"max_tokens": 1})
        assert answer.status_code in (200, 400), answer.text


TOOL_NAME = {"name": "weather", "description": "Weather of a city."}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "title": "City"}}}
EXTRA = {"a": "b", "c": [{"d": "e"}]}
USER = {"role": "user", "content": [{"type": "text", "text": "Rain in Bonn?"}], "name": "me"}
FUNCTION = {"name": "weather", "arguments": '{"city": "Bonn", "days": 2.5}'}
TOOL_CALL = {"id": "call_1", "type": "function", "function": FUNCTION}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "dry"}
EVERY_FIELD: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "builtin",
        "prompt": ["one", "two"],
        "echo": True,
        "stop": ["never", "ever"],
        "bad_words": ["bad"],
        "request_id": "mine",
        "user": "me",
        "logit_bias": {"65": 1.5},
        "temperature": 0.5,
    },
    "/v1/chat/completions": {
        "model": "builtin",
        "messages": [
            {"role": "system", "content": "Be brief.", "extra": EXTRA},
            USER,
            {"role": "assistant", "content": "Hm.", "reasoning_content": "So."},
            {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "dry"},
        ],
        "tools": [{"type": "function", "function": TOOL_NAME | {"parameters": PARAMETERS}}],
        "chat_template_kwargs": {"enable_thinking": True, "note": "x", "deep": EXTRA},
        "metadata": {"k": "v"},
        "stop": "never",
        "request_id": "mine",
        "prompt_cache_options": {"comparison_response_id": "chatcmpl-none"},
        "top_p": 0.5,
    },
    "/v1/messages": {
        "model": "builtin",
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "Rain in Bonn?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "So.", "signature": "s"},
                    {"type": "tool_use", "id": "t", "name": "weather", "input": EXTRA},
                ],
            },
            {"role": "user", "content": [RESULT]},
        ],
        "tools": [TOOL_NAME | {"input_schema": PARAMETERS}],
        "stop_sequences": ["never"],
        "metadata": {"user_id": "me"},
        "output_config": {"effort": "low"},
        "diagnostics": {"previous_message_id": "msg_none"},
        "temperature": 0.5,
    },
    "/v1/responses": {
        "model": "builtin",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": "Rain in Bonn?"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
            {"type": "function_call", "call_id": "c", **FUNCTION},
            {"type": "function_call_output", "call_id": "c", "output": "dry"},
        ],
        "tools": [{"type": "function", **TOOL_NAME, "parameters": PARAMETERS}],
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "metadata": {"k": "v"},
        "user": "me",
        "prompt_cache_options": {"comparison_response_id": "resp_none"},
        "top_p": 0.5,
    },
    "/tokenize": {"messages": [USER], "chat_template_kwargs": EXTRA},
}  # fmt: skip
"""Body of each dialect with text in every kind of field."""


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and value of each text, number and name; the path of a name ends in None."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield (*at, name, None), name
            yield from places(entry, (*at, name))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from places(entry, (*at, index))
    elif isinstance(value, str | float):
        yield at, value


def replace_at(value: Any, at: tuple[Any, ...], new: str) -> Any:
    """Return a copy of ``value`` with ``new`` at the path ``at``."""
    if not at:
        return new
    if at[1:] == (None,):
        return {(new if name == at[0] else name): entry for name, entry in value.items()}
    copy = value.copy()
    copy[at[0]] = replace_at(value[at[0]], at[1:], new)
    return copy


def strict_json(text: str) -> list[Any]:
    """Return each JSON object of an answer, after the checks of a strict client."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {text[:200]}")

    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    objects = [json.loads(line, parse_constant=refuse) for line in lines or [text]]
    json.dumps(objects, ensure_ascii=False).encode()  # Fails for lone surrogates.
    return objects


@pytest.mark.full("/v1/completions-whole", "/v1/chat/completions-streamed", "/tokenize-whole")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", EVERY_FIELD)
def test_lone_surrogate_is_harmless_in_every_field(
    serve_answer: Callable[..., Live], path: str, stream: bool
) -> None:
    """It is served as U+FFFD or refused before any computation. Stored responses stay readable."""
    live = serve_answer("Dry.")
    body = EVERY_FIELD[path] | ({"stream": stream} if path != "/tokenize" else {})
    body |= {"max_tokens": 2} if path in ("/v1/messages", "/v1/completions") else {}
    assert live.post(path, body).status_code == 200
    num_served = 0
    for at, old in places(EVERY_FIELD[path]):
        if isinstance(old, float):
            continue
        payload = json.dumps(replace_at(body, at, old + "\ud83d"))
        assert r"\ud83d" in payload
        before = live.report()["usage"]["requests"]
        answer = live.post_raw(path, payload)
        assert answer.status_code in (200, 400, 404), (at, answer.text)
        [*_, last] = strict_json(answer.text)
        assert r"\ud83d" not in answer.text
        if answer.status_code != 200:
            assert live.report()["usage"]["requests"] == before, at
            continue
        num_served += 1
        assert '"error":{' not in answer.text.replace(" ", ""), at
        if path == "/v1/responses":
            stored = live.get(f"/v1/responses/{last.get('response', last)['id']}")
            assert stored.status_code == 200 and len(strict_json(stored.text)) == 1
    assert num_served >= 4


@pytest.mark.parametrize("path", EVERY_FIELD)
def test_number_without_a_json_form_is_refused(
    serve_answer: Callable[..., Live], path: str
) -> None:
    live = serve_answer("Dry.")
    before = live.report()["usage"]["requests"]
    for number in ("1e400", "-1e400", "NaN", "Infinity", "-Infinity"):
        for at, _ in places(EVERY_FIELD[path]):
            if at[-1] is not None:
                payload = json.dumps(replace_at(EVERY_FIELD[path], at, "@")).replace('"@"', number)
                answer = live.post_raw(path, payload)
                assert answer.status_code == 400 and number in answer.text, (at, answer.text)
    assert live.report()["usage"]["requests"] == before


BAD_ARGUMENTS = r'{"city": "Bo\ud83dnn", "days": 1e400, "deep": [NaN, "\udfff"]}'


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize(
    "call",
    [
        f'{{"name": "weather", "arguments": {BAD_ARGUMENTS}}}',
        f'{{"arguments": {BAD_ARGUMENTS}, "name": "weather"}}',
        f'{{"name": "we\\ud800ather", "arguments": {BAD_ARGUMENTS}}}',
        r'{"arguments": {"city": "\ud800"}, "name": "\ud800"}',
    ],
)
def test_bad_json_of_a_model_gives_a_valid_answer(
    serve_answer: Callable[..., Live], path: str, call: str, stream: bool
) -> None:
    live = serve_answer(f"<think>Hm.</think>\n<tool_call>\n{call}\n</tool_call>")
    body = EVERY_FIELD[path] | {"stream": stream}
    body |= {"max_tokens": 500} if path == "/v1/messages" else {}
    answer = live.post(path, body)
    assert answer.status_code == 200, answer.text
    [*_, last] = strict_json(answer.text)
    assert '"error":{' not in answer.text.replace(" ", "")
    if path == "/v1/responses":
        stored = live.get(f"/v1/responses/{last.get('response', last)['id']}")
        assert stored.status_code == 200 and len(strict_json(stored.text)) == 1


@pytest.mark.parametrize("depth", [50, 150, 199, 400, 700])
def test_deep_stored_response_can_be_read(live: Live, depth: int) -> None:
    parameters = {"type": "object", "properties": _nested(depth)}
    tool = {"type": "function", "name": "f", "parameters": parameters}
    for stream in (False, True):
        body = {"input": "x", "max_output_tokens": 2, "tools": [tool], "stream": stream}
        answer = live.post("/v1/responses", body)
        assert answer.status_code == (200 if depth < 190 else 400), answer.text
        if answer.status_code == 200:
            [*_, last] = strict_json(answer.text)
            stored = live.get(f"/v1/responses/{last.get('response', last)['id']}")
            assert stored.json()["tools"][0]["parameters"] == parameters


def test_score_of_minus_infinity_is_written_as_a_number() -> None:
    score = SampledToken(65, float("-inf"), ((65, float("-inf")), (66, -1.0)))
    for written in (
        CompletionScores(ByteTokenizer(), 2).write([65], [score]),
        chat_scores(ByteTokenizer(), [score], 2),
    ):
        assert "-9999.0" in to_json(written).decode() and strict_json(to_json(written).decode())


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
)


@given(json_values)
def test_written_json_can_be_read(value: Any) -> None:
    """With or without escapes, by the server and by clients."""
    for text in (write_json(value), to_json(value).decode()):
        [read] = strict_json(text)
        assert read_json(text) == read
        text.encode()
    if all(isinstance(entry, str) or math.isfinite(entry) for _, entry in places(value)):
        assert read_json(json.dumps(value)) == read


def test_unfinished_body_times_out(serve_oracle: Callable[..., Live]) -> None:
    live = serve_oracle(ServerConfig(body_timeout_s=0.1))
    with live.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"prompt": '
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


HALF_HEADER = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Half: "
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def read_all(connection: socket.socket) -> bytes:
    """Return all bytes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


def test_unfinished_headers_time_out(serve_oracle: Callable[..., Live]) -> None:
    """On a new connection, after an answer, and without any byte. A complete request may take
    longer."""
    live = serve_oracle(ServerConfig(header_timeout_s=1.0), step_s=0.05)
    slow = live.send("/v1/completions", {"prompt": "x", "max_tokens": 25, "ignore_eos": True})
    with live.connect() as first, live.connect() as later, live.connect() as silent:
        first.sendall(HALF_HEADER)  # First: a delay would make this connection a silent one.
        later.sendall(HEALTH)
        answer = b""
        while not answer.endswith(b"}"):
            answer += later.recv(65536)
        later.sendall(HALF_HEADER)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(40):
                first.sendall(b"a")
                time.sleep(0.05)
        for connection in (first, later):
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive in time" in answer
        assert read_all(silent) == b""
    assert http_answer(slow).startswith("HTTP/1.1 200")
    slow.close()


def test_idle_connections_make_room_at_the_limit(
    monkeypatch: pytest.MonkeyPatch, serve_oracle: Callable[..., Live]
) -> None:
    """The longest idle one is closed first, then one with an unfinished body, never one with a
    running request."""
    monkeypatch.setattr(serve, "STALLED_S", 1000.0)
    live = serve_oracle(ServerConfig(max_connections=8), step_s=0.02)
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(
            live.send("/v1/completions", {"prompt": "x", "max_tokens": 150, "ignore_eos": True})
        )
        live.wait_for(lambda report: report["num_running"] == 1)
        upload = stack.enter_context(live.connect())
        upload.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        # After an answer on another connection, the server has read the headers above.
        assert httpx.get(f"{live.url}/health", timeout=30).status_code == 200
        idle = [stack.enter_context(live.connect()) for _ in range(30)]
        for connection in idle:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(HALF_HEADER)
        for _ in range(3):  # A persistent connection could be closed.
            assert httpx.get(f"{live.url}/health", timeout=30).status_code == 200
        still_open = [connection for connection in idle if not has_ended(connection)]
        assert 0 < len(still_open) <= 6 and still_open == idle[-len(still_open) :]
        assert not has_ended(upload)
        time.sleep(1.1 * serve.NEW_S)
        monkeypatch.setattr(serve, "STALLED_S", 0.0)
        for _ in range(7):
            stack.enter_context(live.send("/v1/completions", SLOW))
        assert read_all(upload).startswith(b"HTTP/1.1 503")
        refused = stack.enter_context(live.connect())
        refused.sendall(HEALTH)
        answer = read_all(refused)
        assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 1" in answer
        assert not has_ended(running)
    live.wait_until_idle()


SLOW = {"prompt": "y", "max_tokens": 150, "ignore_eos": True}


def has_ended(connection: socket.socket) -> bool:
    """Return True if the server has closed the connection or has answered."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) is not None
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        connection.settimeout(30)


@pytest.mark.parametrize("soft", [20, 256, 1 << 20])
def test_connection_limit_leaves_file_descriptors(
    monkeypatch: pytest.MonkeyPatch, soft: int
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    monkeypatch.setattr("os.listdir", lambda _: ["0"] * 40)
    left = soft - most_connections()
    assert left == 40 + RESERVED or most_connections() == FEWEST
    assert most_connections() >= FEWEST and RESERVED >= 8 * ACCEPTED_AT_ONCE
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (min(soft, 100), soft))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    raise_descriptor_limit()
    assert raised == ([(min(soft, MOST_DESCRIPTORS), soft)] if soft > 100 else [])


def test_openapi_page_describes_bodies(live: Live) -> None:
    description = httpx.get(live.url + "/openapi.json", timeout=60).json()
    version = httpx.get(live.url + "/version", timeout=60).json()["version"]
    assert description["info"]["version"] == version
    body = description["paths"]["/v1/completions"]["post"]["requestBody"]
    assert "prompt" in body["content"]["application/json"]["schema"]["properties"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_messages": 0}, r"max_messages must be an integer of 1 or more \(got 0\)"),
        ({"max_stops": 65}, "max_stops must be an integer from 1 to 64"),
        ({"body_timeout_s": 0}, "body_timeout_s must be a number of seconds above 0"),
        ({"header_timeout_s": -1}, "header_timeout_s must be a number of seconds above 0"),
        ({"max_connections": 0}, "max_connections must be an integer of 1 or more"),
    ],
)
def test_bad_limits_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server_config(**settings)
