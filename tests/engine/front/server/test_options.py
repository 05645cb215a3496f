"""Parameters of vLLM and SGLang that OpenAI's API lacks.

They work as in those servers. ``test_bad_input.py`` tests the refusal of others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.front.server.settings import API_KEY_VARIABLE, ServerConfig
from engine.text.tokenizer import ChatTemplate
from tests.refused import refused

from .conftest import Live, Serve

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


def test_default_limit_of_a_chat_is_that_of_the_server(serve_oracle: Serve) -> None:
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


def test_switches_of_the_template_have_defaults_of_the_server(serve_oracle: Serve) -> None:
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
def test_choices_of_a_request_are_one_session(serve_oracle: Serve, path: str) -> None:
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
    assert live.get("/health").headers["keep-alive"] == "timeout=75"
    assert "access-control-allow-origin" not in live.get("/health").headers


def test_api_keys_and_cors_origins(
    serve_oracle: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "other")
    (tmp_path / "key").write_text("# of clients\nsecret\n")
    config = ServerConfig(api_key_file=str(tmp_path / "key"), cors_origin=("https://a.example",))
    live = serve_oracle(config)

    def status(path: str = "/v1/models", **headers: str) -> int:
        return httpx.get(live.url + path, headers=headers).status_code

    assert status(authorization="Bearer wrong") == 401 == status(authorization="secret")
    assert "An API key is required" in httpx.get(live.url + "/v1/models").text
    assert "not accepted" in httpx.get(live.url + "/v1/models", headers={"x-api-key": "x"}).text
    assert status(authorization="Bearer secret") == status(authorization="Bearer other") == 200
    assert status(**{"x-api-key": "secret"}) == 200
    assert status("/health") == 200 and status("/metrics") == 200
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    preflight = httpx.options(live.url + "/v1/models", headers=headers)
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    for wrong in ("", " ", "a b c", "é"):
        monkeypatch.setenv(API_KEY_VARIABLE, wrong)
        refused(f"{API_KEY_VARIABLE}( has no key|: (each|the) key)", serve_oracle, config)
    monkeypatch.setenv(API_KEY_VARIABLE, "other")
    refused("--api-key-file", serve_oracle, ServerConfig(api_key_file=str(tmp_path / "none")))
