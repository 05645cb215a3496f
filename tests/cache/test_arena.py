"""Cache on an arena: events, and leases with moving rows."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.export.events import EventStream
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.registry import parse_placement
from hybridcache.tokens import Tokens
from tests.cache.serving import carried_out

GRID = 4


def arena_cache(kind: str = "hybrid", num_rows: int = 200, state_rows: int = 24, **options):
    return build_prefix_cache(
        CacheConfig(
            prefix_cache=kind,
            total_bytes=num_rows,
            state_bytes=state_rows,
            memory="arena",
            **({"grid": GRID} | options),
        )
    )


def serve(cache, tokens: Tokens, stateful: bool = True, held_tokens: int = 0) -> int:
    """Serve a prompt and its answer with a lease. Returns the reused length, or -1 if refused."""
    prompt_len = len(tokens) - 4
    request = LeaseRequest(tokens[:prompt_len], stateful=stateful)
    lease = Lease.begin(cache, parse_placement("backoff,end"), request)
    assert lease is not None
    if not lease.extend(prompt_len):
        lease.abort()
        return -1
    lease.take_checkpoint_slots(lease.cached_len, prompt_len)
    carried_out(cache)
    lease.publish(tokens, prompt_len)
    computed_len = len(tokens) - 1 if lease.extend(len(tokens) - 1) else prompt_len
    carried_out(cache)
    lease.finish(tokens, computed_len)
    cache.check(held_tokens=held_tokens, held_slots=0)
    return lease.cached_len


def prompts(seed: int, num_requests: int) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    systems = [rng.integers(0, 50, 20, dtype=np.int32) for _ in range(3)]
    questions = [rng.integers(0, 50, 40, dtype=np.int32) for _ in range(4)]
    return [
        np.concatenate(
            (systems[rng.integers(3)], questions[rng.integers(4)][: rng.integers(8, 40)])
        )
        for _ in range(num_requests)
    ]


def test_an_arena_sends_the_same_events_as_a_budget():
    """Events contain no rows, so subscribers do not see moves."""
    arena = arena_cache()
    shape = {"total_bytes": arena.arena.capacity, "state_bytes": 24, "grid": GRID}
    budget = build_prefix_cache(CacheConfig(**shape))
    recorded = [[], []]
    for cache, events in zip((arena, budget), recorded, strict=True):
        cache.subscribe(EventStream(events.append))
        for tokens in prompts(1, 90):
            serve(cache, tokens)
    assert recorded[0] == recorded[1] and len(recorded[0]) > 50
    assert arena.arena.num_moves > 0


def test_a_lease_follows_moves_of_cached_rows():
    cache = arena_cache(num_rows=240, state_rows=20)
    tokens, other = prompts(5, 2)[0][:10], prompts(6, 1)[0][:10]
    gaps = [cache.allocate_kv(11)]
    serve(cache, tokens, held_tokens=11)
    gaps.append(cache.allocate_kv(11))
    serve(cache, other, held_tokens=22)
    for rows in gaps:
        cache.free_kv(rows)
    carried_out(cache)
    lease = Lease.begin(cache, parse_placement("none"), LeaseRequest(tokens, table_row=7))
    assert lease.cached_len > 0 and lease in cache.arena.holders
    before = lease.kv_indices.copy()
    plan = carried_out(cache)
    assert [(write.start, write.kv_indices.tolist()) for write in plan.row_writes] == [
        (0, before.tolist())
    ]
    assert plan.restores == (lease.restore,)
    slots = []
    while cache.arena.num_moves == 0:
        slots.append(cache.allocate_slot())
        assert slots[-1] is not None, "no row moved, so this test proves nothing"
    assert lease.kv_indices.tolist() == cache.gather(lease.match.node).tolist() != before.tolist()
    changed = np.flatnonzero(lease.kv_indices != before)
    [(row, start, rows)] = carried_out(cache).row_writes
    assert (row, start, start + len(rows)) == (7, changed[0], changed[-1] + 1)
    cache.check(held_tokens=0, held_slots=1 + len(slots))
    lease.abort()
    assert lease not in cache.arena.holders, "an ended lease is still notified of moves"


def test_invalid_memory_options_raise():
    weights = {"kv_bytes_per_token": 2, "state_bytes": 5}
    with pytest.raises(ValueError, match="unknown memory 'ram'; known: arena, budget"):
        CacheConfig(total_bytes=10, memory="ram", **weights)
    with pytest.raises(ValueError, match="needs total_bytes"):
        CacheConfig(num_kv_tokens=10, num_slots=1, memory="arena", **weights)
    assert build_prefix_cache(CacheConfig(total_bytes=10, **weights)).arena is None
