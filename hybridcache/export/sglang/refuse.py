"""Unsupported SGLang settings, with one sentence each."""

from __future__ import annotations

from typing import Any

from hybridcache.export.sglang import eviction_name
from hybridcache.policies.registry import EVICTION_NAMES

WITHOUT = "or --radix-cache-backend hybridcache"


def why_not(ctx: Any, memory: Any, disagg: Any, parallel: Any) -> str | None:
    """Return a message for the first unsupported setting, or None if all are supported.

    Args:
        ctx: SGLang's build context.
        memory: SGLang's memory settings.
        disagg: SGLang's disaggregation settings.
        parallel: SGLang's parallelism settings.
    """
    params = ctx.params
    refusals = (
        (
            ctx.is_hybrid_swa or params.sliding_window_size is not None,
            "hybridcache keeps no sliding windows: drop --radix-cache-backend hybridcache for this "
            "model",
        ),
        (
            ctx.enable_hierarchical_cache,
            f"hybridcache has no host tier inside SGLang: drop --enable-hierarchical-cache, "
            f"{WITHOUT}",
        ),
        (memory.enable_lmcache, f"hybridcache does not work with LMCache: drop it, {WITHOUT}"),
        (memory.enable_flexkv, f"hybridcache does not work with FlexKV: drop it, {WITHOUT}"),
        (
            memory.enable_unified_memory,
            "hybridcache needs KV and states in pools of their own: drop --enable-unified-memory, "
            f"{WITHOUT}",
        ),
        (
            disagg.disaggregation_mode != "null",
            "hybridcache is not verified with prefill and decode apart: drop "
            f"--disaggregation-mode, {WITHOUT}",
        ),
        (
            parallel.dcp_enabled,
            f"hybridcache does not work with decode context parallelism: drop it, {WITHOUT}",
        ),
        (
            params.is_eagle and not ctx.is_hybrid_ssm,
            "hybridcache keys single tokens, where EAGLE on an attention-only model wants pairs: "
            f"drop --speculative-algorithm, {WITHOUT}",
        ),
        (
            eviction_name(params.eviction_policy) not in EVICTION_NAMES,
            f"hybridcache has no eviction {params.eviction_policy!r}: choose "
            "--radix-eviction-policy survival, plain-lru, lfu or slru",
        ),
    )
    return next((sentence for refused, sentence in refusals if refused), None)
