"""Hostile requests must not stop other clients: limits, few errors, short messages.

The tests count costs instead of timing them: number of errors, size of the answer, the thread that
works. ``python -m tests.endurance hostile`` measures times.
"""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.front.server import transport
from engine.front.server.settings import ServerConfig

from .conftest import Live, Serve

CHAT = [{"role": "user", "content": "hi"}]


HALF_HEADER = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Half: "
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b"
)


def read_all(connection: socket.socket) -> bytes:
    """Return all bytes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",), b"200"),
        ((b"GET /health HTTP/1.1\r", b"\nHost: localhost\r\n\r", b"\n"), b"200"),
        ((b"GET /health HTTP/1.1\nHost: x\n\n",), b"400"),
        ((b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\nContent-Length: 9\r\n\r\n",), b"400"),
        ((b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b", b"\n\r\n"), b"400"),
        ((b"GET /health HTTP/1.1\r\nHost: localhost\r\n X-Cache-Salt: y\r\n\r\n",), b"400"),
        ((b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\r\n\tc\r\n\r\n",), b"400"),
    ],
)
def test_headers_that_proxies_read_differently_are_refused(
    serve_oracle: Serve, pieces: tuple[bytes, ...], status: bytes
) -> None:
    with serve_oracle().connect() as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)
        assert connection.recv(65536).startswith(b"HTTP/1.1 " + status)


def test_a_body_may_have_any_line_feeds(serve_oracle: Serve) -> None:
    live = serve_oracle()
    body = b'{"prompt": "x",\n "max_tokens":\n\t1}\n'
    for _ in range(2):  # The second request follows a body on the same connection.
        kind = {"content-type": "application/json"}
        answer = live.http.post("/v1/completions", content=body, headers=kind)
        assert answer.status_code == 200


def test_unfinished_headers_time_out(serve_oracle: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a new connection, after an answer, and without any byte. A complete request may take
    longer, also if it arrived together with the one before it."""
    monkeypatch.setattr(transport, "HEADERS_S", 1.0)
    live = serve_oracle(ServerConfig(idle_timeout_s=1.0), step_s=0.05)
    body = b'{"prompt": "x", "max_tokens": 25, "ignore_eos": true}'
    slow = live.connect()
    slow.sendall(HEALTH + POST % (len(body), body))
    with live.connect() as first, live.connect() as later, live.connect() as silent:
        first.sendall(HALF_HEADER)
        later.sendall(HEALTH)
        answer = b""
        while not answer.endswith(b"}"):
            answer += later.recv(65536)
        later.sendall(HALF_HEADER)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(40):
                first.sendall(b"a")
                time.sleep(0.05)
        assert [read_all(connection) for connection in (first, later, silent)] == [b""] * 3
    assert read_all(slow).count(b"HTTP/1.1 200") == 2
    slow.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "x" * 2**20, "content": "hi"}]}),
        ("/v1/completions", {"prompt": "x", "model": "m" * 2**20}),
        ("/v1/completions", {"prompt": "x", "n" * 2**20: 1}),
        ("/v1/completions", {"prompt": "x", "n": "9" * 2**20}),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"s" * 2**20: 1}}),
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


def test_long_echoed_prompts_are_returned_whole(serve_oracle: Serve) -> None:
    live = serve_oracle(num_kv_tokens=16_384)
    prompt = "echo " * 700
    for n in (1, 3):
        body = {"prompt": prompt, "echo": True, "max_tokens": 1, "logprobs": 0, "n": n}
        answer = live.post("/v1/completions", body).json()
        assert all(choice["text"].startswith(prompt) for choice in answer["choices"])


def _nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


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
        "metadata": {"k": "v"}, "service_tier": "new", "prompt_cache_retention": "7d",
        "stop": "never",
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
        "metadata": {"user_id": "me"}, "service_tier": "new",
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
    serve_answer: Serve, path: str, stream: bool
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
def test_number_without_a_json_form_is_refused(serve_answer: Serve, path: str) -> None:
    live = serve_answer("Dry.")
    before = live.report()["usage"]["requests"]
    for number in ("1e400", "-1e400", "NaN", "Infinity", "-Infinity"):
        for at, _ in places(EVERY_FIELD[path]):
            if at[-1] is not None:
                payload = json.dumps(replace_at(EVERY_FIELD[path], at, "@")).replace('"@"', number)
                answer = live.post_raw(path, payload)
                assert answer.status_code == 400, (at, answer.text)
    assert live.report()["usage"]["requests"] == before


def entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, name or index) of every entry."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for name, entry in items:
        yield value, name
        if isinstance(entry, dict | list):
            yield from entries(entry)


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 10**400, 1e300, float("nan"), float("inf"), "", "\ud800"),
    *("<|im_end|>\n<|im_start|>system\n", "x" * 10**5, "[" * 2000, "a{1000000000}"),
    *('root ::= [b-d] [b-d] [b-d] "a"{1000000}', [], {}, [1] * 5000, ["x"] * 5000, [[]] * 5000),
    *([{"role": "user"}] * 5000, _nested(200), _nested(450)),
)
ADDED = ("top_k", "min_p", "seed", "stop_token_ids", "logit_bias", "best_of", "structured_outputs")


@given(data=st.data())
def test_random_changes_of_a_body_are_served_or_refused(live: Live, data: st.DataObject) -> None:
    """One or two entries are replaced or added, and a byte may flip. The error is one sentence."""
    path = data.draw(st.sampled_from(sorted(EVERY_FIELD)))
    body = copy.deepcopy(EVERY_FIELD[path])
    places = [*entries(body), *((body, name) for name in ADDED)]
    for _ in range(data.draw(st.integers(1, 2))):
        container, name = places[data.draw(st.integers(0, len(places) - 1))]
        container[name] = data.draw(st.sampled_from(ODD_VALUES))
    raw = bytearray(json.dumps(body).encode())
    if data.draw(st.integers(0, 9)) == 0:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    kind = {"Content-Type": "application/json"}
    answer = live.http.post(path, content=bytes(raw), headers=kind)
    assert answer.status_code < 500, (raw[:300], answer.text)
    if answer.status_code >= 400:
        assert "\n" not in answer.json()["error"]["message"] and len(answer.content) < 2000


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
    serve_answer: Serve, path: str, call: str, stream: bool
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


def test_unfinished_body_times_out(serve_oracle: Serve) -> None:
    live = serve_oracle(ServerConfig(body_timeout_s=0.1))
    with live.connect() as connection:
        connection.sendall(POST % (100, b'{"prompt": '))
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")
