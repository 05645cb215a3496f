"""SGLang's tree over its host pools on a CPU, with its decisions and without its copies."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from experiments.system.sglang.pools import CHUNK, new_pools
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache import l2_transfer
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.pool_host import common
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

DECODE_INTERVAL = 256
_EVENT = SimpleNamespace(
    record=lambda *_: None, query=lambda: True, synchronize=lambda: None, wait=lambda *_: None
)
_DONE = l2_transfer.TransferCompletion(_EVENT, _EVENT, False)


def copy_nothing() -> None:
    """Skip the registration of host memory, and complete each copy at once without copying."""
    common._cuda_host_register = lambda *_, **__: None
    for name in ("submit_device_to_host", "submit_host_to_device"):
        setattr(l2_transfer.L2TransferEngine, name, lambda *_, **__: _DONE)


class HostPools:
    """SGLang's cache with host pools of ``ratio`` times the size of its device pools.

    Requests run one after the other with the calls of its scheduler, and states are saved where the
    scheduler tracks them.
    """

    def __init__(self, num_kv_tokens: int, num_slots: int, ratio: float) -> None:
        world = new_pools(num_kv_tokens, num_slots, extra_buffer=True)
        self.rows, self.slots = world.rows, world.requests.mamba_allocator
        arguments = ServerArgs(
            model_path="dummy",
            page_size=1,
            enable_hierarchical_cache=True,
            hicache_ratio=ratio,
            hicache_io_backend="direct",
            hicache_mem_layout="page_first_direct",
        )
        arguments._mamba_cache_chunk_size = CHUNK
        set_global_server_args_for_scheduler(arguments)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=world.requests,
            token_to_kv_pool_allocator=world.rows,
            page_size=1,
            eviction_policy="lru",
            enable_kv_cache_events=False,
            enable_mamba_extra_buffer=True,
        )
        params.tree_components = (ComponentType.FULL, ComponentType.MAMBA)
        params.tree_core_backend = "python"
        self.cache = UnifiedRadixCache(params)
        self.cache.init_hicache(arguments, params)

    def free(self) -> tuple[int, int, int, int]:
        """Return the free KV rows and states on the device, then in host memory."""
        return self.rows.available_size(), self.slots.available_size(), *self.host_free()

    def host_free(self) -> tuple[int, int]:
        """Return the free KV rows and states in host memory."""
        pools = self.cache.host_pool_group.entry_map
        sizes = [pools[name].host_pool.available_size() for name in (PoolName.KV, PoolName.MAMBA)]
        return sizes[0], sizes[1]

    def serve(self, tokens: np.ndarray, output: np.ndarray, chunk: int = 8192) -> int:
        """Serve one request and return the number of reused tokens."""
        cache, length = self.cache, len(tokens)
        ids = array("q", np.concatenate((tokens, output)).astype(np.int64).tobytes())
        request = SimpleNamespace(kv=ReqKvInfo(), rid="r", last_node=None)
        match = cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, limit=length - 1)))
        request.last_node = match.last_device_node
        request.swa_host_hit_length = 0
        request.mamba_host_hit_length = match.mamba_host_hit_length
        load = InitLoadBackParams(match.best_match_node, match.host_hit_length, req=request)
        _, node = cache.init_load_back(load)
        cache.ready_to_load_host_cache()
        cache.loading_check()
        hit = len(cache.path_device_indices(node))
        lock = cache.lock(node)
        fetched = request.kv.mamba_pool_idx
        slot = self._slot() if fetched is None else fetched.unsqueeze(0)
        rows = torch.cat((cache.path_device_indices(node), self._rows(length - hit)))
        owned, branch = hit, match.mamba_branching_seqlen
        for start in range(hit, length, chunk):
            end = min(start + chunk, length)
            at = start + (end - start) // CHUNK * CHUNK
            if branch is not None and start < branch <= end and not (branch - start) % CHUNK:
                at = branch
            if at > start:
                lock, owned = self._insert(ids[:at], rows, self._slot(), lock, owned), at
        rows = torch.cat((rows, self._rows(len(output))))
        at = len(ids) // DECODE_INTERVAL * DECODE_INTERVAL
        if at > length:
            lock, owned = self._insert(ids[:at], rows, slot, lock, owned), at
        else:
            self.slots.free(slot)
        self.rows.free(rows[owned:])
        cache.unlock(lock)
        return hit

    def _insert(
        self, ids: array[int], rows: torch.Tensor, slot: torch.Tensor, lock: Any, owned: int
    ) -> Any:
        params = InsertParams(
            key=RadixKey(ids), value=rows[: len(ids)], mamba_value=slot, prev_prefix_len=owned
        )
        result = self.cache.insert(params)
        self.cache.writing_check(write_back=True)
        if result.mamba_exist:
            self.slots.free(slot)
        rows[: len(ids)] = self.cache.path_device_indices(result.last_device_node)
        moved = self.cache.lock(result.last_device_node)
        self.cache.unlock(lock)
        return moved

    def _slot(self) -> torch.Tensor:
        if not self.slots.available_size():
            self.cache.evict_for_alloc(EvictParams(mamba_num=1))
        return self.slots.alloc(1)

    def _rows(self, num_tokens: int) -> torch.Tensor:
        short = num_tokens - self.rows.available_size()
        if short > 0:
            self.cache.evict_for_alloc(EvictParams(num_tokens=short))
        return self.rows.alloc(num_tokens)
