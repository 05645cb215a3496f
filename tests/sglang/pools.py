"""SGLang's pools and tree on a CPU, and this cache over the same kind of pools."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.disaggregation.decode import HybridMambaDecodeReqToTokenPool
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MHATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from hybridcache.sglang.cache import HybridRadixBackend

CHUNK = 64
LINEAR_LAYERS, ATTENTION_LAYERS = [0, 1, 2], [3]


class World(NamedTuple):
    """Cache with SGLang's interface, and its pools."""

    cache: Any
    rows: Any
    """``TokenToKVPoolAllocator``."""
    requests: Any
    """``HybridReqToTokenPool``."""


def new_world(
    backend: str,
    num_kv_tokens: int,
    num_slots: int,
    *,
    eviction: str = "lru",
    events: bool = False,
    **pools: Any,
) -> World:
    """Return a cache with its pools, without a scheduler. ``backend`` is hybridcache, rust or
    python."""
    world = new_pools(num_kv_tokens, num_slots, **pools)
    page_size, has_states = world.rows.page_size, num_slots > 0
    args = ServerArgs(model_path="dummy", page_size=page_size)
    args._mamba_cache_chunk_size = CHUNK
    set_global_server_args_for_scheduler(args)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=world.requests,
        token_to_kv_pool_allocator=world.rows,
        page_size=page_size,
        eviction_policy=eviction,
        enable_kv_cache_events=events,
        enable_mamba_extra_buffer=has_states and world.requests.enable_mamba_extra_buffer,
    )
    if backend == "hybridcache":
        return world._replace(cache=HybridRadixBackend(params, has_states))
    states = (ComponentType.MAMBA,) if has_states else ()
    params.tree_components = (ComponentType.FULL, *states)
    params.tree_core_backend = backend
    return world._replace(cache=UnifiedRadixCache(params))


def new_pools(
    num_kv_tokens: int,
    num_slots: int,
    *,
    extra_buffer: bool = False,
    lazy: bool = False,
    page_size: int = 1,
    max_requests: int = 8,
    context_len: int = 8192,
    decodes: bool = False,
) -> World:
    """Return the pools of one attention and three linear layers, without a cache.

    A state has the bytes of 3,072 tokens, as in Qwen3-Next. Without slots, there is only attention.
    With ``decodes`` the pool of requests is that of a decode node.
    """
    kv: dict[str, Any] = {
        "size": num_kv_tokens,
        "dtype": torch.bfloat16,
        "page_size": page_size,
        "head_num": 1,
        "head_dim": 4,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    if not num_slots:
        requests = ReqToTokenPool(max_requests, context_len, "cpu", False)
        return World(None, _allocator(MHATokenToKVPool(layer_num=1, **kv)), requests)
    with envs.SGLANG_MAMBA_SSM_DTYPE.override("bfloat16"):
        shape = Mamba2StateShape.create(
            tp_world_size=1,
            intermediate_size=128,
            n_groups=1,
            num_heads=2,
            head_dim=64,
            state_size=64,
            conv_kernel=2,
        )
        cache_params = Mamba2CacheParams(shape=shape, layers=LINEAR_LAYERS)
    fields: dict[str, Any] = {
        "size": max_requests,
        "mamba_size": num_slots,
        "max_context_len": context_len,
        "device": "cpu",
        "enable_memory_saver": False,
        "cache_params": cache_params,
        "mamba_layer_ids": LINEAR_LAYERS,
        "enable_mamba_extra_buffer": extra_buffer,
    }
    if decodes:
        requests = HybridMambaDecodeReqToTokenPool(
            speculative_num_draft_tokens=0,
            pre_alloc_size=2,
            enable_overlap_schedule=False,
            **fields,
        )
    else:
        requests = HybridReqToTokenPool(
            mamba_spec_state_size=max_requests, enable_mamba_extra_buffer_lazy=lazy, **fields
        )
    kv_pool = HybridLinearKVPool(
        full_attention_layer_ids=ATTENTION_LAYERS, mamba_pool=requests.mamba_pool, **kv
    )
    return World(None, _allocator(kv_pool), requests)


def _allocator(pool: Any) -> Any:
    if pool.page_size == 1:
        return TokenToKVPoolAllocator(pool.size, pool.dtype, "cpu", pool, need_sort=False)
    return PagedTokenToKVPoolAllocator(
        pool.size, pool.page_size, pool.dtype, "cpu", pool, need_sort=False
    )
