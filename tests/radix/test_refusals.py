"""Wrong arguments raise a clear error and leave the cache unchanged."""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache, parse_placement
from hybridcache.adapters.events import EventStream, Mirror
from hybridcache.adapters.routing.protocol import ReplicaSpec, RouteRequest
from hybridcache.adapters.routing.registry import ROUTERS, find_router
from hybridcache.allocators.moves import Drop, StepMemory
from hybridcache.allocators.pools import SlotAllocator
from hybridcache.policies.placement import End, Placement
from hybridcache.policies.registry import make_admission
from hybridcache.radix.api import Listener
from hybridcache.radix.protocol import Prefill, PromptBoundaries
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.planner import StepPlanner
from hybridcache.scheduling.request import ScheduledRequest
from tests.adapters.segments import PlainMirror, segments_of
from tests.radix.serving import PerToken, hybrid, ids, publish
from tests.refused import refused

INVALID_IDS = (
    [1, 2, 3, 4],
    np.arange(4, dtype=np.int64),
    np.arange(4, dtype=np.float32),
    np.zeros((4, 2), np.int32),
    np.int32(4),
    np.arange(4, dtype=">i4"),
    np.ma.masked_array(np.arange(4, dtype=np.int32), mask=[0, 1, 0, 0]),
)
INVALID_NAMES = ("list", "int64", "float32", "two axes", "scalar", "big-endian", "masked")


@pytest.mark.parametrize("prefix_cache", ["hybrid", "radix", "none"])
@pytest.mark.parametrize("bad", INVALID_IDS, ids=INVALID_NAMES)
def test_ids_and_rows_that_are_not_int32_raise_in_every_cache(prefix_cache, bad):
    sizes = {"num_kv_tokens": 100, "num_slots": 2, "grid": 1}
    cache = build_prefix_cache(CacheConfig(prefix_cache=prefix_cache, **sizes))
    publish(cache, ids([1, 0, 2, 0]))
    before = cache.render()
    rows = cache.allocate_kv(4)
    for named, call in (
        ("tokens", lambda: cache.match(bad)),
        ("tokens", lambda: cache.insert(bad, rows)),
        ("KV indices", lambda: cache.insert(ids("abcd"), bad)),
        ("rows", lambda: cache.free_kv(bad)),
    ):
        refused(rf"{named} must be a numpy array int32\[n\]", call)
    assert cache.render() == before
    cache.check(held_tokens=4, held_slots=0)


FOLLOWS = EventStream(print)
hybrid().subscribe(FOLLOWS)
PLACEMENT = parse_placement("end")
OTHER = hybrid()
publish(OTHER, ids("abcde"), [5])
FOUND_ELSEWHERE = OTHER.match(ids("abcdef"))


def insert(*checkpoints, **options):
    """Return a call that inserts five tokens. The caller holds their rows and slots 1 and 2."""
    return lambda cache, rows: cache.insert(ids("abcde"), rows, list(checkpoints), **options)


REFUSED = {
    "the cache's slot": ("slot 0 is free", insert((2, 0))),
    "a free slot": ("slot 3 is free", insert((2, 3))),
    "a label too few": ("1 labels for 2 checkpoints", insert((2, 1), (4, 2), labels=["end"])),
    "a cached slot": ("slot 0", lambda cache, rows: cache.free_slot(0)),
    "a list": ("tokens must", lambda cache, rows: cache.lock_kv([1, 2])),
    "an inner row": (
        "is not of this pool",
        lambda cache, rows: cache.free_kv(np.array([*rows[:2], -7, *rows[3:]], np.int32)),
    ),
    "a row past the last": (
        "is not of this pool",
        lambda cache, rows: cache.free_kv(np.append(rows[1:], np.int32(1000))),
    ),
    "rows twice": ("only 5 are held", lambda cache, rows: cache.free_kv(np.tile(rows, 2))),
    "another's lock": ("of this cache", lambda cache, rows: cache.unlock(OTHER.lock(None))),
    "the match of another cache": ("another", lambda cache, rows: cache.touch(FOUND_ELSEWHERE)),
    "another's node": ("another", lambda cache, rows: cache.gather(FOUND_ELSEWHERE.node)),
    "a used node": ("another", lambda cache, rows: cache.refresh(FOUND_ELSEWHERE.node)),
    "a node as base": ("another", insert(owned_from=5, after=FOUND_ELSEWHERE.node)),
    "another's node for a copy": (
        "another",
        lambda cache, rows: cache.replace_rows(FOUND_ELSEWHERE.node, 0, rows),
    ),
    "a copy past the end": (
        "on a path of 3 tokens",
        lambda cache, rows: cache.replace_rows(cache.match(ids("abXc")).node, 0, rows),
    ),
    "a listener of another cache": ("another", lambda cache, rows: cache.subscribe(FOLLOWS)),
}
"""Wrong calls, each with a part of its message."""


@pytest.mark.parametrize(("named", "call"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_call_changes_nothing(named, call):
    cache = hybrid(debug=False)
    publish(cache, ids("abX"), [3])
    rows = cache.allocate_kv(5)
    assert (cache.allocate_slot(), cache.allocate_slot()) == (1, 2)
    before = cache.render(), cache.now, cache.stats.as_dict()
    with pytest.raises((ValueError, TypeError)) as caught:
        call(cache, rows)
    assert named in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert (cache.render(), cache.now, cache.stats.as_dict()) == before
    cache.check(held_tokens=5, held_slots=2)
    cache.reset()
    assert cache.cached_tokens == 0


@pytest.mark.parametrize("prefix_cache", ["hybrid", "radix"])
def test_evicted_nodes_can_neither_be_locked_read_nor_extended(prefix_cache):
    cache = hybrid(100, prefix_cache=prefix_cache)
    publish(cache, ids("abcde"), [5] * (prefix_cache == "hybrid"))
    match = cache.match(ids("abcdef"))
    cache.evict(num_tokens=100)
    rows = cache.allocate_kv(6)
    insertion = partial(cache.insert, ids("abcdef"), rows, (), None, 5, ())
    calls = [partial(call, match.node) for call in (cache.lock, cache.gather, cache.refresh)]
    for call in (*calls, partial(insertion, match.node), partial(cache.touch, match)):
        refused("match again", call)
    cache.check(held_tokens=6, held_slots=0)


EVENTS = [name for name, value in vars(Listener).items() if inspect.isfunction(value)]


@pytest.mark.parametrize("event", EVENTS)
def test_a_listener_that_raises_is_unsubscribed_and_breaks_nothing(event, caplog):
    class Broken(Listener):
        def __getattribute__(self, name):
            if name == event:
                if event in ("kv_split", "checkpoint_stored") and self.followed is not None:
                    cache.unsubscribe(self)  # by itself
                raise OSError("the socket is closed")
            return super().__getattribute__(name)

    cache, mirror, broken = hybrid(), PlainMirror(unit=1), Broken()
    cache.subscribe(broken)
    cache.subscribe(EventStream(mirror.apply))
    for tokens in (ids("abcde"), ids("aX"), ids("abcdeZ")):
        node = publish(cache, tokens, [2, len(tokens)]).node
        cache.label_tip(node, "stop")
        cache.check(held_tokens=0, held_slots=0)
    cache.evict(num_tokens=2, num_slots=1)
    cache.check(held_tokens=0, held_slots=0)
    assert segments_of(mirror.nodes.values()) == segments_of(cache._tree.nodes())
    if event in ("kv_stored", "checkpoint_stored"):
        refused("the socket is closed", cache.subscribe, broken, kind=OSError)
    cache.reset()
    assert cache.cached_tokens == cache.num_checkpoints == 0
    cache.check(held_tokens=0, held_slots=0)
    cache = cache.rebuilt()
    found = [(record.name, *record.exc_info[1].args) for record in caplog.records]
    assert found == [("hybridcache", "the socket is closed")]
    refused("not subscribed", cache.unsubscribe, broken)


def begun(cache, placement, prompt):
    lease = Lease.begin(cache, placement, LeaseRequest(prompt))
    assert lease is not None and lease.extend(len(prompt))
    cache.take_step().done()
    return lease


def small(**options):
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=4, grid=8, **options))
    return cache, parse_placement("backoff")


def test_a_block_aborts_a_lease_that_has_not_ended():
    cache, placement = small()
    prompt = np.arange(20, dtype=np.int32)
    with suppress(OSError), begun(cache, placement, prompt):
        raise OSError("no device")
    with begun(cache, placement, prompt) as lease:
        lease.finish(prompt, 20)
    cache.check(held_tokens=0, held_slots=0)


def test_a_plan_that_was_not_carried_out_stops_a_reset():
    cache, placement = small()
    prompt = np.arange(20, dtype=np.int32)
    lease = Lease.begin(cache, placement, LeaseRequest(prompt, table_row=0))
    assert lease.extend(20)
    plan = cache.take_step()
    refused("taken but not carried out", cache.reset, kind=RuntimeError)
    plan.done()
    lease.publish(prompt, 20)
    cache.reset()
    lease.abort()
    cache.check(held_tokens=0, held_slots=0)


def test_a_plan_that_failed_half_way_cannot_be_carried_out():
    cache, placement = small()
    request = LeaseRequest(np.arange(20, dtype=np.int32), table_row=0)

    class Failing(StepMemory):
        def write_row(self, write):
            raise OSError("no device")

    lease = Lease.begin(cache, placement, request)
    assert lease.extend(20)
    plan = cache.take_step()
    refused("no device", plan.carry_out, Failing(), kind=OSError)
    for again in (lambda: plan.carry_out(Failing()), plan.done):
        refused("failed half-way", again, kind=RuntimeError)
    lease.abort()
    cache.reset()
    cache.check(held_tokens=0, held_slots=0)


def test_a_plan_that_a_reset_has_forgotten_cannot_be_carried_out():
    cache, placement = small()
    node = publish(cache, ids("xyz")).node
    lease = Lease.begin(cache, placement, LeaseRequest(ids("abcde"), table_row=0))
    assert lease.extend(5)
    plan = cache.take_step()
    lease.abort()
    for take, give_back in (
        (partial(cache.allocate_kv, 1), cache.free_kv),
        (cache.allocate_slot, cache.free_slot),
        (partial(cache.lock, node), cache.unlock),
    ):
        held = take()
        refused("taken but not carried out", cache.reset, kind=RuntimeError)
        give_back(held)
    cache.reset()
    for again in (lambda: plan.carry_out(None), plan.done):
        refused("forgotten by reset", again, kind=RuntimeError)


def test_a_lease_whose_slot_was_freed_holds_no_rows_after_its_end():
    cache, placement = small(debug=False)
    lease = Lease.begin(cache, placement, LeaseRequest(ids("abcde")))
    assert lease.extend(5)
    cache.free_slot(lease.state_slot)
    refused("which is not taken", lease.abort)
    cache.check(held_tokens=0, held_slots=0)


def spec(**changes):
    fields = {"request_id": "one", "namespace": None, "boundaries": PromptBoundaries()}
    fields |= {"returns_within_s": None, "ends_session": False, "choice_of": None, "save_at": ()}
    fields |= {"session": ""}
    return SimpleNamespace(**fields | changes)


def scheduled(prompt=None, **changes):
    prompt = ids("abcde") if prompt is None else prompt
    arguments = {"spec": spec(), "arrival": 0, "arrival_s": 0.0, "max_len": 9}
    return ScheduledRequest(prompt=prompt, **arguments | changes)


def asking(**fields):
    return scheduled(spec=spec(**fields))


def manager(**changes):
    arguments = {"placement": parse_placement("end"), "num_rows": 2, "stateful": True}
    return CacheManager(**{"cache": hybrid()} | arguments | changes)


def planner(**changes):
    arguments = {"manager": manager(), "max_running": 2, "token_budget": 64}
    arguments |= {"admission": make_admission("sessions"), "clock": lambda: 0.0}
    return StepPlanner(**arguments | changes)


def build(**config):
    build_prefix_cache(CacheConfig(**{"state_bytes": 4, "memory": "arena"} | config))


def begin(**changes):
    arguments = {"tokens": ids("abcde")} | changes
    cache, placement = arguments.pop("cache", hybrid()), arguments.pop("placement", PLACEMENT)
    exchange = arguments.pop("exchange", None)
    Lease.begin(cache, placement, LeaseRequest(**arguments), exchange)


def on_grid(plan):
    Prefill(200, 0, 0, 0, (), 64).on_grid(plan)


def route(now=1.0, name="checkpoint", **fields):
    """Route a request, after a right one."""
    router = find_router(name)(replicas())
    for replica in range(2):
        router.joined(replica, 0.0)
    router.route(RouteRequest(0, ids("ab")), 1.0)
    try:
        router.route(RouteRequest(**{"id": 1, "tokens": ids("ab")} | fields), now)
    finally:
        router.route(RouteRequest(2, ids("ab")), 1.0)
        router.check()


def replicas(**changes):
    return ReplicaSpec(**{"times": PerToken()} | changes)


class OwnPlacement(End):
    """Policy of a user that nothing guards."""


OWN_PLACEMENTS = ("backoff", None, OwnPlacement, OwnPlacement(), Placement((OwnPlacement(),)))


WRONG = (
    *((manager, {"num_rows": value}) for value in (-1, 0, "a")),
    *((planner, {"max_running": value}) for value in (0, "a")),
    *((planner, {"token_budget": value}) for value in (0, -5)),
    *((scheduled, {"prompt": value}) for value in ([1, 2], ids(), ids("abcdefghij"))),
    *((scheduled, {"max_len": value}) for value in (4, "a")),
    *((asking, {"save_at": value}) for value in ((4.0,), ("a",), (-4,))),
    *((begin, {"placement": value}) for value in OWN_PLACEMENTS),
    (hybrid(page_size=4).allocate_kv, {"num_tokens": -3}),
    (begin, {"stateful": False}),
    (CacheConfig, {"num_kv_tokens": 9, "num_slots": 1, "priority_classes": "no"}),
    (CacheConfig, {"num_kv_tokens": 9, "num_slots": 1, "grid": None}),
    (build, {"total_bytes": 8000, "kv_bytes_per_token": 0}),
    (CacheConfig, {"kv_bytes_per_token": 8, "total_bytes": 8000}),
    (CacheConfig, {"num_kv_tokens": 9, "num_slots": 1, "kv_bytes_per_token": 8, "host_bytes": 99}),
    (CacheConfig, {"num_kv_tokens": 9, "num_slots": 1, "memory": "arena"}),
    (on_grid, {"plan": (("a", "b"),)}),
    *((partial(route, name=name), {"id": 0}) for name in ROUTERS),
    *((find_router, {"router": value}) for value in (None, 5, End)),
    (planner, {"max_running": 3}),
    (Mirror(1).match, {"tokens": [1.5]}),
    (build, {"total_bytes": 99, "prefix_cache": "none", "kv_bytes_per_token": 8, "state_bytes": 0}),
)
"""Makers with a wrong value of the last parameter."""


@pytest.mark.parametrize(("make", "wrong"), WRONG, ids=[str(wrong) for _, wrong in WRONG])
def test_wrong_arguments_of_constructors_are_refused_by_name(make, wrong):
    with pytest.raises(
        (ValueError, TypeError, MemoryError), match=rf"\b{[*wrong][-1]}\b"
    ) as caught:
        make(**wrong)
    assert len(str(caught.value).splitlines()) == 1


def test_more_items_than_int32_can_number_are_refused_before_they_are_listed():
    config = CacheConfig(memory="arena", total_bytes=10**11, kv_bytes_per_token=1, state_bytes=64)
    for make in (lambda: build_prefix_cache(config), lambda: SlotAllocator(5 * 10**9)):
        refused("are more than the 2147483648 that int32 can number", make)


def test_a_request_is_added_once_and_its_removal_can_be_repeated():
    owner = planner()
    prompt = ids("abcde")
    request, other = scheduled(prompt), scheduled()
    prompt[:] = 0
    assert request.tokens.tolist() == ids("abcde").tolist(), "the caller may change its array"
    owner.remove(request)
    owner.add(request)
    refused("max_len", owner.add, scheduled(arrival=8, max_len=1001))
    for again in (request, other):
        refused("arrival 0 is that of a waiting or running request", owner.add, again)
    [(running, end)] = owner.choose().items()
    owner.advance(running, end)
    assert running is request and request.scheduled_len == end == 5
    for _ in range(4):
        running.append(1)
    refused("has its max_len of 9 tokens", running.append, 1)
    assert (running.computed_len, running.num_tokens) == (5, 9)
    refused("arrival 0", owner.add, request)
    refused("has a lease already", owner.manager.begin, request, kind=RuntimeError)
    owner.remove(other)
    owner.remove(request)
    owner.remove(request)
    assert not owner.has_work()
    owner.check()


def test_a_step_plan_taken_too_early_is_found_if_entries_left_their_rows_for_the_step():
    sizes = {"kv_bytes_per_token": 4, "state_bytes": 64, "host_bytes": 100_000}
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=200, num_slots=4, grid=8, **sizes))
    placement = parse_placement("backoff")

    def serve(first, takes_first):
        prompt = np.arange(first, first + 120, dtype=np.int32)
        with Lease.begin(cache, placement, LeaseRequest(prompt)) as lease:
            for end in (60, 120):
                if takes_first:
                    cache.take_step().done()
                assert lease.extend(end)
                lease.take_checkpoint_slots(lease.published_len, end)
                if not takes_first:
                    cache.take_step().done()
                lease.publish(prompt, end)

    for number in range(20):
        serve(1000 * number, takes_first=False)
    refused("or moved the entries", serve, 20_000, takes_first=True, kind=RuntimeError)
    cache, placement = hybrid(100, 4, grid=8), parse_placement("every:8")
    with Lease.begin(cache, placement, LeaseRequest(prompt := ids(range(32)))) as lease:
        assert lease.extend(32)
        assert len(lease.take_checkpoint_slots(0, 8)) == 1
        cache.steps.transfers.append(Drop("disk", prompt))
        assert len(lease.take_checkpoint_slots(8, 32)) == 2  # no other slot is left
        lease.publish(prompt, 8)
        refused("or moved the entries", lease.publish, prompt, 16, kind=RuntimeError)
    with Lease.begin(cache, parse_placement("end"), LeaseRequest(prompt[:8])) as lease:
        assert lease.extend(32)
        assert not lease.take_checkpoint_slots(0, 8)
        cache.take_step().done()
        cache.steps.transfers.append(Drop("disk", prompt))
        assert len(lease.take_checkpoint_slots(8, 32)) == 1
        refused("or moved the entries", lease.finish, prompt, 32, kind=RuntimeError)
    cache.check(held_tokens=0, held_slots=0)
