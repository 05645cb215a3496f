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
from hybridcache.lab.baselines.vllm import ChunkStore
from hybridcache.lab.simulation.simulate import simulate
from hybridcache.tokens import Tokens


def begin(peer: Baseline, tokens: Tokens) -> PeerSession:
    session = peer.begin(tokens)
    assert session is not None
    return session


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
