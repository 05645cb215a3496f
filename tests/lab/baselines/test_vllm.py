"""Tests of the rebuilt vLLM: known results for single prompts, and per-request hits recorded with
vLLM 0.33."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.studies.record_vllm import VARIANTS, summary
from hybridcache.lab.baselines import BaselineConfig, replay
from hybridcache.lab.baselines.vllm import BlockPool, VllmCache, inflated_block_size
from hybridcache.lab.generators import GENERATORS
from tests.lab.baselines.prompts import (
    GIB,
    QWEN3_NEXT,
    repeated_hits,
    text,
)

RECORD: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "vllm_hits.json").read_text()
)
BF16 = replace(QWEN3_NEXT, state_bytes=36 * (49_152 + 1_048_576))
QWEN35_4B = BaselineConfig(
    budget_bytes=4 * GIB, kv_bytes_per_token=8 * 4096, state_bytes=24 * (49_152 + 2_097_152),
    num_full_layers=8, num_linear_layers=24,
)  # fmt: skip


@pytest.mark.full("few-shot", "branch", "resend", "short")
@pytest.mark.parametrize("workload", RECORD)
def test_each_request_reuses_as_many_tokens_as_in_vllm(workload: str) -> None:
    trace = list(GENERATORS[workload](seed=0))
    for cell, expected in RECORD[workload].items():
        name, _, size = cell.rpartition(", ")
        block, unit, retention = VARIANTS[name]
        config = QWEN3_NEXT if block == 1056 else BF16
        config = replace(config, budget_bytes=int(size.split()[0]) * GIB)
        peer = VllmCache(config, unit, retention)
        assert peer.block_tokens == block
        served = []
        for request in trace:
            session = peer.begin(request.tokens)
            assert session is not None
            served.append((session.cached_len, session.num_chunks))
            session.finish(request.output)
        peer.check()
        assert summary(served) == expected, cell


@pytest.mark.parametrize(("config", "block"), [(QWEN3_NEXT, 1056), (BF16, 544), (QWEN35_4B, 528)])
def test_attention_block_is_as_large_as_a_state(config: BaselineConfig, block: int) -> None:
    assert inflated_block_size(config) == block
    assert VllmCache(config).num_state_groups == 3
    assert inflated_block_size(config, match_unit=32) % 32 == 0


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (1000, [0, 0, 0, 0, 0, 0]),
        (1500, [0, 0, 1056, 1056, 1056, 1056]),
        (2200, [0, 2112, 2112, 2112, 2112, 2112]),
        (5000, [0, 0, 4224, 4224, 4224, 4224]),
    ],
)
@pytest.mark.parametrize("match_unit", [None, 32])
def test_shared_prefix_is_reused_from_the_third_prompt_in_whole_blocks(
    prefix: int, expected: list[int], match_unit: int | None
) -> None:
    assert repeated_hits(VllmCache(QWEN3_NEXT, match_unit), text(0, prefix)) == expected


@pytest.mark.parametrize(("length", "reused"), [(480, 0), (552, 528), (979, 528)])
def test_repeated_prompt_is_reused_up_to_its_last_block(length: int, reused: int) -> None:
    peer = VllmCache(QWEN35_4B)
    assert [replay(peer, text(0, length), text(1, 20)) for _ in range(2)] == [0, reused]


def test_match_unit_adds_a_chunk_a_state_and_copies() -> None:
    peer = VllmCache(QWEN3_NEXT, match_unit=32)
    session = peer.begin(text(0, 3300))
    assert session is not None
    assert session.num_chunks == 3, "3,168, then 128, then 4"
    assert _held(peer) == 4 + 3, "the request holds attention and the running state"
    session.finish(text(1, 1))
    cached = {block for block in peer.pool.free if block in peer.pool._keys_of}
    assert len(cached) == 4 + 6, "four attention blocks, two states of three groups"
    assert replay(peer, np.concatenate((text(0, 3300), text(2, 300))), text(3, 4)) == 3296
    coarse = VllmCache(QWEN3_NEXT)
    replay(coarse, text(0, 3300), text(1, 1))
    assert replay(coarse, np.concatenate((text(0, 3300), text(2, 300))), text(3, 4)) == 3168


@pytest.mark.parametrize(("length", "held"), [(12, 4), (3300, 10)])
def test_running_request_holds_the_expected_blocks(length: int, held: int) -> None:
    peer = VllmCache(QWEN3_NEXT)
    session = peer.begin(text(0, length))
    assert session is not None
    assert _held(peer) == held
    session.finish(text(1, 1))
    assert _held(peer) == 0
    peer.check()


def test_retention_must_be_a_multiple_of_the_block() -> None:
    with pytest.raises(ValueError, match="multiple of the block, 1056"):
        VllmCache(QWEN3_NEXT, retention=1000)
    prompt = text(0, 20_000)
    for retention, reused in ((0, 0), (2112, 6336), (None, 7392)):
        peer = VllmCache(replace(QWEN3_NEXT, prefill_chunk=1056), retention=retention)
        replay(peer, prompt, text(1, 4))
        assert replay(peer, prompt[:8000], text(2, 4)) == reused


def test_null_block_is_never_used() -> None:
    assert VllmCache(replace(QWEN3_NEXT, budget_bytes=6 * GIB)).pool.num_blocks == 248 - 1


def test_pool_reuses_empty_blocks_first_then_released_blocks_in_order() -> None:
    pool = BlockPool(4)
    first, second, third = (pool.allocate() for _ in range(3))
    pool.register(first, "a", 2)
    pool.register(second, "b", 2)
    pool.release([second, third, first])
    assert list(pool.free) == [third, 3, second, first]
    assert pool.lookup("b") == second
    assert [pool.allocate() for _ in range(3)] == [third, 3, second]
    assert pool.lookup("b") is None and pool.lookup("a") == first
    pool.check()


def test_block_is_found_by_its_whole_and_its_partial_key() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.register(block, "part", 3)
    pool.register(block, "whole", 8)
    assert pool.lookup("part") is None
    pool.register(block, "part", 3)
    assert pool.lookup("part") == pool.lookup("whole") == block
    copy = pool.allocate()
    pool.move(block, copy)
    assert pool.lookup("part") == pool.lookup("whole") == copy
    pool.check()


def _held(peer: VllmCache) -> int:
    return peer.pool.num_blocks - len(peer.pool.free)
