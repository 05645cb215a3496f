"""Ends of sessions that clients name: what only they used is evicted first."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from engine.front.server.bodies import decode
from engine.front.server.endpoints.anthropic import MessagesRequest
from engine.front.server.endpoints.responses import ResponsesRequest
from engine.front.server.schemas import Sampling
from engine.front.server.settings import ServerConfig
from hybridcache import CacheConfig, LeaseRequest, build_prefix_cache, parse_placement
from tests.radix.serving import serve_lease

HEAD = np.arange(16, dtype=np.int32)


class Clients:
    """Sessions on one small cache. Each text is a shared head, the branches of a session and turns
    of 16 tokens."""

    def __init__(self, num_slots: int, eviction: str = "survival") -> None:
        self.cache = build_prefix_cache(
            CacheConfig(num_kv_tokens=4000, num_slots=num_slots, grid=8, eviction=eviction)
        )
        self.placement = parse_placement("end")

    def text(self, *turns: int) -> np.ndarray:
        parts = [np.arange(1000 * turn, 1000 * turn + 16, dtype=np.int32) for turn in turns]
        return np.concatenate((HEAD, *parts))

    def serve(
        self, *turns: int, session: str = "", ends: bool = False, tenant: str | None = None
    ) -> None:
        text = self.text(*turns)
        asked = LeaseRequest(text[:-8], tenant, session=session)
        serve_lease(self.cache, self.placement, asked, text[-8:], "session_end" if ends else "")
        self.cache.check(held_tokens=0, held_slots=0)

    def has(self, *turns: int, tenant: str | None = None) -> bool:
        text = self.text(*turns)
        return self.cache.match(np.append(text, np.int32(7)), tenant).cached_len == len(text)

    def superseded(self) -> set[tuple[str | None, int]]:
        nodes = (node.checkpoint for node in self.cache.iter_nodes())
        return {(one.session, one.position) for one in nodes if one and one.superseded}


@pytest.mark.parametrize("eviction", ["lru", "survival"])
def test_all_branches_of_an_ended_session_go_first_and_nothing_of_others(eviction: str) -> None:
    clients = Clients(5, eviction)
    clients.serve(1, 2, session="a")
    clients.serve(1, 3, session="a")
    clients.serve(4, 5, session="b")
    clients.serve(1, 6, session="a", ends=True)
    assert clients.superseded() == {("a", 48)}
    for number in range(7, 10):
        clients.serve(number, session="c")
    assert clients.has(4, 5) and not (clients.has(1, 2) or clients.has(1, 3) or clients.has(1, 6))


def test_text_that_another_session_used_stays() -> None:
    clients = Clients(9)
    clients.serve(1, session="a")
    clients.serve(1, 2, session="b")
    clients.serve(1, 3, session="a")
    clients.serve(1, 4)
    clients.serve(1, 3, 5, session="a", ends=True)
    nodes = [node.checkpoint for node in clients.cache.iter_nodes()]
    [shared] = [one for one in nodes if one is not None and one.position == 32]
    assert shared.session == "" and not shared.superseded
    assert clients.superseded() == {("a", 48), ("a", 64)}
    clients.serve(1, 3, 5, 6, session="d")  # It goes on after all, under another name.
    clients.serve(1, 3, 7, session="e")
    assert ("a", 48) not in clients.superseded()


def test_a_liar_loses_its_own_and_reaches_no_other_tenant() -> None:
    clients = Clients(8)
    for tenant in "AB":
        clients.serve(1, session="chat", tenant=tenant)
        clients.serve(1, 2, session="chat", tenant=tenant)
    clients.serve(1, 3, session="chat", tenant="B", ends=True)
    assert all(clients.has(1, 2, tenant=tenant) for tenant in "AB")
    [clients.serve(number, session=f"{number}", tenant="A") for number in range(4, 9)]
    assert clients.has(1, 2, tenant="A") and not clients.has(1, 2, tenant="B")


def test_the_rest_of_an_ended_session_goes_first_in_two_pools_too() -> None:
    clients = Clients(9)
    clients.serve(1, 2, session="a")
    clients.serve(3, 4, session="b")
    clients.serve(1, 2, 5, session="a", ends=True)
    clients.cache.evict(num_tokens=48)
    assert not clients.has(1, 2) and clients.has(3, 4)


CHAT = {"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]}
CHAT["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
KINDS: dict[str, Any] = {"input": ResponsesRequest, "messages": MessagesRequest}


@pytest.mark.parametrize(
    ("body", "session"),
    [
        ({"metadata": {"session_id": "a"}}, {"session": "a"}),
        ({"session_id": "a", "metadata": {"session_id": "b"}}, {"session": "b"}),
        ({"session_id": "a", "cache_ttl_ms": 5}, {"session": "a", "returns_within_s": 0.005}),
        ({"agent_hint": {"session": "a", "release": True}}, {"session": "a", "ends_session": True}),
        ({"agent_hint": {"cache_ttl_ms": 20, "prefetch": 1}}, {"returns_within_s": 0.02}),
        ({"input": "Hi", "session_id": "a"}, {"session": "a"}),
        (CHAT, {"returns_within_s": 3600.0}),
        (CHAT | {"metadata": {"returns_within_s": 2}}, {"returns_within_s": 2.0}),
    ],
)
def test_clients_name_sessions_and_times_as_in_other_engines(
    body: dict[str, Any], session: dict[str, Any]
) -> None:
    kind = next((kind for name, kind in KINDS.items() if name in body), Sampling)
    asked = decode(kind, json.dumps(body).encode(), ServerConfig())
    if kind is not Sampling:
        asked = asked.as_chat(*([asked.items] if kind is ResponsesRequest else []))
    assert asked.session == {"ends_session": False, "session": ""} | session
