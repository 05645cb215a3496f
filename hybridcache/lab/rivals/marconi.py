r"""Marconi (MLSys'25, arXiv:2411.19379): a radix tree with eviction by score.

Two checkpoints are saved per request.

- Eq. 1: ``efficiency(n)`` is the FLOPs that a hit of ``n`` saves compared with a hit of its parent,
  divided by the bytes of the KV and state of ``n``.
- Eq. 2: ``score(n)`` is recency + alpha * efficiency, both min-max normalised over the candidates.
  The candidate with the least score is evicted.
- Candidates have at most one child. Evicting a leaf frees its KV and state. Evicting an inner node
  frees its state, and its KV joins the child's edge.
- Checkpoints are saved at the last decoded token, and where an insertion splits an edge. A fork is
  therefore useful from its third sighting on.
- A hit refreshes only the recency of the resumed node.

The paper and its artifact (0801661, 2025-03-05) differ, and the results depend on it in both
directions. There are two readings.

====================  ======================  =================================
property              ``paper``               ``artifact``
====================  ======================  =================================
MLP FLOPs saved       less the parent's MLP   less the *attention* of the
                                              parent's prefix, in as many
                                              layers as there are MLPs
bytes in Eq. 1        own edge's KV, state    KV of the whole prefix, state
bytes of a dead leaf  its own                 edge of the last candidate walked
recency               time                    ``1 / (now - time)``
   of a merged node   its child's             the later of both
insertion             splits get a state      splits get a state where prompt
                      where the prompt        and answer diverge; matches and
                      diverges                refreshes a second time
room is made          after the insertion;    before it, for the maximal need;
                      both new checkpoints    nothing is spared
                      are spared
alpha is tuned after  ``(1 + window) * n``    ``window * n`` requests, by
                      requests, by hit        FLOPs saved
                      tokens
====================  ======================  =================================

``alpha=None`` tunes alpha. It is 0 until the first eviction, in request ``n``. All requests up to
the tuning are then replayed with 0, 0.1 ... 2, and the best alpha is used from then on.

A running request holds a state and its uncached tokens from its beginning to its end, as those of
the other rebuilt systems do, and the path that it resumes from is not evicted. Room for both is
made when it begins, and for its answer when that is inserted; without room, the request waits, and
the answer is not kept. The paper and the artifact simulate the tree only (``is_charged=False``):
published figures are compared with that, and alpha is tuned with it.

Not modelled: the artifact can also skip a whole prompt, while here the last token is always
computed, and it continues to match below an edge that it left.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np

from hybridcache.lab.rivals.protocol import BaselineConfig, PeerSession, replay
from hybridcache.lab.traces.prefix_tree import (
    PrefixNode,
    grow,
    merge_into_child,
    new_root,
    nodes,
    remove_leaf,
    walk,
)
from hybridcache.radix.tokens import Tokens

Reading = Literal["paper", "artifact"]
ALPHAS = tuple(round(0.1 * step, 1) for step in range(21))
WINDOW = 5
"""Multiple of the requests before the first eviction after which alpha is tuned."""


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """Forward FLOPs of ``length`` tokens by layer kind."""

    num_attention: int
    num_mlp: int
    attention_token: float
    """In one attention layer, of a token without attention to others."""
    attention_pair: float
    """In one attention layer, for each of ``length ** 2`` pairs."""
    mlp_token: float
    """Of a token in all MLPs."""
    linear_token: float
    """Of a token in all linear layers."""

    @classmethod
    def of(cls, config: BaselineConfig) -> LayerFlops:
        """Return the FLOPs of the model of a config. All weights and recurrences count as MLP,
        which changes no efficiency of the paper's reading."""
        num_attention = max(1, config.num_full_layers)
        # Each token attends to all before it and to itself: length * (length + 1) / 2 pairs.
        pair = config.pair_flops / num_attention / 2
        num_mlp = config.num_full_layers + config.num_linear_layers
        return cls(num_attention, num_mlp, pair, pair, config.token_flops, 0.0)

    def one_attention(self, length: int) -> float:
        """Return the FLOPs of one attention layer."""
        return self.attention_token * length + self.attention_pair * length**2

    def attention(self, length: int) -> float:
        """Return the FLOPs of all attention layers."""
        return self.num_attention * self.one_attention(length)

    def total(self, length: int) -> float:
        """Return the FLOPs of the whole model."""
        return self.attention(length) + (self.mlp_token + self.linear_token) * length


HIDDEN, STATE = 4096, 128
PAPER_7B = LayerFlops(
    num_attention=4,
    num_mlp=28,
    attention_token=8.0 * HIDDEN**2,
    attention_pair=4.0 * HIDDEN,
    mlp_token=28 * 16.0 * HIDDEN**2,
    linear_token=24 * (12.0 * HIDDEN**2 + 16.0 * HIDDEN * STATE + 10.0 * HIDDEN),
)
"""FLOPs as counted in the paper, of its 7B model."""


class MarconiCache:
    """Marconi cache in one of its readings, with one byte budget.

    Args:
        config: Budget and sizes.
        reading: ``paper`` or ``artifact``.
        alpha: Weight of the efficiency, or None to tune it.
        leaf_lru: True for the paper's baseline SGLang+.
        is_charged: False if running requests hold no memory, as in the published simulations.
        grid: Distance of possible states in tokens, in the reading ``paper``. Marconi saves at any
            token, which kernels that compute in chunks cannot.
    """

    def __init__(
        self,
        config: BaselineConfig,
        reading: Reading = "paper",
        alpha: float | None = None,
        leaf_lru: bool = False,
        is_charged: bool = True,
        grid: int = 1,
    ) -> None:
        self.config = config
        self.reading: Reading = reading
        self.alpha = alpha or 0.0
        self.flops = LayerFlops.of(config) if config.token_flops else PAPER_7B
        self.leaf_lru = leaf_lru
        self.is_charged = is_charged
        self.grid = max(1, grid // config.unit)
        self.kv_bytes = config.kv_bytes_per_token * config.unit
        self.used_bytes = 0
        """Bytes of the tree."""
        self.running: dict[MarconiSession, int] = {}
        """Bytes that each running request holds in addition to the tree."""
        self.clock = 0
        self.flops_saved = 0.0
        self.hit_tokens = 0
        self.roots: dict[Hashable, PrefixNode] = {}
        self.candidates: dict[PrefixNode, None] = {}
        self._wait = WINDOW + 1 if reading == "paper" else WINDOW
        is_tuned = alpha is None and not leaf_lru
        self._recorded: list[tuple[Tokens, Tokens, Hashable]] | None = [] if is_tuned else None
        """Requests from the start, because alpha has no effect before the first eviction; None if
        alpha is fixed."""
        self._tuned_at: int | None = None
        """Number of recorded requests at which alpha is tuned; None before the first eviction."""

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> MarconiSession | None:
        """Match ``tokens`` and start a request. None if it must wait. O(prompt)."""
        root = self.roots.setdefault(namespace, new_root())
        node = self._match(root, tokens[:-1])
        session = MarconiSession(self, root, tokens, node, node.depth, namespace)
        uncached = (len(tokens) - node.depth) * self.kv_bytes
        if not self._hold(session, uncached + self.config.state_bytes):
            return None
        self.hit_tokens += node.depth
        self.flops_saved += self.flops.total(node.depth * self.config.unit)
        return session

    def finished(self, session: MarconiSession, output: Tokens) -> None:
        """Insert a finished request if its answer fits, and tune alpha if it is due."""
        root, tokens, namespace = session.root, session.tokens, session.namespace
        whole = np.concatenate([tokens, output])
        walked, matched = walk(root, whole)
        fork_bytes = self.config.state_bytes if matched < walked.depth else 0
        is_kept = self._hold(session, len(output) * self.kv_bytes + fork_bytes)
        self.running.pop(session, None)
        if self.reading == "paper":
            if is_kept:
                self._insert_then_evict(root, tokens, whole)
            self._learn(tokens, output, namespace)
        else:
            self._learn(tokens, output, namespace)
            if is_kept:
                self._evict_then_insert(root, whole)
        self._fit()

    def check(self) -> None:
        """Raise AssertionError unless the bytes and the candidates match the tree. O(tree)."""
        used = 0
        for node in chain.from_iterable(map(nodes, self.roots.values())):
            used += len(node.tokens) * self.kv_bytes + node.has_state * self.config.state_bytes
            assert (node in self.candidates) == (len(node.children) <= 1), "candidates are stale"
        assert used == self.used_bytes, f"counted {self.used_bytes} bytes, the tree has {used}"
        assert not self.is_charged or self._excess_bytes() <= 0, "more memory than the budget"

    def _hold(self, session: MarconiSession, num_bytes: int) -> bool:
        """Give ``session`` more memory, evicting for it. False if other requests leave too little;
        then nothing is evicted."""
        if not self.is_charged:
            return True
        held = self._pinned() | set(session.node.path())
        kept = sum(
            len(n.tokens) * self.kv_bytes + n.has_state * self.config.state_bytes for n in held
        )
        if kept + sum(self.running.values()) + num_bytes > self.config.budget_bytes:
            return False
        self.running[session] = self.running.get(session, 0) + num_bytes
        self._fit()
        return True

    def _pinned(self) -> set[PrefixNode]:
        """Return the nodes that running requests resumed from, and those above them."""
        return {node for session in self.running for node in session.node.path()}

    def _excess_bytes(self) -> int:
        """Return the bytes of the tree and of running requests beyond the budget."""
        return self.used_bytes + sum(self.running.values()) - self.config.budget_bytes

    def _fit(self) -> None:
        """Evict until running requests have their memory (the artifact miscounts leaves)."""
        while self.is_charged and (missing := self._excess_bytes()) > 0:
            assert self.candidates.keys() - self._pinned(), "running requests hold too much"
            self._evict(missing, set())

    def _match(self, root: PrefixNode, tokens: Tokens) -> PrefixNode:
        """Return the deepest whole node with a state, and refresh it (``leaf_lru``: its path)."""
        self.clock += 1
        node, matched = walk(root, tokens)
        while node.parent is not None and not (node.has_state and node.depth <= matched):
            node = node.parent
        for step in list(node.path()) if self.leaf_lru else [node]:
            step.time = self.clock
        return node

    def _insert_then_evict(self, root: PrefixNode, tokens: Tokens, whole: Tokens) -> None:
        """Insert, save at the branch point and at the answer's end, then evict to the budget."""
        self.clock += 1
        walked, matched = walk(root, tokens)
        branch = matched // self.grid * self.grid if matched < walked.depth else 0
        whole = whole[: len(whole) // self.grid * self.grid]
        tail, new = root, 0
        for part in (whole[:branch], whole) if branch else (whole,):
            tail, added, _ = grow(*walk(root, part), part)
            new += added
        self.used_bytes += new * self.kv_bytes
        fresh = {node for node in tail.path() if node is tail or node.depth == branch} - {root}
        for node in fresh:
            self._save(node)
        for node in tail.path():
            self._list(node)
        self._evict(self._excess_bytes(), fresh)

    def _evict_then_insert(self, root: PrefixNode, whole: Tokens) -> None:
        """Evict for the whole text and at most two states, then insert."""
        self.clock += 1
        reusable = self._match(root, whole)
        _, matched = walk(root, whole)
        num_states = 1 + (matched > reusable.depth)
        needed = num_states * self.config.state_bytes + (len(whole) - matched) * self.kv_bytes
        self._evict(self._excess_bytes() + needed, set())
        tail, new, fork = grow(*walk(root, whole), whole)
        self.used_bytes += new * self.kv_bytes
        for node in (tail, fork):
            if node is not None and not node.has_state:
                self._save(node)
        for node in tail.path():
            self._list(node)

    def _save(self, node: PrefixNode) -> None:
        node.time = self.clock
        if not node.has_state:
            node.has_state = True
            self.used_bytes += self.config.state_bytes

    def _list(self, node: PrefixNode) -> None:
        self.candidates.pop(node, None)
        if node.parent is not None and len(node.children) <= 1:
            self.candidates[node] = None

    def _evict(self, missing: int, spared: set[PrefixNode]) -> None:
        if missing <= 0:
            return
        if self._recorded is not None and self._tuned_at is None:
            self._tuned_at = self._wait * max(1, len(self._recorded))
        if self.reading != "paper":
            self.clock += 1
        spared = spared | self._pinned()
        while missing > 0:
            pool = [node for node in self._pool() if node not in spared]
            if not pool:
                return
            victim = pool[int(np.argmin(self._scores(pool)))]
            if self.reading != "artifact" or victim.children:
                missing -= self._own_bytes(victim)
            else:  # It counts the tokens of the node that it walked last.
                missing -= len(pool[-1].tokens) * self.kv_bytes + self.config.state_bytes
            self._remove(victim)

    def _pool(self) -> Iterator[PrefixNode]:
        """Return the candidates, in the order that breaks ties."""
        if self.leaf_lru:
            return (node for node in self.candidates if not node.children)
        if self.reading == "paper":
            return iter(self.candidates)
        every = chain.from_iterable(map(nodes, self.roots.values()))
        return (node for node in every if len(node.children) <= 1)

    def _own_bytes(self, node: PrefixNode) -> int:
        """Return the bytes freed by evicting ``node``."""
        kv = 0 if node.children else len(node.tokens) * self.kv_bytes
        return kv + node.has_state * self.config.state_bytes

    def _remove(self, node: PrefixNode) -> None:
        self.used_bytes -= self._own_bytes(node)
        del self.candidates[node]
        if not node.children:
            self._list(remove_leaf(node))
            return
        child = merge_into_child(node)
        if self.reading != "paper":
            child.time = max(child.time, node.time)

    def _scores(self, pool: list[PrefixNode]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        times = np.array([node.time for node in pool], dtype=np.float64)
        if self.leaf_lru:
            return times
        recency = times if self.reading == "paper" else 1.0 / (self.clock - times)
        score = _normalised(recency)
        if self.alpha:
            score = score + self.alpha * _normalised(np.array([self._efficiency(n) for n in pool]))
        return score

    def _efficiency(self, node: PrefixNode) -> float:
        """Compute Eq. 1 in the arithmetic of the reading."""
        assert node.parent is not None
        unit, flops = self.config.unit, self.flops
        total, above = node.depth * unit, node.parent.depth * unit
        saved = flops.attention(total) - flops.attention(above)
        saved += flops.linear_token * (total - above) + flops.mlp_token * total
        kv_tokens = len(node.tokens)
        if self.reading == "artifact":
            saved -= flops.num_mlp * flops.one_attention(above)
            kv_tokens = node.depth
        else:
            saved -= flops.mlp_token * above
        return saved / (kv_tokens * self.kv_bytes + self.config.state_bytes)

    def _learn(self, tokens: Tokens, output: Tokens, namespace: Hashable) -> None:
        """Record a request, and tune alpha by replays if enough are recorded."""
        if self._recorded is None:
            return
        self._recorded.append((tokens, output, namespace))
        if self._tuned_at is not None and len(self._recorded) >= self._tuned_at:
            # max returns the first of equal ones, which is the smallest alpha.
            self.alpha = max(ALPHAS, key=partial(self._saved, self._recorded))
            self._recorded = None

    def _saved(self, requests: list[tuple[Tokens, Tokens, Hashable]], alpha: float) -> float:
        """Return the tokens or FLOPs that an empty cache with a fixed ``alpha`` saves."""
        twin = MarconiCache(self.config, self.reading, alpha, is_charged=False)
        for tokens, output, namespace in requests:
            replay(twin, tokens, output, namespace)
        return twin.hit_tokens if self.reading == "paper" else twin.flops_saved


@dataclass(slots=True, eq=False)
class MarconiSession(PeerSession):
    """One running request, and the node that it resumed from."""

    cache: MarconiCache
    root: PrefixNode
    tokens: Tokens
    node: PrefixNode
    cached_len: int
    namespace: Hashable
    num_chunks: int = 1

    def finish(self, output: Tokens) -> None:
        """Insert the prompt and its answer. Call once."""
        self.cache.finished(self, output)


def _normalised(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
