"""Debug caches: each misuse raises at once, changes nothing, and passes unnoticed without debug."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache, parse_placement
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.tiers import TieredRadixCache
from tests.radix.serving import carried_out, ids, publish
from tests.refused import refused

PROMPT = np.arange(40, dtype=np.int32)
ANSWERED = np.arange(60, dtype=np.int32)
SIZES = {"kv_bytes_per_token": 1, "state_bytes": 20}
CONFIGS: dict[str, dict[str, Any]] = {
    "pools": {"num_kv_tokens": 200, "num_slots": 6},
    "arena": {"memory": "arena", "total_bytes": 300, **SIZES},
    "tiers": {"num_kv_tokens": 200, "num_slots": 6, "host_bytes": 400, **SIZES},
}


def make(kind: str = "pools", debug: bool = True) -> HybridRadixCache:
    return build_prefix_cache(CacheConfig(grid=8, debug=debug, **CONFIGS[kind]))


def begin(cache: HybridRadixCache, rules: str = "none", **options: Any) -> Lease:
    lease = Lease.begin(cache, parse_placement(rules), LeaseRequest(PROMPT, **options))
    assert lease is not None
    return lease


def step(lease: Lease, start: int, end: int) -> None:
    """Compute tokens [start, end)."""
    assert lease.extend(end) and lease.take_checkpoint_slots(start, end) is not None
    carried_out(lease.cache)


def publish_ahead(cache: HybridRadixCache, lease: Lease) -> None:
    step(lease, 0, 16)
    lease.extend(40)
    lease.publish(PROMPT, 40)


def preempt_behind(cache: HybridRadixCache, lease: Lease) -> None:
    """Keep the state after 48 tokens as that after 40."""
    step(lease, 0, 40)
    step(lease, 40, 48)
    lease.preempt(ANSWERED, 40)


def donate_behind(cache: HybridRadixCache, lease: Lease) -> None:
    """The placement chooses the end of the answer, and the state is that after a later step."""
    step(lease, 0, 40)
    step(lease, 40, 56)
    lease.finish(ANSWERED, 48)


def free_rows_of_a_lease(cache: HybridRadixCache, lease: Lease) -> None:
    assert lease.extend(40)
    cache.free_kv(lease.kv_indices[:8].copy())


def insert_rows_of_a_lease(cache: HybridRadixCache, lease: Lease) -> None:
    assert lease.extend(40)
    cache.insert(PROMPT, lease.kv_indices.copy())


def free_rows_of_the_cache(cache: HybridRadixCache, lease: Lease) -> None:
    assert lease.extend(8)  # As many rows are held.
    cache.free_kv(cache.gather(cache.match(ids("abcdefghi")).node))


def free_rows_again(cache: HybridRadixCache, lease: Lease) -> None:
    assert lease.extend(8)
    rows = cache.allocate_kv(8)
    assert rows is not None
    cache.free_kv(rows)
    cache.free_kv(rows)


def free_a_slot_of_a_lease(cache: HybridRadixCache, lease: Lease) -> None:
    assert lease.state_slot is not None
    cache.free_slot(lease.state_slot)


def begin_behind_a_gap(cache: HybridRadixCache, lease: Lease) -> None:
    step(lease, 0, 16)
    step(lease, 24, 40)


def begin_before_the_end(cache: HybridRadixCache, lease: Lease) -> None:
    """Drafts were rejected without ``roll_back``."""
    step(lease, 0, 40)
    step(lease, 40, 44)
    step(lease, 41, 48)


MISUSES: dict[str, Callable[[HybridRadixCache, Lease], object]] = {
    "tokens up to 40 are said to be computed, but the last step went to 16": publish_ahead,
    "state_slot has the state after that many tokens and not after 40": preempt_behind,
    "last step went to 56": donate_behind,
    "this step begins at 24, but the last one ended at 16": begin_behind_a_gap,
    "this step begins at 41, but the last one ended at 44": begin_before_the_end,
    "is a lease's": free_rows_of_a_lease,
    "a lease's: give only rows of allocate_kv": insert_rows_of_a_lease,
    "is the cache's": free_rows_of_the_cache,
    "is free": free_rows_again,
    "it returns the slot itself": free_a_slot_of_a_lease,
    "own_slot 7 is that of a running lease": lambda cache, _: begin(cache, own_slot=7),
    "table_row 3 is that of a running lease": lambda cache, _: begin(cache, table_row=3),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("message", MISUSES)
def test_a_misuse_raises_and_changes_nothing(kind: str, message: str) -> None:
    cache = make(kind)
    publish(cache, ids("abcdefgh"), [8])
    other = begin(cache, own_slot=7, table_row=3)
    lease = begin(cache, "end")
    refused(message, MISUSES[message], cache, lease)
    if not cache.steps.restores:
        cache.check(lease.held_tokens + other.held_tokens, lease.held_slots + other.held_slots)
    lease.abort()
    other.abort()
    begin(cache, own_slot=7, table_row=3).abort()
    cache.check(0, 0)


def test_without_debug_a_wrong_state_is_reused() -> None:
    cache = make(debug=False)
    lease = begin(cache, "none")  # Decode saves no checkpoints.
    preempt_behind(cache, lease)
    cache.check(0, 0)  # Nothing is noticed.
    assert cache.match(ANSWERED).cached_len == 40


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_thread_may_call_only_while_nothing_is_held(kind: str) -> None:
    cache, errors = make(kind), list[str]()

    def call(work: Callable[[], object]) -> None:
        def run() -> None:
            try:
                work()
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    publish(cache, ids("abcdefgh"), [8])
    call(lambda: publish(cache, ids("abcdefgh12345678"), [16]))
    assert not errors  # Nothing was held: it is the other thread's now.
    lease = begin(cache)
    for number, work in enumerate(
        (lambda: cache.match(PROMPT), lambda: lease.extend(8), lambda: cache.evict(1)), 1
    ):
        call(work)
        assert len(errors) == number and "call it in one thread" in errors[-1]
    cache.owner = None  # type: ignore[attr-defined]  # as callers do that share a lock
    call(lambda: lease.extend(8))
    assert len(errors) == 3 and lease.extended_len == 8
    cache.owner = None  # type: ignore[attr-defined]
    lease.abort()
    cache.check(0, 0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dropped_lease_warns(kind: str) -> None:
    cache = make(kind)
    gc.collect()  # leases of other tests
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = begin(cache)
        ended.finish(PROMPT[:0], 0)
        del ended
        gc.collect()
    lease = begin(cache)
    assert lease.extend(8)
    with pytest.warns(ResourceWarning, match=r"Lease\(.*extended_len=8.* was dropped"):
        del lease
        gc.collect()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dropped_lock_warns_and_fails_the_check(kind: str) -> None:
    cache = make(kind)
    publish(cache, ids("abcdefgh"), [8])
    node = cache.match(ids("abcdefghi")).node
    assert node is not None
    with cache.lock(node):
        cache.check()
    lock = cache.lock(node)
    place = r"LockHandle\(end=8, taken in test_debug.py, line \d+\) was dropped"
    with pytest.warns(ResourceWarning, match=place):
        del lock
        gc.collect()
    refused(r"1 locks on .* were dropped without unlock", cache.check, kind=AssertionError)


def test_debug_off_has_no_part_of_it() -> None:
    for kind in CONFIGS:
        cache = make(kind, debug=False)
        assert type(cache) in (HybridRadixCache, TieredRadixCache)
        lease = begin(cache)
        assert type(lease) is Lease
        lease.abort()
    script = "import sys, hybridcache; c = hybridcache.CacheConfig(num_kv_tokens=8, num_slots=1)\n"
    script += (
        "hybridcache.build_prefix_cache(c); sys.exit('hybridcache.radix.debug' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
