"""Cache headers of answers, and explanations of misses compared with an earlier request."""

from __future__ import annotations

from typing import Any

import httpx

from .conftest import Live

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
    assert explanation["text"].endswith(explanation["advice"])
    assert live.post("/reset_prefix_cache", {}).status_code == 200
    again = live.post("/v1/chat/completions", chats[2]).json()["id"]
    assert "reset" in live.get(f"/v1/cache/explanations/{again}").json()["advice"]
    unknown = live.get("/v1/cache/explanations/chatcmpl-none")
    assert (
        unknown.status_code == 404 and "id 'chatcmpl-none' of its answer is stored" in unknown.text
    )


def test_ids_of_calls_that_no_prompt_has_are_no_difference(live: Live) -> None:
    def chat(call_id: str, last: str) -> str:
        call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        messages = [
            *body(SYSTEM)["messages"],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": "7"},
            {"role": "user", "content": last},
        ]
        name = live.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2}).json()
        return str(name["id"])

    first, second = chat("call_a", "Thank you."), chat("call_b", "Write a table.")
    told = live.get(f"/v1/cache/explanations/{second}?compared_with={first}").json()
    assert told["parted"]["path"] == "messages[4].content"
