"""What an answer says of the cache: headers, and why it missed beside an earlier one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import httpx
import pytest
from openai.types.responses.response import PromptCacheDiagnostics
from pydantic import TypeAdapter

from engine import server_config
from engine.plugins.diagnostics.explain import ADVICE, CAUSES, NEW, Change

from .conftest import Live

SYSTEM = "Explain what was missed, in a word or two. " * 8


def body(system: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Why?"}]
    return {"messages": messages, "max_tokens": 4, **more}


def compared(answer_id: str) -> dict[str, Any]:
    return {
        "prompt_cache_options": {"comparison_response_id": answer_id},
        "diagnostics": {"previous_message_id": answer_id},
    }


def test_every_answer_says_in_its_headers_what_the_cache_had(live: Live) -> None:
    for stream in (False, True):
        for path, asked in (
            ("/v1/chat/completions", body("Headers. " * 20, stream=stream)),
            ("/v1/completions", {"prompt": "headers " * 20, "max_tokens": 3, "stream": stream}),
        ):
            with httpx.stream("POST", live.url + path, json=asked, timeout=60) as answer:
                answer.read()
            said = answer.headers
            hit, total = int(said["x-cache-hit-tokens"]), int(said["x-cache-prompt-tokens"])
            lost = dict(part.split("=") for part in said["x-cache-lost"].split(", "))
            assert hit + sum(map(int, lost.values())) == total
            assert hit > 0 or not stream
            assert "x-cache-parted" not in said


def test_an_answer_says_where_it_parts_from_an_earlier_one(live: Live) -> None:
    first = live.post("/v1/chat/completions", body(SYSTEM)).json()
    assert "cache_explanation" not in first
    changed = SYSTEM.replace("or two", "or three", 1)
    answer = live.post("/v1/chat/completions", body(changed, **compared(first["id"])))
    assert answer.headers["x-cache-parted"].startswith("system; at=")
    told = answer.json()
    at = told["cache_explanation"]["parted"]["at"]
    total = told["usage"]["prompt_tokens"]
    assert told["diagnostics"] == {
        "cache_miss_reason": {"type": "system_changed", "cache_missed_input_tokens": total - at}
    }
    kind = TypeAdapter(PromptCacheDiagnostics).validate_python(told["prompt_cache_diagnostics"])
    assert (kind.type, kind.reason) == ("cache_miss", "input_changed")
    assert kind.cache_missed_tokens == kind.comparison_reusable_tokens - at
    parted = told["cache_explanation"]["parted"]
    assert parted["path"] == "messages[0].content"
    assert parted["now"][:5] == "hree." and parted["before"] == "n a word or t"[-12:]


def test_a_stream_says_it_in_its_last_event(live: Live) -> None:
    first = live.post("/v1/chat/completions", body(SYSTEM + "S")).json()
    asked = body(SYSTEM + "S", stream=True, **compared(first["id"]))
    with httpx.stream("POST", live.url + "/v1/chat/completions", json=asked, timeout=60) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    told = json.loads(lines[-1])
    assert told["choices"] == [] and told["diagnostics"] is None
    assert told["prompt_cache_diagnostics"] == {"type": "cache_hit"}
    assert told["cache_explanation"]["parted"] is None
    assert answer.headers["x-cache-parted"] == "no"


def test_messages_say_it_as_anthropic_does(live: Live) -> None:
    user = {"role": "user", "content": "Why?"}
    asked = {"model": live.engine.model_name, "max_tokens": 4, "messages": [user]}
    first = live.post(
        "/v1/messages",
        {**asked, "system": SYSTEM + "M", "diagnostics": {"previous_message_id": None}},
    )
    assert first.json()["diagnostics"] is None
    assert int(first.headers["x-cache-prompt-tokens"]) > 300
    later = {"diagnostics": {"previous_message_id": first.json()["id"]}}
    changed = live.post("/v1/messages", {**asked, "system": "B" + SYSTEM + "M", **later})
    reason = changed.json()["diagnostics"]["cache_miss_reason"]
    assert reason["type"] == "system_changed"
    at = int(changed.headers["x-cache-parted"].partition("at=")[2])
    total = int(changed.headers["x-cache-prompt-tokens"])
    assert reason["cache_missed_input_tokens"] == total - at
    streamed = {**asked, "system": "B" + SYSTEM + "M", "stream": True, **later}
    with httpx.stream("POST", live.url + "/v1/messages", json=streamed, timeout=60) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    assert json.loads(lines[0])["message"]["diagnostics"]["cache_miss_reason"] == reason
    assert int(answer.headers["x-cache-hit-tokens"]) > 0
    assert "diagnostics" not in live.post("/v1/messages", {**asked, "system": "C"}).json()


def test_each_cause_has_advice() -> None:
    assert set(ADVICE) == {*get_args(Change), *CAUSES, NEW}


def test_an_unknown_id_may_be_one_that_was_forgotten(serve_oracle: Callable[..., Live]) -> None:
    live = serve_oracle(server_config(explain_mib=0))
    answer_id = live.post("/v1/chat/completions", body("Gone.")).json()["id"]
    told = live.get(f"/v1/cache/explanations/{answer_id}")
    assert told.status_code == 404 and "raise --explain-mib" in told.text


def test_responses_say_it_as_openai_does(live: Live) -> None:
    create = live.client.responses.create
    model = live.engine.model_name
    first = create(model=model, input="Why?", instructions=SYSTEM + "R", max_output_tokens=4)
    assert first.prompt_cache_diagnostics is None
    body = {"prompt_cache_options": {"comparison_response_id": first.id}}
    second = create(
        model=model,
        input="Why?",
        instructions="R" + SYSTEM + "R",
        max_output_tokens=4,
        extra_body=body,
    )
    told = second.prompt_cache_diagnostics
    assert told is not None and told.type == "cache_miss" and told.reason == "input_changed"
    stream = create(
        model=model,
        input="Why?",
        instructions=SYSTEM + "R",
        max_output_tokens=4,
        stream=True,
        extra_body=body,
    )
    assert int(stream.response.headers["x-cache-hit-tokens"]) > 0
    last = list(stream)[-1]
    assert last.response.prompt_cache_diagnostics.type == "cache_hit"


@pytest.mark.parametrize(("salt", "later"), [("a", "b"), ("a", None), (None, "a")])
def test_nobody_learns_of_another_tenants_request(
    live: Live, salt: str | None, later: str | None
) -> None:
    first = live.post("/v1/chat/completions", body(SYSTEM, cache_salt=salt)).json()
    told = live.post(
        "/v1/chat/completions", body(SYSTEM, cache_salt=later, **compared(first["id"]))
    ).json()
    unknown = live.post(
        "/v1/chat/completions", body(SYSTEM, cache_salt=later, **compared("chatcmpl-none"))
    ).json()
    for name in ("diagnostics", "prompt_cache_diagnostics", "cache_explanation"):
        assert told[name] == unknown[name]
    assert told["cache_explanation"] is None
    assert told["diagnostics"] == {"cache_miss_reason": {"type": "previous_message_not_found"}}
    assert told["prompt_cache_diagnostics"] == {"type": "comparison_response_not_found"}


def test_an_answer_that_the_client_stopped_is_remembered(
    serve_oracle: Callable[..., Live],
) -> None:
    live = serve_oracle(step_s=0.005)
    asked = body(SYSTEM) | {"stream": True, "max_tokens": 500, "ignore_eos": True}
    said = ""
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=asked) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                said += event["choices"][0]["delta"].get("content") or ""
            if len(said) > 30:
                break
    live.wait_until_idle()
    stopped = event["id"]
    chat = [*asked["messages"], {"role": "assistant", "content": said}]
    goes_on = body("Go on.") | {"messages": [*chat, {"role": "user", "content": "Go on."}]}
    next_id = live.post("/v1/chat/completions", goes_on).json()["id"]
    told = live.get(f"/v1/cache/explanations/{next_id}").json()
    assert told["compared_with"] == stopped
    assert told["cause"] != "new"


def test_the_first_chat_of_a_server_is_explained_as_any_other(
    serve_oracle: Callable[..., Live],
) -> None:
    live = serve_oracle()
    first, second = (live.post("/v1/chat/completions", body(SYSTEM)).json() for _ in range(2))
    told, later = (
        live.get(f"/v1/cache/explanations/{answer['id']}").json() for answer in (first, second)
    )
    assert told.keys() == later.keys() and told["compared_with"] is None
    assert (told["cause"], told["advice"], told["lost"]) == (NEW, ADVICE[NEW], {})
    num_tokens = first["usage"]["prompt_tokens"]
    assert told["prompt_tokens"] == told["new_tokens"] == num_tokens
    assert told["shared_tokens"] == told["earlier_tokens"] == 0 and told["parted"] is None
    assert "no stored request shares any of it" in told["text"]
    assert later["compared_with"] == first["id"] and later["cause"] != NEW


def test_a_first_chat_that_the_cache_knew_is_not_new(serve_oracle: Callable[..., Live]) -> None:
    """A text completion computed its prompt, and is itself not explained."""
    live = serve_oracle()
    asked = body(SYSTEM)
    tokens = live.post("/tokenize", {"messages": asked["messages"]}).json()["tokens"]
    text = live.post("/v1/completions", {"prompt": tokens, "max_tokens": 1}).json()
    chat = live.post("/v1/chat/completions", asked).json()
    told = live.get(f"/v1/cache/explanations/{chat['id']}").json()
    assert told["cause"] == "below_grid" and told["cached_tokens"] > 0
    assert sum(told["lost"].values()) == told["shared_tokens"] - told["cached_tokens"]
    assert "tokens that the cache knew: " in told["text"]
    unknown = live.get(f"/v1/cache/explanations/{text['id']}")
    assert unknown.status_code == 404 and "not text completions" in unknown.text


@pytest.mark.parametrize(
    ("changes", "field", "names_reasoning"),
    [
        ({"content": "b ok"}, "content", False),
        ({"reasoning_content": None}, "reasoning_content", True),
        ({"content": "b ok", "reasoning_content": None}, "reasoning_content", True),
    ],
)
def test_the_advice_names_the_part_of_an_answer_that_came_back_changed(
    say: Callable[..., Live], changes: dict[str, Any], field: str, names_reasoning: bool
) -> None:
    live = say("a</think>b")
    asked = body(str(changes) + SYSTEM, reasoning_effort="low") | {"max_tokens": 40}
    answer = live.post("/v1/chat/completions", asked).json()
    message = answer["choices"][0]["message"] | changes
    messages = [*asked["messages"], message, {"role": "user", "content": "Go on."}]
    later = live.post("/v1/chat/completions", asked | {"messages": messages}).json()
    beside = f"{later['id']}?compared_with={answer['id']}"
    told = live.get(f"/v1/cache/explanations/{beside}").json()
    assert (told["cause"], told["parted"]["path"]) == ("answer", f"messages[2].{field}")
    assert told["advice"].startswith("Send answers back as they came.")
    assert ("--preserve-thinking" in told["advice"]) == names_reasoning


def test_the_operator_sees_an_answer_beside_the_nearest_before_it(live: Live) -> None:
    chats = [body(SYSTEM + "Operator."), body("Else."), body(SYSTEM + "Operator!")]
    ids = [live.post("/v1/chat/completions", chat).json()["id"] for chat in chats]
    told = live.get(f"/v1/cache/explanations/{ids[2]}").json()
    assert (told["id"], told["compared_with"]) == (ids[2], ids[0])
    assert told["parted"]["now"].startswith("!")
    other = live.get(f"/v1/cache/explanations/{ids[2]}?compared_with={ids[1]}").json()
    assert other["compared_with"] == ids[1] and other["parted"]["at"] < told["parted"]["at"]
    assert "tokens were reused" in told["text"] and told["text"].endswith(told["advice"])
    unknown = live.get("/v1/cache/explanations/chatcmpl-none")
    assert unknown.status_code == 404 and "'chatcmpl-none' is stored" in unknown.text
    assert "--explain-mib" not in unknown.text, "nothing was forgotten"
    foreign = {"Origin": "https://evil.example"}
    url = f"{live.url}/v1/cache/explanations/{ids[2]}"
    assert httpx.get(url, headers=foreign).status_code == 403
