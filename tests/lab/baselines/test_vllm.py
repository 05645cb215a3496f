"""Tests of the rebuilt vLLM: known results for single prompts, and per-request hits recorded with
vLLM 0.33."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridcache.lab.baselines.vllm import VllmCache
from hybridcache.lab.generators import GENERATORS
from tests.lab.baselines.prompts import GIB, QWEN3_NEXT
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
