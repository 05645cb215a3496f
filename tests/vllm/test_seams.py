"""The installed vLLM has the private code that the plug-in overrides or calls."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make vllm, or make vllm-scheduler")

import vllm

from hybridcache.vllm import TESTED, require_version
from tests.refused import refused

CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1"
OFFLOADING = f"{CONNECTORS}.offloading.scheduler:OffloadingConnectorScheduler"
SEAMS = (
    # scheduler.py
    "core.sched.async_scheduler:AsyncScheduler._mamba_block_aligned_split(request, num_new_tokens, "
    "num_new_local_computed_tokens, num_external_computed_tokens)",
    "core.sched.async_scheduler:AsyncScheduler._handle_blocked_waiting_request(request)",
    "core.sched.async_scheduler:AsyncScheduler._update_after_schedule(scheduler_output)",
    "core.sched.async_scheduler:AsyncScheduler._connector_finished(request)",
    "core.kv_cache_manager:KVCacheManager.get_computed_blocks(request)",
    "core.kv_cache_manager:KVCacheManager.allocate_slots(request, num_new_tokens, "
    "num_new_computed_tokens, new_computed_blocks)",
    "core.kv_cache_manager:KVCacheManager.get_computed_blocks_for_connector(request)",
    "core.kv_cache_manager:KVCacheManager.cache_blocks(request, num_computed_tokens)",
    "core.kv_cache_manager:KVCacheManager.take_boundary_state_offloads()",
    "core.kv_cache_manager:KVCacheManager.pop_blocks_for_free(request)",
    "core.kv_cache_manager:KVCacheManager.free(request)",
    "core.kv_cache_manager:KVCacheManager.new_step_starts()",
    "core.kv_cache_manager:KVCacheManager.reset_prefix_cache()",
    "core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks(request, num_computed_tokens)",
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
    # connector.py
    f"{OFFLOADING}._lookup(req_status, max_num_new_tokens)",
    f"{OFFLOADING}.update_state_after_alloc(request, blocks, num_external_tokens)",
    f"{OFFLOADING}._build_partial_tail_store_jobs(scheduler_output)",
    f"{OFFLOADING}._make_boundary_key(request, group_idx, boundary_tokens, req_context)",
)
"""Code below ``vllm.v1``, or of a module named in full, that is overridden or called, with the
first parameters after ``self``.
Most of it is private. The rest of the contract: ``Scheduler.current_step``,
``MambaManager._partial_hit_reqs``, ``_pending_cow_copies`` and ``cached_blocks_this_step``, the
links of the free queue, and the fields of ``Request``."""


def installed(seam: str) -> Any:
    """Return the method that "module:Class.method(parameters)" names in the installed version."""
    module, _, path = seam.partition("(")[0].partition(":")
    found: Any = importlib.import_module(module if module[:5] == "vllm." else f"vllm.v1.{module}")
    for name in path.split("."):
        found = getattr(found, name)
    return found


def parameters(method: Any) -> tuple[str, ...]:
    """Return the names of the parameters after ``self`` or ``cls``."""
    names = tuple(inspect.signature(method).parameters)
    return names[1:] if names[:1] in (("self",), ("cls",)) else names


@pytest.mark.parametrize("seam", SEAMS)
def test_private_code_has_the_expected_parameters(seam: str) -> None:
    expected = seam.partition("(")[2].rstrip(")").split(", ")
    found = parameters(installed(seam))
    assert expected in ([""], [*found[: len(expected)]]), (
        f"vLLM {vllm.__version__} has changed {seam}: {found} instead of {expected}"
    )


def test_every_override_is_listed() -> None:
    """A method of a class of vLLM that is overridden without being listed would break unseen."""
    from hybridcache.vllm import connector, pool, scheduler

    listed = {seam.partition("(")[0].rpartition(":")[2] for seam in SEAMS}
    unlisted = []
    for module in (connector, pool, scheduler):
        for name, ours in vars(module).items():
            if not inspect.isclass(ours) or ours.__module__ != module.__name__:
                continue
            theirs = [one for one in ours.__mro__ if one.__module__.startswith("vllm.")]
            for method in (one for one, value in vars(ours).items() if callable(value)):
                owners = [one for one in theirs if method in vars(one)]
                if owners and not method.startswith("__"):
                    names = {f"{one.__name__}.{method}" for one in theirs}
                    if not names & listed:
                        unlisted.append(f"{name}.{method}")
    assert not unlisted


def test_other_versions_are_refused_in_one_sentence() -> None:
    require_version(vllm.__version__)
    assert ".".join(vllm.__version__.split(".")[:2]) in TESTED
    refused(r"works with vLLM 0\.32 and 0\.33", require_version, "0.34.0", kind=RuntimeError)
