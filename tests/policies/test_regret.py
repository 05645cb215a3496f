"""Learned policies: `survival` eviction (hazards, lineage) and `adaptive` placement (yields)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.lab.runs.simulate import simulate
from hybridcache.lab.traces import open_trace
from hybridcache.lab.traces.generators import chat
from hybridcache.lab.traces.trace import Trace, TraceRequest
from hybridcache.policies.eviction.survival import _ROW_BITS, PACE, Hazards, Survival
from hybridcache.policies.placement import Adaptive, _Account
from hybridcache.policies.registry import parse_placement
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import Placed, PlacementPolicy, Prefill, PromptBoundaries
from hybridcache.radix.warm_state import pack, unpack, write_memory
from tests.policies.items import FakeItem, offer
from tests.radix.serving import serve_lease
from tests.selection import is_quick

KV_BYTES, STATE_BYTES = 24_576, 77_266_944


def hit_rate(
    trace: Iterable[TraceRequest], eviction: str, checkpoints: str, **config: int
) -> float:
    """Replay requests one by one on a grid of 1. Returns the token hit rate."""
    sizes = {"kv_bytes_per_token": KV_BYTES, "state_bytes": STATE_BYTES}
    settings = CacheConfig(**sizes | config, grid=1, eviction=eviction)
    cache = build_prefix_cache(settings)
    placement = parse_placement(checkpoints)
    reused = total = 0
    for request in trace:
        lease_request = LeaseRequest(request.tokens, request.namespace)
        reused += serve_lease(cache, placement, lease_request, request.output).cached_len
        total += len(request.tokens)
    cache.check(0, 0)
    return reused / total


def test_superseded_and_speculative_checkpoints_are_evicted_before_tips() -> None:
    tip = FakeItem("tip", label="decode")
    superseded = FakeItem("superseded", label="decode", superseded=True)
    guess = FakeItem("guess", label="back", distance=64, superseded=True)
    assert offer(Survival(), tip, superseded, guess) == ["guess", "superseded", "tip"]


def test_all_ghosts_on_the_path_count_as_used_except_superseded_ones() -> None:
    policy = Survival()
    shared, behind, tip = (FakeItem(name, label=name) for name in ("boundary", "back", "decode"))
    behind.distance, behind.superseded = 4, True
    for item in (shared, behind, tip):
        policy.add(item)
        policy.discard(item, evicted=True)
    policy.on_ghost_hit(tip)
    for item in (behind, shared):
        policy.on_ghost_hit_above(item)
    survival = policy.hazards
    survival._count_ended()
    rows = [item.memo.row for item in (shared, behind, tip)]
    uses = [survival._events[row].sum() for row in rows]
    assert uses == [1, 0, 1]
    policy.on_ghost_hit_above(FakeItem("from a file"))
    assert not survival.stages, "stages remain open after their use"


def test_nothing_grows_while_nothing_is_evicted() -> None:
    policy = Survival()
    policy.hazards = hazards = Hazards(max_open=64, general_from=3)
    for number in range(3000):
        policy.add(FakeItem(str(number), last_used=number))
    pending = hazards._ended, hazards._used, hazards.stages, policy._stale
    assert max(map(len, pending)) <= 1024
    assert {*policy._checkpoints.worths[:3000]} == {0.0, 64.0}, "0 where it is outdated"
    hazards._count_ended()
    assert hazards._reached.sum() == 3000 - 64


def test_a_ghost_hit_ends_the_stage_one_request_after_the_latest_use_of_another() -> None:
    """A request reports its ghost before its use, except of the checkpoint that it resumes from."""
    ages = []
    for is_resumed in (False, True):
        policy, gone = Survival(), FakeItem("gone")
        resumed = FakeItem("resumed")
        policy.add(gone)
        policy.add(resumed)
        policy.discard(gone, evicted=True)
        resumed.last_used, resumed.uses = 5, 1
        policy.touch(resumed)
        if not is_resumed:
            policy.add(FakeItem("saved", last_used=5))  # of that request: the hit is of a later one
        policy.hazards._ended.clear()
        policy.on_ghost_hit(gone)
        (ended,) = policy.hazards._ended
        ages.append(ended >> _ROW_BITS)
    assert ages == [6, 5]


def test_the_predecessor_of_an_evicted_tip_takes_its_class_and_its_time_of_use() -> None:
    policy = Survival()
    before = FakeItem("before", label="decode", superseded=True, last_used=3)
    tip = FakeItem("tip", label="decode", position=128, last_used=9, above=before)
    policy.add(before)
    policy.add(tip)
    policy.discard(tip, evicted=True)
    assert (before.memo.demand, before.memo.active) == (tip.memo.row, 9)


@pytest.mark.parametrize(
    ("label", "position", "is_followed", "changes", "is_saved"),
    [
        ("branch", 300, True, {}, True),
        ("head", 300, True, {}, True),
        ("branch", 300, False, {}, False),
        ("decode", 300, True, {}, False),  # the tip of one conversation
        ("branch", 700, True, {}, False),  # the fork itself
        ("branch", 300, True, {"boundaries": (200,)}, False),  # below a declared boundary
        ("branch", 300, True, {"boundaries": (300, 900)}, False),
        ("branch", 300, True, {"boundaries": (600, 900)}, True),
    ],
)
def test_an_evicted_head_is_saved_again(
    label: str, position: int, is_followed: bool, changes: dict[str, Any], is_saved: bool
) -> None:
    item = FakeItem("it", label=label, position=position, is_head=is_followed, earlier_uses=1)
    deeper = FakeItem("other", label="branch", position=690)
    planned = Adaptive().plan(prefill(0, seen_len=700, evicted=(deeper, item), **changes))
    assert (Placed(position, "head") in planned) == is_saved


def test_a_head_has_two_texts_that_were_used_and_a_cut_of_a_long_text_has_not() -> None:
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=65_536, num_slots=64, grid=64))
    placement, word = parse_placement("branch,backoff"), iter(range(1000, 2000))

    def ask(tokens: np.ndarray[Any, Any], *more: int) -> None:
        prompt = np.append(tokens, np.array(more, np.int32).repeat(100)).astype(np.int32)
        serve_lease(cache, placement, LeaseRequest(prompt), np.zeros(0, np.int32))

    head, document = np.full(192, 1, np.int32), np.arange(2000, 3024, dtype=np.int32)
    heads: list[bool] = []
    for question in (10, 11, 11, 10):
        ask(head, question)
        found = cache.match(np.append(head, head)).resumed
        heads.append(found is not None and found.is_shared_head(64))
    assert heads == [False, False, False, True], "the second question was not used before"
    for cut in (192, 700, 500, 900, 1000, 800):
        ask(document[:cut], next(word))
    found = cache.match(np.append(document[:192], head)).resumed
    assert found is not None and found.position == 192 and not found.is_shared_head(64)


def test_uses_of_evicted_checkpoints_are_counted_for_each_text() -> None:
    """Two heads of equal length: own placements see the uses of the head on their prompt's path."""

    seen: list[tuple[int, int, int]] = []

    class Saves(PlacementPolicy):
        def plan(self, prefill: Prefill) -> list[Placed]:
            seen[:] = [(one.position, one.uses, one.earlier_uses) for one in prefill.evicted]
            return [Placed(64, "head")]

    heads = [np.full(64, text, np.int32) for text in (1, 2)]
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=4096, num_slots=16, grid=64))
    placement, question = parse_placement(Saves), iter(range(1000, 2000))

    def ask(head: int) -> list[tuple[int, int, int]]:
        prompt = np.append(heads[head], np.full(30, next(question), np.int32))
        serve_lease(cache, placement, LeaseRequest(prompt), np.zeros(0, np.int32))
        return [*seen]

    for head in (0, 0, 0, 1):
        assert ask(head) == [], "nothing was evicted"
    cache.evict(num_slots=16)
    assert (ask(0), ask(1)) == ([(64, 2, 1)], [(64, 0, 1)])
    assert ask(0) == [], "it was saved again"
    cache.evict(num_slots=16)
    assert ask(0) == [(64, 1, 4)], "earlier uses are kept"
    cache.evict(num_slots=16)
    memory = unpack(pack(write_memory(cache)))
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=4096, num_slots=16, grid=64))
    memory.recall_tree(cache)
    assert ask(0) == [(64, 0, 6)], "earlier uses are kept over a restart"


def test_a_head_that_nobody_declares_is_found_again() -> None:
    """Three heads compete for five checkpoints: LRU loses them, and few requests fork at them."""
    [found] = simulate(
        "retries?questions=40&trials=3&heads=3&seed=1", gib=0.5, bound=False, progress=False
    ).runs
    assert found.token_hit_rate > 0.45, (
        f"retries, three heads, 0.5 GiB: {found.token_hit_rate:.3f}; without the rule it is 0.27"
    )


MEMORIES = ["arena", "pools"]
LARGEST_FALLS = {
    "few-shot?": (0.9, 1.7),
    "retries?questions=12&trials=3&": (0.5, 0.7),
    "retries?questions=12&trials=3&heads=2&": (0.5, 1.3),
    "chat?": (0.5, 0.5),
    "tree-search?tasks=12&": (0.5, 0.8),
    "short?": (0.7, 0.5),
    "few-shot?boundaries=false&": (0.9, 0.8),
}
"""Largest falls of the hit rate when memory grows, in points, by trace, as means of four seeds, in
the arena and in pools. The aim is 0.5 for all. Without the rule *Head* the third falls by 34.7."""


@pytest.mark.full("few-shot?-arena")
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("trace", list(LARGEST_FALLS))
def test_hits_do_not_fall_when_memory_grows(trace: str, memory: str) -> None:
    """Thirty sizes from a few checkpoints up. `make test` runs one seed, whose hit rate is as even
    as the mean: it has shown each seeded fault that the mean has."""
    sizes = [0.4 * 10 ** (step / 29) for step in range(30)]
    settings: dict[str, Any] = {"kv_share": 0.3} if memory == "pools" else {}
    rates = np.zeros(len(sizes))
    seeds = (2,) if is_quick() else range(4)
    for seed in seeds:
        opened = open_trace(f"{trace}seed={seed}").kept()
        result = simulate(opened, gib=sizes, memory=memory, bound=False, progress=False, **settings)
        rates += [100 / len(seeds) * run.token_hit_rate for run in result.runs]
    falls = np.maximum.accumulate(rates) - rates
    limit = LARGEST_FALLS[trace][MEMORIES.index(memory)]
    worst = int(falls.argmax())
    assert falls[worst] <= limit, (
        f"{trace} in {memory}: {falls[worst]:.2f} points below a smaller size at "
        f"{sizes[worst]:.3f} GiB ({rates[worst]:.2f} %), the limit is {limit}"
    )


def test_a_system_prompt_before_a_short_question_is_shared() -> None:
    """The question is shorter than a grid step, and longer than the header of an answer."""
    rng = np.random.default_rng(0)

    def text(size: int) -> np.ndarray:
        return rng.integers(0, 50_000, size, np.int32)

    systems, requests = [text(1010) for _ in range(8)], []
    for session in range(150):
        tokens = systems[rng.integers(8)]
        for turn in range(3):
            tokens, answer = np.concatenate((tokens, text(rng.integers(20, 60)))), text(100)
            requests.append(
                TraceRequest(3.0 * session + turn, session, None, tokens, answer, (1010,))
            )
            tokens = np.concatenate((tokens, answer))
    trace = Trace("short questions", 1, lambda: requests)
    [found] = simulate(trace, gib=1, bound=False, progress=False).runs
    assert found.token_hit_rate > 0.88, (
        f"short questions, 1 GiB: {found.token_hit_rate:.3f}; 0.84 if the boundary counts as the "
        "end of the prompt"
    )


def test_the_only_checkpoint_is_no_short_prefix_that_every_request_locks() -> None:
    """One or two checkpoints fit. A prefix of 320 tokens would be hit by, and locked by, all."""
    [found] = simulate("toolbench-dfs", gib=0.24, bound=False, progress=False).runs
    assert found.token_hit_rate > 0.65, (
        f"toolbench-dfs, 0.24 GiB: {found.token_hit_rate:.3f}; LRU with one back-off has 0.66, and "
        "the prefix 0.26"
    )


def test_survival_begins_as_lru_until_it_has_seen_uses() -> None:
    def first_victim(num_uses: int) -> str:
        policy = Survival()
        policy.hazards.num_uses = num_uses
        long = FakeItem("old and long", label="decode", span=6400, last_used=8)
        return offer(policy, long, FakeItem("new and short", label="decode", last_used=100))[0]

    assert [first_victim(uses) for uses in (1, 10)] == ["old and long", "new and short"]


def prefill(number: int, **changes: object) -> Prefill:
    return Prefill(1000, 0, 0, 0, (), 1)._replace(**changes)  # type: ignore[arg-type]


def back_offs_of(placement: Adaptive, prefill: Prefill) -> set[int]:
    """Save all checkpoints that ``placement`` plans for a request, all of them back-offs, and
    return their distances."""
    if prefill.resumed is not None:
        placement.on_hit(prefill.resumed)
    for missed in prefill.evicted[:1]:
        placement.on_ghost_hit(missed, missed.position - prefill.cached_len)
    placement.on_prefill(prefill)
    wanted = list(placement.plan(prefill))
    for placed in wanted:
        assert placed.label == "back"
        placement.on_saved(placed)
    return {placed.distance for placed in wanted}


def test_labels_without_hits_are_dropped_and_tried_again() -> None:
    placement = Adaptive()
    planned = [back_offs_of(placement, prefill(n)) for n in range(400)]
    assert planned[0] == {1, 4, 16, 64, 256}
    late = planned[100:]
    assert 1 <= sum(64 in distances for distances in late) <= 4, (
        "it must be tried again less and less often"
    )


def test_every_position_is_saved_in_spare_slots() -> None:
    """A label that never paid is saved again if KV is evicted while slots are free."""
    placement = Adaptive()
    for number in range(100):
        back_offs_of(placement, prefill(number))
    missed = FakeItem("lost", label="back", distance=1, position=900)
    every = {1, 4, 16, 64, 256}
    cases = (7, False, True), (6, False, False), (7, True, False)
    for free_slots, shares_memory, saves_all in cases:
        changes = {"free_slots": free_slots, "shares_memory": shares_memory}
        request = prefill(0, evicted=(missed,), num_checkpoints=20, **changes)
        assert (back_offs_of(placement, request) == every) == saves_all


def labels_of(planned: Iterable[Placed]) -> dict[int, str]:
    return {placed.position: placed.label for placed in planned}


def test_branches_and_boundaries_are_always_placed() -> None:
    placement = Adaptive()
    placed = labels_of(placement.plan(prefill(0, seen_len=300, boundaries=(200, 950))))
    assert placed[300] == "branch" and placed[200] == placed[950] == "boundary"
    tip = FakeItem("tip", label="decode", position=300)
    placed = labels_of(placement.plan(prefill(1, seen_len=300, evicted=(tip,), forks=False)))
    assert placed[300] == "rejoin", "a continuation is not a fork"
    places = (1, 300, "rejoin"), (2, 300, "branch"), (1, 299, "branch")
    for earlier_uses, position, label in places:  # its own conversation, others too, above the fork
        tip = FakeItem("tip", label="back", distance=1, position=position)
        tip.earlier_uses = earlier_uses
        placed = labels_of(placement.plan(prefill(2, seen_len=300, evicted=(tip,))))
        assert placed[300] == label, (earlier_uses, position)


def test_a_conversation_without_its_reasoning_does_not_fork(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second prompt leaves out the reasoning after the evicted end of the first. A third, of
    another conversation, shares that end."""
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=10_000, num_slots=8, grid=64))
    placement, rng, labels = parse_placement("adaptive"), np.random.default_rng(0), list[str]()
    monkeypatch.setattr(Adaptive, "on_saved", lambda self, placed: labels.append(placed.label))
    first = rng.integers(0, 1000, 460, dtype=np.int32)
    saved = []
    for _ in range(3):
        further = rng.integers(1000, 2000, 300, dtype=np.int32)
        prompt = np.concatenate((first, further)) if saved else first
        serve_lease(cache, placement, LeaseRequest(prompt), further)
        saved.append("branch" in labels)
        cache.evict(num_slots=8)
    assert saved == [False, False, True]


@pytest.mark.parametrize(
    ("options", "num_slots", "spec"),
    [
        ({"boundaries": PromptBoundaries((), False)}, 1000, "adaptive"),
        ({"exact": True}, 1000, "adaptive"),
        ({"boundaries": PromptBoundaries((30,))}, 1000, "adaptive"),
        ({"boundaries": PromptBoundaries((300, 310, 450))}, 1000, "adaptive"),
        ({}, 3, "adaptive"),
        ({"boundaries": PromptBoundaries((100, 200, 300))}, 1000, "adaptive"),
        ({}, 1000, "backoff,every:128,adaptive"),
    ],
)
def test_the_placement_counts_only_checkpoints_that_were_saved(
    options: dict[str, object], num_slots: int, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned checkpoints are not saved if the answer is dropped, below the grid, twice at one
    position, without a slot, and for aborted requests."""
    config = CacheConfig(num_kv_tokens=100_000, num_slots=num_slots, grid=64, eviction="lru")
    cache, placement = build_prefix_cache(config), parse_placement(spec)
    saved: list[_Account] = []  # their own counts fade
    monkeypatch.setattr(_Account, "save", lambda account: saved.append(account))
    rng = np.random.default_rng(0)
    for number in range(100):
        prompt = rng.integers(0, 1000, 500, dtype=np.int32)
        lease = Lease.begin(cache, placement, LeaseRequest(prompt, **options))  # type: ignore[arg-type]
        assert lease is not None and lease.extend(500)
        lease.take_checkpoint_slots(0, 500)
        if number % 7 == 0:
            lease.abort()
            continue
        cache.take_step().done()
        lease.publish(prompt, 500)
        answer = np.concatenate([prompt, rng.integers(0, 1000, 200, dtype=np.int32)])
        if number % 2:
            assert lease.extend(700)
            lease.take_checkpoint_slots(500, 700)
            cache.take_step().done()
            lease.finish(answer, 700)
        else:
            cache.take_step().done()
            lease.finish(prompt, 500)
    assert 0 < len(saved) == cache.stats.inserted_slots


@pytest.mark.full
def test_survival_and_adaptive_reach_the_bound_with_ample_memory() -> None:
    assert hit_rate(chat().head(120), "survival", "adaptive", total_bytes=40 << 30) > 0.8


def test_demand_passes_on_only_if_the_tip_leaves_the_last_tier() -> None:
    for has_tier in (False, True):
        device = Survival()
        tier = device.for_tier() if has_tier else None
        first = FakeItem("first", created=1, last_used=1, superseded=True)
        tip = FakeItem("tip", created=2, last_used=2, above=first)
        for item in (first, tip):
            device.add(item)
        device.discard(tip, evicted=True)
        assert (first.memo.demand is None) == has_tier
        if tier is not None:
            tier.add(tip)
            tier.discard(tip, evicted=True)
            assert first.memo.demand == tip.memo.row


@pytest.mark.parametrize("rule", ["end", "backoff"])
def test_survival_learns_by_stop_reason(rule: str) -> None:
    """Answers with one stop reason are followed by another turn, those with the other never. With
    ``backoff`` the next turn omits the answer, as chat templates omit reasoning."""
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=100_000, num_slots=1000, grid=1))
    placement, labels = parse_placement(rule), dict[str, str]()
    rng = np.random.default_rng(0)
    for number in range(100):
        reason = ("tool_use", "end_turn")[number % 2]
        prompt = rng.integers(0, 1000, 50, dtype=np.int32)
        for turn in range(1 + (reason == "tool_use")):
            answer = rng.integers(0, 1000, 10, dtype=np.int32)
            stop = reason if not turn else ""
            lease = serve_lease(cache, placement, LeaseRequest(prompt), answer, stop)
            if turn:
                assert lease.match.resumed is not None
                labels[reason] = lease.match.resumed.title
            history = np.concatenate((prompt, answer))
            prompt = history if rule == "end" else prompt
            prompt = np.concatenate((prompt, rng.integers(0, 1000, 10, dtype=np.int32)))
    assert labels == {"tool_use": f"{'decode' if rule == 'end' else 'backoff'}/tool_use"}
    policy = cache.policy
    assert isinstance(policy, Survival)
    survival = policy.hazards
    survival.refresh(survival.now + 100)
    survival.check()
    used, ended = (
        max(survival.index[row, 0] for key, row in survival.rows.items() if key[-1] == reason)
        for reason in ("tool_use", "end_turn")
    )
    assert used > 4 * ended
    learned = Adaptive()
    learned.on_saved(Placed(60, "decode"))
    learned.on_hit(FakeItem("tip", label="decode", stop_reason="tool_use"))
    assert learned._accounts.keys() == {("decode", 0)}, (
        "a placement policy decides before the stop reason is known"
    )


def test_a_conversation_with_one_tip_has_no_class_of_paces() -> None:
    policy = Survival()
    first = FakeItem("first", label="decode")
    second = FakeItem("second", label="decode", position=128, created=9, evicted_above=first)
    has_pace = []
    for item in (first, second):
        policy.add(item)
        keys = {row: key for key, row in policy.hazards.rows.items()}
        facts = [fact for fact in keys[item.memo.row] if isinstance(fact, tuple)]
        has_pace.append(PACE in dict(facts))
    assert has_pace == [False, True]


def test_the_next_use_is_expected_at_the_pace_of_the_session() -> None:
    """Two sessions alternate in one class of items; one returns sixteen times as often."""
    policy, latest = Survival(), dict[int, FakeItem]()
    for now in range(1, 800):
        for pace in (4, 64):
            if now % pace:
                continue
            before = latest.get(pace)
            if before is not None:
                before.uses, before.last_used = 1, now
                policy.touch(before)
            item = FakeItem("tip", label="decode", position=1024 + now, created=now, last_used=now)
            item.evicted_above, latest[pace] = before, item
            policy.add(item)
    hazards = policy.hazards
    hazards.refresh(hazards.now + 200)
    often, rarely = (hazards.index_at(latest[pace].memo.row, 0) for pace in (4, 64))
    assert often > 4 * rarely, f"uses per request expected: {often:.3f} and {rarely:.3f}"
