"""Cache headers of answers, and explanations of misses compared with an earlier request."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from engine import EngineConfig, ServerConfig
from engine.front.server.endpoints.explain import AnsweredChat, Explanations
from hybridcache.radix.api import Losses
from tests.engine.front.server.conftest import Live, Serve

SYSTEM = "Explain what was missed, in a word or two. " * 8


def body(system: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Why?"}]
    return {"messages": messages, "max_tokens": 4, **more}


def test_headers_report_hits_and_losses(live: Live) -> None:
    for stream in (False, True):
        for path, request in (
            ("/v1/chat/completions", body("Headers. " * 20, stream=stream)),
            ("/v1/completions", {"prompt": "headers " * 20, "max_tokens": 3, "stream": stream}),
        ):
            with httpx.stream("POST", live.url + path, json=request, timeout=120) as answer:
                answer.read()
            headers = answer.headers
            hit, total = int(headers["x-cache-hit-tokens"]), int(headers["x-cache-prompt-tokens"])
            lost = dict(part.split("=") for part in headers["x-cache-lost"].split(", "))
            assert hit + sum(map(int, lost.values())) == total
            assert hit > 0 or not stream


def test_operator_sees_comparison_with_nearest_earlier_chat(live: Live) -> None:
    chats = [body(SYSTEM + "Operator."), body("Else."), body(SYSTEM + "Operator!")]
    ids = [live.post("/v1/chat/completions", chat).json()["id"] for chat in chats]
    explanation = live.get(f"/v1/cache/explanations/{ids[2]}").json()
    assert (explanation["id"], explanation["compared_with"]) == (ids[2], ids[0])
    assert explanation["parted"]["now"].startswith("!")
    other = live.get(f"/v1/cache/explanations/{ids[2]}?compared_with={ids[1]}").json()
    assert other["compared_with"] == ids[1] and other["parted"]["at"] < explanation["parted"]["at"]
    assert "tokens were reused" in explanation["text"]
    assert "tokens that both share: " in explanation["text"]
    assert explanation["text"].endswith(explanation["advice"])
    assert live.post("/reset_prefix_cache", {}).status_code == 200
    again = live.post("/v1/chat/completions", chats[2]).json()["id"]
    assert "reset" in live.get(f"/v1/cache/explanations/{again}").json()["advice"]
    name = "chatcmpl-" + "0" * 32
    unknown = live.get(f"/v1/cache/explanations/{name}?compared_with={name}")
    assert unknown.status_code == 404 and f"id '{name}' and '{name}' is stored" in unknown.text
    assert 'explain_mib=N).","' in unknown.text


def test_requests_at_once_are_compared_in_the_order_of_their_starts(serve_oracle: Serve) -> None:
    """The later one ends first: the first one is new, and nothing is said to be evicted."""
    live = serve_oracle(step_s=0.02)
    chat = body(SYSTEM, max_tokens=60, ignore_eos=True, stream=True)
    with httpx.stream("POST", live.url + "/v1/chat/completions", json=chat, timeout=120) as first:
        lines = (line for line in first.iter_lines() if line.startswith("data: {"))
        first_id = json.loads(next(lines)[6:])["id"]
        later, same = (
            live.post("/v1/chat/completions", body(system)).json()["id"]
            for system in (SYSTEM + "Later.", SYSTEM)
        )
        assert live.get(f"/v1/cache/explanations/{first_id}").status_code == 404
        assert sum(1 for _ in lines) > 10
    live.wait_until_idle()
    told = live.get(f"/v1/cache/explanations/{first_id}").json()
    assert (told["cause"], told["compared_with"], told["lost"]) == ("new", None, {})
    for name in (later, same):
        told = live.get(f"/v1/cache/explanations/{name}?compared_with={first_id}").json()
        assert "forgotten" not in told["lost"] and "More memory" not in told["text"]
    assert live.get(f"/v1/cache/explanations/{later}").json()["compared_with"] == first_id


@pytest.mark.parametrize(
    ("ended_s", "cause", "said"),
    [
        (9.0, "in_progress", "199 shared with a request in progress"),
        (4.0, "forgotten", "199 no longer known to the cache"),
    ],
)
def test_tokens_of_a_request_in_progress_are_not_evicted(
    ended_s: float, cause: str, said: str
) -> None:
    tokens, losses = np.arange(200, dtype=np.int32), Losses(200, 0, 0, 0, 0)
    first, later = (
        AnsweredChat(name, None, [], [], None, tokens, 200, 0, losses, {}, began_s, end_s)
        for name, began_s, end_s in (("a", 1.0, ended_s), ("b", 5.0, 6.0))
    )
    tokenizer: Any = None  # Without a difference, no text is decoded.
    told = Explanations(tokenizer, EngineConfig(), ServerConfig()).explain(first, later)
    assert told["cause"] == cause and said in told["text"]
    assert ("More memory" in told["text"]) == (cause == "forgotten")


def test_reuse_of_a_request_that_is_not_stored_is_no_new_conversation(live: Live) -> None:
    chat = body("Not stored. " * 30)
    tokens = live.post("/tokenize", {"messages": chat["messages"]}).json()["tokens"]
    live.post("/v1/completions", {"prompt": tokens, "max_tokens": 1})
    ids = [live.post("/v1/chat/completions", one).json()["id"] for one in (body("Else."), chat)]
    told = live.get(f"/v1/cache/explanations/{ids[1]}").json()
    assert told["cached_tokens"] > 256 and told["compared_with"] is None, told["text"]
    assert told["cause"] == "below_grid" and "not stored" in told["text"]
    told = live.get(f"/v1/cache/explanations/{ids[1]}?compared_with={ids[0]}").json()
    assert told["cause"] is told["advice"] is None and told["parted"]["change"] == "system"


def test_advice_for_a_template_that_writes_tools_behind_the_system_text(live: Live) -> None:
    function = {"name": "look", "description": "Look at a place. " * 8, "parameters": {}}
    for tools, words in (
        ({"tools": [{"type": "function", "function": function}]}, "first user"),
        ({}, "at the end"),
    ):
        chats = [body(f"{SYSTEM} Folder: {name}.", **tools) for name in ("alpha", "beta")]
        ids = [live.post("/v1/chat/completions", chat).json()["id"] for chat in chats]
        told = live.get(f"/v1/cache/explanations/{ids[1]}?compared_with={ids[0]}").json()
        assert told["cause"] == "system" and words in told["advice"], told


SAME = {"role": "system", "content": "Every session of a client begins with this. " * 4}


def sessions(*chats: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Chats with the same system message and these further (role, content)."""
    return [
        {"messages": [SAME, *({"role": r, "content": c} for r, c in chat)], "max_tokens": 4}
        for chat in chats
    ]


def test_another_first_question_is_a_new_conversation_with_the_same_beginning(live: Live) -> None:
    asked = "Please read the second file and say what it is for. " * 3
    chats = sessions([("user", "What is in file one?")], [("user", "How long is it?")])
    ids = [live.post("/v1/chat/completions", chat).json()["id"] for chat in [*chats, chats[1]]]
    first, later, _ = ids
    told = live.get(f"/v1/cache/explanations/{later}").json()
    assert "new conversation with the same beginning" in told["text"] and told["compared_with"]
    assert told["parted"]["path"] == "messages[1].content"
    assert "Only append" not in told["text"] and told["cause"] != "messages"
    assert [*told["lost"]] == ["below_grid"] and "Nothing is to be done" in told["advice"]
    # A client that edits its first question, and sends the later ones again, changes its history.
    old, new = sessions(
        [("user", "Now it is nine."), ("assistant", "Yes."), ("user", asked)],
        [("user", "Now it is ten."), ("assistant", "Yes."), ("user", asked)],
    )
    earlier, edited = (live.post("/v1/chat/completions", one).json()["id"] for one in (old, new))
    path = f"/v1/cache/explanations/{edited}"
    assert live.get(path).json()["compared_with"] == earlier
    assert live.get(path).json()["cause"] == "messages"
    told = live.get(f"/v1/cache/explanations/{later}?compared_with={first}").json()
    assert told["parted"]["change"] == "messages"


@pytest.mark.parametrize(
    ("at", "checkpoints", "setting"),
    [
        (200, ("adaptive",), "adaptive,backoff:2"),
        (200, ("branch", "backoff"), "branch,backoff:2"),
        (200, ("adaptive", "backoff:2"), None),
        (96, ("adaptive",), None),
    ],
)
def test_advice_names_a_setting_that_reaches_the_place_and_is_not_in_use(
    at: int, checkpoints: tuple[str, ...], setting: str | None
) -> None:
    tokenizer: Any = None
    explanations = Explanations(tokenizer, EngineConfig(checkpoints=checkpoints), ServerConfig())
    advice = explanations._nearer(at, 300)
    assert "cache_control" in advice
    assert (setting in advice) if setting else ("--checkpoints" not in advice)


def test_advice_names_no_flag_that_is_in_use() -> None:
    tokenizer: Any = None

    def advice(cause: str, server: ServerConfig, **engine: Any) -> str:
        return Explanations(tokenizer, EngineConfig(**engine), server)._advice(cause) or ""

    plain, keeps = ServerConfig(), ServerConfig(preserve_thinking=True)
    for cause in ("answer", "template"):
        assert "--preserve-thinking" in advice(cause, plain)
        assert "--preserve-thinking" not in advice(cause, keeps)
    assert "(--host-gib, --state-dir)" in advice("kv_evicted", plain)
    assert "(--state-dir)" in advice("kv_evicted", plain, host_gib=1.0)
    assert "tier" not in advice("kv_evicted", plain, host_gib=1.0, state_dir="here")
