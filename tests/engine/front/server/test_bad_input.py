"""Bad requests get a 4xx answer of one line that names the parameter, and change nothing."""

from __future__ import annotations

import gzip
import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.front.server.bodies import num_nodes
from engine.front.server.settings import ServerConfig

from .conftest import Live, Serve
from .dialects import CHAT, DIALECT, STREAMED, TOOL, Dialect

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": CHAT},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/v1/messages": {"model": "builtin", "max_tokens": 1, "messages": CHAT},
    "/v1/messages/count_tokens": {"model": "builtin", "messages": CHAT},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
}
"""Smallest body of each endpoint."""
ODD = (True, "odd", 1.5, -1, 2**64, -(10**40), 1e308, [], ["a", 1], {}, {"odd": 1}, "a\nb\u2028")


def refused(live: Live, path: str, body: Any, named: str = "") -> str:
    """Send a bad request. Return the message after a check of its form and effects."""
    before = live.report()["usage"]["requests"]
    message = checked(live.post(path, body), path, body, named)
    assert live.report()["usage"]["requests"] == before, message
    return message


def checked(answer: httpx.Response, path: str, body: Any, named: str = "") -> str:
    """Return the message of a refusal after a check of its form, and of the words that it or the
    name of its parameter has."""
    where = f"{path} {body!r:.200}: {answer.status_code} {answer.text[:300]}"
    assert answer.status_code in (400, 404), where
    error = answer.json()["error"]
    keys = {"message", "type", "param", "code"}
    message: str = error["message"]
    assert len(message.splitlines()) == 1 and len(message) < 300, where
    if "messages" in path:
        assert answer.json()["type"] == "error", where
        assert answer.json()["request_id"] == answer.headers["request-id"], where
    else:
        assert set(error) == keys, where
    assert re.search(named, message) or re.match(named, str(error.get("param"))), where
    return message


@pytest.fixture(scope="module")
def fields(live: Live) -> dict[str, dict[str, Any]]:
    """Schemas of the fields of each endpoint."""
    page = live.get("/openapi.json").json()
    found = {}
    for path in BODIES:
        content = page["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        if "$ref" in schema:
            schema = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        found[path] = schema["properties"]
    return found


@pytest.mark.full("/v1/completions", "/detokenize", "/v1/messages")
@pytest.mark.parametrize("path", BODIES)
def test_odd_value_of_a_field_is_served_or_refused(
    live: Live, fields: dict[str, dict[str, Any]], path: str
) -> None:
    num_refused, before = 0, live.report()["usage"]["requests"]
    for name, value in product((*fields[path], "unknown"), ODD):
        body = BODIES[path] | {name: value}
        answer, count = live.post(path, body), live.report()["usage"]["requests"]
        if answer.status_code != 200:
            message = checked(answer, path, body, name)
            assert count == before, message
            num_refused += 1
        before = count
    assert num_refused > 5 * len(fields[path])
    live.check_conserved()


@pytest.mark.parametrize("path", BODIES)
def test_every_number_of_a_body_has_a_range(fields: dict[str, dict[str, Any]], path: str) -> None:
    def check(schema: Any, place: str) -> None:
        if isinstance(schema, list):
            for one in schema:
                check(one, place)
        if not isinstance(schema, dict):
            return
        kinds = schema.get("type")
        if {"integer", "number"} & {*(kinds if isinstance(kinds, list) else [kinds])}:
            is_fixed = "enum" in schema or "const" in schema
            assert is_fixed or {"minimum", "exclusiveMinimum"} & schema.keys(), place
            assert is_fixed or {"maximum", "exclusiveMaximum"} & schema.keys(), place
        for name, part in schema.items():
            check(part, f"{place}.{name}" if isinstance(name, str) else place)

    for name, schema in fields[path].items():
        check(schema, name)


TEXTS = st.text('[]{}:"\\\n,aé', max_size=6)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(TEXTS, parts, max_size=4),
    max_leaves=30,
)


@given(VALUES, st.booleans())
def test_values_of_a_body_are_counted_outside_of_texts(value: Any, is_ascii: bool) -> None:
    def count(one: Any) -> int:
        if isinstance(one, dict):
            return 1 + len(one) + sum(map(count, one.values()))
        return 1 + sum(map(count, one)) if isinstance(one, list) else 0

    assert num_nodes(json.dumps(value, ensure_ascii=is_ascii).encode()) == count(value)


def foreign(**said: str) -> list[tuple[dict[str, Any], str]]:
    """Return fields of another API, and the remedies that are said."""
    return [({name: ["x"]}, f"'{name}' is not.*{remedy}") for name, remedy in said.items()]


FUNCTION = {"type": "function", "function": TOOL}
TEXT = {"type": "text", "text": "x"}
THINKING = {"type": "enabled", "budget_tokens": 8}
SCHEMA = {"type": "json_schema", "name": "a"}
FOO = {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}
MOST = "must be an array of length <= 4096"
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "/v1/completions": [
        ({"priority": 3}, "'priority' is not supported: omit it."),
        *(({"prompt": one}, "prompt must have at least one token") for one in ("", [[]])),
        *(({"prompt": one}, "'prompt' must be a string or an array, got an") for one in (7, {})),
        *(({"prompt": one}, "prompt must contain token ids") for one in ([320], [[65], [999]])),
        ({"prompt": []}, "'prompt' must be an array of length >= 1"),
        ({"prompt": ["a", 1]}, "'prompt' must be a text, a list of texts, a list of token ids or"),
        ({"prompt": [True]}, "'prompt.0' must be an integer or a string or an array, got a bool"),
        ({"prompt": [-1]}, "'prompt.0' must be an integer >= 0"),
        ({"prompt": [2**80]}, "'prompt.0' must be an integer <= "),
        ({"prompt": ["x"] * 100_000, "n": 128}, "queue"),
        ({"max_token": 3}, "'max_token' is not a parameter here"),
        ({"keep_alive": "5m"}, "stays loaded"),
        *foreign(messages="use 'prompt'", prompt_logprobs="use 'echo'"),
        ({"logit_bias": {"x": 1}}, "A name in 'logit_bias' must be an integer"),
        *(({"logit_bias": {"5": one}}, "A value of 'logit_bias' must be") for one in (101, "x")),
        ({"logit_bias": {"320": 1}}, "logit_bias must contain token ids from 0 to 319"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"model": "gpt-5"}, "gpt-5"),
        ({"stop": ["y"] * 65}, "'stop' must be an array of length <= 64"),
        ({"stop": ["y" * 1025]}, "'stop.0' must be a string of length <= 1024"),
        ({"stop_token_ids": [1] * 65}, "'stop_token_ids' must be an array of length <= 64"),
        ({"stop_token_ids": [320]}, "stop_token_ids must contain token ids from 0 to 319"),
        ({f"name{n}": 1 for n in range(100)}, "name0"),
        ({"metadata": [[]] * 100_000}, "100,000 names"),
    ],
    "/v1/chat/completions": [
        ({"messages": [{"content": "x"}]}, "'messages.0.role' is missing"),
        ({"messages": [CHAT[0] | {"role": "a\nb\rc"}]}, "'messages.0.role' cannot be 'a"),
        ({"messages": [CHAT[0] | {"role": None}]}, "'messages.0.role' is missing"),
        ({"messages": [CHAT[0] | {"role": 5}]}, "'messages.0.role' must be a string"),
        ({"metadata": 5}, "metadata"),
        ({"num_ctx": 4096}, "'num_ctx' is a setting of the server: start it with --max-model-len"),
        ({"think": False}, "'reasoning_effort'"),
        ({"cache_salt": ""}, "that is not empty"),
        ({"messages": None}, "'messages' is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [*CHAT, {"role": "user", "content": None}]}, "messages.1"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "requires a 'schema'"),
        ({"tool_choice": "required"}, "'tool_choice' requires 'tools'"),
        ({"tool_choice": "maybe", "tools": [FUNCTION]}, "'tool_choice' cannot be 'maybe'"),
        ({"tool_choice": {"type": "function"}, "tools": [FUNCTION]}, "tool_choice.function"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [FUNCTION]},
            "^'tool_choice': 'g' is none of the tools: weather.$",
        ),
        (
            {"tools": [FUNCTION], "tool_choice": "required", "structured_outputs": {"regex": "a"}},
            "only one form: send one of 'structured_outputs.regex', 'tool_choice'",
        ),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "send a function"),
        ({"tools": [{"type": "function"}]}, "'tools.0.function' is missing"),
        *foreign(functions="use 'tools'", function_call="use 'tool_choice'"),
        *foreign(max_output_tokens="use 'max_tokens'", guided_json="use 'structured_outputs'"),
        *foreign(web_search_options="drop it", lora_request="merge the adapter"),
        (
            {"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"type": "function"}]}]},
            "messages.1.tool_calls.0' has no function with a name",
        ),
        *(
            (
                {"tools": [{"type": "function", "function": TOOL | {name: value}}]},
                f"function.{name}",
            )
            for name, value in (("parameters", [1]), ("strict", "yes"), ("name", "f" * 257))
        ),
        (
            {"messages": [{"role": "user", "content": "x " * 9999}], "response_format": FOO},
            "maximum context length",
        ),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "only one form: .*choice'"),
        ({"structured_outputs": {"json": "no JSON"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "outputs.regex': .* look-around"),
        ({"structured_outputs": {"regex": "a{1000000000}"}}, "outputs.regex': .* too complex"),
        ({"structured_outputs": {"regex": ".*" * 500}}, r"precomputation failed\)"),
        (
            {"structured_outputs": {"grammar": 'root ::= "a"{1000000}'}},
            "structured_outputs.grammar",
        ),
        ({"structured_outputs": {"json": {"type": "foo"}}}, "structured_outputs.json"),
        ({"messages": CHAT * 4097}, MOST),
        ({"messages": [{"role": "user", "content": [TEXT] * 4097}]}, "messages.0.content' must be"),
        ({"messages": [{**CHAT[0], "extra": [[]] * 100_000}]}, "100,000 names"),
        ({"tools": [{"a": [[]] * 100_000}]}, "100,000 names"),
    ],
    "/v1/messages": [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "user"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "source": {}}]}]},
            "cannot be 'video'",
        ),
        ({"messages": [{"role": "user", "content": [TEXT | {"text": 5}]}]}, "content.0.text"),
        ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, "--disallowedTools"),
        ({"tools": [{"type": "bash_20250124", "name": "b"}]}, "turn it off in the client"),
        *foreign(stop="use 'stop_sequences'", seed="drop it", instructions="use 'system'"),
        ({"tool_choice": {"type": "tool", "name": "g"}}, "'tool_choice' requires 'tools'"),
        ({"tool_choice": {"type": "tool"}}, "^'tool_choice.name' is missing: add it.$"),
        ({"temperature": "x"}, "^'temperature' must be a number, got a string.$"),
        ({"thinking": THINKING | {"budget_tokens": 2**31}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"),
        ({"model": "claude"}, "model"),
        ({"messages": []}, "'messages' must be an array of length >= 1"),
        ({"messages": CHAT * 4097}, MOST),
    ],
    "/v1/responses": [
        ({"input": [{"type": "bogus"}]}, "bogus"),
        (
            {"input": [CHAT[0] | {"content": [{"type": "video"}]}]},
            "content.0.type' cannot be 'video'",
        ),
        ({"text": {"format": {}}}, "text.format.type"),
        ({"text": {"format": SCHEMA}}, "'text.format': .* requires a 'schema'"),
        ({"text": {"format": SCHEMA | {"schema": {"type": "b"}}}}, "'text.format': .*type: b"),
        ({"text": {"format": SCHEMA | {"schema": {}, "x": 1}}}, "text.format.x"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.*'web_search'.*Codex: web_search = "),
        ({"tools": [{"type": "custom", "name": "apply_patch"}]}, "apply_patch_tool_type"),
        ({"tools": [{"type": "local_shell"}]}, "turn it off in the client"),
        *foreign(max_tokens="use 'max_output_tokens'", messages="use 'input'"),
        *foreign(system="use 'instructions'"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools.0.name"),
        *(({name: "x"}, name) for name in ("background", "conversation")),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"reasoning": {"effort": "bogus"}}, "reasoning.effort"),
        ({"input": []}, "'input' is empty"),
        ({"input": CHAT * 4097}, MOST),
    ],
    "/tokenize": [
        ({"prompt": None}, "prompt"),
        ({"messages": CHAT}, "Send either 'prompt' or 'messages'"),
        ({"prompt": None, "messages": CHAT * 4097}, MOST),
    ],
    "/detokenize": [({"tokens": [999]}, "ids")],
}
"""Fields whose values exceed a limit or do not fit the model or each other, fields of another API,
and words of the refusal, as a regular expression."""


@pytest.mark.parametrize("path", BAD)
def test_values_that_do_not_fit_together_are_refused(live: Live, path: str) -> None:
    for changes, named in BAD[path]:
        body = {name: v for name, v in (BODIES[path] | changes).items() if v is not None}
        message = refused(live, path, body, named)
        assert message.endswith("."), message
    live.check_conserved()
    assert live.post(path, BODIES[path]).status_code == 200, "the server still works"


QUESTION = {"role": "user", "content": "Rain?"}
CALL = {"name": "f", "arguments": "{}"}
NO_PARAMETERS = {"type": "function", "function": {"name": "f", "parameters": []}}
"""Tool whose parameters are an empty object, as PHP writes it."""
TURNS: tuple[dict[str, Any], ...] = (
    {"content": None, "reasoning_content": "So."},
    {"content": None, "refusal": "No."},
    {"content": None, "function_call": CALL},
    {"tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
    {"tool_calls": [{"id": "", "type": "", "index": 0, "function": CALL}]},
    {"tool_calls": [{"function": {"name": "", "arguments": "{", "parameters": "{"}}]},
    *({"tool_calls": [{"function": {"name": "f", "arguments": one}}]} for one in ([], None)),
    {"content": ""},
)
"""Answers without text, as clients send them back."""
SERVED: list[tuple[str, dict[str, Any]]] = [
    *(
        ("/v1/chat/completions", {"messages": [*CHAT, {"role": "assistant", **one}, QUESTION]})
        for one in TURNS
    ),
    *(
        ("/v1/responses", {"input": [QUESTION, {"type": "reasoning", "summary": one}, QUESTION]})
        for one in ([], [{"type": "summary_text", "text": "So."}])
    ),
    ("/v1/chat/completions", {"logprobs": False, "top_logprobs": 0}),
    ("/v1/chat/completions", {"tools": [NO_PARAMETERS]}),
    ("/v1/completions", {"stop": ["y" * 1024] * 64}),
    ("/detokenize", {"tokens": [65] * 300_000}),
]
"""Unusual fields, and those at the limits."""


@pytest.mark.parametrize(("path", "changes"), SERVED)
def test_unusual_bodies_and_those_at_the_limits_are_served(
    live: Live, path: str, changes: dict[str, Any]
) -> None:
    body = BODIES[path] | changes | ({"max_tokens": 2} if "completions" in path else {})
    answer = live.post(path, body)
    assert answer.status_code == 200, answer.text


DEEP = b'{"prompt": "x", "user": ' + b"[" * 200 + b"]" * 200 + b"}"


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"{", b'{"prompt":\n "x",, }', b"[1, 2]", b'"text"', b"null", b"\x00\x01\x02"),
        *(b'{"prompt": "\xff\xfe"}', b"[" * 60_000, DEEP, b'{"prompt": "x", "\\ud800": 1}'),
        *(b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "user": -Infinity}'),
        *(b'{"prompt": "x", "n": 1e999}', b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}"),
    ],
    ids=lambda value: repr(value)[:30].replace("\\", "/"),
)
def test_broken_body_is_refused(live: Live, payload: bytes) -> None:
    kind = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/v1/messages"):
        answer = httpx.post(live.url + path, content=payload, headers=kind, timeout=120)
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400 and len(message) < 300
        assert path == "/v1/messages" or ("utf-8" in message) == (b"\xff" in payload)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_json_requires_its_content_type(live: Live, content_type: str) -> None:
    """A foreign web page cannot set it without a preflight request."""
    headers, body = {"Content-Type": content_type}, b'{"prompt": "x"}'
    answer = httpx.post(live.url + "/v1/completions", content=body, headers=headers, timeout=120)
    assert answer.status_code == 400 and "Content-Type" in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br"])
def test_packed_bodies_are_refused_by_name(live: Live, encoding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    body = gzip.compress(b'{"prompt": "x"}')
    for path in ("/v1/completions", "/v1/messages"):
        answer = httpx.post(live.url + path, content=body, headers=headers, timeout=120)
        message = answer.json()["error"]["message"]
        assert answer.status_code == 415 and f"Content-Encoding '{encoding}'" in message
    plain = headers | {"Content-Encoding": "identity"}
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    assert httpx.post(f"{live.url}/v1/completions", content=body, headers=plain).status_code == 200


def test_unknown_paths_and_methods_are_refused(live: Live) -> None:
    answer = live.get("/v2/completions")
    assert answer.status_code == 404 and "/openapi.json" in answer.json()["error"]["message"]
    assert live.get("/v1/completions").status_code == 405
    for path in ("?replica=9", "/events?replica=0", "/events?replica=2"):
        assert live.get(f"/v1/cache{path}").status_code == 400
    wrong = live.post("/v1/responses/1", {})
    assert wrong.status_code == 405 and {"GET", "DELETE"} <= {*wrong.headers["allow"].split(", ")}
    for path in ("/health", "/metrics", "/v1/models"):
        answer = httpx.head(f"{live.url}{path}")
        assert (answer.status_code, answer.content) == (200, b"")


def test_body_above_the_limit_is_refused(serve_oracle: Serve) -> None:
    small = serve_oracle(ServerConfig(max_body_mib=0.01))
    kind = {"Content-Type": "application/json"}
    for path, body in BODIES.items():
        large = json.dumps(body | {"user": "x" * (1 << 15)}).encode()
        for content in (large, iter([large])):  # with and without an announced length
            answer = httpx.post(small.url + path, content=content, headers=kind, timeout=120)
            assert answer.status_code == 413, path
            error = answer.json()["error"]
            assert "max_body_mib" in error["message"]
            assert error["type"] == "request_too_large" or "messages" not in path
    small.check_conserved()


def test_images_may_fill_a_body_that_text_may_not(serve_oracle: Serve) -> None:
    """As in the session of an agent, which sends all its screenshots with each turn. More of them
    than are received at once wait."""
    live, url = serve_oracle(), "data:image/png;base64," + "A" * (6 << 20)
    image = [{"type": "image_url", "image_url": {"url": url}}]

    def status(content: Any) -> int:
        chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return live.post("/v1/chat/completions", chat).status_code

    with ThreadPoolExecutor(10) as clients:
        assert [*clients.map(status, [image] * 10)] == [200] * 10
    many = ["a"] * (1 << 21)  # 10 MiB that are no image: refused before they are read as JSON.
    assert [status(one) for one in (url, image * 6, many)] == [413] * 3
    live.check_conserved()


@STREAMED
@DIALECT
def test_overlong_prompt_is_refused_in_the_words_of_each_dialect(
    live: Live, dialect: Dialect, stream: bool
) -> None:
    """Agents shorten their history only if they recognise these words."""
    long = [{"role": "user", "content": "x" * 5000}]
    body = dialect.body(long, limit=1, stream=stream)
    message = refused(live, dialect.path, body)
    if dialect.path == "/v1/messages":
        found = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", message)
        assert found is not None and int(found[1]) > 5000 and int(found[2]) == 4095
    else:
        error = live.post(dialect.path, body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert message.startswith("This model's maximum context length is 4096 tokens. ")
        assert "--max-model-len" in message


@STREAMED
@DIALECT
def test_answer_is_cut_at_the_end_of_the_context(
    serve_answer: Serve, dialect: Dialect, stream: bool
) -> None:
    """Clients send the limits of larger models."""
    live = serve_answer("<think>Hm.</think>" + "x" * 500)
    prompt = [{"role": "user", "content": "y" * 3800}]
    for limit in (4096, 4097, 10**40):
        answer = live.post(dialect.path, dialect.body(prompt, limit=limit, stream=stream))
        assert answer.status_code == 200 and answer.text.count("x") > 200
        assert any(word in answer.text for word in ("length", "incomplete", "context_window"))


def test_each_prompt_of_a_batch_has_its_own_limit(serve_answer: Serve) -> None:
    live = serve_answer("x" * 5000)
    two = {"prompt": ["x" * 4000, "x"], "max_tokens": 100}
    lengths = live.post("/v1/completions", two).json()["usage"]["completion_tokens"]
    assert lengths == 96 + 100


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: ::1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"A" * 200_000,
    ],
    ids=lambda value: repr(value)[:30].replace("\\", "/"),
)
def test_malformed_http_is_refused(live: Live, garbage: bytes) -> None:
    with live.connect() as connection:
        connection.sendall(garbage)
        answer = connection.recv(65536)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
