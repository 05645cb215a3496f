"""Learned policies: `survival` eviction (hazards, lineage) and `adaptive` placement (yields)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.lab.generators import append_only_chat, chat, conversations, resend
from hybridcache.lab.trace import TraceRequest
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.eviction.hazards import (
    EDGES,
    NUM_BINS,
    WIDTHS,
    Hazards,
    age_bins,
    index_of,
)
from hybridcache.policies.eviction.survival import Survival
from hybridcache.policies.placement.adaptive import Adaptive
from hybridcache.policies.placement.rules import Placement
from hybridcache.policies.protocol import Prefill
from hybridcache.policies.registry import parse_placement
from hybridcache.tiers import TieredRadixCache
from tests.policies.items import FakeItem, offer

KV_BYTES, STATE_BYTES = 24_576, 77_266_944
LENGTHS = ("long", "short")


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
        prompt = request.tokens
        lease = Lease.begin(cache, placement, LeaseRequest(prompt, request.namespace))
        assert lease is not None and lease.extend(len(prompt))
        reused += lease.cached_len
        total += len(prompt)
        lease.take_checkpoint_slots(lease.cached_len, len(prompt))
        cache.take_step().done()
        lease.publish(prompt, len(prompt))
        whole = np.concatenate((prompt, request.output))
        assert lease.extend(len(whole))
        lease.take_checkpoint_slots(len(prompt), len(whole))
        cache.take_step().done()
        lease.finish(whole, len(whole))
    cache.check(0, 0)
    return reused / total


def test_age_bins_partition_all_ages() -> None:
    ages = np.array([0, 1, 2, 3, 4, 5, 40, 20_000, 10**9])
    bins = age_bins(ages, 10**9)
    assert (EDGES[bins] <= ages).all()
    assert (ages[:-1] < (EDGES + WIDTHS)[bins[:-1]]).all()
    assert bins[-1] == NUM_BINS - 1


def test_the_index_of_a_constant_hazard_is_the_hazard() -> None:
    hazard = np.full((1, NUM_BINS), 0.01)
    assert np.allclose(index_of(hazard)[0, :20], 0.01, rtol=1e-3)


def test_the_index_follows_a_falling_hazard_and_grows_towards_a_due_use() -> None:
    falling = 1.0 / (EDGES + 16.0)[None, :]
    index = index_of(falling)[0]
    assert (np.diff(index) < 0).all() and index[0] == pytest.approx(1 / 16, rel=0.05)
    loop = np.full((1, NUM_BINS), 1e-6)
    due = int(age_bins(np.array([40]), 40)[0])
    loop[0, due] = 1.0
    index = index_of(loop)[0]
    assert (np.diff(index[: due + 1]) > 0).all()
    assert index[0] == pytest.approx(1 / EDGES[due], rel=0.1)
    assert index[due + 1] < index[0], "the index must fall after the due time"


def test_the_index_follows_the_share_of_stages_with_a_use() -> None:
    survival = Hazards()
    row = survival.row(("class",))
    for start in range(0, 2000, 2):
        stage = survival.open(row, start)
        survival.close(stage, start + 10, used=start % 4 == 0)
        survival.refresh(start + 10)
    # Half of all stages end in a use after ten requests: the hazard is about 0.5 / 10 until then.
    index = survival.index[row]
    assert index[0] == pytest.approx(0.05, rel=0.2)
    assert index[int(age_bins(np.array([10]), 10)[0])] > 2 * index[0]


def test_a_class_differs_from_its_parent_only_with_enough_evidence() -> None:
    survival = Hazards()
    rows = {name: survival.row(("parent", name)) for name in ("much", "little")}
    for start in range(0, 4000, 4):
        survival.close(survival.open(rows["much"], start), start + 5, used=True)
        if start % 2000 == 0:
            survival.close(survival.open(rows["little"], start), start + 5, used=False)
        survival.refresh(start + 5)
    much, little = (survival.index[rows[name]][0] for name in ("much", "little"))
    assert little > 0.5 * much, "two stages without a use are too little evidence"


def test_a_feature_has_the_same_effect_in_a_class_without_evidence() -> None:
    survival = Hazards(general_from=1)
    rows = {
        key: survival.row(key)
        for key in (("a", "long"), ("a", "short"), ("b", "long"), ("b", "short"))
    }
    for start in range(0, 4000, 4):
        used = start % 8 == 0
        survival.close(
            survival.open(rows["a", "short" if used else "long"], start), start + 5, used
        )
        survival.refresh(start + 5)
    index = {key: survival.index[row][0] for key, row in rows.items()}
    assert index["a", "long"] < 0.2 * index["a", "short"]
    assert index["b", "long"] < 0.2 * index["b", "short"]


def test_superseded_and_speculative_checkpoints_are_evicted_before_tips() -> None:
    tip = FakeItem("tip", label="decode")
    superseded = FakeItem("superseded", label="decode", superseded=True)
    guess = FakeItem("guess", label="back:64", superseded=True)
    assert offer(Survival(), tip, superseded, guess) == ["guess", "superseded", "tip"]


def test_items_are_ranked_by_tokens_per_byte() -> None:
    valuable = FakeItem("valuable", span=100, size_bytes=10)
    large = FakeItem("large", span=100, size_bytes=50)
    short = FakeItem("short", span=20, size_bytes=20)
    assert offer(Survival(), valuable, large, short) == ["short", "large", "valuable"]


def test_demand_passes_to_the_successor_and_back() -> None:
    policy = Survival()
    first = FakeItem("first", label="decode", created=1, last_used=1, span=100, position=100)
    policy.add(first)
    first.uses, first.last_used = 1, 2
    policy.touch(first)
    second = FakeItem("second", label="decode", created=2, last_used=2, above=first, position=150)
    second.span = 1
    policy.add(second)
    policy.discard(first, evicted=False)
    first.superseded = True
    policy.add(first)
    assert (first.memo.turn, second.memo.turn) == (0, 1)
    successor_class = second.memo.key
    first.span = 10_000
    assert policy.victim(None) is second
    policy.discard(second, evicted=True)
    policy.discard(first, evicted=False)
    first.superseded = False
    policy.add(first)
    assert first.memo.key == successor_class, (
        "the predecessor did not inherit the demand of the evicted tip"
    )


def test_a_frequently_used_shared_prefix_keeps_its_own_demand() -> None:
    """Every request uses a system prompt, and one conversation continues it. When the conversation
    is evicted, the system prompt must not inherit its lower demand."""
    policy = Survival()
    shared = FakeItem("shared", label="boundary", position=100, superseded=True)
    tip = FakeItem("tip", label="decode", above=shared, position=200)
    policy.add(shared)
    policy.add(tip)
    for now in range(1, 80):
        shared.uses, shared.last_used = now, now
        policy.touch(shared)
        policy.hazards.refresh(now)
    policy.discard(tip, evicted=True)
    policy.discard(shared, evicted=False)
    shared.superseded = False
    policy.add(shared)
    assert shared.memo.demand == tip.memo.key
    assert shared.memo.key[1] == "boundary"


def test_a_used_predecessor_does_not_become_a_tip_again() -> None:
    """The deeper tip is evicted without a use. Its predecessor was used already, so it does not
    return to the class of unused tips."""
    policy = Survival()
    first = FakeItem("first", label="decode", position=100)
    policy.add(first)
    tip_class = first.memo.key
    second = FakeItem("second", label="back:64", created=1, last_used=1, above=first, position=200)
    policy.add(second)
    for superseded in (True, False):
        policy.discard(first, evicted=False)
        first.superseded = superseded
        policy.add(first)
        if superseded:
            policy.discard(second, evicted=True)
    assert first.memo.key != tip_class
    assert first.memo.key in (second.memo.key, ((True, False), *tip_class[1:]))


def test_an_evicted_predecessor_continues_the_turn_count() -> None:
    """A running request may lose the tip that it resumed from before it saves the next one."""
    policy = Survival()
    tip = FakeItem("tip", created=1, last_used=1)
    policy.add(tip)
    tip.memo.turn = 3
    policy.discard(tip, evicted=True)
    successor = FakeItem("successor", position=128, created=2, last_used=2, evicted_above=tip)
    policy.add(successor)
    assert successor.memo.turn == 4


def test_the_generation_goes_on_through_forks() -> None:
    """A fork has no generation in its class, but a tip after it counts the tips before it. This
    holds no matter whether the fork was cached before the request. Heads that no tip precedes add
    nothing."""
    policy = Survival()
    head = FakeItem("head", label="boundary", position=64, uses=3)
    policy.add(head)
    first = FakeItem("first", label="decode", above=head, position=200)
    policy.add(first)
    assert (head.memo.turn, first.memo.turn) == (0, 0)
    policy.discard(first, evicted=True)
    fork = FakeItem("fork", label="boundary", created=1, position=300, evicted_above=first)
    policy.add(fork)
    answer = FakeItem("answer", label="decode", created=1, above=fork, position=400)
    policy.add(answer)
    fork.uses = 1
    later = FakeItem("later", label="decode", created=2, above=fork, position=500)
    policy.add(later)
    assert (answer.memo.turn, later.memo.turn) == (1, 1)
    generation = 3
    assert [item.memo.key[generation] for item in (head, fork, later)] == [0, 0, 1]


def test_a_rejoin_counts_as_the_tip_that_it_replaces() -> None:
    """Its request saved a deeper checkpoint too, so it was superseded without a use."""
    policy = Survival()
    rejoin = FakeItem("rejoin", label="rejoin", superseded=True)
    policy.add(rejoin)
    tip = FakeItem("tip", label="decode", above=rejoin, position=200)
    policy.add(tip)
    assert tip.memo.turn == 1
    found = [
        placed.label
        for forks in (True, False)
        for placed in parse_placement("branch").plan(prefill(0, forks=forks))
    ]
    assert found == ["branch", "rejoin"]


def test_kv_has_the_generation_of_the_checkpoint_at_its_end() -> None:
    """Earlier tips are superseded and evicted before it, in the pool of states."""
    config = CacheConfig(num_kv_tokens=1000, num_slots=9, grid=1, eviction="survival")
    cache = build_prefix_cache(config)
    tokens = np.arange(500, dtype=np.int32)
    after = 0
    for end in range(100, 500, 100):
        match = cache.match(tokens[:end])
        cache.touch(match)
        held = cache.lock(match.node)
        rows = np.concatenate((cache.gather(match.node), cache.allocate_kv(end - after)))
        slot = cache.allocate_slot()
        cache.insert(tokens[:end], rows, ((end, slot),), None, after, (), match.node)
        cache.unlock(held)
        after = end
    cache.evict(num_slots=3)
    [tip] = [node for node in cache.iter_nodes() if node.checkpoint is not None]
    assert tip.end == 400 and tip.checkpoint.memo.turn == 3
    cache.policy._rank_kv()
    assert tip.kv.predecessor is tip.checkpoint
    assert tip.kv.memo.turn == 3


def test_hits_in_two_pools_with_scarce_kv_are_those_of_the_generations() -> None:
    """KV of long conversations was ranked as KV of first turns, which return most often."""
    trace = conversations(live=96, num_conversations=300)
    rates = [
        hit_rate(trace, eviction, "branch,end", num_kv_tokens=150_000, num_slots=240)
        for eviction in ("survival", "lru")
    ]
    assert rates[0] > 1.1 * rates[1]


def test_checkpoints_of_one_prompt_share_a_generation() -> None:
    """The clock ticks between them if requests run concurrently."""
    policy = Survival()
    prompt = FakeItem("prompt", label="back:1", created=5, position=100, superseded=True)
    policy.add(prompt)
    answer = FakeItem("answer", label="decode", created=9, above=prompt, position=200)
    policy.add(answer)
    assert (prompt.memo.turn, answer.memo.turn) == (0, 0)


def test_all_ghosts_on_the_path_count_as_used_except_superseded_ones() -> None:
    policy = Survival()
    shared, behind, tip = (FakeItem(name, label=name) for name in ("boundary", "back:4", "decode"))
    behind.superseded = True
    for item in (shared, behind, tip):
        policy.add(item)
        policy.discard(item, evicted=True)
    policy.on_ghost_hit(tip)
    for item in (behind, shared):
        policy.on_ghost_hit_above(item)
    survival = policy.hazards
    uses = [survival.num_uses(item.memo.cell // NUM_BINS) for item in (shared, behind, tip)]
    assert uses == [1, 0, 1]
    policy.on_ghost_hit_above(FakeItem("from a file"))
    open_stages = len(survival._places)
    assert open_stages == 0, "stages remain open after their use"


def test_kv_in_a_separate_pool_is_ranked_at_the_first_request_for_it() -> None:
    policy = Survival()
    old, new = (FakeItem(f"kv{n}", kind="kv", last_used=n, created=n) for n in (1, 50))
    policy.add(old)
    policy.add(new)
    assert policy.victim("checkpoint") is None
    assert policy.victim("kv") is old


def test_a_part_of_a_loop_that_does_not_fit_is_kept() -> None:
    trace = resend(seed=1)
    budget = 6 << 30
    assert hit_rate(trace, "lru", "end,branch,backoff", total_bytes=budget) < 0.05
    assert hit_rate(trace, "survival", "adaptive", total_bytes=budget) > 0.55


def test_survival_evicts_finished_conversations_earlier_than_lru() -> None:
    trace = conversations(live=48).head(2000)
    pools = {"num_kv_tokens": 200_000, "num_slots": 300}
    lru = hit_rate(trace, "lru", "end,branch", **pools)
    assert hit_rate(trace, "survival", "end,branch", **pools) > lru + 0.003


def test_survival_evicts_conversations_at_their_length_limit() -> None:
    """A long conversation saves more tokens per byte than a short one until it is at the limit."""
    unlimited = conversations(live=24, turns=30).head(3000)
    limited = [request for request in unlimited if len(request.tokens) < 3000]
    sizes = {"state_bytes": 336 * KV_BYTES, "total_bytes": 600 << 20}
    lru = hit_rate(limited, "lru", "branch,end", **sizes)
    assert hit_rate(limited, "survival", "branch,end", **sizes) > lru + 0.01


def prefill(number: int, **changes: object) -> Prefill:
    base = Prefill(1000, 0, 0, 0, (), 1)
    return base._replace(**changes)  # type: ignore[arg-type]


def labels_of(placement: Adaptive, prefill: Prefill) -> set[str]:
    """Save all checkpoints that ``placement`` plans for a request, and return their labels."""
    if prefill.resumed is not None:
        placement.on_hit(prefill.resumed)
    if prefill.missed is not None:
        placement.on_ghost_hit(prefill.missed, prefill.missed.position - prefill.cached_len)
    placement.on_prefill(prefill)
    wanted = list(placement.plan(prefill))
    for position, label in wanted:
        placement.on_saved(position, label)
    return {label for _, label in wanted}


def test_labels_without_hits_are_dropped_and_tried_again() -> None:
    placement = Adaptive()
    planned = [labels_of(placement, prefill(n)) for n in range(400)]
    assert planned[0] == {"back:1", "back:4", "back:16", "back:64", "back:256"}
    late = planned[100:]
    assert 1 <= sum("back:64" in labels for labels in late) <= 4, (
        "it must be tried again less and less often"
    )


def test_a_label_with_hits_stays_and_pressure_raises_the_price() -> None:
    placement = Adaptive()
    used_item = FakeItem("used", label="back:64", span=900, position=900)
    for number in range(300):
        used = used_item if number % 3 == 0 else None
        labels = labels_of(placement, prefill(number, resumed=used))
    assert "back:64" in labels
    end = FakeItem("end", label="back:1", span=900, position=999)
    for number in range(300):
        found = {"missed": end} if number % 4 == 0 else {"resumed": end}
        labels = labels_of(placement, prefill(number, **found))
    assert placement.price_tokens > 50
    assert "back:1" in labels
    assert "back:64" not in labels


def test_few_checkpoints_are_placed_if_all_are_evicted_before_use() -> None:
    placement = Adaptive()
    lost = FakeItem("lost", label="back:1", span=900, position=999)
    planned = [labels_of(placement, prefill(n, missed=lost)) for n in range(400)]
    assert any("back:1" in labels for labels in planned[150:]), "the label is never tried again"
    assert sum(map(len, planned[150:])) < 40, "fewer checkpoints would live longer and be used"


def test_backoffs_do_not_reduce_the_yield_of_an_end() -> None:
    """A prompt continues from its end, 3 tokens past a back-off checkpoint that saves almost as
    much. The end gets the yield of both, because otherwise neither would seem useful."""
    placement = Adaptive()
    old = FakeItem("old", label="decode", position=500)
    backoff = FakeItem("backoff", label="back:4", position=996, above=old)
    end = FakeItem("end", label="back:1", span=3, position=999, above=backoff)
    for number in range(400):
        labels = labels_of(placement, prefill(number, resumed=end))
    assert labels == {"back:1"}
    assert placement._account("back:1").yield_tokens > 400


def test_branches_and_boundaries_are_always_placed() -> None:
    placement = Adaptive()
    placed = dict(placement.plan(prefill(0, seen_len=300, boundaries=(200, 950))))
    assert placed[300] == "branch" and placed[200] == placed[950] == "boundary"
    tip = FakeItem("tip", label="decode", position=300)
    placed = dict(placement.plan(prefill(1, seen_len=300, missed=tip, forks=False)))
    assert placed[300] == "rejoin", "a continuation is not a fork"
    placed = dict(placement.plan(prefill(2, seen_len=300, missed=tip)))
    assert placed[300] == "branch", "other requests forked at the evicted tip"


def test_a_label_that_is_never_saved_has_no_cost() -> None:
    """Decode saves nothing for these requests, so its account stays unchanged."""
    placement = Adaptive()
    for number in range(300):
        labels_of(placement, prefill(number, answer_survives=False))
    assert placement.num_saved().get("decode", 0.0) == 0.0
    assert placement.decode_interval() == 1, "decode was charged although it saved nothing"


@pytest.mark.parametrize(
    ("options", "num_slots", "spec"),
    [
        ({"answer_survives": False}, 1000, "adaptive"),
        ({"exact": True}, 1000, "adaptive"),
        ({"boundaries": (30,)}, 1000, "adaptive"),
        ({"boundaries": (300, 310, 450)}, 1000, "adaptive"),
        ({}, 3, "adaptive"),
        ({"boundaries": (100, 200, 300)}, 1000, "adaptive,cap:2"),
        ({}, 1000, "backoff,every:128,adaptive"),
    ],
)
def test_the_placement_counts_only_checkpoints_that_were_saved(
    options: dict[str, object], num_slots: int, spec: str
) -> None:
    """Planned checkpoints are not saved if the answer is dropped, below the grid, twice at one
    position, past the cap, without a slot, and for aborted requests."""
    config = CacheConfig(num_kv_tokens=100_000, num_slots=num_slots, grid=64, eviction="lru")
    cache, placement = build_prefix_cache(config), parse_placement(spec)
    [learned] = [rule for rule in placement.rules if isinstance(rule, Adaptive)]
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
    assert 0 < sum(learned.num_saved().values()) == cache.stats.inserted_slots


def test_a_checkpoint_saved_first_by_another_request_is_not_counted() -> None:
    """Two equal prompts are computed at the same time. The cache takes the checkpoints of one."""
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=100_000, num_slots=1000, grid=64))
    learned = Adaptive()
    placement, rng = Placement((learned,)), np.random.default_rng(0)
    for _ in range(20):
        request = LeaseRequest(rng.integers(0, 1000, 500, dtype=np.int32))
        leases = [Lease.begin(cache, placement, request) for _ in range(2)]
        for lease in leases:
            assert lease is not None and lease.extend(500)
            assert lease.take_checkpoint_slots(0, 500)
        for lease in leases:
            assert lease is not None
            cache.take_step().done()
            lease.finish(request.tokens, 500)
    assert 0 < sum(learned.num_saved().values()) == cache.stats.inserted_slots


def under_pressure() -> Adaptive:
    """Return a placement that saw 400 prompt ends evicted before use, so that none pays off."""
    placement = Adaptive()
    lost = FakeItem("lost", label="back:1", span=900, position=999)
    for number in range(400):
        labels_of(placement, prefill(number, missed=lost))
    assert placement.price_tokens > 300
    return placement


def test_under_pressure_a_resumed_tip_still_gets_a_successor() -> None:
    """The successor supersedes the tip and displaces nothing else, so that a resident conversation
    stays resident."""
    tip = FakeItem("tip", label="back:1", position=600, span=600)
    for number in range(5):
        placement = under_pressure()
        again = prefill(number, cached_len=600, seen_len=600, forks=False, resumed=tip)
        assert "back:1" in labels_of(placement, again)
    behind = FakeItem("behind", label="back:1", position=600, span=600, superseded=True)
    shared = FakeItem("shared", label="boundary", position=600, span=600)
    for other in (behind, shared):
        placement = under_pressure()
        resumed = prefill(0, cached_len=600, seen_len=600, forks=False, resumed=other)
        assert not labels_of(placement, resumed), "the resumed item is not a tip"


def test_new_conversations_save_ends_if_a_third_of_the_ends_are_used() -> None:
    """With fewer hits, resident conversations keep their memory, because new ones would be evicted
    before their next turn."""
    tip = FakeItem("tip", label="back:1", position=999, span=999)
    lost = FakeItem("lost", label="back:1", position=999)
    other = prefill(0, cached_len=100, seen_len=100, forks=False)
    for period, is_saved in ((2, True), (5, False)):
        placement = Adaptive()
        labels_of(placement, other)
        for number in range(400):
            placement.on_saved(999, "back:1")
            placement.on_saved(500, "boundary")
            if number % period:
                placement.on_ghost_hit(lost, 999)
            else:
                placement.on_hit(tip)
        assert ("back:1" in labels_of(placement, other)) == is_saved


def test_a_tip_gets_only_one_successor() -> None:
    """Ends of answers that are never reused get no checkpoint; only the prompt's end does."""
    placement = Adaptive()
    for _ in range(200):
        placement.on_saved(999, "decode")
        placement.on_saved(999, "back:1")
        placement.on_hit(FakeItem("end", label="back:1", position=999))
        placement.on_ghost_hit(FakeItem("lost", label="back:1"), 3000)
    tip = FakeItem("tip", label="back:1", position=600, span=600)
    placement.on_prefill(prefill(0, cached_len=600, resumed=tip))
    assert placement.decode_interval() is None


def test_a_label_that_saves_more_than_forks_is_placed() -> None:
    """Forks are always placed. The price that they cause must not exclude a label that saves
    more."""
    placement = Adaptive()
    fork = FakeItem("fork", label="branch", span=200, position=500)
    for number in range(200):
        placement.on_saved(500, "branch")
        if number % 10:
            placement.on_ghost_hit(fork, 900)
        else:
            placement.on_hit(fork)
    joint = prefill(0, seen_len=700, forks=False)
    for _ in range(20):
        placement.on_saved(700, "rejoin")
    assert "rejoin" not in labels_of(placement, joint)
    for _ in range(10):
        placement.on_hit(FakeItem("joint", label="rejoin", position=700))
    assert "rejoin" in labels_of(placement, joint)


def test_backoffs_without_hits_are_placed_only_in_free_memory() -> None:
    ample, full = ({"free_slots": free, "num_checkpoints": 20} for free in (20, 0))
    assert "back:64" in labels_of(Adaptive(), prefill(0, **ample))
    assert labels_of(Adaptive(), prefill(0, **full)) == {"back:1"}
    used = FakeItem("used", label="back:64", span=900, position=900)
    placement = Adaptive()
    for number in range(60):
        labels_of(placement, prefill(number, resumed=used, **ample))
    assert "back:64" in labels_of(placement, prefill(99, **full))


@pytest.mark.parametrize(
    ("num_checkpoints", "num_planned"), [(0, 1), (1, 1), (3, 1), (4, 2), (40, 4)]
)
def test_one_prompt_takes_at_most_half_of_all_checkpoints(
    num_checkpoints: int, num_planned: int
) -> None:
    """The end of the answer counts, and equal positions count once."""
    placement = Adaptive()
    new = prefill(
        0,
        grid=64,
        boundaries=(100, 101, 500),
        seen_len=101,
        num_checkpoints=num_checkpoints,
        free_slots=0,
    )
    placement.on_prefill(new)
    positions = new.on_grid(placement.plan(new))
    assert len(positions) + (placement.decode_interval() is not None) == num_planned
    shared = {"branch", "boundary"}
    assert shared & {*positions.values()}, "shared positions have priority"


def test_with_room_for_one_the_position_with_the_highest_savings_is_saved() -> None:
    """A short fork must not keep out the end of a long shared head: a request that resumes from the
    fork holds it, and may find no memory for another checkpoint. Ends that are used more go
    first."""
    few = {"grid": 64, "free_slots": 0, "num_checkpoints": 2, "answer_survives": False}
    placement = Adaptive()
    new = prefill(0, prompt_len=2200, seen_len=320, boundaries=(2028,), **few)
    assert labels_of(placement, new) == {"boundary"}
    end = FakeItem("end", label="back:1", position=2700)
    for _ in range(9):
        placement.on_hit(end)
    assert labels_of(placement, new) == {"back:1"}


def test_the_boundary_at_the_end_of_the_prompt_is_an_end_and_not_shared() -> None:
    """A chat server sends it with every prompt. Headers of answers are a few tokens long."""
    for last in (1000, 997):
        new = prefill(0, grid=64, boundaries=(300, last), prompt_len=1000)
        placement = Adaptive()
        placement.on_prefill(new)
        positions = new.on_grid(placement.plan(new))
        assert (positions[256], positions[960]) == ("boundary", "back:1")
    new = prefill(0, grid=64, boundaries=(300, 958), prompt_len=1000)
    assert 896 in new.on_grid(Adaptive().plan(new)), "it is more than a header away"


def test_conversations_with_the_boundaries_of_a_server_hit_as_those_with_one() -> None:
    """The server sends the end of the prompt too. Every tip had generation 0 then."""
    trace = list(conversations(live=24, num_conversations=80))
    served = [
        request._replace(boundaries=(*request.boundaries, len(request.tokens))) for request in trace
    ]
    one, two = (
        hit_rate(requests, "survival", "adaptive", total_bytes=4 << 30)
        for requests in (trace, served)
    )
    assert two > one - 0.01


def test_a_prefill_has_the_number_of_free_slots_and_checkpoints() -> None:
    prefills: list[Prefill] = []

    class Recording(Adaptive):
        def on_prefill(self, prefill: Prefill) -> None:
            prefills.append(prefill)
            super().on_prefill(prefill)

    cache = build_prefix_cache(CacheConfig(num_kv_tokens=10_000, num_slots=6, grid=1))
    for number in range(3):
        prompt = np.full(100, number, np.int32)
        lease = Lease.begin(cache, Recording(), LeaseRequest(prompt, answer_survives=False))
        assert lease is not None and lease.extend(100)
        lease.take_checkpoint_slots(0, 100)
        cache.take_step().done()
        lease.finish(prompt, 100)
    assert prefills[0].free_slots == 5, "the request's state has one slot"
    assert prefills[0].num_checkpoints == 0 < prefills[1].num_checkpoints
    assert [(each.free_slots or 0) + each.num_checkpoints for each in prefills] == [5, 5, 5]


def test_adaptive_keeps_some_sessions_of_a_loop_that_does_not_fit() -> None:
    """At first every end is evicted before its use. The default must keep as many sessions as
    ``backoff`` does."""
    trace = append_only_chat(sessions=25, turns=12)
    rates = [
        hit_rate(trace, "survival", spec, total_bytes=1 << 30) for spec in ("adaptive", "backoff")
    ]
    assert rates[0] > 0.98 * rates[1] > 0.1


def test_a_single_use_does_not_determine_the_first_evictions() -> None:
    """A single use at an age of twelve is little evidence for items of that age. Older items must
    not be valued much higher than younger ones."""
    survival = Hazards()
    row = survival.row((True,))
    for start in range(24):
        survival.open(row, start)
    survival.close(survival.open(row, 12), 24, used=True)
    assert survival.refresh(64)
    ages = (0, 1, 2, 3, 4, 6, 8, 11, 12, 16, 23, 32)
    indices = [survival.index_at(row, age) for age in ages]
    assert all(later < 1.05 * min(indices[:n]) for n, later in enumerate(indices) if n)


def test_trials_of_new_labels_do_not_fill_a_small_cache() -> None:
    """The assumed yield of a new label lasts for as many checkpoints as fit. If few fit, an unused
    end is saved only that often. With ample memory it is saved each time."""

    def num_ends(num_checkpoints: int) -> float:
        placement = Adaptive()
        for number in range(20):
            labels_of(placement, prefill(number, num_checkpoints=num_checkpoints, free_slots=0))
        return placement.num_saved()["back:1"]

    assert num_ends(4) <= 4
    assert num_ends(1000) == 20


@pytest.mark.full
def test_survival_and_adaptive_reach_the_bound_with_ample_memory() -> None:
    assert hit_rate(chat().head(120), "survival", "adaptive", total_bytes=40 << 30) > 0.8


def test_tiers_share_the_hazards_learned_on_the_device() -> None:
    size = 1 << 22
    config = CacheConfig(
        total_bytes=size,
        host_bytes=size,
        disk_bytes=size,
        eviction="survival",
        kv_bytes_per_token=KV_BYTES,
        state_bytes=1 << 16,
    )
    cache = build_prefix_cache(config)
    assert isinstance(cache, TieredRadixCache)
    policies = [cache.policy, *(tier.policy for tier in cache.offload.tiers)]
    assert all(tier.is_shared for tier in cache.offload.tiers)
    assert all(isinstance(policy, Survival) for policy in policies)
    assert len({id(policy.hazards) for policy in policies}) == 1


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
            assert first.memo.demand == tip.memo.key


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
            lease = Lease.begin(cache, placement, LeaseRequest(prompt))
            assert lease is not None and lease.extend(len(prompt) + 10)
            if turn:
                assert lease.match.resumed is not None
                labels[reason] = lease.match.resumed.label
            lease.take_checkpoint_slots(lease.cached_len, len(prompt))
            cache.take_step().done()
            lease.publish(prompt, len(prompt))
            history = np.concatenate((prompt, rng.integers(0, 1000, 10, dtype=np.int32)))
            lease.take_checkpoint_slots(len(prompt), len(history))
            cache.take_step().done()
            lease.finish(history, len(history), stop_reason=reason if not turn else "")
            prompt = history if rule == "end" else prompt
            prompt = np.concatenate((prompt, rng.integers(0, 1000, 10, dtype=np.int32)))
    assert labels == {"tool_use": f"{'decode' if rule == 'end' else 'backoff'}/tool_use"}
    policy = cache.policy
    assert isinstance(policy, Survival)
    survival = policy.hazards
    survival.refresh(survival.now + 100)
    survival.check()
    used, ended = (
        max(survival.index[row, 0] for key, row in survival._rows.items() if key[-1] == reason)
        for reason in ("tool_use", "end_turn")
    )
    assert used > 4 * ended
    learned = Adaptive()
    learned.on_saved(60, "decode/tool_use")
    learned.on_hit(FakeItem("tip", label="decode/tool_use"))
    assert learned.num_saved().keys() == {"decode"}, (
        "a placement policy decides before the stop reason is known"
    )


def test_a_shared_checkpoint_gets_no_stop_reason() -> None:
    """It serves several conversations, and their answers have different stop reasons."""
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=1000, num_slots=10, grid=1))
    system = np.arange(20, dtype=np.int32)

    def serve(first: int, reason: str) -> set[str]:
        prompt = np.concatenate((system, np.arange(first, first + 10, dtype=np.int32)))
        lease = Lease.begin(cache, parse_placement("boundary"), LeaseRequest(prompt, None, (20,)))
        assert lease is not None and lease.extend(30)
        lease.take_checkpoint_slots(0, 30)
        cache.take_step().done()
        lease.finish(prompt, 30, donate=False, stop_reason=reason)
        nodes = cache.iter_nodes()
        return {node.checkpoint.label for node in nodes if node.checkpoint is not None}

    assert serve(100, "tool_use") == {"boundary/tool_use"}, "the only conversation's stop reason"
    assert serve(100, "end_turn") == {"boundary/end_turn"}, "the stop reason of the latest answer"
    assert serve(200, "tool_use") == {"boundary/end_turn"}, (
        "a second conversation must not change the label"
    )
