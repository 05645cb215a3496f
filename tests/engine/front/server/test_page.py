"""The live page and its event stream: snapshots and access."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from engine import Engine
from engine.front.cache_watch import Watch
from engine.front.server.endpoints.observe import Page
from engine.front.server.settings import ServerConfig
from engine.requests.request import SamplingParams
from tests.adapters.watch.follower import follow, truth
from tests.waiting import wait_until

from .conftest import Live, Serve, oracle_engine, serving

PROMPT = "the same beginning for all who ask here, "


class Reader:
    """Reader of /v1/cache/events, in a thread."""

    def __init__(self, live: Live) -> None:
        self.events: list[tuple[str, Any]] = []
        self.num_busy = 0
        """Number of events about a step that is computed."""
        self._connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=120)
        self._connection.request("GET", "/v1/cache/events")
        self._lines = self._connection.getresponse()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        name = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            for line in self._lines:
                key, _, value = line.decode().rstrip("\n").partition(": ")
                if key == "event":
                    name = value
                elif key == "data" and name == "busy":
                    self.num_busy += 1
                elif key == "data":
                    self.events.append((name, json.loads(value)))

    def close(self) -> None:
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)

    def wait(self, condition: Callable[[Reader], bool]) -> None:
        wait_until(lambda: condition(self))

    @property
    def records(self) -> list[list[Any]]:
        """Records since the last whole state, that state included."""
        start = max((at for at, (name, _) in enumerate(self.events) if name == "whole"), default=0)
        return [record for _, data in self.events[start:] for record in data["records"]]

    @property
    def nodes(self) -> dict[int, dict[str, Any]]:
        nodes: dict[int, dict[str, Any]] = {}
        follow(nodes, self.records)
        return nodes

    @property
    def num_ended(self) -> int:
        return sum(request["state"] == "length" for request in self.requests.values())

    @property
    def requests(self) -> dict[str, dict[str, Any]]:
        return {
            request["id"]: request
            for kind, *rest in self.records
            if kind == "request"
            for request in rest
        }


@pytest.fixture
def read() -> Iterator[Callable[..., Reader]]:
    with contextlib.ExitStack() as stack:

        def start(live: Live) -> Reader:
            reader = Reader(live)
            stack.callback(reader.close)
            return reader

        yield start


def ask(live: Live, text: str, **more: Any) -> None:
    answer = live.post("/v1/completions", {"prompt": text, "max_tokens": 3} | more)
    assert answer.status_code == 200, answer.text


def test_page_is_served_and_loads_no_other_files(live: Live) -> None:
    answer = live.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert live.http.head("/").status_code == 200, "Claude Code sends HEAD before its first request"


def test_reader_follows_the_tree_and_the_requests(
    serve_oracle: Serve, read: Callable[..., Reader]
) -> None:
    live = serve_oracle(num_kv_tokens=2048)
    ask(live, PROMPT * 5)
    reader = read(live)
    reader.wait(lambda reader: bool(reader.events))
    assert len(reader.requests) == 1, "requests that ended earlier are shown, too"
    for number in range(12):
        ask(live, PROMPT * 5 + f"{number} " * 40, cache_salt="tenant" if number % 3 else None)
    reader.wait(lambda reader: reader.num_ended == 13)
    assert reader.nodes == truth(live.engine.cache)
    for request in reader.requests.values():
        assert request["cached"] + sum(request["losses"].values()) == request["prompt"]
        assert (
            request["state"] == "length"
            and request["answer"] == 3
            and request["node"] in reader.nodes
        )
    second = read(live)
    second.wait(lambda second: bool(second.events))
    assert second.nodes == reader.nodes and second.requests == reader.requests


@pytest.mark.parametrize("is_first", [True, False])
def test_monitors_and_pages_do_not_wait_for_a_step(
    is_first: bool, serve_oracle: Serve, read: Callable[..., Reader]
) -> None:
    """They have the report after the last step, or the first question that of a heartbeat, and its
    age."""
    live = serve_oracle()
    if not is_first:
        ask(live, PROMPT)
    goes_on, is_held, forward = threading.Event(), threading.Event(), live.engine.runner.forward

    def held(*arguments: Any) -> Any:
        is_held.set()
        assert goes_on.wait(60)
        return forward(*arguments)

    def age_s() -> float:
        lines = live.get("/metrics").text.splitlines()
        return float(next(one for one in lines if one.startswith("engine_report_age_s")).split()[1])

    assert is_first or age_s() == live.report()["age_s"] == 0
    live.engine.runner.forward = held
    asking = threading.Thread(target=ask, args=(live, PROMPT * 20))
    asking.start()
    assert is_held.wait(60)
    first, second = age_s(), age_s()
    assert 0 < first < second < live.report()["age_s"]
    assert live.report()["usage"]["requests"] == 1 - is_first
    assert live.get("/health").json()["status"] == "ok"
    reader = read(live)
    reader.wait(lambda reader: reader.num_busy > 1)
    assert not reader.events
    goes_on.set()
    reader.wait(lambda reader: bool(reader.events))
    asking.join()
    assert age_s() == 0 and live.report()["usage"]["requests"] == 2 - is_first


def test_an_answer_that_crawls_shows_in_the_metrics(serve_oracle: Serve) -> None:
    """Times of ended requests would show it at the end only."""
    live = serve_oracle(step_s=0.05)

    def sample(name: str) -> float:
        lines = live.get("/metrics").text.splitlines()
        return float(next(one for one in lines if one.startswith(f"engine_{name} ")).split()[1])

    connection = live.send("/v1/completions", {"prompt": PROMPT, "max_tokens": 999, "stream": True})
    wait_until(lambda: sample("itl_seconds_count") > 5)
    assert sample("itl_seconds_sum") > 0.2 and sample("tpot_seconds_count") == 0
    connection.close()
    live.wait_until_idle()
    wait_until(lambda: not live.server._engine._told_s)  # The last output may come after that.


def test_a_report_has_the_progress_of_prompts() -> None:
    engine = oracle_engine(token_budget=64)
    engine.submit(list(range(200)), SamplingParams(max_tokens=1))
    shares = []
    while engine.has_work():
        engine.step()
        shares.append((engine.report().num_prefilled, engine.report().num_to_prefill))
    assert shares == [(64, 200), (128, 200), (192, 200), (0, 0)]


def test_a_page_of_a_replica_has_the_progress_of_its_prompts() -> None:
    engine: Any = SimpleNamespace(seen={})
    shares = {f"replica-{n}": {"num_prefilled": n, "num_to_prefill": 9} for n in (0, 1, 2)}

    async def view() -> None:
        engine.seen = {"num_prefilled": 3, "num_to_prefill": 27, "replicas": shares}

    async def told() -> list[Any]:
        engine.view, found, page = view, [], Page(SimpleNamespace(engine=engine), 3)
        for replica in (2, 2, 4):
            found.append(json.loads(page._busy(replica).split(b"data: ")[1]))
            await page._asking
        return [one["num_prefilled"] for one in found]

    assert asyncio.run(told()) == [0, 1, 0]


def test_first_event_describes_an_arena_once(make_engine: Callable[..., Engine]) -> None:
    kinds = [kind for kind, *_ in Watch(make_engine()).whole()["records"]]
    assert kinds == ["time", "memory", "slabs"]


def test_shares_count_ended_requests() -> None:
    """A running request would make the share of reused tokens too low."""
    engine = oracle_engine()
    engine.generate([PROMPT * 5], SamplingParams(max_tokens=2))
    engine.submit(PROMPT * 9, SamplingParams(max_tokens=9))
    engine.step()
    assert engine.requests and engine.report().usage["prompt_tokens"] > len(PROMPT * 9)
    records: Any = Watch(engine).whole()["records"]
    [memory] = [shown for kind, shown, *_ in records if kind == "memory"]
    assert len(PROMPT * 5) <= memory["prompt_tokens"] <= len(PROMPT * 5) + 1
    assert memory["cached_tokens"] == 0
    report = engine.report()
    for name in ("bytes", "kv", "slots"):
        pool = getattr(report, name)
        assert memory[name] == [pool.free, pool.cached, pool.held]


def test_page_has_the_served_name(read: Callable[..., Reader]) -> None:
    with serving(oracle_engine(), ServerConfig(served_model_name=("local", "*"))) as live:
        reader = read(live)
        reader.wait(lambda reader: bool(reader.events))
        assert reader.events[0][1]["meta"]["title"] == "local"


def test_node_shows_its_text_except_that_of_tenants(
    serve_oracle: Serve, read: Callable[..., Reader]
) -> None:
    live = serve_oracle()
    reader = read(live)
    ask(live, PROMPT * 3)
    ask(live, "what a tenant asks, " * 9, cache_salt="secret")
    reader.wait(lambda reader: reader.num_ended == 2)
    open_nodes, private_nodes = {}, {}
    for id_, node in reader.nodes.items():
        found = live.get(f"/v1/cache/nodes/{id_}").json()
        (open_nodes if node["namespace"] is None else private_nodes)[id_] = found
    assert any("same beginning" in found["text"] for found in open_nodes.values())
    assert private_nodes and all(found["text"] is None for found in private_nodes.values())
    assert "what a tenant" not in json.dumps([private_nodes, reader.records])
    assert "secret" not in json.dumps([private_nodes, reader.records])
    assert live.get("/v1/cache/nodes/99999").status_code == 404
