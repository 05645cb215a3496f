"""Wrong arguments raise a clear error and leave the cache unchanged."""

from __future__ import annotations

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hybridcache import (
    CacheConfig,
    Lease,
    LeaseRequest,
    build_prefix_cache,
    parse_placement,
)
from hybridcache.allocators.moves import StepMemory
from hybridcache.api import Listener
from hybridcache.export.events import EventStream
from hybridcache.export.mirror import Mirror
from tests.cache.serving import hybrid, ids, publish
from tests.cache.twins import VictimLog
from tests.export.segments import segments_of

INVALID_IDS = (
    [1, 2, 3, 4],
    np.arange(4, dtype=np.int64),
    np.arange(4, dtype=np.float32),
    np.zeros((4, 2), np.int32),
    np.int32(4),
    np.arange(4, dtype=">i4"),
)


def attention_only(**options):
    return build_prefix_cache(
        CacheConfig(prefix_cache="radix", num_kv_tokens=100, grid=1, **options)
    )


@pytest.mark.parametrize("prefix_cache", ["hybrid", "radix", "none"])
@pytest.mark.parametrize(
    "bad", INVALID_IDS, ids=["list", "int64", "float32", "two axes", "scalar", "big-endian"]
)
def test_ids_and_rows_that_are_not_int32_raise_in_every_cache(prefix_cache, bad):
    cache = build_prefix_cache(
        CacheConfig(prefix_cache=prefix_cache, num_kv_tokens=100, num_slots=2, grid=1)
    )
    publish(cache, ids([1, 0, 2, 0]))
    before = cache.render()
    rows = cache.allocate_kv(4)
    with pytest.raises(ValueError, match=r"tokens must be a numpy array int32\[n\]"):
        cache.match(bad)
    with pytest.raises(ValueError, match=r"tokens must be a numpy array int32\[n\]"):
        cache.insert(bad, rows)
    with pytest.raises(ValueError, match=r"KV indices must be a numpy array int32\[n\]"):
        cache.insert(ids("abcd"), bad)
    with pytest.raises(ValueError, match=r"rows must be a numpy array int32\[n\]"):
        cache.free_kv(bad)
    assert cache.render() == before
    cache.check(held_tokens=4, held_slots=0)


def test_a_float_namespace_raises():
    cache = hybrid()
    rows = cache.allocate_kv(2)
    with pytest.raises(ValueError, match="namespace nan is a float; use None"):
        cache.insert(ids("ab"), rows, namespace=float("nan"))
    assert not cache._tree.roots
    cache.check(held_tokens=2, held_slots=0)


@pytest.mark.parametrize(
    ("positions", "slots", "labels", "message"),
    [
        ((2, 4), (0, 1), ["end"], "got 1 for 2 checkpoints"),
        ((2,), (0,), ["end", "branch"], "got 2 for 1 checkpoints"),
        ((), (), ["end"], "got 1 for 0 checkpoints"),
        ((2.0,), (0,), (), "position: int, slot: int"),
        (("2",), (0,), (), "position: int, slot: int"),
        ((2,), (None,), (), "position: int, slot: int"),
        ((2,), (10,), (), "0 <= slot < 10"),
        ((2,), (-1,), (), "0 <= slot < 10"),
        ((2, 4), (0, 0), (), "have the same slot"),
    ],
)
def test_malformed_checkpoints_raise_before_anything_changes(positions, slots, labels, message):
    cache = hybrid()
    publish(cache, ids("abX"))
    before = cache.render()
    rows = cache.allocate_kv(5)
    cache.allocate_slot(), cache.allocate_slot()
    with pytest.raises(ValueError, match=message):
        cache.insert(ids("abcde"), rows, list(zip(positions, slots, strict=True)), labels=labels)
    assert cache.render() == before
    cache.check(held_tokens=5, held_slots=2)
    cache.reset()
    assert cache.cached_tokens == 0


@pytest.mark.parametrize("make", [hybrid, attention_only])
def test_evicted_nodes_can_neither_be_locked_read_nor_extended(make):
    cache = make()
    publish(cache, ids("abcde"), [5] if make is hybrid else [])
    match = cache.match(ids("abcdef"))
    cache.evict(num_tokens=100)
    with pytest.raises(ValueError, match="match again"):
        cache.lock(match.node)
    with pytest.raises(ValueError, match="match again"):
        cache.gather(match.node)
    rows = cache.allocate_kv(6)
    with pytest.raises(ValueError, match="match again"):
        cache.insert(ids("abcdef"), rows, owned_from=5, after=match.node)
    cache.check(held_tokens=6, held_slots=0)


def test_a_lock_handle_of_another_cache_is_refused_and_stays_valid():
    cache, other = hybrid(), hybrid()
    for each in (cache, other):
        publish(each, ids("abcde"), [5])
    handle = cache.lock(cache.match(ids("abcdef")).node)
    with pytest.raises(ValueError, match="another cache"):
        other.unlock(handle)
    with pytest.raises(ValueError, match="another cache"):
        other.gather(handle.node)
    assert cache.evict(num_tokens=5).num_tokens == 0
    cache.unlock(handle)
    assert cache.evict(num_tokens=5).num_tokens == 5
    cache.check(held_tokens=0, held_slots=0)
    other.check(held_tokens=0, held_slots=0)


EVENTS = [name for name in vars(Listener) if not name.startswith("_")]


@pytest.mark.parametrize("event", EVENTS)
def test_a_listener_that_raises_is_unsubscribed_and_breaks_nothing(event, caplog):
    class Broken(VictimLog):
        def __getattribute__(self, name):
            if name == event:
                raise OSError("the socket is closed")
            return super().__getattribute__(name)

    cache, mirror, broken = hybrid(), Mirror(page_size=1), Broken()
    cache.subscribe(broken)
    cache.subscribe(EventStream(mirror.apply))
    for tokens in (ids("abcde"), ids("aX"), ids("abcdeZ")):
        publish(cache, tokens, [2, len(tokens)])
        cache.check(held_tokens=0, held_slots=0)
    cache.evict(num_tokens=2, num_slots=1)
    cache.check(held_tokens=0, held_slots=0)
    assert mirror.segments() == segments_of(cache._tree.nodes())
    cache.reset()
    assert cache.cached_tokens == cache.num_checkpoints == 0
    cache.check(held_tokens=0, held_slots=0)
    assert [record.exc_info[1].args for record in caplog.records] == [("the socket is closed",)]
    with pytest.raises(ValueError, match="not subscribed"):
        cache.unsubscribe(broken)


def test_an_error_of_a_listener_in_subscribe_is_raised_and_nothing_is_subscribed():
    class Broken(Listener):
        def kv_stored(self, node):
            raise OSError("the socket is closed")

    cache, broken = hybrid(), Broken()
    publish(cache, ids("abcde"), [5])
    with pytest.raises(OSError, match="the socket is closed"):
        cache.subscribe(broken)
    with pytest.raises(ValueError, match="not subscribed"):
        cache.unsubscribe(broken)


def begun(cache, placement, prompt):
    lease = Lease.begin(cache, placement, LeaseRequest(prompt))
    assert lease is not None and lease.extend(len(prompt))
    cache.take_step().done()
    return lease


def small():
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=4, grid=8))
    return cache, parse_placement("backoff")


def test_dropped_lease_and_lock_warn():
    cache, placement = small()
    prompt = np.arange(20, dtype=np.int32)
    longer = np.arange(21, dtype=np.int32)
    lease = begun(cache, placement, prompt)
    lease.take_checkpoint_slots(0, 20)
    cache.take_step().done()
    lease.finish(prompt, 20)
    assert cache.match(longer).cached_len == 16
    with pytest.warns(ResourceWarning, match=r"Lease\(.*prompt_len=20.* was dropped: call finish"):
        begun(cache, placement, prompt)
        gc.collect()
    with pytest.warns(ResourceWarning, match="a lock was dropped: pass it to cache.unlock"):
        cache.lock(cache.match(longer).node)
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(cache, placement, prompt).abort()
        with cache.lock(cache.match(longer).node):
            pass
        gc.collect()


def test_second_thread_is_refused_while_leases_run():
    cache, placement = small()
    prompt = np.arange(20, dtype=np.int32)
    lease = begun(cache, placement, prompt)
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(RuntimeError, match="another thread has running leases of this cache"):
            other.submit(begun, cache, placement, prompt).result()
        lease.finish(prompt, 20)
        later = other.submit(begun, cache, placement, prompt).result()
        with pytest.raises(RuntimeError, match="another thread"):
            begun(cache, placement, prompt)
        other.submit(later.finish, prompt, 20).result()
    begun(cache, placement, prompt).abort()
    cache.check(held_tokens=0, held_slots=0)


def test_rows_and_slots_that_the_caller_does_not_hold_are_not_freed():
    cache = hybrid()
    rows, slot = cache.allocate_kv(5), cache.allocate_slot()
    cache.insert(ids("abcde"), rows, [(5, slot)])
    with pytest.raises(ValueError, match="5 rows given back, but only 0 are held"):
        cache.free_kv(rows)
    with pytest.raises(ValueError, match=f"slot {slot} is the cache's, from insert"):
        cache.free_slot(slot)
    other = cache.allocate_kv(2)
    with pytest.raises(ValueError, match=f"slot {slot} is the cache's already"):
        cache.insert(ids("XY"), other, [(2, slot)])
    more = cache.allocate_kv(3)
    cache.free_kv(more)
    with pytest.raises(ValueError, match="rows given back"):
        cache.free_kv(more)
    cache.free_kv(other[:1])
    with pytest.raises(ValueError, match="of which the last is free already"):
        cache.free_kv(other[:1])
    cache.free_kv(other[1:])
    cache.check(held_tokens=0, held_slots=0)


WRONG = [
    ("evict", (-1,), ValueError, "num_tokens must not be negative .got -1"),
    ("evict", (0, -1), ValueError, "num_slots must not be negative .got -1"),
    ("evict", (1.5,), TypeError, "num_tokens must be an integer .got 1.5"),
    ("evict", (True,), TypeError, "num_tokens must be an integer .got True"),
    ("allocate_kv", ("4",), TypeError, "num_tokens must be an integer .got '4'"),
    ("allocate_kv", (4.0,), TypeError, "num_tokens must be an integer .got 4.0"),
    ("free_slot", ("1",), TypeError, "slot must be an integer .got '1'"),
    ("free_slot", ([1],), TypeError, "slot must be an integer"),
    ("touch", (None,), TypeError, "match must be the result of match .got None"),
    ("lock_kv", ([1, 2],), ValueError, r"tokens must be a numpy array int32\[n\]"),
]


@pytest.mark.parametrize(("call", "arguments", "error", "message"), WRONG)
def test_wrong_types_are_refused_in_one_sentence(call, arguments, error, message):
    cache = hybrid()
    publish(cache, ids("abcde"), [5])
    before = cache.render(), cache.now, cache.stats.as_dict()
    with pytest.raises(error, match=message):
        getattr(cache, call)(*arguments)
    assert (cache.render(), cache.now, cache.stats.as_dict()) == before
    cache.check(held_tokens=0, held_slots=0)


def test_a_checkpoint_that_is_no_pair_and_a_float_owned_from_are_refused():
    cache = hybrid()
    rows = cache.allocate_kv(2)
    with pytest.raises(ValueError, match=r"a checkpoint must be .position: int, slot: int"):
        cache.insert(ids("ab"), rows, [7])
    with pytest.raises(TypeError, match=r"owned_from must be an integer .got 0.0"):
        cache.insert(ids("ab"), rows, owned_from=0.0)
    cache.check(held_tokens=2, held_slots=0)


def test_a_match_and_a_node_of_another_cache_are_refused():
    cache, other = hybrid(), hybrid()
    for each in (cache, other):
        publish(each, ids("abcde"), [5])
    match = cache.match(ids("abcdef"))
    with pytest.raises(ValueError, match="another cache"):
        other.touch(match)
    assert other.stats.total.requests == 0
    with cache.lock(match.node):
        rows = other.allocate_kv(6)
        with pytest.raises(ValueError, match="another cache"):
            other.insert(ids("abcdef"), rows, owned_from=5, after=match.node)
    other.check(held_tokens=6, held_slots=0)


@pytest.mark.parametrize("what", ["table_row", "own_slot"])
def test_two_running_leases_cannot_have_the_same_number(what):
    cache, placement = small()
    request = LeaseRequest(np.arange(20, dtype=np.int32), **{what: 3})
    first = Lease.begin(cache, placement, request)
    with pytest.raises(ValueError, match=f"{what} 3 is that of a running lease"):
        Lease.begin(cache, placement, request)
    other = Lease.begin(cache, placement, request._replace(**{what: 4}))
    first.abort()
    again = Lease.begin(cache, placement, request)
    other.abort(), again.abort()
    cache.check(held_tokens=0, held_slots=0)


def test_a_plan_that_was_not_carried_out_stops_publishing_and_reset():
    cache, placement = small()
    prompt = np.arange(20, dtype=np.int32)
    lease = Lease.begin(cache, placement, LeaseRequest(prompt, table_row=0))
    assert lease.extend(20)
    plan = cache.take_step()
    for call in (lease.publish, lease.finish, lease.preempt):
        with pytest.raises(RuntimeError, match="taken but not carried out"):
            call(prompt, 20)
    with pytest.raises(RuntimeError, match="abort all leases and unlock all nodes before reset"):
        cache.reset()
    plan.done()
    lease.publish(prompt, 20)
    cache.reset()
    assert lease.extend(24)
    cache.take_step()
    lease.abort()
    cache.reset()
    cache.check(held_tokens=0, held_slots=0)
    assert not cache.take_step()


def test_a_request_that_must_not_reuse_is_not_counted():
    cache, placement = small()
    lease = Lease.begin(cache, placement, LeaseRequest(np.arange(20, dtype=np.int32), reuse=False))
    assert lease.extend(20) and not lease.is_counted and not cache.stats.total.requests
    lease.abort()


def test_a_plan_that_failed_half_way_or_was_forgotten_cannot_be_carried_out():
    cache, placement = small()
    request = LeaseRequest(np.arange(20, dtype=np.int32), table_row=0)

    class Failing(StepMemory):
        def write_row(self, write):
            raise OSError("no device")

    for fails in (True, False):
        lease = Lease.begin(cache, placement, request)
        assert lease.extend(20)
        plan = cache.take_step()
        if fails:
            with pytest.raises(OSError, match="no device"):
                plan.carry_out(Failing())
        lease.abort()
        cache.reset()
        with pytest.raises(RuntimeError, match="failed half-way or was forgotten by reset"):
            plan.carry_out(Failing())
    cache.check(held_tokens=0, held_slots=0)


def test_insert_refuses_labels_that_are_no_strings_and_free_slots():
    cache = hybrid()
    rows, slot = cache.allocate_kv(5), cache.allocate_slot()
    with pytest.raises(TypeError, match="labels must be a tuple of strings"):
        cache.insert(ids("abcde"), rows, [(5, slot)], labels=(3,))
    with pytest.raises(ValueError, match=f"slot {slot + 1} is free: take one"):
        cache.insert(ids("abcde"), rows, [(5, slot + 1)])
    cache.check(held_tokens=5, held_slots=1)


def test_a_lease_whose_rows_the_caller_has_freed_ends_with_one_error():
    cache, placement = small()
    lease = Lease.begin(cache, placement, LeaseRequest(np.arange(20, dtype=np.int32)))
    assert lease.extend(20)
    cache.free_kv(lease.kv_indices)
    with pytest.raises(ValueError, match="only 0 are held"):
        lease.abort()
    lease.abort()
    cache.check(held_tokens=0, held_slots=0)
