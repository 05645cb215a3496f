"""Reference for the optimum: exhaustive search over the possible cache contents after each
request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from hybridcache.lab.optimum import MemoryBudget

Path = tuple[int, ...]
Cache = frozenset[tuple[str, Path]]
"""Items of a cache. ("kv", path) is the KV of the last token of ``path``, and ("state", path) a
checkpoint after it."""


def brute_force(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], budget: MemoryBudget, grid: int = 1
) -> int:
    """Return the largest possible number of cached tokens over requests (prompt, output).

    Exponential: use at most a dozen tokens.
    """
    best: dict[Cache, int] = {frozenset(): 0}
    for prompt, output in requests:
        sequence = (*prompt, *output)
        prefixes = [tuple(sequence[: n + 1]) for n in range(len(sequence))]
        following: dict[Cache, int] = {}
        for cache, saved in best.items():
            for hit in usable_hits(cache, prefixes, len(prompt)):
                available = set(cache)
                available |= {("kv", prefix) for prefix in prefixes}
                available |= {
                    ("state", prefix)
                    for prefix in prefixes
                    if len(prefix) > hit and len(prefix) % grid == 0
                }
                for kept in caches_of(available, budget):
                    following[kept] = max(following.get(kept, 0), saved + hit)
        best = following
    return max(best.values(), default=0)


def usable_hits(cache: Cache, prefixes: list[Path], prompt_len: int) -> Iterator[int]:
    """Yield the lengths from which the prompt can be resumed, 0 included."""
    yield 0
    for depth in range(1, prompt_len):
        if ("kv", prefixes[depth - 1]) not in cache:
            return
        if ("state", prefixes[depth - 1]) in cache:
            yield depth


def caches_of(available: set[tuple[str, Path]], budget: MemoryBudget) -> Iterator[Cache]:
    """Yield every subset that fits, is closed under ancestors, and has KV at each checkpoint."""
    items = sorted(available)
    price = {"kv": budget.kv_bytes_per_token, "state": budget.state_bytes}
    for count in range(len(items) + 1):
        for chosen in combinations(items, count):
            if sum(price[kind] for kind, _ in chosen) > budget.capacity_bytes:
                continue
            kept = frozenset(chosen)
            if all(
                (kind == "kv" or ("kv", path) in kept)
                and (len(path) == 1 or ("kv", path[:-1]) in kept)
                for kind, path in kept
            ):
                yield kept
