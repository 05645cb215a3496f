"""Helpers that serve requests on a cache: match, lock, touch, allocate, insert and free."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.allocators.moves import StepPlan
from hybridcache.radix.api import InsertResult, PrefixMatch
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import PlacementPolicy
from hybridcache.radix.tokens import Tokens


def carried_out(cache: HybridRadixCache) -> StepPlan:
    """Take the step plan, mark it as carried out and return it. Nothing is copied."""
    plan = cache.take_step()
    plan.done()
    return plan


def ids(*parts: str | range | Sequence[int]) -> Tokens:
    """Return a prompt made of strings (one token per letter) and ranges."""
    flat: list[int] = []
    for part in parts:
        flat += [ord(letter) for letter in part] if isinstance(part, str) else list(part)
    return np.array(flat, np.int32)


def hybrid(num_kv_tokens: int = 1000, num_slots: int = 10, **options: object) -> HybridRadixCache:
    """Build a small hybrid cache, by default with a grid of 1 and LRU."""
    config = CacheConfig(
        num_kv_tokens=num_kv_tokens,
        num_slots=num_slots,
        **({"grid": 1, "state_bytes": 2, "eviction": "lru"} | options),
    )
    cache = build_prefix_cache(config)
    assert isinstance(cache, HybridRadixCache)
    return cache


def publish(
    cache: HybridRadixCache,
    tokens: Tokens,
    positions: Iterable[int] = (),
    namespace: Hashable = None,
    match: PrefixMatch | None = None,
) -> InsertResult:
    """Insert ``tokens`` with checkpoints at ``positions``; free duplicates and rejected slots."""
    cached_len = 0 if match is None else match.cached_len
    new = cache.allocate_kv(len(tokens) - cached_len)
    assert new is not None, "no KV rows available"
    cached = cache.gather(None if match is None else match.node)
    rows = np.concatenate([cached, new])
    saved = []
    for position in positions:
        slot = cache.allocate_slot()
        assert slot is not None, "no slot available"
        saved.append((position, slot))
    result = cache.insert(tokens, rows[: len(tokens)], saved, namespace, cached_len)
    cache.free_kv(result.duplicates)
    cache.free_kv(rows[max(result.inserted_len, cached_len) :])
    for slot in result.rejected_slots:
        cache.free_slot(slot)
    return result


def serve(
    cache: HybridRadixCache,
    tokens: Tokens,
    positions: Iterable[int] = (),
    namespace: Hashable = None,
) -> PrefixMatch:
    """Serve a whole request and return its match. Checks the invariants afterwards."""
    match = cache.match(tokens, namespace)
    handle = cache.lock(match.node)
    cache.touch(match)
    publish(cache, tokens, positions, namespace, match)
    cache.unlock(handle)
    assert match.cached_len + sum(match.losses) == len(tokens)
    cache.check()
    return match


def serve_lease(
    cache: HybridRadixCache,
    placement: PlacementPolicy,
    request: LeaseRequest,
    answer: Sequence[int] | Tokens = (),
    stop_reason: str = "",
) -> Lease:
    """Serve a prompt and its answer with a lease. Returns the ended lease."""
    prompt = request.tokens
    lease = Lease.begin(cache, placement, request)
    assert lease is not None and lease.extend(len(prompt))
    lease.take_checkpoint_slots(lease.cached_len, len(prompt))
    carried_out(cache)
    lease.publish(prompt, len(prompt))
    whole = np.concatenate((prompt, np.asarray(answer, np.int32)))
    assert lease.extend(len(whole))
    lease.take_checkpoint_slots(len(prompt), len(whole))
    carried_out(cache)
    lease.finish(whole, len(whole), stop_reason=stop_reason)
    return lease


class PerToken:
    """Compute time of 0.25 s per token."""

    def seconds(self, start: int, end: int) -> float:
        return max(end - start, 0) / 4


class Rate:
    """Exchange rule with a fixed time per loaded byte, and 0.25 s per token."""

    def __init__(self, seconds_per_byte: float) -> None:
        self.seconds_per_byte = seconds_per_byte

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        return (position - cached_len) / 4 - self.seconds_per_byte * sum(num_bytes.values())


def traffic(seed: int, num_requests: int, longest: int = 200) -> Iterator[Tokens]:
    """Yield prompts that share prefixes of many lengths."""
    rng = np.random.default_rng(seed)
    seen = [np.empty(0, np.int32)]
    for _ in range(num_requests):
        before = seen[rng.integers(len(seen))]
        prefix = before[: rng.integers(len(before) + 1)]
        tokens = np.concatenate([prefix, rng.integers(0, 3, rng.integers(1, 60), np.int32)])
        tokens = tokens[:longest]
        seen.append(tokens)
        yield tokens
