"""Warm state: a restarted cache makes the same decisions as one that was never stopped."""

from __future__ import annotations

import contextlib
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest

from hybridcache import (
    CacheConfig,
    ModelGeometry,
    Placed,
    PlacementPolicy,
    ScorePolicy,
    build_prefix_cache,
)
from hybridcache.lab.runs.target import LeaseTarget, build_target
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.generators import agent, chat
from hybridcache.policies.user import own_policy
from hybridcache.radix.offload import path_of
from hybridcache.radix.protocol import PolicyError
from hybridcache.radix.warm_state import MAGIC, pack, unpack, write_memory
from tests.radix import twins
from tests.refused import refused

GEOMETRY = ModelGeometry.preset("qwen3-next")
TRACES = {"agent": agent().head(160), "chat": chat().head(240)}
REQUESTS = {name: list(trace) for name, trace in TRACES.items()}
STATELESS = replace(GEOMETRY, num_linear_layers=0, recurrent_elements=0, conv_bytes=0)
CACHES = {
    "small": {"gib": 0.6, "disk_gib": 2.4},
    "large": {"gib": 2.0, "disk_gib": 8.0},
    "without tiers": {"gib": 0.6, "disk_gib": 0.0},
    "without states": {"gib": 0.6, "disk_gib": 0.0, "model": STATELESS, "policy": "lru"},
}


class VictimLog(twins.VictimLog):
    """Victims in order, with a digest of their tokens."""

    def chosen(self, item):
        namespace, tokens = path_of(item.node)
        entry = (item.kind, namespace, zlib.crc32(tokens.tobytes()), item.position)
        self.chosen_items.append(entry)


def make(trace, gib=1.0, disk_gib=8.0, **options):
    """Build a simulated target with one byte budget. The order of free rows is then irrelevant."""
    settings = {"policy": "survival", "checkpoints": "adaptive", "memory": "budget"}
    settings |= {"model": GEOMETRY} | options
    settings |= {"disk_gib": disk_gib, "disk_gb_s": 1e3} if disk_gib else {}
    target = build_target(Scenario("own", gib=gib, **settings), trace.unit)
    assert isinstance(target, LeaseTarget)
    return target


def serve(target, requests):
    """Serve the requests. Returns hits and losses, victims, and the number of copied rows."""
    chosen, hits = VictimLog(target.cache), []
    for request in requests:
        served = target.begin(request)
        assert served is not None
        hits.append((served.cached_len, served.losses))
        served.prefilled()
        served.finish(request.output)
    tiers = target.cache.offload
    return hits, chosen.chosen_items, None if tiers is None else dict(tiers.copied_rows)


def restarted(target, fresh, has_room=False):
    """Load the warm state and the offloaded states of ``target`` into ``fresh``.

    Returns the names of the policies that could not be restored.
    """
    rules = target.placement.rules
    memory = unpack(pack(write_memory(target.cache, rules)))
    memory.recall_tree(fresh.cache)
    stored = [
        node for node in target.cache._tree.nodes() if node.offloaded and node.offloaded.state
    ]
    for node in stored:
        namespace, tokens = path_of(node)
        assert fresh.cache.adopt(tokens, namespace) is not None or not has_room
    unfit = memory.recall_policies(fresh.cache, fresh.placement.rules)
    fresh.cache.check(0, 0)
    return unfit


def sample_anew(cache):
    """Reset what a file lacks: the order in which the policies compare their candidates."""
    tiers = () if cache.offload is None else cache.offload.tiers
    for policy in (cache.policy, *(tier.policy for tier in tiers)):
        candidates = sorted(policy.candidates(), key=lambda item: repr(path_of(item.node)))
        for item in candidates:
            policy.discard(item, evicted=False)
        policy._idle_kv, policy._stale = {}, {}
        for item in candidates:
            policy.add(item)
        policy._random.seed(0)


@pytest.mark.full("small-agent", "without tiers-chat", "without states-chat")
@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_restarted_run_decides_like_an_uninterrupted_run(name, cache):
    trace = TRACES[name]
    requests = REQUESTS[name]
    half = len(requests) // 2
    whole, without_state, cut = (make(trace, **CACHES[cache]) for _ in range(3))
    serve(whole, requests[:half])
    whole.cache.evict(1 << 40, 1 << 40)  # To the tiers, as a restart does.
    if (tiers := whole.cache.offload) is not None:
        tiers.copied_rows.clear()
        for state in [one for tier in tiers.tiers for one in tier.policy.candidates()]:
            tiers._review(state)  # Before its eviction otherwise, and at a restart.
    assert restarted(whole, cut, has_room=True) == []
    for target in (whole, cut) if CACHES[cache].get("policy") != "lru" else ():
        sample_anew(target.cache)
    expected = serve(whole, requests[half:])
    assert expected[1], "nothing was evicted"
    assert serve(cut, requests[half:]) == expected
    assert serve(without_state, requests[half:]) != expected, (
        "the warm state has no effect on decisions"
    )
    cut.cache.check(0, 0)


def test_state_of_other_policies_is_ignored_and_reported():
    trace = TRACES["agent"]
    target = make(trace)
    serve(target, list(trace))
    fresh = make(trace, policy="lru", checkpoints="branch,end")
    assert restarted(target, fresh) == ["eviction", "placement"]
    serve(fresh, list(trace)[:20])
    fresh.cache.check(0, 0)


class CountsUses(ScorePolicy):
    """A user's policy that learns: texts with many uses in all are evicted last."""

    def __init__(self, unit=1):
        super().__init__()
        self.unit, self.uses = unit, {}

    def score(self, item):
        item.memo = (item.memo or 0) + self.unit
        self.uses[item.label] = self.uses.get(item.label, 0) + self.unit
        return self.uses[item.label]

    def state_dict(self):
        return {"uses": self.uses}

    def load_state_dict(self, state):
        self.uses = state["uses"]

    def memo_state(self, item):
        return item.memo

    def load_memo(self, item, state):
        item.memo = state


class SavesAsOftenAsHit(PlacementPolicy):
    """A user's placement that learns the number of hits."""

    def __init__(self):
        self.num_hits = 0

    def plan(self, prefill):
        return [Placed(prefill.prompt_len, "end")] if self.num_hits % 2 == 0 else []

    def on_hit(self, item):
        self.num_hits += 1

    def state_dict(self):
        return {"num_hits": self.num_hits}

    def load_state_dict(self, state):
        self.num_hits = state["num_hits"]


@pytest.mark.parametrize("policy", [CountsUses, CountsUses(unit=3)], ids=["class", "instance"])
def test_the_learned_state_of_own_policies_survives_a_restart(policy):
    trace = TRACES["agent"]
    own = {"policy": own_policy(policy), "checkpoints": own_policy(SavesAsOftenAsHit)}
    target, fresh = (make(trace, gib=4.0, disk_gib=0.0, **own) for _ in range(2))
    serve(target, list(trace)[:80])
    target.cache.evict(1 << 40, 1 << 40)
    state, [rule] = target.cache.policy.state_dict(), target.placement.rules
    assert restarted(target, fresh, has_room=True) == []
    assert state and fresh.cache.policy.state_dict() == state
    assert rule.num_hits > 0 and fresh.placement.rules[0].num_hits == rule.num_hits
    memos = [
        {path_of(node)[1].tobytes(): lost.memo for node in nodes if (lost := node.lost_checkpoint)}
        for nodes in (target.cache._tree.nodes(), fresh.cache._tree.nodes())
    ]
    assert memos[0] == memos[1] and any(memos[0].values())


def test_a_state_that_cannot_be_saved_is_named():
    class Keeps(CountsUses):
        def state_dict(self):
            return {"items": {1, 2}}

    trace = TRACES["agent"]
    target = make(trace, policy=own_policy(Keeps))
    serve(target, list(trace)[:20])
    assert json.loads(write_memory(target.cache))["eviction"] is None
    with pytest.raises(PolicyError, match=r"Keeps.*state_dict.*set cannot be saved"):
        target.cache.match(next(iter(trace)).tokens)


def tiered_cache():
    """Return a cache with a host tier and a grid of 4 tokens."""
    sizes = {"kv_bytes_per_token": 2, "state_bytes": 8, "host_bytes": 400}
    return build_prefix_cache(CacheConfig(num_kv_tokens=64, num_slots=4, grid=4, **sizes))


def superseded_after_restart(cache):
    """Return, by position, which checkpoints a file of ``cache`` restores as superseded."""
    fresh = tiered_cache()
    unpack(pack(write_memory(cache))).recall_tree(fresh)
    found = (node.lost_checkpoint for node in fresh._tree.nodes())
    return {lost.position: lost.superseded for lost in found if lost is not None}


def insert(cache, tokens, position):
    """Publish ``tokens`` with one checkpoint at ``position``."""
    rows, slot = cache.allocate_kv(len(tokens)), cache.allocate_slot()
    result = cache.insert(tokens, rows, [(position, slot)])
    cache.free_kv(result.duplicates)
    cache.check(0, 0)


def test_a_file_has_the_last_review_of_the_device():
    """The state in the tier is superseded later, the evicted one of the device is not."""
    cache, tokens = tiered_cache(), np.arange(16, dtype=np.int32)
    insert(cache, tokens[:8], 8)
    cache.evict(64, 4)
    insert(cache, tokens, 16)
    cache.evict(64, 4)  # The deeper state supersedes the one in the tier.
    stored = {node.end: node for node in cache._tree.nodes() if node.offloaded.state}
    assert [*stored] == [8, 16]
    assert stored[8].offloaded.state.superseded and not stored[8].lost_checkpoint.superseded
    assert superseded_after_restart(cache) == {8: False, 16: False}


def test_a_file_has_the_review_of_a_tier_for_a_state_never_on_the_device():
    cache, tokens = tiered_cache(), np.arange(16, dtype=np.int32)
    for length in (16, 8):
        assert cache.adopt(tokens[:length], tier="host") is not None
    assert not any(node.checkpoint or node.lost_checkpoint for node in cache._tree.nodes())
    assert superseded_after_restart(cache) == {8: True, 16: False}


def test_a_truncated_or_corrupted_file_is_refused(monkeypatch):
    trace = TRACES["agent"]
    target = make(trace)
    serve(target, list(trace)[:20])
    body = write_memory(target.cache, target.placement.rules)
    data = pack(body)
    ends = {*range(64), *range(0, len(data), 997), len(data) - 1}
    for end in ends:
        refused("damaged", unpack, data[:end])
        flipped = bytearray(data)
        flipped[end] ^= 1 << end % 8
        with contextlib.suppress(zlib.error):
            if end >= len(MAGIC) and zlib.decompress(flipped[len(MAGIC) :]) == body:
                continue  # a bit that the format does not use
        refused(r"damaged|version", unpack, bytes(flipped))
    assert unpack(data + b"more of something").recall_tree(make(trace).cache) is None
    monkeypatch.setattr("hybridcache.radix.warm_state.MAX_BYTES", len(body) - 1)
    with pytest.raises(ValueError, match="larger than any"):
        unpack(data)


@pytest.mark.parametrize("change", [{"page_size": 7}, {"grid": 3}])
def test_the_state_of_another_layout_is_refused_and_changes_nothing(change):
    trace = TRACES["agent"]
    target, fresh = make(trace), make(trace)
    serve(target, list(trace)[:20])
    body = json.dumps(json.loads(write_memory(target.cache)) | change).encode()
    refused("the warm state needs", unpack(pack(body)).recall_tree, fresh.cache)
    assert fresh.cache.num_nodes == 0 and fresh.cache.now == 0
    fresh.cache.check(0, 0)
