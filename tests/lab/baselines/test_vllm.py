"""Tests of the rebuilt vLLM: known results for single prompts, and per-request hits recorded with
vLLM 0.33."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridcache.lab.baselines.vllm import BlockPool, VllmCache
from hybridcache.lab.generators import GENERATORS
from tests.lab.baselines.prompts import GIB, QWEN3_NEXT, repeated_hits, text
from tests.lab.baselines.record_vllm import VARIANTS, summary

RECORD: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "vllm_hits.json").read_text()
)
BF16 = replace(QWEN3_NEXT, state_bytes=36 * (49_152 + 1_048_576))


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
