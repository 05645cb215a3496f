"""Show that OffloadingConnector never stores the block in which a loaded hit ends.

python docs/upstream/vllm_partial_hit_hole.py    (vLLM 0.33.0; no GPU)
"""

from types import SimpleNamespace

import torch
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request

UNIT, BLOCK, NUM_BLOCKS, MAX_LEN = 16, 64, 100, 4096  # UNIT is --prefix-match-unit.


class Fields(SimpleNamespace):
    """Configuration in which every field that was not given is None."""

    def __getattr__(self, name):
        return None


cache = CacheConfig(block_size=BLOCK, mamba_cache_mode="align")
cache.num_gpu_blocks, cache.prefix_match_unit = NUM_BLOCKS, UNIT

attention = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
state = MambaSpec(
    block_size=BLOCK,
    shapes=((64,),),
    dtypes=(torch.float32,),
    page_size_padded=attention.page_size_bytes,
    mamba_cache_mode="align",
)
size = attention.page_size_bytes
scheduler = Scheduler(
    vllm_config=Fields(
        scheduler_config=SchedulerConfig(
            max_model_len=MAX_LEN, is_encoder_decoder=False, max_num_batched_tokens=MAX_LEN
        ),
        cache_config=cache,
        parallel_config=ParallelConfig(),
        observability_config=ObservabilityConfig(),
        model_config=Fields(max_model_len=MAX_LEN, runner_type="generate"),
        ec_manager_config=Fields(get_encoder_cache_manager_obj=lambda: None),
        aux_output_config=Fields(),
        num_speculative_tokens=0,
        num_lookahead_tokens=0,
        num_prefill_lookahead_tokens=0,
        num_hash_lookahead_tokens=0,
        max_in_flight_tokens=MAX_LEN,
        max_concurrent_batches=1,
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            engine_id="report",
            kv_connector_extra_config={"cpu_bytes_to_use": 1000 * size},
        ),
    ),
    kv_cache_config=KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[Fields(size=NUM_BLOCKS * size)],
        kv_cache_groups=[
            KVCacheGroupSpec([name], one) for name, one in (("a", attention), ("s", state))
        ],
    ),
    structured_output_manager=Fields(
        accept_tokens=lambda *_: True,
        validate_tokens=lambda _, tokens: tokens,
        should_advance=lambda *_, **__: False,
    ),
    block_size=BLOCK,
    hash_block_size=UNIT,
    log_stats=True,
)
init_none_hash(sha256)
hasher = get_request_block_hasher(UNIT, sha256)


def serve(length):
    """Serve a prompt of ``length`` tokens with an answer of four, and return its loaded tokens."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    request = Request(f"r{length}", list(range(length)), params, None, block_hasher=hasher)
    scheduler.add_request(request)
    loaded = 0
    for _ in range(12):  # All transfers end in the step in which they start.
        output = scheduler.schedule()
        meta, ids = output.kv_connector_metadata, list(output.num_scheduled_tokens)
        jobs = dict.fromkeys((*meta.load_jobs, *meta.store_jobs), 1)
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index=dict.fromkeys(ids, 0),
            sampled_token_ids=[[1] for _ in ids],
            kv_connector_output=KVConnectorOutput(
                finished_recving={one.req_id for one in meta.load_jobs.values()},
                kv_connector_worker_meta=OffloadingWorkerMetadata(jobs) if jobs else None,
            ),
        )
        if ids and request.prefill_stats:
            loaded = request.prefill_stats.num_external_cached_tokens
        scheduler.update_from_output(output, result)
    assert request.is_finished()
    return loaded


for length in (100, 300, 500, 700):
    print(f"prompt of {length} tokens: {serve(length)} loaded from the host")
    assert scheduler.reset_prefix_cache()  # The device loses its cache, and the host keeps its own.
