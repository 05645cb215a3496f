"""Parameters of vLLM and SGLang that OpenAI's API lacks.

They work as in those servers. ``test_bad_input.py`` tests the refusal of others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.front.server.settings import API_KEY_VARIABLE, ServerConfig
from engine.text.tokenizer import ChatTemplate

from .conftest import Live, ServeAnswer

CHAT = [{"role": "user", "content": "Say something."}]


def complete(live: Live, **body: Any) -> dict[str, Any]:
    answer = live.post("/v1/completions", {"prompt": "tell me", "max_tokens": 12} | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids(answer: dict[str, Any]) -> list[int]:
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


def events(live: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = live.post(path, body | {"stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_default_limit_of_a_chat_is_that_of_the_server(serve_oracle: Callable[..., Live]) -> None:
    live = serve_oracle(ServerConfig(default_max_tokens=7))
    chat: dict[str, Any] = {"messages": CHAT, "ignore_eos": True}
    for limit, expected in (({}, 7), ({"max_tokens": 9}, 9), ({"max_completion_tokens": 3}, 3)):
        answer = live.post("/v1/chat/completions", chat | limit).json()
        assert answer["usage"]["completion_tokens"] == expected
        assert answer["choices"][0]["finish_reason"] == "length"
    answer = live.post("/v1/responses", {"input": "x"}).json()
    assert answer["usage"]["output_tokens"] <= 7
    with pytest.raises(ValueError, match="default_max_tokens must be an integer of 1 or more"):
        ServerConfig(default_max_tokens=0)


def media(kind: str, text: bool) -> dict[str, dict[str, Any]]:
    """Return bodies with a ``kind`` of image in each place, or with the ``text`` in its place."""

    def part(name: str) -> dict[str, Any]:
        line = f"[{kind} was left out here, because the model reads text only.]"
        image = {"type": name, "source": {"data": "x"}, "image_url": "x", "file": {}}
        return {"type": "text", "text": line} if text else image

    image = kind.split()[1]
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [part(image)]}
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    url, given = ("image_url", "input_image") if image == "image" else ("file", "input_file")
    said = {"role": "user", "content": [{"type": "text", "text": "Look:"}, part(url)]}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    items = [call, {"type": "function_call_output", "call_id": "a", "output": [part(given)]}]
    return {
        "/v1/chat/completions": {"messages": [said], "max_tokens": 1},
        "/v1/messages": {"model": "builtin", "messages": [*CHAT, *turns], "max_tokens": 1},
        "/v1/messages/count_tokens": {"model": "builtin", "messages": [*CHAT, *turns]},
        "/v1/responses": {"input": [*CHAT, *items], "max_output_tokens": 1},
        "/tokenize": {"messages": [said]},
    }


@pytest.mark.parametrize("kind", ["An image", "A document"])
def test_images_become_a_line_of_text_or_are_refused(
    builtin: Live, serve_oracle: Callable[..., Live], kind: str
) -> None:
    """A prompt with an image is that with the line: the next turns of a session still work."""
    refusing = serve_oracle(ServerConfig(images="refuse", served_model_name=("builtin",)))

    def num_tokens(answer: dict[str, Any]) -> int:
        usage = answer.get("usage", answer)
        names = ("prompt_tokens", "count", "input_tokens", "cache_read_input_tokens")
        return sum(usage.get(name, 0) for name in names)

    plain = media(kind, text=True)
    for path, body in media(kind, text=False).items():
        shown, said = builtin.post(path, body), builtin.post(path, plain[path])
        assert shown.status_code == said.status_code == 200, shown.text
        assert num_tokens(shown.json()) == num_tokens(said.json()) > 60
        refused = refusing.post(path, body)
        message = refused.json()["error"]["message"]
        assert refused.status_code == 400 and f"{kind} is not supported" in message
        assert refusing.post(path, plain[path]).status_code == 200


def tokens_of(live: Live, messages: list[dict[str, Any]]) -> list[int]:
    tokens: list[int] = live.post("/tokenize", {"messages": messages}).json()["tokens"]
    return tokens


USED = {"type": "server_tool_use", "id": "a", "name": "web_search", "input": {"query": "rain"}}
FOUND = {"type": "web_search_result", "title": "Rain", "url": "u", "encrypted_content": "x" * 99}
LINES: list[tuple[dict[str, Any], str]] = [
    (USED, '[web_search was called with {"query": "rain"}.]'),
    (
        {"type": "web_search_tool_result", "tool_use_id": "a", "content": [FOUND]},
        '[Result: [{"type": "web_search_result", "title": "Rain", "url": "u"}]]',
    ),
    ({"type": "tool_reference", "tool_name": "grep"}, "[The tool grep was found.]"),
    (
        {
            "type": "search_result",
            "title": "Rain",
            "source": "u",
            "content": [{"type": "text", "text": "Wet."}],
        },
        "Rain\nu\nWet.",
    ),
    ({"type": "refusal", "refusal": "I cannot."}, "I cannot."),
]
"""Blocks of history that no template writes, and their text."""


@pytest.mark.parametrize("block, line", LINES, ids=lambda one: ascii(one)[:20].replace("\\", "/"))
def test_blocks_of_history_become_a_line_of_text(
    live: Live, block: dict[str, Any], line: str
) -> None:
    """In messages and results of tools of every dialect: a refused one would end the session."""
    text = {"type": "text", "text": line}
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    for part in (block, text):
        said = [{"role": "assistant", "content": [text, part]}, *CHAT]
        chat = [*CHAT, *said]
        result = {"type": "tool_result", "tool_use_id": "a", "content": [part]}
        later = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        count = "/v1/messages/count_tokens"
        bodies = [
            ("/tokenize", {"messages": chat}),
            (count, {"model": "builtin", "messages": chat}),
            (count, {"model": "builtin", "messages": [*CHAT, *later]}),
            ("/v1/responses", {"input": chat, "max_output_tokens": 1, "temperature": 0}),
        ]
        answers = [live.post(path, body) for path, body in bodies]
        assert [answer.status_code for answer in answers] == [200] * 4, answers
        found = [answer.json() for answer in answers[:3]]
        found.append(answers[3].json()["usage"]["input_tokens"])
        if part is block:
            first = found
    assert first == found


ITEMS: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    (
        [
            {"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": "*** End"},
            {"type": "custom_tool_call_output", "call_id": "a", "output": "Done."},
        ],
        [
            {
                "type": "function_call",
                "call_id": "a",
                "name": "apply_patch",
                "arguments": '{"input": "*** End"}',
            },
            {"type": "function_call_output", "call_id": "a", "output": "Done."},
        ],
    ),
    (
        [
            {"type": "local_shell_call", "call_id": "a", "action": {"command": ["ls"]}},
            {"type": "local_shell_call_output", "call_id": "a", "output": "x"},
        ],
        [
            {
                "type": "function_call",
                "call_id": "a",
                "name": "local_shell",
                "arguments": '{"action": {"command": ["ls"]}}',
            },
            {"type": "function_call_output", "call_id": "a", "output": "x"},
        ],
    ),
    (
        [
            {"type": "computer_call", "call_id": "a", "action": {"type": "screenshot"}},
            {
                "type": "computer_call_output",
                "call_id": "a",
                "output": {"type": "computer_screenshot", "image_url": "data:x"},
            },
        ],
        [
            {
                "type": "function_call",
                "call_id": "a",
                "name": "computer",
                "arguments": '{"action": {"type": "screenshot"}}',
            },
            {
                "type": "function_call_output",
                "call_id": "a",
                "output": "[An image was left out here, because the model reads text only.]",
            },
        ],
    ),
    (
        [{"type": "web_search_call", "id": "w", "status": "completed", "action": {"query": "q"}}],
        [
            {
                "role": "assistant",
                "content": '[web_search was called with {"action": {"query": "q"}}.]',
            }
        ],
    ),
]
"""Items of Codex and of OpenAI's clients, and those that mean the same."""


@pytest.mark.parametrize("items, plain", ITEMS)
def test_items_of_other_tools_are_calls_or_text(
    live: Live, items: list[dict[str, Any]], plain: list[dict[str, Any]]
) -> None:
    counts = []
    for some in (items, plain):
        answer = live.post("/v1/responses", {"input": [*CHAT, *some], "max_output_tokens": 1})
        assert answer.status_code == 200, answer.text
        counts.append(answer.json()["usage"]["input_tokens"])
    assert counts[0] == counts[1]


def test_custom_calls_and_thoughts_in_a_chat_are_read(live: Live) -> None:
    function = {"name": "f", "arguments": '{"input": "x"}'}
    calls = [
        {"id": "a", "type": "custom", "custom": {"name": "f", "input": "x"}},
        {"id": "a", "type": "function", "function": function},
    ]
    custom, plain = (
        tokens_of(live, [*CHAT, {"role": "assistant", "tool_calls": [call]}]) for call in calls
    )
    assert custom == plain
    nameless = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}
    answer = live.post("/tokenize", {"messages": [*CHAT, nameless]})
    assert answer.status_code == 400
    assert "messages.1.tool_calls.0' has no function with a name" in answer.text


WRITES_THOUGHTS = """\
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.reasoning_content or '') }}
{{- '|' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}"""


def test_thoughts_are_read_under_all_names(serve_answer: ServeAnswer) -> None:
    live = serve_answer("x", WRITES_THOUGHTS)
    thoughts: list[dict[str, Any]] = [
        *({name: "Hm."} for name in ("reasoning_content", "reasoning", "thinking")),
        {"reasoning": "Hm.", "reasoning_content": "Hm."},
        {"reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes."}]},
        {"content": [{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "Yes."}]},
    ]
    turn = {"role": "assistant", "content": "Yes."}
    found = [tokens_of(live, [*CHAT, turn | one]) for one in thoughts]
    assert b"\nHm.|Yes." in bytes(token for token in found[0] if token < 256)
    assert all(one == found[0] for one in found)


def test_redacted_thinking_is_omitted(live: Live) -> None:
    """So are thoughts with a signature alone."""
    text = {"type": "text", "text": "Yes."}
    counts = []
    for block in (
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "", "signature": "x"},
    ):
        chat = [*CHAT, {"role": "assistant", "content": [block, text]}, *CHAT]
        answer = live.post("/v1/messages/count_tokens", {"model": "builtin", "messages": chat})
        counts.append(answer.json()["input_tokens"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "path, tool, words",
    [
        ("/v1/responses", {"type": "web_search"}, "tools.0.*'web_search'.*Codex: web_search = "),
        ("/v1/responses", {"type": "custom", "name": "apply_patch"}, "apply_patch_tool_type"),
        ("/v1/responses", {"type": "local_shell"}, "turn it off in the client"),
        (
            "/v1/messages",
            {"type": "web_search_20250305", "name": "web_search"},
            "--disallowedTools",
        ),
        ("/v1/messages", {"type": "bash_20250124", "name": "bash"}, "turn it off in the client"),
        ("/v1/chat/completions", {"type": "custom", "custom": {"name": "x"}}, "send a function"),
    ],
)
def test_tools_that_are_not_supported_are_named_with_the_remedy(
    live: Live, path: str, tool: dict[str, Any], words: str
) -> None:
    field = "input" if path == "/v1/responses" else "messages"
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    answer = live.post(path, {"model": "builtin", field: CHAT, limit: 1, "tools": [tool]})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and re.search(words, message), message
    assert message.endswith((".", ")."))


def test_a_tool_without_a_result_and_no_scores_are_served(live: Live) -> None:
    """Tools of MCP may return nothing."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [*CHAT, {"role": "assistant", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "a"}
    found = [tokens_of(live, [*asked, result | {"content": one}]) for one in (None, "", [])]
    assert found[0] == found[1] == found[2]
    body = {"messages": CHAT, "max_tokens": 1, "logprobs": False, "top_logprobs": 0}
    assert live.post("/v1/chat/completions", body).status_code == 200


def test_switches_of_the_template_have_defaults_of_the_server(
    serve_oracle: Callable[..., Live],
) -> None:
    """In all dialects; a request goes first, and so does its reasoning effort."""
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    live = serve_oracle(ServerConfig(chat_template_kwargs='{"enable_thinking": false}'))

    def prompt(live: Live, **more: Any) -> list[int]:
        return live.post("/tokenize", {"messages": CHAT} | more).json()["tokens"]

    usual, source = serve_oracle(), "{{ 'on' if enable_thinking | default(true) }}"
    template = ChatTemplate(source + "{% for m in messages %}{{ m.content }}{% endfor %}")
    for one in (live, usual):
        assert one.engine.tokenizer is not None
        one.engine.tokenizer.chat_template = template
    assert prompt(live) == prompt(usual, **off) != prompt(usual)
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    assert prompt(live, **on) == prompt(usual, **on) != prompt(live)
    body = {"model": live.get("/v1/models").json()["data"][0]["id"], "messages": CHAT}
    for more, tokens in (
        ({}, prompt(live)),
        ({"thinking": {"type": "enabled"}}, prompt(live, **on)),
    ):
        counted = live.post("/v1/messages/count_tokens", body | more).json()
        assert counted["input_tokens"] == len(tokens)


def test_top_k_below_one_keeps_all_tokens(live: Live) -> None:
    options = {"return_token_ids": True, "ignore_eos": True}
    assert ids(complete(live, top_k=-1, **options)) == ids(complete(live, **options))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_extra_fields_of_a_stream(live: Live, path: str) -> None:
    received = events(
        live,
        path,
        {"prompt" if path == "/v1/completions" else "messages": "x" if "chat" not in path else CHAT}
        | {"max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
        | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    sent = [c["token_ids"] for e in received for c in e["choices"] if "token_ids" in c]
    assert sum(map(len, sent)) == 5
    assert [e["usage"]["completion_tokens"] for e in received if "usage" in e] == [5]
    prompts = [
        e for e in received if "prompt_token_ids" in (e if "chat" in path else json.dumps(e))
    ]
    assert len(prompts) == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_choices_of_a_request_are_one_session(serve_oracle: Callable[..., Live], path: str) -> None:
    """Otherwise, the last choices would wait 300 s for the places of the first ones."""
    live = serve_oracle(admission="live:2")
    body: dict[str, Any] = {"n": 24, "max_tokens": 1, "metadata": {"session_end": "true"}}
    body |= {"messages": CHAT} if "chat" in path else {"prompt": ["one", "two"]}
    for _ in range(3):
        answer = live.post(path, body)
        assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == (24 if "chat" in path else 48)
    sessions = live.engine._scheduler.sessions
    assert not sessions.open and not sessions.idle


def test_stop_strings_and_special_tokens_can_be_kept(live: Live) -> None:
    plain = complete(live, max_tokens=40, ignore_eos=True)["choices"][0]["text"]
    stop = next(c for c in plain[3:] if c.isascii())
    with_stop = complete(
        live, max_tokens=40, ignore_eos=True, stop=[stop], include_stop_str_in_output=True
    )
    at = plain.index(stop)
    assert with_stop["choices"][0]["text"] == plain[: at + 1]
    later = complete(live, max_tokens=40, ignore_eos=True, stop=[stop], min_tokens=40)
    assert later["choices"][0]["text"] == plain
    body = {"ignore_eos": True, "max_tokens": 900}
    with_special = complete(live, skip_special_tokens=False, **body)["choices"][0]["text"]
    assert "<|im_end|>" in with_special
    assert "<|im_end|>" not in complete(live, **body)["choices"][0]["text"]


def test_answer_continues_the_last_message(live: Live) -> None:
    for content in ("Once upon a", "<think>Once upon a"):
        messages = [*CHAT, {"role": "assistant", "content": content}]
        body = {"messages": messages, "continue_final_message": True}
        prompt = live.post("/tokenize", body).json()["tokens"]
        assert bytes(prompt[-11:]) == b"Once upon a"
        body |= {"max_tokens": 3, "return_token_ids": True}
        answer = live.post("/v1/chat/completions", body).json()
        assert answer["prompt_token_ids"] == prompt
        is_thinking = "reasoning_content" in answer["choices"][0]["message"]
        assert is_thinking == ("<think>" in content)


def test_paths_of_other_servers(live: Live) -> None:
    assert live.get("/version").json()["version"]
    assert live.post("/flush_cache", {}).json() == {"reset": True}
    assert (
        httpx.get(live.url + "/health", headers={"x-request-id": "seven"}).headers["x-request-id"]
        == "seven"
    )
    assert len(live.get("/nowhere").headers["x-request-id"]) == 32
    assert "access-control-allow-origin" not in live.get("/health").headers


def test_api_keys_and_cors_origins(
    serve_oracle: Callable[..., Live], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "other")
    (tmp_path / "key").write_text("# of clients\nsecret\n")
    config = ServerConfig(api_key_file=str(tmp_path / "key"), cors_origin=("https://a.example",))
    live = serve_oracle(config)

    def status(path: str = "/v1/models", **headers: str) -> int:
        return httpx.get(live.url + path, headers=headers).status_code

    assert status() == 401 and status(authorization="Bearer wrong") == 401
    assert status(authorization="secret") == 401
    assert status(authorization="Bearer secret") == status(authorization="Bearer other") == 200
    assert status(**{"x-api-key": "secret"}) == 200
    assert status("/health") == 200 and status("/metrics") == 200
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    preflight = httpx.options(live.url + "/v1/models", headers=headers)
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    for wrong in ("", " ", "a b"):
        monkeypatch.setenv(API_KEY_VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"{API_KEY_VARIABLE}( has no key|: each key must)"):
            serve_oracle(config)
    monkeypatch.setenv(API_KEY_VARIABLE, "other")
    with pytest.raises(ValueError, match="--api-key-file"):
        serve_oracle(ServerConfig(api_key_file=str(tmp_path / "none")))
