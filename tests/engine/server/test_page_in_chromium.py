"""The page in Chromium before a live server: it follows, asks, chats, and comes back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import AsyncEngine
from engine.plugins.observe.feed import Feed
from engine.server.api_errors import APIError
from engine.server.settings import ServerConfig
from tests.watch.browser import chromium, errors, tab

from .conftest import Live, oracle_engine, serving

__all__ = ["chromium", "errors", "tab"]
PROMPT = "the same beginning for all who ask here, " * 5


def until(tab: Any, expression: str) -> Any:
    """What ``expression`` is once it is true. The page's policy keeps playwright's own wait out."""
    deadline = time.monotonic() + 20
    while not (value := tab.evaluate(expression)):
        assert time.monotonic() < deadline, f"{expression}: {tab.locator('body').inner_text()}"
        time.sleep(0.02)
    return value


def ask(live: Live, prompt: str, **more: Any) -> None:
    body = {"prompt": prompt, "max_tokens": 3} | more
    assert live.post("/v1/completions", body).status_code == 200


def is_live(tab: Any) -> None:
    tab.wait_for_selector("#link[data-state=live]")


def test_it_shows_requests_and_nodes_as_they_come(
    tab: Any, serve_oracle: Callable[..., Live]
) -> None:
    live = serve_oracle()
    tab.goto(live.url)
    is_live(tab)
    assert "Nothing is cached yet" in tab.locator(".note").inner_text()
    for number in range(3):
        ask(live, PROMPT + f"{number} " * 30)
    until(tab, "document.querySelectorAll('.bar:not(.running)').length === 3")
    ask(live, "a tenant's " * 20, cache_salt="secret")
    until(tab, "document.querySelectorAll('.bar:not(.running)').length === 4")
    tab.evaluate("hybridcache.views[0].select(hybridcache.views[0].tree.items[0])")
    text = tab.locator(".details pre.text")
    text.wait_for()
    assert "same beginning" in text.inner_text()
    tab.evaluate(
        "hybridcache.views[0].select("
        "hybridcache.views[0].tree.items.find((node) => node.namespace !== null))"
    )
    until(tab, "document.querySelector('.details pre.text')?.textContent.includes('not shown')")
    assert "a tenant's a tenant's" not in tab.content() and "secret" not in tab.content()


def test_a_request_is_explained(tab: Any, live: Live) -> None:
    """In the words of /v1/cache/explanations."""
    parted = {"at": 9, "before": "as before ", "was": "three", "now": "four"}
    told = {"text": "The system message was changed.", "parted": parted}
    tab.route(
        "**/v1/cache/explanations/*",
        lambda route: route.fulfill(body=json.dumps(told), content_type="application/json"),
    )
    ask(live, "what is explained " * 9)
    tab.goto(live.url)
    is_live(tab)
    tab.locator(".bar").first.click()
    tab.locator(".details ins").wait_for()
    shown = tab.locator(".details").inner_text()
    assert "Why it missed" in shown and told["text"] in shown and "as before threefour" in shown


def test_the_chat_box_streams_and_says_what_it_reused(tab: Any, live: Live) -> None:
    tab.goto(live.url)
    is_live(tab)
    for number in range(2):
        tab.get_by_label("Message").fill("What do you keep? " * 20)
        tab.keyboard.press("Enter")
        until(tab, f"document.querySelectorAll('.said small').length === {number + 1}")
    told = tab.locator(".said small").last.inner_text()
    assert " reused" in told and not told.startswith("0 of") and "TTFT" in told
    tab.get_by_role("button", name="new").click()
    assert tab.locator(".said").count() == 0


def test_it_says_when_the_server_is_gone_and_goes_on_when_it_is_back(tab: Any) -> None:
    with serving(oracle_engine()) as live:
        ask(live, PROMPT)
        tab.goto(live.url)
        is_live(tab)
        until(tab, "hybridcache.views[0].model.nodes.size > 0")
    tab.wait_for_selector("#link[data-state=broken]")
    assert "trying again" in tab.locator("#link").inner_text()
    assert tab.evaluate("hybridcache.views[0].model.nodes.size") > 0, "what is known stays"
    with serving(oracle_engine(), port=live.port):
        is_live(tab)
        assert tab.evaluate("hybridcache.views[0].model.nodes.size") == 0, "another server's cache"


def test_it_asks_for_the_operators_key(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret")
    with serving(oracle_engine(), ServerConfig(admin_key_file=str(tmp_path / "key"))) as live:
        tab.goto(live.url)
        for key in ("wrong", "s3cret"):
            tab.get_by_label("Key", exact=True).fill(key)
            tab.get_by_role("button", name="Open").click()
        is_live(tab)
        ask(live, PROMPT)
        until(tab, "document.querySelectorAll('.bar').length === 1")
        assert tab.get_by_label("Key", exact=True).count() == 0


@pytest.mark.parametrize("path", ["/", "/v1/cache"])
def test_an_inline_script_of_another_page_reads_nothing(tab: Any, live: Live, path: str) -> None:
    """Nothing here allows another origin."""
    tab.goto("data:text/html,<p>another page")
    found = tab.evaluate(
        "(url) => fetch(url).then(() => 'read', (error) => error.name)", live.url + path
    )
    assert found == "TypeError"


def test_of_replicas_it_has_the_sums(
    tab: Any, serve_oracle: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(feed: Feed) -> None:
        raise APIError(501, "Several engines.", code="replicas")

    async def two(engine: AsyncEngine) -> dict[str, Any]:
        return (await engine.report()).as_dict() | {"replicas": {"a": {}, "b": {}}}

    monkeypatch.setattr(Feed, "_begin", refuse)
    monkeypatch.setattr(AsyncEngine, "cache_view", two)
    live = serve_oracle()
    tab.goto(live.url)
    is_live(tab)
    for _ in range(2):
        ask(live, PROMPT)
    tokens, cached = 2 * len(PROMPT), (len(PROMPT) - 1) // 64 * 64
    said = f"{100 * cached / tokens:.1f} % of {tokens}"
    for text in (said, "2 replicas · 0 running", "Several engines."):
        until(tab, f"document.querySelector('.note').innerText.includes('{text}')")
