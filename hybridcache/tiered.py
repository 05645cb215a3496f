"""TieredRadixCache: a hybrid cache with host memory, and disk, below the device's."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from hybridcache.core.fetch import adopt, fetch
from hybridcache.core.lower import LowerTiers, Tier
from hybridcache.hybrid import HybridRadixCache
from hybridcache.radix.node import RadixNode
from hybridcache.results import PrefixMatch, Resumable
from hybridcache.tokens import Indices, Tokens, require_int32


class TieredRadixCache(HybridRadixCache):
    """What is evicted from the device goes to the next tier that lets it in, and can be fetched.

    ``lower``: the tiers, their rows, and the ``orders`` that the owner of the tensors carries out
    (``allocators.orders``). Made by ``CacheConfig(host_bytes=..., disk_bytes=...)``.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> config = CacheConfig(
    ...     num_kv_tokens=16,
    ...     num_slots=1,
    ...     grid=4,
    ...     kv_bytes_per_token=2,
    ...     state_bytes=8,
    ...     host_bytes=64,
    ... )
    >>> cache, prompt = build_prefix_cache(config), np.arange(10, dtype=np.int32)
    >>> _ = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
    >>> cache.evict(num_tokens=10)
    Eviction(num_tokens=10, num_slots=1)
    >>> match = cache.match(prompt)
    >>> match.cached_len, [(one.position, one.rows) for one in match.lower]
    (0, [(8, (12,))])
    >>> cache.fetch(match.lower[0]), cache.match(prompt).cached_len
    (True, 8)
    >>> [(order.kind, order.src_tier, order.dst_tier) for order in cache.lower.orders.take()]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('checkpoint', 'device', 'host'), ('kv', 'device', 'host'),
     ('kv', 'host', 'device'), ('checkpoint', 'host', 'device')]
    >>> cache.check(held_tokens=0, held_slots=0)
    """

    lower: LowerTiers

    def attach(
        self, tiers: tuple[Tier, ...], state_rows: int, make: type[LowerTiers] = LowerTiers
    ) -> None:
        """Use ``tiers``, the nearest first, in which a state takes ``state_rows`` rows, before
        anything is cached. ``make``: another rule for what goes there, of a study."""
        residency = self._residency
        lower = make(tiers, residency.ghosts, residency.item_bytes, state_rows)
        self.lower = residency.lower = lower
        if self.arena is not None:
            self.arena.holders[lower.orders] = None

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """As ``HybridRadixCache.match``, with what lower tiers could bring. O(n)."""
        found = super().match(tokens, namespace)
        root = self._tree.find_root(namespace)
        if root is None:
            return found
        node, inside, _ = self._tree.walk(root, tokens)
        if inside is None and node.ghosts:
            node, _, _ = self._tree.walk(node, tokens[node.end :], ghosts=True)
        lower = self._resumable(node, found.cached_len, found.num_tokens)
        return found._replace(lower=lower) if lower else found

    def _resumable(
        self, node: RadixNode, cached_len: int, num_tokens: int
    ) -> tuple[Resumable, ...]:
        """States on the path of ``node`` past ``cached_len`` to which all KV is somewhere. O(nodes
        of the path)."""
        path = []
        while node.parent is not None and node.end > cached_len:
            path.append(node)
            node = node.parent
        found, num_rows = [], [0] * len(self.lower.tiers)
        for node in reversed(path):
            below = node.below
            if node.kv is None:
                if below is None or below.kv is None:
                    break
                num_rows[below.kv_tier] += len(below.kv)
            if below is not None and below.state is not None and node.end < num_tokens:
                rows = list(num_rows)
                rows[below.state.tier] += self.lower.state_rows
                found.append(Resumable(node.end, tuple(rows), node))
        return tuple(found)

    def fetch(self, resumable: Resumable) -> bool:
        """Bring to the device what ``resumable``, of the latest ``match``, needs. False: no room.

        The tree says at once that it is there; its bytes follow by ``lower.orders``. O(tokens
        fetched), and what making room costs.
        """
        return fetch(self._residency, self.lower, resumable.node)

    def adopt(
        self, tokens: Tokens, namespace: Hashable = None, tier: str = "disk"
    ) -> tuple[int, Indices, Indices] | None:
        """Make known that ``tier`` holds the KV of ``tokens`` and the state after them: what an
        earlier process left there.

        Returns (start, KV rows of tokens[start:], rows of the state), taken in ``tier`` for what is
        not known yet; None: it is known, or there is no room. Makes no orders: the bytes are there.
        ValueError: not int32[n], n no multiple of the grid and the page, no such tier. O(n).
        """
        require_int32(tokens, "tokens")
        if tier not in self.lower.words:
            raise ValueError(f"no tier {tier!r}; this cache has {', '.join(self.lower.words)}")
        if not len(tokens) or len(tokens) % self._step:
            raise ValueError(f"a state after {len(tokens)} tokens: not a multiple of {self._step}")
        number = self.lower.words.index(tier)
        return adopt(self._residency, self.lower, tokens, namespace, number)

    def drop_lost(self, tier: str, is_lost: Callable[[Indices], bool]) -> None:
        """Forget what ``tier`` cannot give back.

        ``is_lost`` gets the rows of one state, or of the KV of one node. What cannot be resumed
        without them is freed too, in this tier and in those after it. Call it when no orders are
        pending: rows that an order is about to fill are not lost. O(tree).
        """
        nodes = list(self._tree.nodes())
        self.lower.lose(nodes, self.lower.words.index(tier), is_lost)
        self._residency.ghosts.trim()

    def touch(self, match: PrefixMatch) -> None:
        """As ``HybridRadixCache.touch``; the tier that let go of what was missed is told."""
        super().touch(match)
        if match.missed is not None:
            self.lower.missed(match.missed)

    def reset(self) -> None:
        """Drop everything that is not locked, in all tiers. O(tree)."""
        self.lower.clear()
        self._residency.lower = None
        super().reset()
        self._residency.lower = self.lower
