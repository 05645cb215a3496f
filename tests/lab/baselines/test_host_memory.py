"""Tests of rebuilt baselines with host memory: known behaviour, invariants, and per-request pool
contents recorded with vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.studies import record_vllm_store
from hybridcache.lab.baselines import (
    HOST_TIERS,
    Baseline,
    BaselineConfig,
    PeerSession,
    build_baseline,
)
from hybridcache.lab.baselines.vllm import ChunkStore, VllmCache
from hybridcache.lab.simulation.simulate import simulate
from hybridcache.tokens import Tokens
from tests.lab.baselines.prompts import GIB, QWEN3_NEXT, text


def begin(peer: Baseline, tokens: Tokens) -> PeerSession:
    session = peer.begin(tokens)
    assert session is not None
    return session


def serve(peer: Baseline, tokens: Tokens, output: Tokens) -> tuple[int, int]:
    """Return (reused tokens, loaded bytes)."""
    session = begin(peer, tokens)
    session.finish(output)
    peer.check()
    return session.cached_len, session.fetched_bytes


def test_vllm_stores_whole_blocks_of_the_prompt_and_their_states() -> None:
    config = replace(QWEN3_NEXT, budget_bytes=GIB // 2, host_bytes=4 * GIB)
    peer = VllmCache(config)
    prompt, block = text(0, 5000), peer.block_bytes
    assert serve(peer, prompt, text(1, 3000)) == (0, 0)
    assert peer.spilled_bytes == (4 + 3) * block, "four of attention, three for the last state"
    for seed in range(2, 6):
        serve(peer, text(seed, 9000), text(9, 2))
    assert serve(peer, prompt, text(9, 2)) == (4224, (4 + 3) * block)
    assert serve(peer, prompt, text(9, 2)) == (4224, 0), "the prefix is on the device now"
    for seed in range(12, 16):
        serve(peer, text(seed, 9000), text(9, 2))
    parting = np.concatenate((prompt[:3400], text(7, 300)))
    assert serve(peer, parting, text(9, 2)) == (0, 0), "attention matches to 3,168, without a state"


def test_store_evicts_the_end_of_the_oldest_request_first() -> None:
    store: ChunkStore[str] = ChunkStore(6)
    first, second = store.tick(), store.tick()
    assert store.offer({"a1": 1, "a2": 2, "a3": 3}, first)
    assert store.offer({"b1": 1, "b2": 2, "b3": 3}, second)
    store.finish(("a1", "a2", "a3"))
    store.finish(("b1", "b2", "b3"))
    assert store.offer({"c1": 1, "a1": 1}, store.tick())
    assert [key in store for key in ("a1", "a2", "a3", "c1")] == [True, True, False, True]
    assert not store.offer({f"d{n}": n for n in range(7)}, store.tick()), "larger than the store"
    assert len(store) == 6
    store.check()


def test_offer_does_not_evict_its_own_chunks() -> None:
    store: ChunkStore[str] = ChunkStore(2)
    first, second = store.tick(), store.tick()
    assert store.offer({"a1": 1}, first) and store.offer({"b1": 1}, second)
    assert store.offer({"a1": 1, "a2": 2}, first)
    assert set(store) == {"a1", "a2"}


@pytest.mark.parametrize("size", record_vllm_store.SIZES)
def test_store_has_the_contents_of_vllm_after_each_request(size: int) -> None:
    store: ChunkStore[bytes] = ChunkStore(size)
    contents = []
    for request in record_vllm_store.random_requests():
        recency, done, states = (
            store.tick(),
            request.fetched,
            range(1, record_vllm_store.NUM_GROUPS),
        )
        came_by = {request.key(0, place): place for place in range(1, done + 1)}
        came_by |= {request.key(group, done): done for group in states if done}
        if any(key not in store for key in came_by):
            came_by, done = {}, 0
        store.use(came_by, recency)
        for end, keeps in request.passes:
            offers = [{request.key(group, end): end} for group in states if keeps and end > done]
            fresh = {request.key(0, place): place for place in range(done + 1, end + 1)}
            for offer in (*offers, fresh):
                is_stored = store.offer(offer, recency)
                came_by |= offer
            done = max(done, end) if is_stored else done
        store.finish(sorted(came_by, key=lambda key: (came_by[key], key[-1])))
        store.check()
        contents.append(set(store))
    recorded = json.loads(record_vllm_store.RECORD.read_text())
    assert record_vllm_store.digest(contents) == recorded[str(size)]


def test_only_baselines_that_support_host_memory_get_it() -> None:
    result = simulate(
        "chat?head=60",
        gib=2,
        host_gib=2,
        policy="lru",
        baseline=("lightllm", "sglang"),
        bound=False,
    )
    assert [run.label for run in result.runs] == [
        "lru + 2 GiB host", "lightllm (rebuilt) + 2 GiB host", "sglang (rebuilt)",
    ]  # fmt: skip
    lightllm, sglang = result.runs[1:]
    assert lightllm.tier_bytes is not None and lightllm.tier_bytes["device_to_host_bytes"] > 0
    fetched = lightllm.tier_bytes["host_to_device_bytes"]
    assert (lightllm.copy_seconds > 0) == (fetched > 0) and sglang.tier_bytes is None


SMALL = BaselineConfig(
    budget_bytes=40_000, kv_bytes_per_token=12, state_bytes=640, num_full_layers=1,
    num_linear_layers=3, grid=8,
)  # fmt: skip


@pytest.mark.parametrize("baseline", sorted(HOST_TIERS))
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), concurrent=st.integers(1, 3), host=st.integers(1, 120_000))
def test_invariants_hold_in_both_memories(
    baseline: str, seed: int, concurrent: int, host: int
) -> None:
    rng = np.random.default_rng(seed)
    peer = build_baseline(baseline, replace(SMALL, host_bytes=host))
    stems = [rng.integers(0, 50, 300, dtype=np.int32) for _ in range(3)]
    seen: list[Tokens] = []
    running: list[partial[None]] = []
    for _ in range(30):
        stem = stems[int(rng.integers(3))][: int(rng.integers(1, 300))]
        prompt = np.concatenate((stem, rng.integers(0, 50, int(rng.integers(1, 200)), np.int32)))
        session = peer.begin(prompt)
        if session is not None:
            hit = session.cached_len
            assert 0 <= hit < len(prompt)
            assert hit == 0 or any(np.array_equal(prompt[:hit], other[:hit]) for other in seen)
            answer = rng.integers(0, 50, int(rng.integers(0, 60)), dtype=np.int32)
            seen.append(np.concatenate((prompt, answer)))
            running.append(partial(session.finish, answer))
        peer.check()
        while len(running) >= concurrent:
            running.pop(0)()
            peer.check()
