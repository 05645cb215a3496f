"""Cache on an arena: a lease with moving rows, and a plain twin."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.registry import EVICTION_NAMES, parse_placement
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.tokens import Tokens
from tests.radix.serving import carried_out, serve_lease
from tests.radix.twins import Twins


def serve(cache, tokens: Tokens, held_tokens: int) -> None:
    """Serve a prompt and its answer of four tokens, without the last one's KV."""
    request = LeaseRequest(tokens[:-4])
    serve_lease(cache, parse_placement("backoff,end"), request, tokens[-4:-1])
    cache.check(held_tokens=held_tokens, held_slots=0)


def test_a_lease_follows_moves_of_cached_rows():
    sizes = {"total_bytes": 240, "kv_bytes_per_token": 1, "state_bytes": 20}
    cache = build_prefix_cache(CacheConfig(memory="arena", grid=4, **sizes))
    tokens, other = np.arange(10, dtype=np.int32), np.arange(50, 60, dtype=np.int32)
    gaps = [cache.allocate_kv(11)]
    serve(cache, tokens, held_tokens=11)
    gaps.append(cache.allocate_kv(11))
    serve(cache, other, held_tokens=22)
    for rows in gaps:
        cache.free_kv(rows)
    carried_out(cache)
    num_holders = len(cache.arena.holders)
    lease = Lease.begin(cache, parse_placement("none"), LeaseRequest(tokens, table_row=7))
    assert lease.cached_len > 0
    before = lease.kv_indices.copy()
    plan = carried_out(cache)
    assert [(write.start, write.kv_indices.tolist()) for write in plan.row_writes] == [
        (0, before.tolist())
    ]
    assert plan.restores == ((lease.match.checkpoint, lease.state_slot),)
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
    assert len(cache.arena.holders) == num_holders, "an ended lease is still notified of moves"


def test_the_first_row_of_a_lease_moves_alone():
    sizes = {"total_bytes": 240, "kv_bytes_per_token": 1, "state_bytes": 20}
    cache = build_prefix_cache(CacheConfig(memory="arena", grid=4, **sizes))
    tokens, rows = np.arange(9, dtype=np.int32), np.sort(cache.allocate_kv(40))
    alone, others = rows[:1], rows[20:27]
    cache.insert(tokens[:8], np.append(alone, others), [(8, cache.allocate_slot())])
    cache.free_kv(np.append(rows[1:20], rows[38:]))
    lease = Lease.begin(cache, parse_placement("none"), LeaseRequest(tokens, table_row=7))
    assert lease.kv_indices.tolist() == [*alone, *others]
    carried_out(cache)
    slots = [cache.allocate_slot() for _ in range(9)]
    assert None not in slots and cache.arena.num_moves == 1
    assert lease.kv_indices[1:].tolist() == others.tolist() and lease.kv_indices[0] != alone
    [(_, start, moved)] = carried_out(cache).row_writes
    assert (start, moved.tolist()) == (0, lease.kv_indices[:1].tolist())
    cache.check(held_tokens=11, held_slots=1 + len(slots))


def config_of(
    rng: random.Random, memory: str | None = None, has_tiers: bool = False
) -> CacheConfig:
    """Return a random configuration of a small cache, with ``memory`` or a random one."""
    page_size, grid = rng.choice(((1, 1), (1, 4), (2, 4), (4, 2), (16, 16)))
    unit = max(page_size, grid)
    state_bytes = 2 * unit * rng.randint(1, 8)
    pools: dict[str, Any] = {"num_kv_tokens": unit * rng.randint(8, 50)}
    pools["num_slots"] = rng.randint(1, 8)
    if memory or rng.random() < 0.6:
        pools = {"total_bytes": 2 * unit * rng.randint(8, 50) + 4 * state_bytes}
        pools["memory"] = memory or rng.choice(("arena", "budget"))
    if has_tiers:
        pools["host_bytes"] = 2 * state_bytes + 2 * unit * rng.randint(1, 12)
        pools["disk_bytes"] = rng.choice((0, 2 * state_bytes + 2 * unit * rng.randint(1, 12)))
    return CacheConfig(
        page_size=page_size,
        grid=grid,
        kv_bytes_per_token=2,
        state_bytes=state_bytes,
        eviction=rng.choice(("lru", *sorted(EVICTION_NAMES))),
        priority_classes=rng.random() < 0.7,
        ghost_bytes=rng.choice((0, 2000, 1 << 20)),
        **pools,
    )


def serve_twins(twins: Twins, rng: random.Random, num_operations: int) -> None:
    """Run random operations: begin, publish and end requests, hold rows and slots, and free
    them."""
    unit, step = max(twins.config.page_size, twins.config.grid), twins.cache.checkpoint_grid
    for _ in range(num_operations):
        dice = rng.random()
        request = rng.choice(twins.requests) if twins.requests else None
        if dice < 0.3 and len(twins.requests) < 3:
            blocks = [rng.randrange(3) for _ in range(rng.randint(1, 5))]
            twins.begin(np.repeat(np.array(blocks, np.int32), unit), rng.choice((None, "tenant")))
        elif dice < 0.65 and request is not None:
            length = rng.randint(request.published_len, len(request.tokens))
            positions = {rng.randint(0, length // step) * step for _ in range(rng.randint(0, 2))}
            twins.publish(request, length, sorted(positions), rng.random() < 0.5)
        elif dice < 0.85 and request is not None:
            twins.end(request)
        elif dice < 0.89:
            rows = twins.allocate_kv(rng.randint(1, 3) * twins.config.page_size)
            if rows is not None:
                twins.held_rows.append(rows)
        elif dice < 0.93 and twins.held_rows:
            twins.free_kv(twins.held_rows.pop(0))
        elif dice < 0.96:
            twins.allocate_slot()
        elif twins.held_slots:
            twins.free_slot(twins.held_slots[0])
        twins.check()


@pytest.mark.full("0", "1", "2", "3")
@pytest.mark.parametrize("seed", range(12))
def test_a_full_arena_agrees_with_its_plain_twin(seed):
    rng, num_moves = random.Random(seed), 0
    for _ in range(3):
        twins = Twins(config_of(rng, "arena"))
        serve_twins(twins, rng, num_operations=120)
        num_moves += twins.arena(twins.cache).num_moves
    assert num_moves > 0, "no row moved, so this test proves nothing"
