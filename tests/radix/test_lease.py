"""Leases on a real cache: held rows and slots after each call, and refusal of wrong calls."""

from __future__ import annotations

from dataclasses import replace as copy_of
from typing import Any

import numpy as np
import pytest

from hybridcache.allocators.moves import Copy, Drop, Move, RowWrite, StepMemory, StepPlan
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.placement import End
from hybridcache.policies.registry import parse_placement
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import Item, Placed, Prefill, PromptBoundaries
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.warm_state import write_memory
from tests.radix.serving import carried_out, serve_lease
from tests.refused import refused


def make_cache(slots: int = 8, **options: int):
    return build_prefix_cache(CacheConfig(num_kv_tokens=1024, num_slots=slots, **options))


def tokens(length: int, first: int = 0) -> Tokens:
    return np.arange(first, first + length, dtype=np.int32)


def begin(
    cache: HybridRadixCache, prompt: Tokens, placement: str = "backoff", **options: object
) -> Lease:
    lease = Lease.begin(cache, parse_placement(placement), LeaseRequest(prompt, **options))
    assert lease is not None
    return lease


def prefill(lease: Lease, prompt: Tokens, end: int | None = None) -> tuple[tuple[int, int], ...]:
    """Extend, take checkpoint slots and publish up to ``end``, like the engine's prefill chunk."""
    end = len(prompt) if end is None else end
    assert lease.extend(end)
    exports = lease.take_checkpoint_slots(lease.published_len, end)
    carried_out(lease.cache)
    lease.publish(prompt, end)
    return exports


def check(cache: HybridRadixCache, *leases: Lease) -> None:
    cache.check(sum(le.held_tokens for le in leases), sum(le.held_slots for le in leases))


def test_a_prompt_that_ends_at_a_planned_position_gives_its_own_slot() -> None:
    """No answer was computed, so the decode rule of the placement does not matter."""
    for placement, is_planned, is_published in (("none", 1, 0), ("end", 0, 0), ("none", 1, 1)):
        cache, prompt = make_cache(slots=1 + is_published), tokens(128)
        lease = begin(cache, prompt, placement)
        assert lease.extend(128)
        if is_planned:
            lease.plan_checkpoint(128, "rejoin")
        if is_published:
            prefill(lease, prompt)
        carried_out(cache)
        lease.finish(prompt, 128, stop_reason="tool_use")
        titles = [node.checkpoint.title for node in cache.iter_nodes() if node.checkpoint]
        assert titles == ["rejoin/tool_use"] * is_planned


def test_the_placement_sees_the_match_and_is_told_of_dropped_positions() -> None:
    class Recorder(End):
        def __init__(self) -> None:
            self.seen: list[tuple[Item | None, bool]] = []
            self.dropped: list[Placed] = []

        def plan(self, prefill: Prefill) -> list[Placed]:
            self.seen.append((prefill.resumed, prefill.answer_survives))
            return [Placed(128, "own")]

        def on_dropped(self, placed: Placed) -> None:
            self.dropped.append(placed)

    cache, text, recorder = make_cache(), tokens(200), Recorder()
    placement = parse_placement(lambda: recorder)
    for exact, survives in ((False, True), (True, True), (False, False)):
        known = PromptBoundaries((), survives)
        request = LeaseRequest(text, boundaries=known, exact=exact)
        serve_lease(cache, placement, request)
        lease = Lease.begin(cache, placement, request)
        assert lease is not None and lease.extend(200)
        lease.plan_checkpoint(lease.cached_len, "rejoin")  # It is there already.
        lease.abort()
    [node] = [node for node in cache.iter_nodes() if node.checkpoint is not None]
    assert recorder.seen[0] == (None, True)
    assert recorder.seen[1:] == [
        (node.checkpoint, survives) for survives in (True, False, False, False, False)
    ]
    assert recorder.dropped == []
    for has_slot in (False, True):
        lease = Lease.begin(make_cache(), placement, LeaseRequest(text))
        assert lease is not None and lease.extend(200)
        assert not has_slot or lease.take_checkpoint_slots(0, 200)
        lease.abort()
    assert recorder.dropped == [Placed(128, "own")] * 2


def test_a_publish_in_decode_keeps_the_checkpoint_of_the_prompt_superseded() -> None:
    cache, text = make_cache(), tokens(400)
    lease = begin(cache, text[:200], "end,backoff")
    prefill(lease, text[:200])
    assert lease.extend(330)
    assert lease.take_checkpoint_slots(200, 330) == ((320, lease._rolling[1]),)
    carried_out(cache)
    [found] = [node.checkpoint for node in cache.iter_nodes() if node.checkpoint]
    assert found.superseded and found.num_successors == 1
    lease.publish(text, 325)
    cache.check()
    assert found.superseded and found.num_successors == 1
    lease.abort()
    cache.check(held_tokens=0, held_slots=0)
    assert not found.superseded and found.num_successors == 0


def test_the_first_tokens_that_wait_for_a_plan_are_remembered() -> None:
    cache, prompt = make_cache(), tokens(40)
    lease = begin(cache, prompt)
    cache.steps.transfers.append(Drop("disk", prompt))
    assert lease.extend(20) and lease.extend(40)
    refused("or moved the entries", lease.publish, prompt, 10, kind=RuntimeError)
    carried_out(cache)
    lease.finish(prompt, 40)
    check(cache)


def test_a_position_with_a_slot_is_not_planned_again() -> None:
    cache, prompt = make_cache(), tokens(200)
    lease = begin(cache, prompt, "end")
    for position in (64, 70):
        lease.plan_checkpoint(position, "rejoin")
    assert lease.extend(128)
    [(position, _)] = lease.take_checkpoint_slots(0, 128)
    assert position == 64 and lease.is_saving_at(64) and not lease.is_saving_at(128)
    lease.plan_checkpoint(64, "rejoin")
    lease.plan_checkpoint(128, "rejoin")
    for _ in range(2):
        assert [at for at, _ in lease.take_checkpoint_slots(0, 128)] == [64, 128]
    lease.abort()
    check(cache)


def test_decode_saves_no_state_at_the_position_where_a_step_starts() -> None:
    """The last step saved it."""
    cache, text = make_cache(), tokens(140)
    lease = begin(cache, text[:100], "end")
    prefill(lease, text[:100])
    assert lease.extend(140)
    assert [position for position, _ in lease.take_checkpoint_slots(100, 128)] == [128]
    assert lease.take_checkpoint_slots(128, 131) == ()


@pytest.mark.parametrize(("accepted", "resumed_at"), [(128, 128), (127, 0)])
def test_a_roll_back_keeps_the_checkpoint_at_the_accepted_length(
    accepted: int, resumed_at: int
) -> None:
    cache, text = make_cache(), tokens(140)
    lease = begin(cache, text[:100], "end")
    prefill(lease, text[:100])
    assert lease.extend(140)
    assert [position for position, _ in lease.take_checkpoint_slots(100, 131)] == [128]
    carried_out(cache)
    num_free = cache.free_slots
    lease.roll_back(accepted)
    assert cache.free_slots == num_free + (accepted < 128)
    lease.finish(text, accepted, donate=False)
    assert cache.match(text).cached_len == resumed_at
    check(cache)


@pytest.mark.parametrize(("prompt_len", "label"), [(128, "preempt"), (127, "decode")])
def test_a_preempted_state_is_that_of_an_answer_only_behind_the_prompt(
    prompt_len: int, label: str
) -> None:
    cache, text = make_cache(), tokens(140)
    lease = begin(cache, text[:prompt_len], "none")
    prefill(lease, text[:prompt_len])
    assert lease.extend(128)
    lease.preempt(text, 128)
    resumed = cache.match(text).resumed
    assert resumed is not None and (resumed.position, resumed.label) == (128, label)


def test_a_request_that_computed_nothing_gives_no_checkpoint() -> None:
    """Its state is a copy of a cached one, which the placement would see dropped."""
    dropped: list[Placed] = []

    class Recorder(End):
        def on_dropped(self, placed: Placed) -> None:
            dropped.append(placed)

    cache, prompt = make_cache(), tokens(200)
    serve_lease(cache, parse_placement("backoff"), LeaseRequest(prompt))
    lease = Lease.begin(cache, parse_placement(Recorder), LeaseRequest(prompt))
    assert lease is not None and lease.cached_len == 192
    lease.preempt(prompt, 192)
    assert dropped == [] and cache.num_checkpoints == 1


# --- Misuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finish", "preempt", "abort"])
def test_an_ended_lease_refuses_every_call(how: str) -> None:
    cache, prompt = make_cache(grid=8), tokens(40)
    lease = begin(cache, prompt)
    prefill(lease, prompt)
    lease.abort() if how == "abort" else getattr(lease, how)(prompt, 40)
    after = cache.render(), cache.free_tokens, cache.free_slots
    calls: dict[str, Any] = {
        "extend": (0,),
        "take_checkpoint_slots": (0, 0),
        "plan_checkpoint": (8, "branch"),
        "roll_back": (0,),
        "publish": (prompt, 40),
        "finish": (prompt, 40),
        "preempt": (prompt, 0),
    }
    for call, arguments in calls.items():
        refused("this lease has ended", getattr(lease, call), *arguments)
    lease.abort()
    assert (lease.state_slot, lease.held_tokens, len(lease.kv_indices)) == (None, 0, 0)
    assert lease.extended_len == lease.published_len == 0
    assert repr(lease) == "Lease(ended)"
    assert (cache.render(), cache.free_tokens, cache.free_slots) == after
    check(cache)


LENGTHS: list[tuple[Any, ...]] = [
    *(("publish", 21), ("finish", 21), ("preempt", 21), ("roll_back", 21)),
    *(("publish", 9), ("finish", 9), ("preempt", 9), ("roll_back", 9)),
    *(("take_checkpoint_slots", *span) for span in ((10, 21), (15, 10), (9, 20))),
]
"""Calls with invalid numbers of a lease of 20 rows and 10 published tokens."""


def test_invalid_lengths_are_refused_and_the_lease_stays_usable() -> None:
    cache, prompt = make_cache(grid=8), tokens(40)
    lease = begin(cache, prompt, "every:8")
    assert lease.extend(20)
    saves = lease.take_checkpoint_slots(0, 20)
    lease.publish(prompt, 10)
    before = cache.render()
    for call, *numbers in LENGTHS:
        text = [prompt] * (call in ("publish", "finish", "preempt"))
        given = " and ".join(map(str, numbers))
        with pytest.raises(ValueError, match=f"10 tokens .* and 20 have KV rows .got {given}"):
            getattr(lease, call)(*text, *numbers)
    refused("stop_reason must be", lease.finish, prompt, 20, stop_reason="banana")
    refused(r"int32 of shape \(20, 1\)", lease.finish, prompt[:20, None], 20)
    assert cache.render() == before
    check(cache, lease)
    lease.finish(prompt, 20)
    check(cache)
    assert [position for position, _ in saves] == [8, 16] and cache.num_checkpoints == 2


def test_begin_refuses_invalid_arguments_immediately() -> None:
    cache, placement, request = make_cache(), parse_placement("backoff"), LeaseRequest(tokens(9))
    wrongs = ("at least one token", tokens(0)), ("not list", [1, 2]), ("int32", np.arange(3))
    for named, wrong in wrongs:
        with pytest.raises(ValueError, match=named):
            Lease.begin(cache, placement, LeaseRequest(wrong))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got 'backoff'"):
        Lease.begin(cache, "backoff", request)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"session must be a text .got 3"):
        Lease.begin(cache, placement, request._replace(session=3))  # type: ignore[arg-type]
    for memory in ("arena", "budget"):
        small = CacheConfig(memory=memory, total_bytes=60, kv_bytes_per_token=4, state_bytes=64)  # type: ignore[arg-type]
        refused("needs room for one", Lease.begin, build_prefix_cache(small), placement, request)
    radix = build_prefix_cache(CacheConfig(prefix_cache="radix", num_kv_tokens=99, num_slots=9))
    refused("needs room for one", Lease.begin, radix, placement, request)
    for right in ((), (0, 4, 4, 9), [np.int64(3)], (12,)):
        boundaries = PromptBoundaries(right)
        lease = begin(make_cache(grid=np.int64(3)), tokens(9), "boundary", boundaries=boundaries)
        prefill(lease, tokens(9), 6)
        lease.abort()
        check(lease.cache)
    assert write_memory(lease.cache)


@pytest.mark.parametrize("call", ["publish", "finish", "preempt"])
def test_tokens_of_another_request_are_refused(call: str) -> None:
    cache, prompt, answer = make_cache(grid=8), tokens(20), tokens(4, 50)
    lease = begin(cache, prompt)
    prefill(lease, prompt, 10)
    assert lease.extend(24)
    lease.take_checkpoint_slots(10, 20)
    before = cache.render()
    wrong = prompt.copy()
    wrong[19] = 5
    with pytest.raises(ValueError, match="tokens 10 to 20 are not those of the LeaseRequest"):
        getattr(lease, call)(np.concatenate((wrong, answer)), 24)
    refused("tokens 10 to 20 are not those of the LeaseRequest", getattr(lease, call), wrong, 20)
    refused(r"tokens must be .* not list", getattr(lease, call), wrong.tolist(), 24)
    assert cache.render() == before
    check(cache, lease)
    lease.publish(wrong, 19)  # the wrong token is not published
    lease.finish(np.concatenate((prompt, answer)), 24)
    assert cache.match(np.concatenate((prompt, answer))).kv_match_len == 24
    check(cache)


class RecordingMemory:
    """Memory that records the work of a step plan in order."""

    def __init__(self) -> None:
        self.work: list[Any] = []
        for name in ("move", "copy", "write_row", "restore"):
            setattr(self, name, lambda *given, name=name: self.work.append((name, *given)))


def test_a_plan_is_carried_out_in_order() -> None:
    row = np.zeros(1, np.int32)
    transfers = Move(0, row, row, row), Copy("kv", "device", row, "host", row, 1), Drop("disk", row)
    plan = StepPlan((*transfers, *transfers[:1]), (RowWrite(0, 0, row),), ((1, 2), (3, 4)))
    memory = RecordingMemory()
    copy_of(plan).carry_out(memory)
    moves = [("move", transfers[0]), ("copy", transfers[1]), ("move", transfers[0])]
    others = ("write_row", plan.row_writes[0]), ("restore", 1, 2), ("restore", 3, 4)
    assert memory.work == [*moves, *others]

    class Derived(StepMemory):
        """Memory without a method of its own."""

    with pytest.raises(TypeError, match="Derived has no method move, which this step plan needs"):
        plan.carry_out(Derived())
    empty = make_cache().take_step()
    assert not empty
    empty.done()
    empty.done()  # an empty plan may be completed twice
    refused("was carried out", empty.carry_out, memory, kind=RuntimeError)


WRONG_TYPES: dict[str, Any] = {
    "boundaries must be PromptBoundaries": lambda lease: begin(
        lease.cache, tokens(20), boundaries=(16,)
    ),
    "positions of boundaries must be": lambda lease: begin(
        lease.cache, tokens(20), boundaries=PromptBoundaries(16)
    ),
    "each of boundaries must be an integer": lambda lease: begin(
        lease.cache, tokens(20), boundaries=PromptBoundaries((16.0,))
    ),
    "table_row must be an integer": lambda lease: begin(lease.cache, tokens(20), table_row=1.5),
    "own_slot must be an integer": lambda lease: begin(lease.cache, tokens(20), own_slot=1.0),
    "to_len must be an integer": lambda lease: lease.extend(30.0),
    "start must be an integer": lambda lease: lease.take_checkpoint_slots(0.0, 20),
    "end must be an integer": lambda lease: lease.take_checkpoint_slots(0, 20.0),
    "position must be an integer": lambda lease: lease.plan_checkpoint(16.0, "asked"),
    "computed_len must be an integer": lambda lease: lease.publish(tokens(20), 16.0),
    r"len must be an integer \(got 16.0\)": lambda lease: lease.finish(tokens(20), 16.0),
    r"computed_len must be an integer \(": lambda lease: lease.preempt(tokens(20), 16.0),
    r"_len must be an integer \(got 16.0\)": lambda lease: lease.roll_back(16.0),
    "num_tokens must be an integer": lambda lease: lease.cache.allocate_kv(3.5),
    "slot must be an integer": lambda lease: lease.cache.free_slot(7.0),
}


@pytest.mark.parametrize("message", WRONG_TYPES)
@pytest.mark.parametrize("debug", [False, True])
def test_a_number_of_another_type_is_refused_before_anything_is_taken(
    message: str, debug: bool
) -> None:
    cache = make_cache(grid=8, debug=debug)
    lease = begin(cache, tokens(20))
    assert lease.extend(20) and lease.take_checkpoint_slots(0, 20)
    carried_out(cache)
    held = lease.held_tokens, lease.held_slots, lease.planned
    refused(message, WRONG_TYPES[message], lease, kind=TypeError)
    assert held == (lease.held_tokens, lease.held_slots, lease.planned)
    check(cache, lease)
    lease.publish(tokens(20), np.int64(20))  # A numpy integer is one.
    lease.abort()
    check(cache)
