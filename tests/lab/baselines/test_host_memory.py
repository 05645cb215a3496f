"""Tests of rebuilt baselines with host memory: known behaviour, invariants, and per-request pool
contents recorded with SGLang and vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.studies import record_vllm_store
from experiments.studies.record_hicache import LOADS, requests_of, summary
from hybridcache.lab.baselines import (
    HOST_TIERS,
    Baseline,
    BaselineConfig,
    PeerSession,
    build_baseline,
    replay,
)
from hybridcache.lab.baselines.hicache import HicacheCache
from hybridcache.lab.baselines.llama_server import LlamaServerCache
from hybridcache.lab.baselines.ollama import OllamaCache
from hybridcache.lab.baselines.vllm import ChunkStore, VllmCache
from hybridcache.lab.simulation.simulate import simulate
from hybridcache.tokens import Tokens
from tests.lab.baselines.prompts import GIB, QWEN3_NEXT, text

RECORD: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "hicache_hits.json").read_text()
)
PLAIN = BaselineConfig(10**9, 1, 3072, host_bytes=1)
"""Configuration with KV of one byte per token, and states of 3,072 bytes."""


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


@pytest.mark.parametrize("name", LOADS)
def test_each_request_leaves_the_pools_as_in_sglang(name: str) -> None:
    load, expected = LOADS[name], RECORD[name]
    peer = HicacheCache(
        PLAIN,
        num_kv_tokens=load.num_kv_tokens,
        num_slots=load.num_slots,
        num_host_tokens=expected["host_tokens"],
        num_host_slots=expected["host_slots"],
    )
    served = []
    for request in requests_of(name):
        reused = replay(peer, request.tokens, request.output)
        free = peer.free_tokens, peer.free_slots, peer.free_host_tokens, peer.free_host_slots
        served.append((reused, *free))
    peer.check()
    assert summary(served).items() <= expected.items()


def hicache(tokens: int, slots: int, host_tokens: int, host_slots: int) -> HicacheCache:
    return HicacheCache(
        PLAIN, "end", num_kv_tokens=tokens, num_slots=slots, num_host_tokens=host_tokens,
        num_host_slots=host_slots,
    )  # fmt: skip


def test_sglang_writes_everything_to_host_and_loads_the_state_twice() -> None:
    peer = hicache(1000, 2, 5000, 8)
    first, second = text(0, 500), text(1, 600)
    assert serve(peer, first, text(2, 10)) == (0, 0)
    assert peer.spilled_bytes == 510 + 3072, "the copy must be made at once"
    assert serve(peer, second, text(3, 10)) == (0, 0)
    following = np.concatenate((first, text(2, 10), text(4, 20)))
    assert serve(peer, following, text(5, 10)) == (510, 510 + 2 * 3072)
    assert peer.free_host_tokens == 5000 - 510 - 610 - 30, "loaded entries must stay in host memory"


def test_sglang_host_pool_smaller_than_the_device_adds_nothing() -> None:
    """Entries that are also on the device are never evicted from host memory."""
    peer = hicache(2000, 8, 1000, 8)
    for seed in range(3):
        serve(peer, text(seed, 600), text(9, 10))
    assert peer.spilled_bytes == 610 + 3072, "only the first prompt must have a copy"
    assert (peer.free_host_tokens, peer.free_host_slots) == (390, 7)


def test_sglang_splits_host_memory_in_the_same_ratio_as_the_device() -> None:
    config = replace(QWEN3_NEXT, budget_bytes=4 * GIB, host_bytes=16 * GIB)
    peer = build_baseline("sglang", config)
    assert isinstance(peer, HicacheCache)
    assert peer.num_host_tokens == pytest.approx(4 * peer.num_tokens, rel=0.03)
    assert peer.num_host_slots == pytest.approx(4 * peer.num_slots, rel=0.05)


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


def llama(gib: float = 4, host_gib: float = 16, **settings: int) -> LlamaServerCache:
    config = replace(QWEN3_NEXT, budget_bytes=int(gib * GIB), host_bytes=int(host_gib * GIB))
    return LlamaServerCache(config, **settings)


STATE, ROW = QWEN3_NEXT.state_bytes, QWEN3_NEXT.kv_bytes_per_token


def test_llama_server_resumes_from_the_end_of_a_slot_or_a_checkpoint() -> None:
    peer, history, answer = llama(), text(0, 3000), text(1, 101)
    assert serve(peer, history, answer) == (0, 0)
    longer = np.concatenate((history, answer[:-1], text(2, 50)))
    assert serve(peer, longer, text(3, 5)) == (3100, 0), "the last token was not computed"
    assert serve(peer, longer, text(3, 5)) == (3146, STATE), "the checkpoint is 4 before the end"
    other = np.concatenate((history, text(4, 400)))
    assert serve(peer, other, text(5, 5)) == (2996, STATE)
    assert serve(peer, longer, text(3, 5)) == (2996, STATE), "later checkpoints were deleted"


def test_llama_server_saves_idle_slots_to_host_and_loads_them_whole() -> None:
    peer, first, second = llama(), text(0, 3000), text(1, 2000)
    serve(peer, first, text(2, 11))
    serve(peer, second, text(3, 11))
    assert [len(one.tokens) for one in peer.cache] == [3010]
    following = np.concatenate((first, text(2, 11)[:-1], text(4, 30)))
    assert serve(peer, following, text(5, 2)) == (3010, 3010 * ROW + STATE)
    assert [len(one.tokens) for one in peer.cache] == [2010], "a loaded entry leaves the cache"


def test_llama_server_evicts_the_oldest_text_and_counts_checkpoints() -> None:
    peer = llama(host_gib=0.5)
    for seed in range(6):
        serve(peer, text(seed, 3000), text(9, 2))
    assert len(peer.cache) == 1 and peer.host_used <= GIB // 2
    assert serve(peer, text(0, 3000), text(9, 2)) == (0, 0)
    peer = llama(host_gib=0.1)
    serve(peer, text(0, 3000), text(9, 2))
    assert peer.host_used == STATE, "only one of two checkpoints fits"


def test_llama_server_thins_out_a_full_list_of_checkpoints() -> None:
    peer, history = llama(max_checkpoints=4), text(0, 1000)
    for turn in range(6):
        serve(peer, history, text(10 + turn, 2))
        history = np.concatenate((history, text(10 + turn, 2)[:-1], text(20 + turn, 600)))
    (slot,) = (slot for slot in peer.slots if len(slot.text.tokens))
    assert [at for at, _ in slot.text.checkpoints] == [484, 4005 - 516, 4005 - 4]


def test_ollama_resumes_only_from_its_ring_of_states() -> None:
    peer = OllamaCache(replace(QWEN3_NEXT, budget_bytes=8 * GIB))
    history, answer = text(0, 4000), text(1, 2001)
    assert serve(peer, history, answer) == (0, 0)
    assert peer.slots[0].ring == [512, 2048, 3584, 4864], "at passes of 512, 1,280 apart or more"
    longer = np.concatenate((history, answer[:-1], text(2, 10)))
    assert serve(peer, longer, text(3, 2)) == (4864, 0)
    assert serve(peer, np.concatenate((history[:3000], text(4, 9))), text(5, 2)) == (2048, 0)
    assert serve(peer, text(6, 100), text(7, 2)) == (0, 0)
    assert serve(peer, history, answer) == (0, 0), "the other text replaced it in the only slot"


def test_only_baselines_that_support_host_memory_get_it() -> None:
    result = simulate(
        "short?head=30", gib=1, host_gib=2, policy="lru", baseline=("sglang", "ollama"), bound=False
    )
    assert [run.label for run in result.runs] == [
        "lru + 2 GiB host", "sglang (rebuilt) + 2 GiB host", "ollama (rebuilt)",
    ]  # fmt: skip
    sglang, ollama = result.runs[1:]
    assert sglang.tier_bytes is not None and sglang.tier_bytes["device_to_host_bytes"] > 0
    fetched = sglang.tier_bytes["host_to_device_bytes"]
    assert (sglang.copy_seconds > 0) == (fetched > 0) and ollama.tier_bytes is None


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
