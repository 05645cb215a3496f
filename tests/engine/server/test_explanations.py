"""Cache headers of answers, and explanations of misses compared with an earlier request."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types.responses.response import PromptCacheDiagnostics
from pydantic import TypeAdapter

from engine.plugins.diagnostics.explain import ADVICE, NEW

from .conftest import Live

SYSTEM = "Explain what was missed, in a word or two. " * 8


def body(system: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Why?"}]
    return {"messages": messages, "max_tokens": 4, **more}


def compare_with(answer_id: str) -> dict[str, Any]:
    return {
        "prompt_cache_options": {"comparison_response_id": answer_id},
        "diagnostics": {"previous_message_id": answer_id},
    }


def test_headers_report_hits_and_losses(live: Live) -> None:
    for stream in (False, True):
        for path, request in (
            ("/v1/chat/completions", body("Headers. " * 20, stream=stream)),
            ("/v1/completions", {"prompt": "headers " * 20, "max_tokens": 3, "stream": stream}),
        ):
            with httpx.stream("POST", live.url + path, json=request, timeout=60) as answer:
                answer.read()
            headers = answer.headers
            hit, total = int(headers["x-cache-hit-tokens"]), int(headers["x-cache-prompt-tokens"])
            lost = dict(part.split("=") for part in headers["x-cache-lost"].split(", "))
            assert hit + sum(map(int, lost.values())) == total
            assert hit > 0 or not stream
            assert "x-cache-parted" not in headers


def test_answer_reports_the_first_difference(live: Live) -> None:
    first = live.post("/v1/chat/completions", body(SYSTEM)).json()
    assert "cache_explanation" not in first
    changed = SYSTEM.replace("or two", "or three", 1)
    answer = live.post("/v1/chat/completions", body(changed, **compare_with(first["id"])))
    assert answer.headers["x-cache-parted"].startswith("system; at=")
    report = answer.json()
    difference = report["cache_explanation"]["parted"]["at"]
    total = report["usage"]["prompt_tokens"]
    assert report["diagnostics"] == {
        "cache_miss_reason": {
            "type": "system_changed",
            "cache_missed_input_tokens": total - difference,
        }
    }
    openai_report = TypeAdapter(PromptCacheDiagnostics).validate_python(
        report["prompt_cache_diagnostics"]
    )
    assert (openai_report.type, openai_report.reason) == ("cache_miss", "input_changed")
    assert (
        openai_report.cache_missed_tokens == openai_report.comparison_reusable_tokens - difference
    )
    parted = report["cache_explanation"]["parted"]
    assert parted["path"] == "messages[0].content"
    assert parted["now"][:5] == "hree." and parted["before"] == "n a word or t"[-12:]


def test_stream_explains_in_its_last_event(live: Live) -> None:
    first = live.post("/v1/chat/completions", body(SYSTEM + "S")).json()
    request = body(SYSTEM + "S", stream=True, **compare_with(first["id"]))
    with httpx.stream(
        "POST", live.url + "/v1/chat/completions", json=request, timeout=60
    ) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    event = json.loads(lines[-1])
    assert event["choices"] == [] and event["diagnostics"] is None
    assert event["prompt_cache_diagnostics"] == {"type": "cache_hit"}
    assert event["cache_explanation"]["parted"] is None
    assert answer.headers["x-cache-parted"] == "no"


def test_messages_explain_in_anthropics_fields(live: Live) -> None:
    user = {"role": "user", "content": "Why?"}
    request = {"model": live.engine.model_name, "max_tokens": 4, "messages": [user]}
    first = live.post(
        "/v1/messages",
        {**request, "system": SYSTEM + "M", "diagnostics": {"previous_message_id": None}},
    )
    assert first.json()["diagnostics"] is None
    assert int(first.headers["x-cache-prompt-tokens"]) > 300
    later = {"diagnostics": {"previous_message_id": first.json()["id"]}}
    changed = live.post("/v1/messages", {**request, "system": "B" + SYSTEM + "M", **later})
    reason = changed.json()["diagnostics"]["cache_miss_reason"]
    assert reason["type"] == "system_changed"
    difference = int(changed.headers["x-cache-parted"].partition("at=")[2])
    total = int(changed.headers["x-cache-prompt-tokens"])
    assert reason["cache_missed_input_tokens"] == total - difference
    streamed = {**request, "system": "B" + SYSTEM + "M", "stream": True, **later}
    with httpx.stream("POST", live.url + "/v1/messages", json=streamed, timeout=60) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    assert json.loads(lines[0])["message"]["diagnostics"]["cache_miss_reason"] == reason
    assert int(answer.headers["x-cache-hit-tokens"]) > 0
    assert "diagnostics" not in live.post("/v1/messages", {**request, "system": "C"}).json()


@pytest.mark.parametrize(("salt", "later"), [("a", "b"), ("a", None), (None, "a")])
def test_requests_of_other_tenants_are_unknown(
    live: Live, salt: str | None, later: str | None
) -> None:
    first = live.post("/v1/chat/completions", body(SYSTEM, cache_salt=salt)).json()
    answer = live.post(
        "/v1/chat/completions", body(SYSTEM, cache_salt=later, **compare_with(first["id"]))
    ).json()
    unknown = live.post(
        "/v1/chat/completions", body(SYSTEM, cache_salt=later, **compare_with("chatcmpl-none"))
    ).json()
    for name in ("diagnostics", "prompt_cache_diagnostics", "cache_explanation"):
        assert answer[name] == unknown[name]
    assert answer["cache_explanation"] is None
    assert answer["diagnostics"] == {"cache_miss_reason": {"type": "previous_message_not_found"}}
    assert answer["prompt_cache_diagnostics"] == {"type": "comparison_response_not_found"}


def test_first_chat_of_a_server_is_explained(
    serve_oracle: Callable[..., Live],
) -> None:
    live = serve_oracle()
    first, second = (live.post("/v1/chat/completions", body(SYSTEM)).json() for _ in range(2))
    first_explanation, second_explanation = (
        live.get(f"/v1/cache/explanations/{answer['id']}").json() for answer in (first, second)
    )
    assert (
        first_explanation.keys() == second_explanation.keys()
        and first_explanation["compared_with"] is None
    )
    assert (first_explanation["cause"], first_explanation["advice"], first_explanation["lost"]) == (
        NEW,
        ADVICE[NEW],
        {},
    )
    num_tokens = first["usage"]["prompt_tokens"]
    assert first_explanation["prompt_tokens"] == first_explanation["new_tokens"] == num_tokens
    assert (
        first_explanation["shared_tokens"] == first_explanation["earlier_tokens"] == 0
        and first_explanation["parted"] is None
    )
    assert "no stored request shares any of it" in first_explanation["text"]
    assert second_explanation["compared_with"] == first["id"] and second_explanation["cause"] != NEW


def test_operator_sees_comparison_with_nearest_earlier_chat(live: Live) -> None:
    chats = [body(SYSTEM + "Operator."), body("Else."), body(SYSTEM + "Operator!")]
    ids = [live.post("/v1/chat/completions", chat).json()["id"] for chat in chats]
    explanation = live.get(f"/v1/cache/explanations/{ids[2]}").json()
    assert (explanation["id"], explanation["compared_with"]) == (ids[2], ids[0])
    assert explanation["parted"]["now"].startswith("!")
    other = live.get(f"/v1/cache/explanations/{ids[2]}?compared_with={ids[1]}").json()
    assert other["compared_with"] == ids[1] and other["parted"]["at"] < explanation["parted"]["at"]
    assert "tokens were reused" in explanation["text"] and explanation["text"].endswith(
        explanation["advice"]
    )
    unknown = live.get("/v1/cache/explanations/chatcmpl-none")
    assert unknown.status_code == 404 and "'chatcmpl-none' is stored" in unknown.text
    assert "--explain-mib" not in unknown.text, "no explanation was dropped"
    foreign = {"Origin": "https://evil.example"}
    url = f"{live.url}/v1/cache/explanations/{ids[2]}"
    assert httpx.get(url, headers=foreign).status_code == 403
