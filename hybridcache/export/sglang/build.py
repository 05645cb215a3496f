"""Factory: builds a cache over the memory pools in SGLang's build context."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.mem_cache.registry import default_radix_cache_factory
from sglang.srt.runtime_context import (
    get_disagg,
    get_memory,
    get_parallel,
    mamba_checkpoint_grid,
)

from hybridcache.allocators.pools import SlotAllocator
from hybridcache.cache import HybridRadixCache
from hybridcache.config import CacheConfig, build_on
from hybridcache.export.sglang.cache import HybridRadixBackend
from hybridcache.export.sglang.states import RequestStates
from hybridcache.export.sglang.translation import eviction_name, why_not
from hybridcache.export.sglang.views import RowView, SlotView

logger = logging.getLogger("hybridcache.sglang")


def build_backend(ctx: Any) -> Any:
    """Build the cache of one scheduler. SGLang calls this.

    Raises:
        ValueError: a setting is not supported. The message is one sentence.
    """
    if ctx.disable_radix_cache:
        return default_radix_cache_factory(ctx)
    refusal = why_not(ctx, get_memory(), get_disagg(), get_parallel())
    if refusal is not None:
        raise ValueError(refusal)
    eviction = eviction_name(ctx.params.eviction_policy)
    logger.info("hybridcache: eviction policy %s", eviction)
    return make_backend(ctx.params, ctx.is_hybrid_ssm, eviction)


def make_backend(
    params: Any, is_hybrid_ssm: bool, eviction: str | None = None
) -> HybridRadixBackend:
    """Return an empty cache over the pools of ``params`` (``CacheInitParams``).

    Args:
        params: SGLang's parameters.
        is_hybrid_ssm: True for models with recurrent layers.
        eviction: Eviction policy in place of ``params.eviction_policy``.
    """
    token_bytes, state_bytes = sizes_in_bytes(params, is_hybrid_ssm)
    rows = RowView(params.token_to_kv_pool_allocator, params.page_size, token_bytes)
    grid, states = params.page_size, None
    slots = SlotAllocator(0)
    if is_hybrid_ssm:
        pool = params.req_to_token_pool
        slots = view = SlotView(pool.mamba_allocator, state_bytes)
        extra_buffer = params.enable_mamba_extra_buffer
        states = RequestStates(pool, view, rows, extra_buffer=extra_buffer)
        if extra_buffer:
            grid = mamba_checkpoint_grid(params.page_size)
    config = CacheConfig(
        prefix_cache="hybrid" if is_hybrid_ssm else "radix",
        num_kv_tokens=rows.capacity,
        num_slots=slots.capacity,
        kv_bytes_per_token=token_bytes,
        state_bytes=state_bytes,
        page_size=params.page_size,
        grid=1,
        eviction=params.eviction_policy if eviction is None else eviction,
    )

    def make() -> HybridRadixCache:
        return build_on(config, rows, slots)

    return HybridRadixBackend(params, make, rows, states, grid)


def sizes_in_bytes(params: Any, is_hybrid_ssm: bool) -> tuple[int, int]:
    """Return the bytes of one token's KV and of one state, summed over all pipeline stages.

    Stages have different layers, and all ranks must use equal sizes.
    """
    kv_cache = params.token_to_kv_pool_allocator.get_kvcache()
    held = kv_cache.get_kv_size_bytes()
    sizes = [(sum(held) if isinstance(held, tuple) else held) // kv_cache.size, 0]
    if is_hybrid_ssm:
        pool = params.req_to_token_pool.mamba_pool
        sizes[1] = pool.get_kv_size_bytes() // (pool.size + 1)
    if params.pp_size > 1:
        summed = torch.tensor(sizes)
        torch.distributed.all_reduce(summed, group=params.pp_cache_group)
        sizes = summed.tolist()
    return max(sizes[0], 1), max(sizes[1], 1)
