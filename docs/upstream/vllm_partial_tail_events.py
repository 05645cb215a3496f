"""Show that vLLM's KV event of a partial tail names a parent that was never published.

python docs/upstream/vllm_partial_tail_events.py    (vLLM 0.33.0; no GPU)
"""

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

UNIT, BLOCK = 16, 64  # --prefix-match-unit, and the block size of the attention group
init_none_hash(sha256)
pool = BlockPool(8, True, hash_block_size=UNIT, enable_kv_cache_events=True)
hasher = get_request_block_hasher(UNIT, sha256)
prompt = list(range(BLOCK + 3 * UNIT + 1))
request = Request("r", prompt, SamplingParams(max_tokens=1), None, block_hasher=hasher)
blocks = pool.get_new_blocks(2)
pool.cache_full_blocks(request, blocks, 0, 1, BLOCK, kv_cache_group_id=0)
pool.cache_partial_block(request, blocks[1], BLOCK + 3 * UNIT, 0, BLOCK)

known = {None}
for event in pool.take_events():
    is_known = event.parent_block_hash in known
    known.update(event.block_hashes)
    print(
        f"{len(event.token_ids):3} tokens, block size {event.block_size}, parent known: {is_known}"
    )
