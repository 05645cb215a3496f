"""Cache manager and step planner without an engine: memory, order, budgets and prefix sharing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.policies.registry import parse_placement
from hybridcache.scheduling.cache_manager import CacheManager, MemorySizes
from hybridcache.scheduling.loading import Loader
from hybridcache.scheduling.planner import DECODE_PIECE, StepPlanner
from hybridcache.scheduling.request import ScheduledRequest
from tests.radix.serving import hybrid, ids, publish
from tests.radix.test_refusals import manager, planner, scheduled, spec


def request(number: int, length: int, max_len: int | None = None, **fields) -> ScheduledRequest:
    """Return a request whose prompt, of ``length`` tokens, starts at token 1000 times its
    number."""
    prompt = ids(range(1000 * number, 1000 * number + length))
    return scheduled(prompt, arrival=number, max_len=max_len or length + 9, spec=spec(**fields))


def step(owner: StepPlanner[ScheduledRequest]) -> dict[ScheduledRequest, int]:
    """Compute one step, and return the number of tokens of each request."""
    ends, computed = owner.choose(), {}
    for one, end in ends.items():
        if owner.take_checkpoint_slots(one, end) is not None:
            computed[one] = end - one.scheduled_len
    owner.manager.take_step().done()
    for one in computed:
        owner.advance(one, ends[one])
        if ends[one] == one.num_tokens:
            one.append(7)
    owner.check()
    return computed


def test_the_share_of_an_arena_counts_states_as_rows_and_of_two_pools_the_fuller_one_counts():
    arena = MemorySizes("arena", 100, 10, row_bytes=2, state_bytes=19)
    assert arena.share(30, 2) == 0.5
    assert replace(arena, memory="pools").share(30, 4) == 0.4
    assert replace(arena, memory="pools", state_bytes=0).share(30, 9) == 0.3


def test_an_answer_outgrows_the_first_array():
    one = scheduled(ids("abc"), max_len=1000)
    for token in range(997):
        one.append(token)
    assert one.tokens.tolist() == [*ids("abc"), *range(997)] and one.tokens.dtype == ids().dtype


def test_a_manager_without_a_free_row_begins_nothing():
    owner, first, second = manager(num_rows=1), request(0, 5), request(1, 5)
    assert owner.begin(first) and not owner.begin(second)
    assert first.lease is not None and (second.lease, second.losses) == (None, None)


def test_decoding_takes_rows_in_pieces_when_it_needs_them():
    owner, one = planner(), request(0, 5, max_len=100)
    owner.add(one)
    lengths = []
    while one.num_tokens < 72:
        step(owner)
        assert owner.extend(one, one.lease.extended_len)
        lengths.append(one.lease.extended_len)
    assert lengths == [5, *[5 + DECODE_PIECE] * 32, *[5 + 2 * DECODE_PIECE] * 32, 100, 100]


def test_one_slab_is_emptied_per_step():
    sizes = {"memory": "arena", "total_bytes": 240, "kv_bytes_per_token": 1, "state_bytes": 20}
    cache, gaps = build_prefix_cache(CacheConfig(**sizes, grid=4, eviction="lru")), []
    for number in range(11):
        publish(cache, ids(range(100 * number, 100 * number + 10)))
        gaps.append(cache.allocate_kv(10))
    for rows in gaps:
        cache.free_kv(rows)
    owner = CacheManager(cache, parse_placement("every:4"), num_rows=1, stateful=True)
    one = scheduled(ids(range(5000, 5012)), max_len=20)
    steps = planner(manager=owner, max_running=1)
    assert owner.begin(one) and steps.extend(one, 12)
    counts, saves = [], None
    while saves is None:
        saves = steps.take_checkpoint_slots(one, 12)
        counts.append(cache.steps.num_moves)
        owner.take_step().done()
    assert [position for position, _ in saves] == [4, 8, 12] and counts == [1, 1, 1]


def test_a_preempted_request_has_the_slot_of_its_row_and_is_counted_once():
    owner, one = manager(owns_states=True), request(0, 16)
    for _ in range(2):
        assert owner.begin(one) and one.lease.extend(8)
        assert (one.lease.state_slot, owner.cache.free_slots) == (one.row, 10)
        one.lease.preempt(one.tokens, 0)
        owner.release(one)
    assert owner.cache.stats.total.requests == 1


def test_a_row_write_that_was_lost_is_found():
    owner, one = manager(), request(0, 5)
    assert not owner.lost_moves() and owner.begin(one) and one.lease.extend(5)
    owner.check(lambda row, end: ids())
    owner.take_step().done()
    owner.check(lambda row, end: one.lease.kv_indices[:end])
    with pytest.raises(AssertionError, match="a row write was lost: at position 3 of request"):
        owner.check(lambda row, end: one.lease.kv_indices[:3])


def test_rejected_drafts_leave_the_checkpoint_before_them():
    owner, one = planner(manager=manager(cache=hybrid(grid=8))), request(0, 12, max_len=40)
    owner.add(one)
    while one.computed_len < 16:
        step(owner)
    assert owner.extend(one, 32)
    assert owner.take_checkpoint_slots(one, 30) is not None
    one.lease.roll_back(one.computed_len, unwritten=True)
    assert one.lease.held_slots == 2
    owner.leave(one)
    [found] = [node.checkpoint for node in owner.manager.cache.iter_nodes() if node.checkpoint]
    assert (found.position, found.label) == (16, "decode")


@pytest.mark.parametrize("prefix_cache", ["hybrid", "radix", "none"])
def test_an_equal_prompt_waits_for_the_first_one_if_entries_are_kept(prefix_cache: str):
    keeps, cache = prefix_cache != "none", hybrid(prefix_cache=prefix_cache, grid=8)
    options = {"stateful": prefix_cache != "radix", "placement": parse_placement("backoff")}
    owned = manager(cache=cache, num_rows=4, **options)
    owner = planner(manager=owned, max_running=4, token_budget=1024, shares=keeps)
    prompt = ids(range(100))
    first, equal, other = (
        scheduled(prompt, arrival=number, max_len=109, spec=spec(namespace=namespace))
        for number, namespace in enumerate((None, None, "other"))
    )
    for one in (first, equal, other):
        owner.add(one)
    began = step(owner)
    assert began == {first: 100, other: 100} | ({} if keeps else {equal: 100})
    step(owner)
    assert equal.cached_len == (96 if keeps else 0) and other.cached_len == 0


def test_a_request_does_not_wait_for_a_prefix_that_is_cached():
    owned = manager(cache=hybrid(2000, grid=8), placement=parse_placement("backoff"))
    owner = planner(manager=owned, token_budget=256)
    first, equal = (scheduled(ids(range(600)), arrival=at, max_len=609) for at in range(2))
    owner.add(first)
    step(owner)
    publish(owned.cache, first.tokens, [592])
    owner.add(equal)
    assert step(owner)[equal] == 8 and (equal.cached_len, equal.lost_len) == (592, 0)


def test_a_session_goes_on_in_its_own_namespace_only():
    owner, first = planner(token_budget=256, clock=lambda: 9.0), request(0, 100)
    owner.add(first)
    step(owner)
    owner.leave(first)
    text, times = ids(range(120)), {"max_len": 130, "arrival_s": 1.0}
    for number, namespace in ((1, "other"), (2, None)):
        later = scheduled(text, arrival=number, spec=spec(namespace=namespace), **times)
        owner.add(later)
        assert (later.session is first.session) == (namespace is None)
    owner.add(choice := request(4, 20, choice_of="one"))
    assert choice.session is later.session
    report = owner.admission_report()
    assert (report.waiting_sessions, report.live_sessions, report.oldest_wait_s) == (2, 2, 9.0)
    assert report.figures == owner.admission.report()
    owner.add(last := request(3, 20, ends_session=True))
    owner.remove(last)
    assert owner.admission_report().live_sessions == 2


def test_a_decode_takes_one_token_of_the_budget():
    owner = planner(token_budget=128)
    for one in (first := request(0, 60), second := request(1, 300)):
        owner.add(one)
        chosen = step(owner)
    assert chosen == {first: 1, second: 64}


def test_the_rest_of_a_step_goes_to_the_next_prompt():
    owner = planner(manager=manager(cache=hybrid(3000)), token_budget=512)
    for one in (first := request(0, 912), second := request(1, 600)):
        owner.add(one)
        chosen = step(owner)
    assert chosen == {first: 400, second: 64}


def test_a_waiting_request_is_matched_once_while_the_cache_does_not_change(monkeypatch):
    owner, one, matched = planner(), request(0, 100), []
    cache, match = owner.manager.cache, owner.manager.cache.match
    monkeypatch.setattr(cache, "match", lambda *asked: matched.append(asked) or match(*asked))
    owner.add(one)
    assert [owner._load.cached_len(one) for _ in range(3)] == [0] * 3
    publish(cache, one.tokens[:50], [50])
    assert [owner._load.cached_len(one) for _ in range(3)] == [50] * 3
    assert len(matched) == 2


class Counting(Loader[ScheduledRequest]):
    """Loader that loads nothing, and counts the requests that it is asked for, and those
    forgotten."""

    def __init__(self, manager: CacheManager) -> None:
        super().__init__(manager)
        self.seen: set[ScheduledRequest] = set()
        self.forgotten: list[ScheduledRequest] = []

    def is_holding(self, request: ScheduledRequest) -> bool:
        self.seen.add(request)
        return False

    def wants(self, *_: object) -> bool:
        return False

    begin = advance = wait_for_data = wants  # type: ignore[assignment]

    def forget(self, request: ScheduledRequest) -> None:
        self.forgotten.append(request)


@pytest.mark.parametrize(("are_equal", "num_seen"), [(False, 4), (True, 16)])
def test_a_step_looks_at_few_waiting_requests(are_equal: bool, num_seen: int):
    owned = manager(cache=hybrid(grid=8), placement=parse_placement("backoff"))
    owner = planner(manager=owned, loader=(counting := Counting(owned)), token_budget=64)
    requests = [
        scheduled(ids(range(first, first + 90)), arrival=number, max_len=99)
        for number in range(30)
        for first in [0 if are_equal else 1000 * number]
    ]
    for one in requests:
        owner.add(one)
    owner.choose()
    assert len(counting.seen) == num_seen
    owner.remove(requests[-1])
    assert counting.forgotten == requests[-1:]


@pytest.mark.parametrize("end", [StepPlanner.leave, StepPlanner.remove])
def test_no_request_is_admitted_after_a_refusal_until_one_has_left(end):
    owned = manager(cache=hybrid(150), num_rows=3)
    owner = planner(manager=owned, max_running=3, token_budget=256)
    first, other, second = request(0, 100), request(1, 20), request(2, 100)
    for one in (first, other, second):
        owner.add(one)
    for _ in range(3):
        step(owner)
        assert owner.is_stuck and owned.cache.stats.refusals == 1
    end(owner, first)
    step(owner)
    assert second.is_running


@pytest.mark.parametrize(
    ("room", "lengths", "num_steps", "counted"), [(100, (60, 30), 6, 5), (300, (120, 200), 3, 4)]
)
def test_a_step_without_memory_admits_nothing(room, lengths, num_steps, counted):
    """The youngest request is preempted for an older one and counted, or sits the step out."""
    owned = manager(cache=hybrid(room), num_rows=3)
    owner = planner(manager=owned, max_running=3, token_budget=128)
    old, young = (request(2 * at, length, length + 39) for at, length in enumerate(lengths))
    young.num_preemptions = 4
    for one in (old, young):
        owner.add(one)
    for _ in range(num_steps):
        step(owner)
    owner.add(late := request(1, 3))
    step(owner)
    assert (late.is_running, old.num_preemptions, young.num_preemptions) == (False, 0, counted)


def test_a_restarted_manager_has_all_rows():
    owner = manager()
    assert owner.begin(request(0, 5)) and owner.begin(request(1, 5))
    owner.restart()
    assert owner.begin(request(2, 5)) and owner.begin(request(3, 5))
    assert not owner.begin(request(4, 5))


def test_a_state_that_a_client_asks_for_is_saved_under_its_own_label():
    owner = planner()
    owner.add(request(0, 16, save_at=(8,)))
    step(owner)
    nodes = owner.manager.cache.iter_nodes()
    assert "asked" in {one.checkpoint.label for one in nodes if one.checkpoint is not None}


def test_a_held_request_is_matched_once_in_its_own_namespace():
    found = []

    class Full(Counting):
        max_loads = 0
        is_holding = Loader.is_holding

        def wants(self, request, match):
            found.append(match.kv_match_len)
            return True

    owned = manager(cache=hybrid())
    publish(owned.cache, ids(range(5)))
    loader = Full(owned)
    for namespace in (None, "b"):
        one = scheduled(ids(range(9)), spec=spec(namespace=namespace))
        assert loader.holds(one) and loader.holds(one) and loader.requests >= {one}
    assert found == [5, 0]


def test_the_oldest_request_runs_alone_if_the_policy_withholds_all(monkeypatch):
    now_s, seen = [0.0], []
    owner = planner(token_budget=256, clock=lambda: now_s[-1])
    monkeypatch.setattr(owner.admission, "order", lambda waiting, load: ())
    monkeypatch.setattr(owner.admission, "computed", lambda *given: seen.append(given))
    for one in (first := request(0, 20), last := request(1, 20)):
        owner.add(one)
    assert [list(step(owner)) for _ in range(2)] == [[first]] * 2
    owner.leave(first)
    assert list(step(owner)) == [last]
    now_s.append(3.0)
    owner.leave(last)  # Its prefill ends now, and not when another request comes.
    assert seen == [(20, 0.0, owner._load), (20, 3.0, owner._load)]


def test_leaders_are_forgotten_when_they_are_computed():
    owner = planner(token_budget=256)
    for number in range(5):
        owner.add(one := request(number, 20))
        step(owner)
        owner.leave(one)
    assert owner._sharing._leaders == [one]
