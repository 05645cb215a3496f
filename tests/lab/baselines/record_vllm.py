"""Record the decisions of vLLM's own cache manager, request by request.

Tests compare the rebuilt cache with the record.

`python -m tests.lab.baselines.record_vllm` writes vllm_hits.json next to it. Run it in a
separate environment with `vllm==0.33.0` and this project. No device is needed, because only the
scheduler's side of vLLM runs: its `KVCacheManager` (one attention group, three state groups) and
its chunk split. Requests run one at a time, with copies as in vLLM's scheduler.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from hybridcache import TraceRequest
from hybridcache.geometry.units import GIB
from hybridcache.lab.generators import GENERATORS

RECORD = Path(__file__).with_name("vllm_hits.json")
KV_BYTES = 24_576
PREFILL_CHUNK = 8192
WORKLOADS = ("chat", "few-shot", "agent", "branch", "resend", "short")
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
SIZES_GIB = (3, 6)


class VllmManager:
    """vLLM's cache manager and chunk split without its scheduler."""

    def __init__(
        self, num_blocks: int, block: int, unit: int | None, retention: int | None
    ) -> None:
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            MambaSpec,
        )
        from vllm.v1.request import Request

        init_none_hash(sha256)
        unit = unit or block
        attention = FullAttentionSpec(
            block_size=block, num_kv_heads=2, head_size=256, dtype=torch.bfloat16
        )
        states = MambaSpec(
            block_size=block,
            shapes=((16,),),
            dtypes=(torch.float32,),
            page_size_padded=attention.page_size_bytes,
            mamba_cache_mode="align",
        )
        groups = [KVCacheGroupSpec(["attention"], attention)]
        groups += [KVCacheGroupSpec([f"states {group}"], states) for group in range(3)]
        config = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=groups,
            prefix_cache_retention_interval=retention,
        )
        self.manager = KVCacheManager(
            config, max_model_len=1 << 17, scheduler_block_size=block, hash_block_size=unit
        )
        self.split = Scheduler._mamba_block_aligned_split
        self.scheduler = SimpleNamespace(
            block_size=block,
            cache_config=SimpleNamespace(block_size=block),
            scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
            hash_block_size=unit,
            mamba_partial_cache_hit=self.manager.coordinator.enable_partial_hash_hits,
            use_eagle_block_drop=False,
            num_hash_lookahead_tokens=0,
            mamba_has_prefill_checkpoint_blocks=False,
            mamba_prefill_checkpoint_alignment=None,
            mamba_shared_prefix_checkpoint=False,
            max_num_scheduled_tokens=PREFILL_CHUNK,
        )
        self._request = Request
        self._sampling = SamplingParams
        self._hasher = get_request_block_hasher(unit, sha256)
        self._number = 0

    def serve(self, request: TraceRequest) -> tuple[int, int]:
        """Prefill and decode one request. Returns (reused tokens, prefill chunks)."""
        manager, prompt, output = self.manager, request.tokens.tolist(), request.output.tolist()
        self._number += 1
        served = self._request(
            str(self._number),
            prompt,
            self._sampling(max_tokens=len(output) + 1),
            None,
            block_hasher=self._hasher,
        )
        blocks, hit, served.shared_prefix_boundary = manager.get_computed_blocks(served)
        chunks = 0
        while served.num_computed_tokens < len(prompt):
            fresh = hit if not chunks else 0
            start = served.num_computed_tokens + fresh
            wanted = min(PREFILL_CHUNK, len(prompt) - start)
            length = self.split(self.scheduler, served, wanted, fresh)
            given = (fresh, blocks) if not chunks else ()
            self._step(served, length, *given)
            served.num_computed_tokens = start + length
            chunks += 1
        for token in output[:-1]:
            served.append_output_token_ids(token)
            self._step(served, 1)
            served.num_computed_tokens += 1
        manager.free(served)
        return hit, chunks

    def _step(self, served: Any, length: int, *computed: Any) -> None:
        self.manager.new_step_starts()
        if self.manager.allocate_slots(served, length, *computed) is None:
            raise RuntimeError(f"Request {served.request_id} does not fit; use a larger size.")
        _, retained = self.manager.take_kv_cache_block_copies()
        self.manager.block_pool.free_blocks(retained)
        self.manager.take_boundary_state_offloads()


def record(manager: VllmManager, trace: Iterable[TraceRequest]) -> dict[str, Any]:
    """Return the totals of reused tokens and chunks, and a digest of both per request."""
    served = [manager.serve(request) for request in trace]
    return summary(served)


def summary(served: list[tuple[int, int]]) -> dict[str, Any]:
    """Summarise (reused tokens, prefill chunks) of every request."""
    lines = "\n".join(f"{reused} {chunks}" for reused, chunks in served)
    return {
        "reused": sum(reused for reused, _ in served),
        "chunks": sum(chunks for _, chunks in served),
        "digest": hashlib.blake2b(lines.encode(), digest_size=8).hexdigest(),
    }


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    records: dict[str, dict[str, Any]] = {}
    for workload in tqdm(WORKLOADS, disable=None):
        records[workload] = {}
        for name, (block, unit, retention) in VARIANTS.items():
            for gib in SIZES_GIB:
                manager = VllmManager(gib * GIB // (block * KV_BYTES), block, unit, retention)
                trace = GENERATORS[workload](seed=0)
                records[workload][f"{name}, {gib} GiB"] = record(manager, trace)
    RECORD.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
