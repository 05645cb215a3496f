"""Caller of prefix caches inside SGLang: SGLang's own and ours.

Tests that import this module are skipped if SGLang is not installed.
"""

from __future__ import annotations

import os
from array import array

import pytest

from tests.sglang import cpu

if not cpu.is_installed():
    pytest.skip("SGLang is not installed: make sglang", allow_module_level=True)
os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
os.environ["SGLANG_CHECK_KV_PAGE_INVARIANTS"] = "1"
cpu.stand_in()

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402

from tests.sglang.pools import new_world  # noqa: E402

CORES = ("hybridcache", "python", "rust")
PATH = list(range(1, 13))


class Caller:
    """Cache and pools, with the calls that SGLang's scheduler makes."""

    def __init__(self, core: str, num_kv_tokens: int = 100, num_slots: int = 8, **pools):
        self.core = core
        self.cache, self.rows, self.requests = new_world(core, num_kv_tokens, num_slots, **pools)
        self.slots = self.requests.mamba_allocator if num_slots else None

    def insert(self, tokens, owned: int = 0, extra_key=None, salt=None):
        """Publish ``tokens`` with newly allocated rows and a state."""
        tokens = list(tokens)
        rows = self.rows.alloc(len(tokens))
        slot = None if self.slots is None else self.slots.alloc(1)
        if owned:
            self.rows.free(rows[:owned])
            rows[:owned] = self.cache.path_device_indices(self.match(tokens[:owned])[1])
        result = self.cache.insert(
            InsertParams(
                key=RadixKey(array("q", tokens), extra_key, cache_salt=salt),
                value=rows,
                mamba_value=slot,
                prev_prefix_len=owned,
            )
        )
        if result.mamba_exist:
            self.slots.free(slot)
        return result

    def match(self, tokens, extra_key=None, salt=None):
        """Return (cached length, node). All of ``tokens`` may be reused."""
        key = RadixKey(array("q", tokens), extra_key, cache_salt=salt)
        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        return found.device_prefix_len, found.last_device_node

    def hit(self, *tokens) -> int:
        return self.match([token for part in tokens for token in part])[0]

    def evict(self, num_tokens: int = 0, num_states: int = 0):
        result = self.cache.evict(EvictParams(num_tokens=num_tokens, mamba_num=num_states))
        return result.num_tokens_evicted, result.mamba_num_evicted

    def check(self):
        """Check SGLang's invariant for rows and states, if no request holds any."""
        cache = self.cache
        cache.sanity_check()
        free = self.rows.available_size()
        assert free + cache.full_evictable_size() + cache.full_protected_size() == self.rows.size
        if self.slots is None:
            return
        free = self.slots.available_size()
        states = cache.mamba_evictable_size() + cache.mamba_protected_size()
        assert free + states == self.slots.size
