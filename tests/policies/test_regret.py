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
    Hazards,
    age_bins,
    index_of,
)
from hybridcache.policies.eviction.survival import Survival
from hybridcache.policies.placement.adaptive import Adaptive
from hybridcache.policies.protocol import Prefill
from hybridcache.policies.registry import parse_placement
from hybridcache.tiers import TieredRadixCache
from tests.policies.items import FakeItem, offer

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
    assert cache.policy.victim("kv") is tip.kv
    assert tip.kv.predecessor is tip.checkpoint
    assert tip.kv.memo.turn == 3


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


def test_branches_and_boundaries_are_always_placed() -> None:
    placement = Adaptive()
    placed = dict(placement.plan(prefill(0, seen_len=300, boundaries=(200, 950))))
    assert placed[300] == "branch" and placed[200] == placed[950] == "boundary"
    tip = FakeItem("tip", label="decode", position=300)
    placed = dict(placement.plan(prefill(1, seen_len=300, missed=tip, forks=False)))
    assert placed[300] == "rejoin", "a continuation is not a fork"
    placed = dict(placement.plan(prefill(2, seen_len=300, missed=tip)))
    assert placed[300] == "branch", "other requests forked at the evicted tip"


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
