"""Cache on an arena: a lease with moving rows, and refused options."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.registry import parse_placement
from hybridcache.tokens import Tokens
from tests.cache.serving import carried_out


def serve(cache, tokens: Tokens, held_tokens: int) -> None:
    """Serve a prompt and its answer of four tokens with a lease."""
    prompt_len = len(tokens) - 4
    lease = Lease.begin(cache, parse_placement("backoff,end"), LeaseRequest(tokens[:prompt_len]))
    assert lease is not None and lease.extend(prompt_len)
    lease.take_checkpoint_slots(lease.cached_len, prompt_len)
    carried_out(cache)
    lease.publish(tokens, prompt_len)
    assert lease.extend(len(tokens) - 1)
    carried_out(cache)
    lease.finish(tokens, len(tokens) - 1)
    cache.check(held_tokens=held_tokens, held_slots=0)


def test_a_lease_follows_moves_of_cached_rows():
    cache = build_prefix_cache(CacheConfig(total_bytes=240, state_bytes=20, memory="arena", grid=4))
    tokens, other = np.arange(10, dtype=np.int32), np.arange(50, 60, dtype=np.int32)
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
    assert lease not in cache.arena.holders, "an ended lease is still notified of moves"


def test_invalid_memory_options_raise():
    weights = {"kv_bytes_per_token": 2, "state_bytes": 5}
    with pytest.raises(ValueError, match="unknown memory 'ram'; known: arena, budget"):
        CacheConfig(total_bytes=10, memory="ram", **weights)
    with pytest.raises(ValueError, match="needs total_bytes"):
        CacheConfig(num_kv_tokens=10, num_slots=1, memory="arena", **weights)
    assert build_prefix_cache(CacheConfig(total_bytes=10, **weights)).arena is None
