"""The page in Chromium with a live server: updates, explanations, chat and reconnection."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.front.cache_watch import Watch
from engine.front.server.settings import ServerConfig
from tests.adapters.watch.browser import chromium, tab
from tests.waiting import wait_until

from .conftest import Live, Serve, oracle_engine, serving

__all__ = ["chromium", "tab"]
PROMPT = "the same beginning for all who ask here, " * 5


def wait_for(tab: Any, expression: str) -> None:
    """Wait until ``expression`` is true. The page's security policy blocks playwright's own
    wait."""
    wait_until(lambda: tab.evaluate(expression))


def ask(live: Live, prompt: str, **more: Any) -> None:
    body = {"prompt": prompt, "max_tokens": 3} | more
    assert live.post("/v1/completions", body).status_code == 200


def wait_until_live(tab: Any) -> None:
    tab.wait_for_selector("#link[data-state=live]")


def test_page_shows_new_requests_and_nodes(tab: Any, serve_oracle: Serve) -> None:
    live = serve_oracle()
    tab.goto(live.url)
    wait_until_live(tab)
    assert "Nothing is cached yet" in tab.locator(".note").inner_text()
    for number in range(3):
        ask(live, PROMPT + f"{number} " * 30)
    wait_for(tab, "document.querySelectorAll('.bar:not(.running)').length === 3")
    ask(live, "a tenant's " * 20, cache_salt="secret")
    wait_for(tab, "document.querySelectorAll('.bar:not(.running)').length === 4")
    tab.evaluate("hybridcache.view.select(hybridcache.view.tree.items[0])")
    text = tab.locator(".details pre.text")
    text.wait_for()
    assert "same beginning" in text.inner_text()
    tab.evaluate(
        "hybridcache.view.select("
        "hybridcache.view.tree.items.find((node) => node.namespace !== null))"
    )
    wait_for(tab, "document.querySelector('.details pre.text')?.textContent.includes('not shown')")
    assert "a tenant's a tenant's" not in tab.content() and "secret" not in tab.content()


def test_a_refusal_of_a_proxy_does_not_ask_for_a_key(tab: Any, live: Live) -> None:
    """No key would pass it: it is not the server's own error."""
    refusal = {"status": 403, "body": "<h1>403 Forbidden</h1>", "content_type": "text/html"}
    tab.route("**/v1/cache/events", lambda route: route.fulfill(**refusal))
    tab.goto(live.url)
    tab.wait_for_selector("#link[data-state=broken]")
    assert (
        "A proxy denies /v1/cache: open the page on the server" in tab.locator("#link").inner_text()
    )
    assert "A proxy denies" in tab.locator(".note").inner_text()
    assert tab.locator("input[type=password]").count() == 0


def test_page_shows_the_explanation_of_a_request(tab: Any, live: Live) -> None:
    parted = {"at": 9, "before": "as before ", "was": "three", "now": "four"}
    explanation = {"text": "The system message was changed.", "parted": parted}
    tab.route(
        "**/v1/cache/explanations/*",
        lambda route: route.fulfill(body=json.dumps(explanation), content_type="application/json"),
    )
    ask(live, "what is explained " * 9)
    tab.goto(live.url)
    wait_until_live(tab)
    tab.locator(".bar").first.click()
    tab.locator(".details ins").wait_for()
    details = tab.locator(".details").inner_text()
    assert (
        "Why it missed" in details
        and explanation["text"] in details
        and "as before threefour" in details
    )


def test_chat_box_streams_and_shows_reused_tokens(tab: Any, live: Live) -> None:
    tab.goto(live.url)
    wait_until_live(tab)
    for number in range(2):
        tab.get_by_label("Message").fill("What do you keep? " * 20)
        tab.keyboard.press("Enter")
        wait_for(tab, f"document.querySelectorAll('.said small').length === {number + 1}")
    summary = tab.locator(".said small").last.inner_text()
    assert " reused" in summary and not summary.startswith("0 of") and "TTFT" in summary
    tab.get_by_role("button", name="new").click()
    assert tab.locator(".said").count() == 0


def test_chat_box_folds_reasoning_and_says_that_an_answer_was_cut(tab: Any, live: Live) -> None:
    """No limit is sent unless one is set; reasoning is sent back with the next message."""
    sent: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        sent.append(json.loads(route.request.post_data))
        deltas = [{"reasoning_content": "Hm, "}, {"reasoning_content": "well."}]
        deltas += [] if len(sent) == 3 else [{"content": "# So\n**Yes**:\n```py\n**x**\n```\n"}]
        choices = [{"delta": one, "finish_reason": None} for one in deltas]
        choices.append({"delta": {}, "finish_reason": "length" if len(sent) > 1 else "stop"})
        usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
        chunks = [*({"choices": [one]} for one in choices), {"choices": [], "usage": usage}]
        lines = [*(f"data: {json.dumps(one)}\n\n" for one in chunks), "data: [DONE]\n\n"]
        route.fulfill(body="".join(lines), content_type="text/event-stream")

    tab.route("**/v1/chat/completions", answer)
    tab.goto(live.url)
    wait_until_live(tab)
    assert tab.locator(".chat h2").inner_text() == "Chat " + tab.evaluate(
        "hybridcache.view.model.meta.title"
    )
    for number, (length, thinking) in enumerate([("", "default"), ("5", "off"), ("5", "on")], 1):
        tab.evaluate("document.querySelector('.chat > details').open = true")
        tab.get_by_label("Maximum tokens of an answer").fill(length)
        tab.get_by_label("Thinking").select_option(thinking)
        tab.get_by_label("Message").fill("Well?")
        tab.keyboard.press("Enter")
        wait_for(tab, f"document.querySelectorAll('.said small').length === {number}")
    assert [one.get("max_tokens") for one in sent] == [None, 5, 5]
    switches = [None, {"enable_thinking": False}, {"enable_thinking": True}]
    assert [one.get("chat_template_kwargs") for one in sent] == switches
    assert sent[1]["messages"][1]["reasoning_content"] == "Hm, well."
    said = tab.locator(".said.assistant")
    assert [("cut at the limit" in said.nth(at).inner_text()) for at in range(3)] == [0, 1, 1]
    assert [
        said.first.locator(tag).inner_text() for tag in (".heading", "strong >> nth=1", "pre")
    ] == [*("So", "Yes", "**x**\n")]
    assert "(reasoning only)" in said.last.inner_text()
    assert not said.last.get_by_text("Hm, well.").is_visible()
    said.last.get_by_text("reasoning", exact=True).click()
    assert said.last.get_by_text("Hm, well.").is_visible()


def test_page_reports_a_lost_server_and_reconnects(tab: Any) -> None:
    with serving(oracle_engine()) as live:
        ask(live, PROMPT)
        tab.goto(live.url)
        wait_until_live(tab)
        wait_for(tab, "hybridcache.view.model.nodes.size > 0")
    tab.wait_for_selector("#link[data-state=broken]")
    assert "trying again" in tab.locator("#link").inner_text()
    assert tab.evaluate("hybridcache.view.model.nodes.size") > 0, "the last state stays visible"
    with serving(oracle_engine(), port=live.port):
        wait_until_live(tab)
        assert tab.evaluate("hybridcache.view.model.nodes.size") == 0, "another server's cache"


def test_page_asks_for_the_operators_key(tab: Any, tmp_path: Path) -> None:
    """After the right one it says that it loads, for as long as a step takes."""
    answers = {"wrong": "did not accept", "api": "needs the key of", "admin": "waiting for the"}
    for key in answers:
        (tmp_path / key).write_text(key)
    files = {f"{key}_key_file": str(tmp_path / key) for key in ("api", "admin")}
    goes_on = threading.Event()
    with serving(oracle_engine(), ServerConfig(**files)) as live:
        tab.goto(live.url)
        for key, answer in answers.items():
            if key == "admin":
                live.server._engine.channel.host.call_soon(lambda: goes_on.wait(60))
            tab.get_by_label("Key", exact=True).fill(key)
            tab.get_by_role("button", name="Open").click()
            tab.get_by_text(answer).wait_for()
        assert tab.locator(".note").inner_text() == "Loading the cache …"
        assert "No request yet" not in tab.content()
        goes_on.set()
        wait_until_live(tab)
        live.headers["Authorization"] = "Bearer api"
        ask(live, PROMPT)
        wait_for(tab, "document.querySelectorAll('.bar').length === 1")
        assert tab.get_by_label("Key", exact=True).count() == 0


def test_page_shows_the_progress_of_a_prompt(tab: Any) -> None:
    """An answer has a rate after a second, and the built-in model examples under any name."""
    goes_on, engine = threading.Event(), oracle_engine(token_budget=64)
    engine.observers.append(lambda step: (64, 128) not in step.prefilled or goes_on.wait(60))
    with serving(engine, ServerConfig(served_model_name=("mine",))) as live:
        ask(live, "short")
        tab.goto(live.url)
        wait_until_live(tab)
        assert "tok/s" not in tab.locator(".lanes").inner_text()
        assert "Ada has 5 apples" in tab.locator(".chat").inner_text()
        with ThreadPoolExecutor(1) as asking:
            asking.submit(ask, live, "another one, " * 60)
            tab.get_by_text(re.compile(r"computing a prompt, \d+ %")).wait_for()
            goes_on.set()
        engine.runner.step_s = 0.05
        with live.send("/v1/completions", {"prompt": "a", "max_tokens": 999, "stream": True}):
            tab.get_by_text(re.compile(r"\d tokens · [\d.]+ tok/s")).wait_for()


@pytest.mark.parametrize("path", ["/", "/v1/cache"])
def test_script_of_another_page_cannot_read(tab: Any, live: Live, path: str) -> None:
    tab.goto("data:text/html,<p>another page")
    result = tab.evaluate(
        "(url) => fetch(url).then(() => 'read', (error) => error.name)", live.url + path
    )
    assert result == "TypeError"


def test_page_links_to_each_replica(
    tab: Any, serve_oracle: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Watch.whole

    def second_of_two(watch: Watch) -> dict[str, Any]:
        state = whole(watch)
        state["meta"] |= {"replica": 2, "num_replicas": 2}
        return state

    monkeypatch.setattr(Watch, "whole", second_of_two)
    live = serve_oracle(ServerConfig(replicas=2))
    tab.goto(f"{live.url}?replica=2")
    wait_until_live(tab)
    assert tab.locator("#replicas").inner_text().split() == ["replica", "1", "2"]
    assert tab.locator("#replicas a[aria-current]").inner_text() == "2"
    ask(live, PROMPT)
    wait_for(tab, "document.querySelectorAll('.bar').length === 1")
