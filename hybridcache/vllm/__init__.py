"""Plug-in for vLLM: ``--scheduler-cls hybridcache.vllm.HybridScheduler`` uses HybridRadixCache.

Importing this module imports neither vLLM nor torch. Settings are given to vLLM as
``--additional-config '{"hybridcache": {"placement": "adaptive"}}'``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from hybridcache.policies.registry import (
    DEFAULT_EVICTION,
    DEFAULT_PLACEMENT,
    make_eviction,
    parse_placement,
)
from hybridcache.tokens import require_bool

if TYPE_CHECKING:
    from hybridcache.vllm.scheduler import HybridScheduler as HybridScheduler

NAME = "hybridcache"
"""Key of the settings in ``--additional-config``, and of the hints in ``extra_args``."""
TESTED = ("0.32", "0.33")
"""Minor versions of vLLM that the tests run with."""

SEAMS = (
    # scheduler.py
    "core.sched.async_scheduler:AsyncScheduler._mamba_block_aligned_split(request, num_new_tokens, "
    "num_new_local_computed_tokens, num_external_computed_tokens)",
    "core.sched.async_scheduler:AsyncScheduler._update_after_schedule(scheduler_output)",
    "core.sched.async_scheduler:AsyncScheduler._free_request(request, delay_free_blocks)",
    "core.kv_cache_manager:KVCacheManager.get_computed_blocks(request)",
    "core.kv_cache_manager:KVCacheManager.allocate_slots(request, num_new_tokens, "
    "num_new_computed_tokens, new_computed_blocks)",
    "core.kv_cache_manager:KVCacheManager.free(request)",
    "core.kv_cache_manager:KVCacheManager.new_step_starts()",
    "core.kv_cache_manager:KVCacheManager.reset_prefix_cache()",
    "core.single_type_kv_cache_manager:MambaManager.cache_blocks(request, num_tokens, "
    "retention_interval)",
    "core.single_type_kv_cache_manager:FullAttentionManager._cache_partial_tail_block(request, "
    "num_tokens)",
    # pool.py
    "core.block_pool:BlockPool.get_new_blocks(num_blocks)",
    "core.block_pool:BlockPool.move_block_hashes(src_block, dst_block)",
    "core.block_pool:BlockPool._emit_block_removed_events(block_hashes)",
    # pool.py, called and not overridden
    "core.block_pool:BlockPool.cache_partial_block(request, block, num_tokens, kv_cache_group_id, "
    "block_size)",
    "core.block_pool:BlockPool._maybe_evict_cached_block(block)",
    "core.block_pool:BlockPool.free_blocks(ordered_blocks)",
    "core.kv_cache_utils:FreeKVCacheBlockQueue.remove(block)",
    "core.kv_cache_utils:FreeKVCacheBlockQueue.prepend_n(blocks)",
    # host.py
    "kv_offload.cpu.policies.base:CachePolicy.get(key)",
    "kv_offload.cpu.policies.base:CachePolicy.insert(key, chunk)",
    "kv_offload.cpu.policies.base:CachePolicy.remove(key)",
    "kv_offload.cpu.policies.base:CachePolicy.touch(keys, req_context)",
    "kv_offload.cpu.policies.base:CachePolicy.on_store_miss(keys, req_context)",
    "kv_offload.cpu.policies.base:CachePolicy.on_request_finished(key_groups, "
    "insertion_only_keys, reused_keys, req_context)",
    "kv_offload.cpu.policies.base:CachePolicy.evict(n, protected)",
    "kv_offload.cpu.policies.base:CachePolicy.clear()",
    "kv_offload.cpu.policies.base:CachePolicy.mark_evictable(key)",
    "kv_offload.cpu.policies.base:CachePolicy.mark_non_evictable(key)",
    "kv_offload.base:ReqContext.get_offload_key_position(key)",
)
"""Code below ``vllm.v1`` that is overridden or called, with the first parameters after ``self``.
Most of it is private. The rest of the contract: ``MambaManager._partial_hit_reqs``,
``_pending_cow_copies`` and ``req_to_blocks``, and the fields of ``Request``."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Value of ``additional_config["hybridcache"]``.

    >>> Settings.read({"hybridcache": {"eviction": "lru"}}).eviction
    'lru'
    >>> Settings.read({"hybridcache": {"evict": "lru"}})
    Traceback (most recent call last):
    ValueError: hybridcache has no setting 'evict'; known: eviction, placement, debug.
    """

    eviction: str = DEFAULT_EVICTION
    """Name of the eviction policy."""
    placement: str = DEFAULT_PLACEMENT
    """Name of the placement of checkpoints."""
    debug: bool = False
    """Check all invariants at each step, for tests. O(blocks)."""

    def __post_init__(self) -> None:
        make_eviction(self.eviction)
        parse_placement(self.placement)
        require_bool(self.debug, "debug")

    @classmethod
    def read(cls, additional_config: Any) -> Settings:
        """Read the settings of vLLM's ``additional_config``. Raises ValueError for unknown ones."""
        given = additional_config.get(NAME, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"the value of {NAME} must be a JSON object (got {given!r}).")
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"{NAME} has no setting {name!r}; known: {', '.join(known)}.")
        return cls(**given)


def require_version(installed: str) -> None:
    """Raise RuntimeError unless ``installed`` is a tested version of vLLM.

    >>> require_version("0.33.0+cpu")
    >>> require_version("0.40.1")
    Traceback (most recent call last):
    RuntimeError: hybridcache works with vLLM 0.32 and 0.33 (installed: 0.40.1). Install one of these, or a newer hybridcache.
    """  # noqa: E501
    if ".".join(installed.split(".")[:2]) not in TESTED:
        raise RuntimeError(
            f"hybridcache works with vLLM {' and '.join(TESTED)} (installed: {installed}). Install "
            "one of these, or a newer hybridcache."
        )


def __getattr__(name: str) -> object:
    """Import the scheduler when vLLM resolves its name."""
    if name == "HybridScheduler":
        from hybridcache.vllm.scheduler import HybridScheduler

        return HybridScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
