"""Router by the prompts sent to each replica, without cache events, and its radix tree.

The tree models no eviction except its size limit, so it can report matches that a replica has
evicted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from hybridcache.routing.protocol import Choice, ReplicaId, ReplicaSpec, Router, RouteRequest
from hybridcache.tokens import common_tuple_len

KEPT = 0.9
"""Fraction of ``max_tokens`` that remains after a replica's record exceeds the limit."""


class _TextNode:
    __slots__ = ("children", "last_use", "parent", "tokens")

    def __init__(self, tokens: tuple[int, ...], parent: _TextNode | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[int, _TextNode] = {}
        self.last_use: dict[ReplicaId, int] = {}
        """Time of the last prompt through this node, by replica."""


class TextTree:
    """Prompts by replica, at most ``max_tokens`` each. Evicts least recently used leaves first.

    ``insert`` is O(len(tokens)), amortised with its evictions; ``match`` is O(len(tokens)).
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens: dict[ReplicaId, int] = {}
        """Number of recorded tokens, by replica. Replicas without any are absent."""
        self._roots: dict[Hashable, _TextNode] = {}
        self._uses = 0

    def match(
        self, tokens: tuple[int, ...], namespace: Hashable = None
    ) -> tuple[int, dict[ReplicaId, int]]:
        """Return the length of the longest known prefix, and the length that was sent to each
        replica with a match."""
        reached: dict[ReplicaId, int] = {}
        node = self._roots.get(namespace)
        end = 0
        while node is not None and end < len(tokens):
            child = node.children.get(tokens[end])
            if child is None:
                break
            common = common_tuple_len(child.tokens, tokens[end : end + len(child.tokens)])
            end += common
            for replica in child.last_use:
                reached[replica] = end
            if common < len(child.tokens):
                break
            node = child
        return end, reached

    def insert(
        self, tokens: tuple[int, ...], replica: ReplicaId, namespace: Hashable = None
    ) -> None:
        """Record that ``tokens`` were sent to ``replica``."""
        self._uses += 1
        node = self._roots.setdefault(namespace, _TextNode((), None))
        end = 0
        while end < len(tokens):
            child = node.children.get(tokens[end])
            if child is None:
                child = node.children[tokens[end]] = _TextNode(tokens[end:], node)
            else:
                common = common_tuple_len(child.tokens, tokens[end : end + len(child.tokens)])
                if common < len(child.tokens):
                    child = self._split(child, common)
            if replica not in child.last_use:
                held = self.num_tokens.get(replica, 0)
                self.num_tokens[replica] = held + len(child.tokens)
            child.last_use[replica] = self._uses
            end += len(child.tokens)
            node = child
        if self.num_tokens.get(replica, 0) > self.max_tokens:
            self._evict(replica, int(KEPT * self.max_tokens))

    def forget(self, replica: ReplicaId) -> None:
        """Remove all records of ``replica``. O(tree log tree)."""
        self._evict(replica, 0)

    def _split(self, lower: _TextNode, at: int) -> _TextNode:
        """Split ``lower`` after ``at`` tokens. Returns the new parent."""
        assert lower.parent is not None
        upper = _TextNode(lower.tokens[:at], lower.parent)
        upper.last_use = dict(lower.last_use)
        lower.parent.children[lower.tokens[0]] = upper
        lower.tokens, lower.parent = lower.tokens[at:], upper
        upper.children[lower.tokens[0]] = lower
        return upper

    def _evict(self, replica: ReplicaId, wanted: int) -> None:
        """Reduce the record of ``replica`` to ``wanted`` tokens. O(tree log tree)."""
        nodes = [node for node in self._leaves_first() if replica in node.last_use]
        # A parent is used whenever its child is: a stable sort keeps leaves before their parents.
        nodes.sort(key=lambda node: node.last_use[replica])
        for node in nodes:
            if self.num_tokens.get(replica, 0) <= wanted:
                break
            del node.last_use[replica]
            self.num_tokens[replica] -= len(node.tokens)
            if not node.last_use:
                assert node.parent is not None and not node.children
                del node.parent.children[node.tokens[0]]
        if not self.num_tokens.get(replica):
            self.num_tokens.pop(replica, None)
        self._roots = {name: root for name, root in self._roots.items() if root.children}

    def _leaves_first(self) -> Iterator[_TextNode]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        found = []
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return reversed(found)

    def check(self) -> None:
        """Raise AssertionError unless counts match the nodes and the limit holds. O(tree)."""
        held: dict[ReplicaId, int] = {}
        for node in self._leaves_first():
            assert node.tokens and node.last_use
            for replica, use in node.last_use.items():
                held[replica] = held.get(replica, 0) + len(node.tokens)
                parent = node.parent
                assert parent is not None and use <= parent.last_use.get(replica, self._uses)
                assert parent.parent is None or replica in parent.last_use
            for first, child in node.children.items():
                assert child.tokens[0] == first and child.parent is node
        assert held == self.num_tokens
        assert all(num_tokens <= self.max_tokens for num_tokens in held.values())


MAX_TREE_TOKENS = 1 << 24
"""Limit of the gateway, 2**26 characters, at four characters per token."""
CACHE_THRESHOLD = 0.3
BALANCE_ABS, BALANCE_REL = 64, 1.5


class CacheAware(Router):
    """Rule ``cache_aware`` of SGLang's gateway, with its defaults, but counting tokens in place of
    characters. It estimates the contents of caches from the prompts that it sent.

    - While one replica has over ``BALANCE_ABS`` requests more than another, and over
      ``BALANCE_REL`` times as many, choose the least loaded replica.
    - Otherwise choose the longest match, if it exceeds ``CACHE_THRESHOLD`` of the prompt.
    - Otherwise choose the replica with the fewest recorded tokens.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self.tree = TextTree(max(1, MAX_TREE_TOKENS // spec.unit))

    def left(self, replica: ReplicaId, now: float) -> tuple[object, ...]:
        lost = super().left(replica, now)
        self.tree.forget(replica)
        return lost

    def smallest(self) -> ReplicaId:
        """Return the replica with the fewest recorded tokens."""
        return min(self.loads, key=lambda replica: self.tree.num_tokens.get(replica, 0))

    def choose(self, request: RouteRequest, now: float) -> Choice:
        counts = [load.num_running for load in self.loads.values()]
        most, fewest = max(counts), min(counts)
        expected = 0
        if most - fewest > BALANCE_ABS and most > BALANCE_REL * fewest:
            chosen = self.least_loaded()
        else:
            _, reached = self.tree.match(request.tokens, request.namespace)
            chosen = max(reached, key=lambda each: reached[each], default=self.smallest())
            expected = reached.get(chosen, 0)
            if expected <= CACHE_THRESHOLD * len(request.tokens):
                chosen, expected = self.smallest(), 0
        self.tree.insert(request.tokens, chosen, request.namespace)
        return Choice(chosen, expected)

    def check(self) -> None:
        super().check()
        self.tree.check()
        assert self.tree.num_tokens.keys() <= self.loads.keys()
