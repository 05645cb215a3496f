"""Tests of the rebuilt vLLM: known results for single prompts, and per-request hits recorded with
vLLM 0.33.

vllm_hits.json was written by record_vllm.py of commit efe20553, with vLLM's own `KVCacheManager`
and chunk split, one request at a time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridcache.lab.baselines.vllm import VllmCache
from hybridcache.lab.generators import GENERATORS
from tests.lab.baselines.prompts import GIB, QWEN3_NEXT

RECORD: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "vllm_hits.json").read_text()
)
VARIANTS: dict[str, tuple[int, int | None, int | None]] = {
    "block 1056": (1056, None, 0),
    "match unit 32": (1056, 32, 0),
    "retention None": (1056, None, None),
    "match unit 32, retention None": (1056, 32, None),
    "retention 2112": (1056, None, 2112),
    "block 544": (544, None, 0),
    "block 544, match unit 32": (544, 32, 0),
}
"""Block, match unit and retention in tokens, by name. Qwen3-Next's block is 1,056 with float32
states, 544 with bfloat16 ones."""
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
        lines = "\n".join(f"{reused} {chunks}" for reused, chunks in served)
        assert expected == {
            "reused": sum(reused for reused, _ in served),
            "chunks": sum(chunks for _, chunks in served),
            "digest": hashlib.blake2b(lines.encode(), digest_size=8).hexdigest(),
        }, cell
