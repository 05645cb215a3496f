"""Ranks of one vLLM with a scheduler each, behind the router that follows their events."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest

pytest.importorskip("vllm")

from hybridcache.adapters.routing.blocks import BlockEvents
from hybridcache.adapters.routing.precise import CheckpointSeconds
from hybridcache.adapters.routing.protocol import ReplicaSpec, RouteRequest
from hybridcache.lab.traces import open_trace
from hybridcache.vllm import NAME
from hybridcache.vllm.check.engine import Options, StubEngine
from tests.radix.serving import PerToken


def hit_rate(gib, ranks):
    engines = [StubEngine(Options(gib=gib, scheduler=NAME, unit=32)) for _ in range(ranks)]
    sizes = {"kv_bytes": 24576, "state_bytes": 78 << 20, "capacity_bytes": int(gib * 2**30)}
    router = CheckpointSeconds(ReplicaSpec(PerToken(), page_size=32, grid=32, **sizes))
    for rank, engine in enumerate(engines):
        router.joined(rank, 0.0)
        manager, blocks = engine.scheduler.kv_cache_manager, BlockEvents(32, 3)
        manager.enable_kv_cache_events = manager.block_pool.enable_kv_cache_events = True

        def publish(batch, rank=rank, blocks=blocks):
            number, payload = blocks.next_sequence, msgspec.msgpack.encode([0.0, batch.events])
            router.on_events(rank, number, blocks.read(number, payload))

        engine.scheduler.kv_event_publisher.publish = publish
    sessions, number, running, now = {}, 0, {}, 0.0
    for one in open_trace("agent?head=90"):
        sessions.setdefault(one.session, deque()).append(one)
    waiting = deque(sessions.values())
    while waiting or running:
        while waiting and len(running) < 16:
            session, number = waiting.popleft(), number + 1
            turn = session.popleft()
            rank = router.route(RouteRequest(number, turn.tokens), now).replica
            engines[rank].submit(deque([turn]))
            running[number] = engines[rank], [*engines[rank].live][-1], session
        now += 512.0  # 2,048 tokens.
        for engine in engines:
            engine.step()
        for number_, (engine, name, session) in list(running.items()):
            if name not in engine.live:
                router.ended(number_, now)
                del running[number_]
                waiting.extendleft([session] if session else [])
    reports = [engine.report for engine in engines]
    assert not any(one.num_wrong for one in reports)
    return sum(one.hit_tokens for one in reports) / sum(one.prompt_tokens for one in reports)


def test_hits_of_eight_ranks_are_near_those_of_one_with_their_memory() -> None:
    assert hit_rate(2.0, 8) > hit_rate(16.0, 1) - 0.05
