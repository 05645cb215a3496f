"""Marconi (MLSys'25): a radix tree, two checkpoints a request, eviction by recency + alpha * FLOPs per byte.

Eq. 1: ``efficiency(n)`` = FLOPs that hitting ``n`` saves over hitting its parent / bytes of ``n``'s own KV and state.
Eq. 2: ``score(n)`` = recency + alpha * efficiency, both min-max normalised over the candidates; the least goes.
Candidates have at most one child; a leaf frees KV and state, an inner node its state, its KV joining the child's edge.
Admission: the last decoded token, and the point where the prompt's insertion splits an edge (so a fork pays on its third
sighting). Only the consumed node's recency is refreshed.

Three readings, since the paper and its artifact differ and results depend on it in both directions:

- ``paper``: Eq. 1 and 2 as printed, bytes freed exactly, the two checkpoints just inserted never evicted.
- ``artifact``: the simulator as published, with its slips: the MLP term subtracts the parent's *attention* FLOPs; the
  memory term counts the KV of the whole prefix; recency is ``1 / (now - time)``; bytes evicted are counted of another
  node (the last candidate looked at); an insert ticks the clock and refreshes the match again.
- ``repaired``: the artifact with its accounting mended (FLOPs, memory, bytes), its recency kept.

``alpha=None`` tunes it as published: 0 until the first eviction, after ``n`` requests; the next ``window * n`` requests are
replayed over 0, 0.1 … 2 and the alpha that saves the most FLOPs (paper: hits the most tokens) is kept for good.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hybridcache.baselines.prefix_tree import (
    PrefixNode,
    grow,
    merge_into_child,
    new_root,
    remove_leaf,
    walk,
)
from hybridcache.baselines.protocol import BaselineConfig
from hybridcache.interface import Tokens

Reading = Literal["paper", "artifact", "repaired"]
ALPHAS = tuple(round(0.1 * step, 1) for step in range(21))


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """Forward FLOPs of ``length`` tokens by layer kind, as the paper counts them (MHA, two MLP matrices of 4 D)."""

    num_attention: int = 4
    num_linear: int = 24
    num_mlp: int = 28
    hidden: int = 4096
    state: int = 128

    def attention(self, length: int) -> float:
        return self.num_attention * (8.0 * length * self.hidden**2 + 4.0 * length**2 * self.hidden)

    def mlp(self, length: int) -> float:
        return self.num_mlp * 16.0 * length * self.hidden**2

    def linear(self, length: int) -> float:
        d, n = self.hidden, self.state
        return self.num_linear * length * (12.0 * d**2 + 16.0 * d * n + 10.0 * d)

    def total(self, length: int) -> float:
        return self.attention(length) + self.mlp(length) + self.linear(length)


class MarconiCache:
    """Marconi in one of its readings. One byte budget; a running request's own memory is not counted (as in the artifact).

    ``leaf_lru`` turns it into the paper's SGLang+ baseline: the same admission, leaves only, least recently used, the whole
    path refreshed by a hit.
    """

    def __init__(
        self,
        config: BaselineConfig,
        reading: Reading = "paper",
        alpha: float | None = None,
        window: int = 5,
        flops: LayerFlops | None = None,
        leaf_lru: bool = False,
    ) -> None:
        self.config = config
        self.reading: Reading = reading
        self.alpha = alpha or 0.0
        self.flops = flops or LayerFlops()
        self.leaf_lru = leaf_lru
        self.kv_bytes = config.kv_bytes_per_token * config.unit
        self.used_bytes = 0
        self.clock = 0
        self.flops_saved = 0.0
        self.hit_tokens = 0
        self.num_evictions = 0
        self.roots: dict[Hashable, PrefixNode] = {}
        self.candidates: dict[PrefixNode, None] = {}
        self._tuner = _Tuner(window) if alpha is None and not leaf_lru else None

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> MarconiSession:
        root = self.roots.setdefault(namespace, new_root())
        node = self._match(root, tokens[:-1])
        self.hit_tokens += node.depth
        self.flops_saved += self.flops.total(node.depth * self.config.unit)
        return MarconiSession(self, root, tokens, node.depth, namespace)

    def insert(self, root: PrefixNode, tokens: Tokens, output: Tokens) -> None:
        """Admit a finished request: the branch point its prompt made, and its end; then evict down to the budget."""
        if self.reading == "artifact":
            self._match(root, tokens[:-1])
        self.clock += 1
        walked, matched = walk(root, tokens)
        branch = matched if matched < walked.depth and matched > 0 else None
        tail, new, _ = grow(root, np.concatenate([tokens, output]))
        self.used_bytes += new * self.kv_bytes
        fresh = {tail}
        self._save(tail)
        if branch is not None:
            for node in tail.path():
                if node.depth == branch:
                    fresh.add(node)
                    self._save(node)
        for node in (*fresh, *tail.path()):
            self._list(node)
        self._evict(set() if self.reading == "artifact" else fresh)

    def check(self) -> None:
        used = 0
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            used += len(node.tokens) * self.kv_bytes + node.has_state * self.config.state_bytes
            stack.extend(node.children.values())
            if node.parent is not None:
                assert (node in self.candidates) == (len(node.children) <= 1), (
                    "candidates are stale"
                )
        assert used == self.used_bytes, f"counted {self.used_bytes} bytes, the tree has {used}"

    def _match(self, root: PrefixNode, tokens: Tokens) -> PrefixNode:
        """The deepest whole node with a state; refreshes it (leaf_lru: its path)."""
        self.clock += 1
        node, matched = walk(root, tokens)
        while node.parent is not None and not (node.has_state and node.depth <= matched):
            node = node.parent
        for step in list(node.path()) if self.leaf_lru else [node]:
            step.time = self.clock
        return node

    def _save(self, node: PrefixNode) -> None:
        node.time = self.clock
        if not node.has_state:
            node.has_state = True
            self.used_bytes += self.config.state_bytes

    def _list(self, node: PrefixNode) -> None:
        self.candidates.pop(node, None)
        if node.parent is not None and len(node.children) <= 1:
            self.candidates[node] = None

    def _evict(self, fresh: set[PrefixNode]) -> None:
        missing = self.used_bytes - self.config.budget_bytes
        if missing > 0 and self._tuner is not None:
            self._tuner.first_eviction()
        while missing > 0:
            pool = [node for node in self._pool() if node not in fresh]
            if not pool:
                return
            scores = self._scores(pool)
            victim = pool[int(np.argmin(scores))]
            counted = pool[-1] if self.reading == "artifact" else victim
            missing -= self._own_bytes(counted)
            self._remove(victim)

    def _pool(self) -> Iterator[PrefixNode]:
        return (node for node in self.candidates if (not node.children if self.leaf_lru else True))

    def _own_bytes(self, node: PrefixNode) -> int:
        """What evicting ``node`` frees."""
        kv = 0 if node.children else len(node.tokens) * self.kv_bytes
        return kv + node.has_state * self.config.state_bytes

    def _remove(self, node: PrefixNode) -> None:
        self.num_evictions += 1
        self.used_bytes -= self._own_bytes(node)
        del self.candidates[node]
        if node.children:
            merge_into_child(node)
        else:
            self._list(remove_leaf(node))

    def _scores(self, pool: list[PrefixNode]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        times = np.array([node.time for node in pool], dtype=np.float64)
        if self.leaf_lru:
            return times
        recency = times if self.reading == "paper" else 1.0 / (self.clock + 1 - times)
        score = _normalised(recency)
        if self.alpha:
            score = score + self.alpha * _normalised(np.array([self._efficiency(n) for n in pool]))
        return score

    def _efficiency(self, node: PrefixNode) -> float:
        """Eq. 1, in the reading's arithmetic."""
        assert node.parent is not None
        unit, flops = self.config.unit, self.flops
        total, above = node.depth * unit, node.parent.depth * unit
        saved = flops.attention(total) - flops.attention(above)
        saved += flops.linear(total) - flops.linear(above) + flops.mlp(total)
        saved -= flops.attention(above) if self.reading == "artifact" else flops.mlp(above)
        kv_tokens = node.depth if self.reading == "artifact" else len(node.tokens)
        return saved / (kv_tokens * self.kv_bytes + self.config.state_bytes)

    def finished(self, tokens: Tokens, output: Tokens, namespace: Hashable) -> None:
        """One request is over: the tuner may have seen enough."""
        if self._tuner is None:
            return
        self._tuner.record(tokens, output, namespace)
        if self._tuner.ready:
            self.alpha = self._tuner.best_alpha(self)
            self._tuner = None

    def twin(self, alpha: float) -> MarconiCache:
        """An empty cache of the same make with a fixed alpha."""
        return MarconiCache(self.config, self.reading, alpha, flops=self.flops)


class MarconiSession:
    """One request; the artifact knows no running memory, so there is nothing to hold."""

    num_chunks = 1

    def __init__(
        self,
        cache: MarconiCache,
        root: PrefixNode,
        tokens: Tokens,
        cached_len: int,
        namespace: Hashable,
    ) -> None:
        self.cache = cache
        self.root = root
        self.tokens = tokens
        self.cached_len = cached_len
        self.namespace = namespace

    def finish(self, output: Tokens) -> None:
        self.cache.insert(self.root, self.tokens, output)
        self.cache.finished(self.tokens, output, self.namespace)


class _Tuner:
    """Records requests from the start, as alpha changes nothing before the first eviction, and replays them."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._requests: list[tuple[Tokens, Tokens, Hashable]] = []
        self._until: int | None = None

    def first_eviction(self) -> None:
        if self._until is None:
            self._until = (1 + self._window) * max(1, len(self._requests))

    def record(self, tokens: Tokens, output: Tokens, namespace: Hashable) -> None:
        self._requests.append((tokens, output, namespace))

    @property
    def ready(self) -> bool:
        return self._until is not None and len(self._requests) >= self._until

    def best_alpha(self, cache: MarconiCache) -> float:
        """The alpha that saves most on what was recorded; ties go to the smaller."""
        saved: dict[float, float] = {}
        for alpha in ALPHAS:
            twin = cache.twin(alpha)
            for tokens, output, namespace in self._requests:
                twin.begin(tokens, namespace).finish(output)
            saved[alpha] = twin.hit_tokens if cache.reading == "paper" else twin.flops_saved
        return max(ALPHAS, key=lambda alpha: (saved[alpha], -alpha))


def _normalised(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
