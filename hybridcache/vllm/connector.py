"""Host memory for HybridScheduler: vLLM's OffloadingConnector, whose hits end at any state.

    --kv-transfer-config '{"kv_connector": "HybridOffloadingConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "hybridcache.vllm.connector",
      "kv_connector_extra_config": {"cpu_bytes_to_use": 64000000000}}'

vLLM's own lookup finds a state at the end of the last whole block that the host has, or in the
block behind it, and takes no states inside the blocks of answers. Transfers, fences and memory are
vLLM's.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import LookupResult

from hybridcache.vllm.pool import derive


class HybridOffloadingConnector(OffloadingConnector):
    """vLLM's connector with the lookup of ``HybridOffloadingScheduler``."""

    takes_answers = False
    """Whether states inside the blocks of answers may be handed over."""
    num_host_blocks = 0
    """Blocks that the host has room for. 0 is not known."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        # vLLM's default keeps no blocks of answers, which the next turn of a chat resumes from.
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        given.setdefault("offload_prompt_only", False)
        super().__init__(vllm_config, role, kv_cache_config)
        if self.connector_scheduler is not None:
            ours = derive(self.connector_scheduler, HybridOffloadingScheduler)
            self.takes_answers = ours.finds_any_state and not ours.config.offload_prompt_only
            if ours.finds_any_state:
                self.num_host_blocks = getattr(ours.manager, "_num_chunks", 0)


class _Computed:
    """View of a request whose computed answer counts as a part of its prompt."""

    def __init__(self, request: Any) -> None:
        self._request = request

    @property
    def num_prompt_tokens(self) -> int:
        return int(self._request.num_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class HybridOffloadingScheduler(OffloadingConnectorScheduler):
    """vLLM's scheduler side with hits at any state."""

    @property
    def finds_any_state(self) -> bool:
        """True if a chunk is one block, and no drafts reach past a hit."""
        eagle = any(one.is_eagle_group for one in self.config.kv_group_configs)
        return self.config.supports_partial_tail and not eagle

    def _lookup(self, req_status: Any, max_num_new_tokens: int | None = None) -> int | None:
        if not self.finds_any_state:
            return super()._lookup(req_status, max_num_new_tokens)
        request, context, config = req_status.req, req_status.req_context, self.config
        groups, states = config.kv_group_configs, req_status.group_states
        unit, size = config.tokens_per_hash, groups[0].tokens_per_block
        local, loading = req_status.num_locally_computed_tokens, self._chunks_being_loaded or ()
        limits = max_num_new_tokens, req_status.max_load_tokens
        limit = min([request.num_tokens - 1, *(local + one for one in limits if one is not None)])
        req_status.partial_tail_boundary, is_pending = None, False

        def has(keys: Any) -> bool:
            """Return whether the host has all of ``keys``, and note those on their way."""
            nonlocal is_pending
            for key in keys:
                found = self.manager.lookup(key, context)
                if found is LookupResult.MISS:
                    return False
                is_pending |= found is not LookupResult.HIT or key in loading
            return True

        rows = [at for at, one in enumerate(groups) if not one.requires_cow_source]
        end = local // size
        num_chunks = min(len(states[at].offload_keys) for at in rows)
        while end < num_chunks and has([states[at].offload_keys[end] for at in rows]):
            end += 1
        if is_pending:
            return None  # Another request loads or stores these rows: they are soon there.
        saved = [one.group_idx for one in groups if one.requires_cow_source]
        for at in range(min(limit, (end + 1) * size - 1) // unit * unit, local, -unit):
            # The rows of a part of the last block are a chunk of their own.
            parts = [groups[row].group_idx for row in rows] if at % size else []
            if not has(
                self._make_boundary_key(request, group, at, context) for group in saved + parts
            ):
                is_pending = False
                continue
            if is_pending:
                return None
            req_status.partial_tail_boundary = at if at % size else None
            return at - local
        return 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        status = self._req_status[request.request_id]
        is_part = num_external_tokens > 0 and status.partial_tail_boundary is not None
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        # vLLM counts the block that a hit ends in as stored. Its rest is computed only after that:
        # without the whole block, no later hit goes beyond it.
        for state in status.group_states if is_part else ():
            state.next_stored_chunk_idx -= 1

    def _build_partial_tail_store_jobs(self, scheduler_output: Any) -> Any:
        block_state = scheduler_output.kv_connector_block_state
        handed = block_state.boundary_state_offloads if block_state else ()
        views = [self._req_status[one] for one in handed or () if one in self._req_status]
        if not self.finds_any_state or self.config.offload_prompt_only:
            views = []
        requests = [status.req for status in views]
        try:
            for status in views:
                status.req = _Computed(status.req)
            return super()._build_partial_tail_store_jobs(scheduler_output)
        finally:
            for status, request in zip(views, requests, strict=True):
                status.req = request
