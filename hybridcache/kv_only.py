"""RadixCache: the classic tree for attention-only models, and the control for the hybrid one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from hybridcache.hybrid import EVICTED, HybridRadixCache, Receipt
from hybridcache.radix.ghosts import read_ghosts
from hybridcache.radix.node import RadixNode
from hybridcache.results import InsertResult, Losses, PrefixMatch
from hybridcache.tokens import INT32, Indices, Tokens, require_int32


class PathPart(NamedTuple):
    """The first ``length`` tokens of the path to ``node``: a hit may end inside an edge, and a
    match splits nothing."""

    node: RadixNode
    length: int

    def last(self) -> RadixNode:
        """The node that the part ends in, or at: splits since the match put nodes above ``node``.
        O(those)."""
        node = self.node
        while node.start >= self.length:
            assert node.parent is not None
            node = node.parent
        return node


class RadixCache(HybridRadixCache):
    """KV alone is enough to resume, at any multiple of grid and page. Takes no checkpoints.

    Made with ``ItemBytes(state=0)``, so that no KV is ever dead for want of a checkpoint.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(prefix_cache="radix", num_kv_tokens=100, grid=4))
    >>> result = cache.insert(np.arange(10, dtype=np.int32), cache.allocate_kv(10))
    >>> cache.match(np.arange(7, dtype=np.int32)).cached_len
    4
    """

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Read how much of ``tokens`` is cached and why not more. Changes nothing. O(n)."""
        if getattr(tokens, "dtype", None) is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        num_tokens = len(tokens)
        root = self._tree.find_root(namespace)
        if root is None:
            losses = Losses(num_tokens, 0, 0, 0, 0)
            return PrefixMatch(num_tokens, 0, 0, 0, None, losses, None, namespace)
        node, inside, kv_len = self._tree.walk(root, tokens)
        branch_len = kv_len
        if inside is None and node.ghosts:
            branch_len, _, _ = read_ghosts(self._tree, node, tokens)
        reachable = min(kv_len, num_tokens - 1)
        cached_len = max(reachable - reachable % self._step, 0)
        losses = Losses(num_tokens - branch_len, branch_len - kv_len, 0, 0, kv_len - cached_len)
        part = None
        if cached_len:
            deepest = inside if inside is not None else node
            part = PathPart(PathPart(deepest, cached_len).last(), cached_len)
        return PrefixMatch(
            num_tokens, cached_len, kv_len, branch_len, None, losses, part, namespace
        )

    def continuation(
        self,
        tokens: Tokens,
        max_tokens: int,
        namespace: Hashable = None,
        after: PathPart | RadixNode | None = None,
    ) -> Tokens:
        """Up to ``max_tokens`` ids that followed ``tokens`` before; see
        ``PrefixCache.continuation``. O(n), or what lies behind ``after``."""
        node = after.last().parent if isinstance(after, PathPart) else after
        return super().continuation(tokens, max_tokens, namespace, node)

    def gather(self, node: PathPart | RadixNode | None) -> Indices:
        """KV indices of ``match.node`` or ``result.node``. O(position)."""
        if isinstance(node, PathPart):
            return super().gather(node.last())[: node.length]
        return super().gather(node)

    def touch(self, match: PrefixMatch) -> None:
        """Count one request: refresh what it resumes from, record hits and losses. O(1)."""
        node = None if match.node is None else match.node.last()
        super().touch(match._replace(node=node))

    def lock(self, node: PathPart | RadixNode | None) -> Receipt:
        """Protect the path's KV, and nothing past it: an edge is split where a hit ends inside.
        O(page). ValueError: it was evicted."""
        if isinstance(node, PathPart):
            last = node.last()
            if last.kv is None:
                raise ValueError(EVICTED)
            node = self._residency.split(last, node.length) if last.end > node.length else last
        return super().lock(node)

    def insert(
        self,
        tokens: Tokens,
        kv_indices: Indices,
        checkpoints: Sequence[tuple[int, int]] = (),
        namespace: Hashable = None,
        owned_from: int = 0,
        labels: Sequence[str] = (),
        after: Any = None,
    ) -> InsertResult:
        """Publish ``tokens`` with their rows; every checkpoint is handed back."""
        node = after.last() if isinstance(after, PathPart) else after
        rejected_slots = tuple(slot for _, slot in checkpoints)
        result = super().insert(tokens, kv_indices, (), namespace, owned_from, (), node)
        return result._replace(rejected_slots=rejected_slots)
