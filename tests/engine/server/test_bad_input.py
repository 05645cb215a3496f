"""Bad requests get a 4xx answer in OpenAI's shape with one helpful sentence, and leak nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import httpx
import pytest

from engine.plugins.dialects.anthropic_body import CountRequest, MessagesRequest
from engine.plugins.dialects.responses_body import ResponsesRequest
from engine.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Strict,
    TokenizeRequest,
)
from engine.server.settings import ServerConfig

from .conftest import Live

CHAT = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
EPHEMERAL = {"type": "ephemeral"}

BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    *(({"prompt": prompt}, "prompt") for prompt in ("", [], [[]], 7, ["a", 1], [True], {})),
    *(({"prompt": prompt}, "ids|flat list") for prompt in ([320], [-1], [2**80])),
    ({"prompt": ["x"] * 100_000, "n": 128}, "answers are more than the queue"),
    ({"prompt": "x", "max_token": 3}, "did you mean 'max_tokens'?"),
    ({"prompt": "x", "logit_bias": {"x": 1}}, "'logit_bias.x'"),
    ({"prompt": "x", "logit_bias": {"5": 101}}, "'logit_bias.5'"),
    ({"prompt": "x", "logit_bias": {"320": 1}}, "logit_bias"),
    ({"prompt": "x", "allowed_token_ids": [9999]}, "token ids"),
    ({"prompt": "x", "allowed_token_ids": [1], "guided_regex": "a"}, "allowed_token_ids"),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ({"prompt": "x", "stream_options": {"include": 1}}, "'stream_options.include'"),
]
"""Bodies with values that fit their field but not the model or each other, and a word of the error.
``test_refusals_are_one_line_and_name_the_parameter`` sends values that do not fit their field."""
ASSISTANT_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"content": "x"}]}, "'messages.0.role' is missing"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "Unexpected message role: wizard"),
    ({"messages": [{"role": "a\nb\rc", "content": "x"}]}, "Unexpected message role: a b c"),
    ({"messages": [{"role": "user", "content": 5}]}, "'messages.0.content' must be text or a list"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
            ]
        },
        "supports text only: remove the 'image_url' part",
    ),
    ({"messages": [{"role": "user"}]}, "'messages.0' has no 'content': add its text."),
    ({"messages": [*CHAT, {"role": "user", "content": None}]}, "'messages.1' has no 'content'"),
    (
        {"messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": []}, *CHAT]},
        "'messages.1' has neither 'content' nor 'tool_calls'",
    ),
    ({"messages": CHAT, "top_logprobs": 3}, "'top_logprobs' requires 'logprobs'"),
    (
        {"messages": CHAT, "max_tokens": 5, "max_completion_tokens": 6},
        "'max_tokens' 5 and 'max_completion_tokens' 6 are different limits",
    ),
    (
        {"messages": CHAT, "response_format": {"type": "structural_tag"}},
        "'response_format.type' must be 'text', 'json_object' or 'json_schema'",
    ),
    ({"messages": CHAT, "tool_choice": "required"}, "'tool_choice' needs 'tools'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "'messages.0' is a tool's result, but no"),
    (
        {
            "messages": [
                *CHAT,
                ASSISTANT_CALL,
                {"role": "tool", "tool_call_id": "2", "content": "x"},
            ]
        },
        "'messages.2' is the result of the call '2', which no message before it makes",
    ),
    (
        {
            "messages": CHAT,
            "tool_choice": "required",
            "tools": TOOLS,
            "response_format": {"type": "json_object"},
        },
        "'tool_choice' requires a call, so no other form",
    ),
    ({"messages": CHAT, "tools": [*TOOLS, TOOLS[0]]}, "names must be unique"),
    ({"messages": CHAT, "tool_choice": "maybe", "tools": TOOLS}, "'none', 'auto', 'required'"),
    ({"messages": CHAT, "tool_choice": {"type": "function"}}, "'tool_choice.function' is missing"),
    (
        {"messages": CHAT, "tool_choice": {"type": "allowed_tools"}},
        "'tool_choice.type' must be 'function' (got \"allowed_tools\").",
    ),
    (
        {
            "messages": CHAT,
            "tool_choice": {"type": "function", "function": {"name": "g"}},
            "tools": TOOLS,
        },
        "no tool 'g' among",
    ),
    ({"messages": CHAT, "tools": [{"type": "web_search"}]}, "of type 'web_search' are not"),
    ({"messages": CHAT, "tools": [{"type": "function"}]}, "a 'function' with a 'name'"),
    (
        {"messages": CHAT, "parallel_tool_calls": "no"},
        "'parallel_tool_calls' must be true or false",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "cache_control": EPHEMERAL}] * 6},
        "marks 6 places of this chat, and at most 4",
    ),
    (
        {"messages": CHAT, "response_format": {"type": "json_schema"}},
        "requires 'json_schema.schema'",
    ),
    (
        {"messages": CHAT, "guided_choice": ["a"], "guided_regex": "a"},
        "an answer can have only one form",
    ),
    (
        {"messages": CHAT, "continue_final_message": True, "add_generation_prompt": True},
        "continues the last message",
    ),
    ({"messages": CHAT, "continue_final_message": True}, "must be the assistant's"),
    ({"messages": CHAT, "request_id": "a b\r\nX-Evil: 1"}, "must not contain control characters"),
    ({"messages": CHAT, "guided_json": {"type": "foo"}}, "cannot be used: Invalid type: foo"),
    ({"messages": CHAT, "guided_regex": "(?=a)b"}, "'guided_regex': this grammar cannot be"),
    ({"messages": CHAT, "guided_regex": "a{1000000000}"}, "'guided_regex': this grammar is too"),
    (
        {"messages": CHAT, "guided_grammar": 'root ::= "a"{1000000}'},
        "is too complex to follow",
    ),
    (
        {"messages": CHAT, "structured_outputs": {"json": {"type": "foo"}}},
        "'structured_outputs.json'",
    ),
    (
        {
            "messages": CHAT,
            "max_tokens": 9,
            "guided_grammar": 'root ::= [b-d] [b-d] [b-d] "a"{1000000}',
        },
        "is too complex to follow",
    ),
]


def check_error(answer: httpx.Response, status: int, message: str) -> dict[str, Any]:
    """Check an error of OpenAI's shape: one short line with one of the ``|``-separated parts of
    ``message``."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert any(part in error["message"] for part in message.split("|")), error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 300
    return error


@pytest.mark.parametrize(("body", "message"), BAD_COMPLETIONS, ids=[m for _, m in BAD_COMPLETIONS])
def test_bad_completions_are_refused(live: Live, body: dict[str, Any], message: str) -> None:
    check_error(live.post("/v1/completions", body), 400, message)
    check_error(live.post("/v1/completions", body | {"stream": True}), 400, message)


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_obfuscation": False}, {}])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
    ],
)
def test_stream_options_require_a_stream(
    live: Live, path: str, body: dict[str, Any], options: dict[str, bool]
) -> None:
    message = "'stream_options' requires a streamed answer: set 'stream' to true, or omit it."
    request = body | {"stream_options": options}
    check_error(live.post(path, request), 400, message)
    check_error(live.post(path, request | {"stream": False}), 400, message)
    assert live.post(path, request | {"stream": True}).status_code == 200
    assert live.post(path, body | {"stream_options": None}).status_code == 200


@pytest.mark.parametrize(("body", "message"), BAD_CHATS, ids=[m for _, m in BAD_CHATS])
def test_bad_chats_are_refused(live: Live, body: dict[str, Any], message: str) -> None:
    check_error(live.post("/v1/chat/completions", body), 400, message)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "The body is empty. Send one JSON object."),
        (b"{", "The body is not valid JSON"),
        (b'{"prompt":\n "x",, }', "double quotes, line 2, column 6)"),
        (b"[1, 2]", "The body must be one JSON object, with names"),
        (b'"text"', "The body must be one JSON object"),
        (b"null", "The body"),
        (b'{"prompt": "\xff\xfe"}', "not valid UTF-8 JSON"),
        (b"\x00\x01\x02", "The body is not valid"),
        (b"[" * 60_000, "at most 200 levels deep"),
        (
            b'{"prompt": "x", "user": ' + b"[" * 200 + b"]" * 200 + b"}",
            "may be nested at most 200 levels deep",
        ),
        (b'{"prompt": "x", "\\ud800": 1}', "'\N{REPLACEMENT CHARACTER}' is not a parameter"),
        (b'{"prompt": "x", "temperature": NaN}', "cannot be read: NaN is not a number of JSON."),
        (b'{"prompt": "x", "user": -Infinity}', "cannot be read: -Infinity is not a number"),
        (b'{"prompt": "x", "user": [{"a": 1e999}]}', "the number 1e999 is too large."),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "has a number that is too long"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_broken_bodies_are_refused(live: Live, payload: bytes, message: str) -> None:
    check_error(_send(live, payload, "application/json"), 400, message)


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models"])
def test_probes_may_ask_for_the_head_alone(live: Live, path: str) -> None:
    answer = httpx.head(f"{live.url}{path}")
    assert (answer.status_code, answer.content) == (200, b"")


def test_lone_surrogate_is_quoted_as_replacement_character(live: Live) -> None:
    answer = _send(live, b'{"prompt": "x", "model": "\\ud800"}', "application/json")
    check_error(answer, 404, "The model '\N{REPLACEMENT CHARACTER}' is not served")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_json_requires_its_content_type(live: Live, content_type: str) -> None:
    """``curl -d`` omits it, and a foreign web page cannot set it without a preflight request."""
    answer = _send(live, b'{"prompt": "x"}', content_type)
    check_error(answer, 400, "add -H 'Content-Type: application/json'")


def _send(live: Live, payload: bytes, content_type: str) -> httpx.Response:
    headers = {"Content-Type": content_type}
    return httpx.post(live.url + "/v1/completions", content=payload, headers=headers, timeout=60)


def test_unknown_models_and_paths_are_refused(live: Live) -> None:
    answer = live.post("/v1/completions", {"model": "gpt-5", "prompt": "x"})
    error = check_error(answer, 404, "The model 'gpt-5' is not served: use 'builtin'.")
    assert error["code"] == "model_not_found"
    missing = "The path /v2/completions does not exist: did you mean /v1/completions?"
    check_error(live.get("/v2/completions"), 404, missing)
    missing = "The path /chat/completions does not exist: did you mean /v1/chat/completions?"
    check_error(live.get("/chat/completions"), 404, missing)
    check_error(live.get("/elsewhere"), 404, "see /openapi.json for all paths")
    check_error(live.get("/v1/completions"), 405, "does not support GET")
    refused = live.post("/v1/responses/1", {})
    check_error(refused, 405, "does not support POST")
    assert refused.headers["allow"] == "DELETE, GET"


def test_prompt_of_three_megabytes_is_refused(
    live: Live, serve_oracle: Callable[..., Live]
) -> None:
    huge = "x" * (3 << 20)
    check_error(live.post("/v1/completions", {"prompt": huge}), 400, "shorten the prompt")
    check_error(
        live.post("/v1/completions", {"prompt": [65] * (1 << 18)}), 400, "shorten the prompt"
    )
    chat = {"messages": [{"role": "user", "content": huge}]}
    check_error(live.post("/v1/chat/completions", chat), 400, "shorten the prompt")
    small = serve_oracle(ServerConfig(max_body_mib=1))
    error = "The body is larger than 1 MiB: send less, or raise --max-body-mib."
    check_error(small.post("/v1/completions", {"prompt": huge}), 413, error)

    def unannounced() -> Any:
        for _ in range(4096):
            yield b"x" * 1024

    check_error(
        httpx.post(small.url + "/v1/completions", content=unannounced(), timeout=60), 413, error
    )
    small.check_conserved()


TOO_LONG = "x" * 5000
OVERFLOWS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": TOO_LONG, "max_tokens": 1}, "prompt"),
    ("/v1/completions", {"prompt": [[65], [65] * 4096], "max_tokens": 1}, "prompt"),
    ("/v1/completions", {"prompt": TOO_LONG, "max_tokens": 0, "echo": True}, "prompt"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": TOO_LONG}]}, "messages"),
    ("/v1/responses", {"input": TOO_LONG}, "input"),
    (
        "/v1/messages",
        {
            "model": "builtin",
            "max_tokens": 1,
            "messages": [{"role": "user", "content": TOO_LONG}],
        },
        "messages",
    ),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "body", "param"), OVERFLOWS)
def test_overlong_prompt_is_refused_in_the_words_of_each_dialect(
    live: Live, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    """Agents shorten their history only if they recognise these words. Nothing is submitted."""
    before = live.report()["usage"]["requests"]
    answer = live.post(path, body | {"stream": stream})
    assert answer.status_code == 400
    error = answer.json()["error"]
    if path == "/v1/messages":
        assert error["type"] == "invalid_request_error"
        found = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", error["message"])
        assert found is not None and int(found[1]) > 5000 and int(found[2]) == 4095
    else:
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert error["message"].startswith("This model's maximum context length is 4096 tokens. ")
    assert live.report()["usage"]["requests"] == before


LIMITS = [
    ("/v1/completions", "max_tokens", '"finish_reason":"length"'),
    ("/v1/chat/completions", "max_tokens", '"finish_reason":"length"'),
    ("/v1/chat/completions", "max_completion_tokens", '"finish_reason":"length"'),
    ("/v1/messages", "max_tokens", '"model_context_window_exceeded"'),
    ("/v1/responses", "max_output_tokens", '"status":"incomplete"'),
]


@pytest.mark.full('/v1/chat/completions-max_completion_tokens-"finish_reason":"length"-streamed')
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "name", "cut"), LIMITS)
def test_token_limits_work_alike_in_every_dialect(
    serve_answer: Callable[..., Live], path: str, name: str, cut: str, stream: bool
) -> None:
    """A limit above the context is refused, except of messages, which must have one: their clients
    send that of larger models. An answer that reaches the end of the context is cut and reports
    it."""
    live = serve_answer("<think>Hm.</think>" + "x" * 5000)
    body: dict[str, Any] = {"model": "builtin", "messages": CHAT, "stream": stream}
    if path == "/v1/completions":
        body = {"prompt": "x", "stream": stream}
    elif path == "/v1/responses":
        body = {"input": "x", "stream": stream}
    answer = live.post(path, body | {name: 4096})
    assert answer.status_code == 200
    assert cut in answer.text.replace(": ", ":") and answer.text.count("x") > 3900
    for limit in (4097, 10**6, 2**63, 10**40):
        answer = live.post(path, body | {name: limit})
        if path == "/v1/messages":
            assert answer.status_code == 200 and cut in answer.text.replace(": ", ":")
            continue
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert error["message"].startswith(f"'{name}' must be at most 4096")
        assert (error["param"], error["code"]) == (name, None)


def test_each_prompt_of_a_batch_has_its_own_limit(serve_answer: Callable[..., Live]) -> None:
    live = serve_answer("x" * 5000)
    two = {"prompt": ["x" * 4000, "x"], "max_tokens": 100}
    lengths = live.post("/v1/completions", two).json()["usage"]["completion_tokens"]
    assert lengths == 96 + 100


def test_bad_prompt_refuses_its_whole_batch(live: Live) -> None:
    before = live.report()["usage"]["requests"]
    check_error(
        live.post("/v1/completions", {"prompt": [[65, 66], [999]]}),
        400,
        "ids must be from 0 to 319",
    )
    live.wait_until_idle()
    assert live.report()["usage"]["requests"] <= before + 1


def test_bad_tokenize_requests_are_refused(live: Live) -> None:
    check_error(live.post("/tokenize", {}), 400, "Send either 'prompt' or 'messages'")
    check_error(live.post("/tokenize", {"prompt": "x", "messages": CHAT}), 400, "Send either")
    check_error(live.post("/detokenize", {"tokens": [999]}), 400, "must be ids from 0 to 319")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"A" * 200_000,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_http_is_refused(live: Live, garbage: bytes) -> None:
    with live.connect() as connection:
        connection.sendall(garbage)
        answer = connection.recv(65536)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


def test_server_still_works_after_all_bad_requests(live: Live) -> None:
    assert live.get("/health").json()["status"] == "ok"
    assert live.client.completions.create(
        model="builtin", prompt="still here?", max_tokens=2
    ).choices
    live.check_conserved()


BODIES = [
    ("/v1/completions", CompletionRequest, {"prompt": "x"}),
    ("/v1/chat/completions", ChatRequest, {"messages": CHAT}),
    ("/tokenize", TokenizeRequest, {"prompt": "x"}),
    ("/detokenize", DetokenizeRequest, {"tokens": [1]}),
    ("/v1/messages", MessagesRequest, {"model": "builtin", "max_tokens": 1, "messages": CHAT}),
    ("/v1/messages/count_tokens", CountRequest, {"model": "builtin", "messages": CHAT}),
    ("/v1/responses", ResponsesRequest, {"input": "x", "max_output_tokens": 1}),
]


def numbers_of(schema: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (path, schema) of each number in a JSON schema that is not an enumeration."""
    if isinstance(schema, dict):
        kinds = schema.get("type")
        is_number = any(kind in ("integer", "number") for kind in _as_list(kinds))
        if is_number and "enum" not in schema and "const" not in schema:
            yield path, schema
        for name, part in schema.items():
            yield from numbers_of(part, (*path, name))
    elif isinstance(schema, list):
        for index, part in enumerate(schema):
            yield from numbers_of(part, (*path, index))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize(("path", "kind", "body"), BODIES)
def test_every_number_of_a_body_has_a_range(
    path: str, kind: type[Strict], body: dict[str, Any]
) -> None:
    for place, schema in numbers_of(kind.model_json_schema()):
        assert {"minimum", "exclusiveMinimum"} & schema.keys(), place
        assert {"maximum", "exclusiveMaximum"} & schema.keys(), place


ODD = (True, "odd", 1.5, -1, 2**64, -(10**40), 1e308, [], ["a", 1], {}, {"odd": 1}, "a\nb\u2028")


@pytest.mark.full(
    "/v1/completions-CompletionRequest-body0",
    "/detokenize-DetokenizeRequest-body3",
    "/v1/messages-MessagesRequest-body4",
)
@pytest.mark.parametrize(("path", "kind", "body"), BODIES)
def test_refusals_are_one_line_and_name_the_parameter(
    live: Live, path: str, kind: type[Strict], body: dict[str, Any]
) -> None:
    """Each field gets odd values. They are served, or refused without any effect."""
    num_refused = 0
    with httpx.Client(base_url=live.url, timeout=60) as client:
        for name, value in product((*kind.model_json_schema()["properties"], "unknown"), ODD):
            before = live.report()["usage"]["requests"]
            answer = client.post(path, json=body | {name: value})
            context = f"{name}: {value!r}: {answer.status_code} {answer.text[:300]}"
            if answer.status_code == 200:
                continue
            assert answer.status_code in (400, 404), context
            error = answer.json()["error"]
            message = error["message"]
            assert name in message or str(error.get("param")).startswith(name), context
            assert len(message.splitlines()) == 1 and len(message) < 300, context
            assert live.report()["usage"]["requests"] == before, context
            num_refused += 1
    assert num_refused > 5 * len(kind.model_json_schema()["properties"])
    live.check_conserved()
