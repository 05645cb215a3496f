"""SGLang 0.5.23 with its host pool (HiCache) under the hybrid radix cache.

Source: the published behaviour of its unified tree, Mamba component and hybrid cache controller,
defaults (``write_through``). Rules in addition to those of ``sglang``:

- *Two host pools*, KV and states, in the proportion of the device's two.
- *Write-through*: when a prompt or an answer is inserted, each node of its path without a host
  copy gets one at once. KV and state are copied together, parents first, until the first node for
  which there is no room. A state added later to a node is copied then. So everything on the
  device has a host copy.
- *Recency* of a node: a match refreshes the path of the node at which it ends. An insert
  refreshes the path that it walks. A split refreshes the lower part too.
- *Room in the KV pool* comes from leaves without KV on the device, least recently used first, and
  their states. Room in the state pool comes from states without a device copy, least recently
  used first: a leaf is deleted whole, elsewhere only the state. Entries that are also on the
  device are never evicted from the host.
- *Eviction from the device* of a node with a host copy frees its KV and its state there and keeps
  the node; a node without one is deleted. A leaf is a node without children that have KV on the
  device.
- *A match* may end at any node with KV and state on either side. It is then loaded at any cost: KV
  to the tree, the state twice, to the tree and to the request. If the device has no room, the
  request resumes at the deepest node that is complete on the device. A load keeps the host copies.
- An insert over a node without KV on the device gives it the request's rows.

Left out: ``write_back`` and ``write_through_selective``, storage below the host, prefetch, copies
that are still in progress, and the rule against loading fewer than ten tokens without a state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from sortedcontainers import SortedDict

from hybridcache.lab.baselines.prefix_tree import (
    PrefixNode,
    grow,
    new_root,
    nodes,
    remove_leaf,
    split,
    walk,
)
from hybridcache.lab.baselines.protocol import BaselineConfig
from hybridcache.lab.baselines.sglang import PlacementWord, SglangCache, SglangSession
from hybridcache.tokens import Tokens


class HicacheCache(SglangCache):
    """SGLang 0.5.23 with ``host_bytes`` of host memory. ``num_host_tokens`` and ``num_host_slots``
    override the split."""

    def __init__(
        self,
        config: BaselineConfig,
        placement: PlacementWord = "extra_buffer",
        max_states_per_path: int | None = None,
        num_kv_tokens: int | None = None,
        num_slots: int | None = None,
        num_host_tokens: int | None = None,
        num_host_slots: int | None = None,
    ) -> None:
        super().__init__(config, placement, max_states_per_path, num_kv_tokens, num_slots)
        row_bytes = config.kv_bytes_per_token * config.unit
        kv_bytes, state_bytes = self.num_tokens * row_bytes, self.num_slots * config.state_bytes
        whole = max(1, kv_bytes + state_bytes)
        if num_host_tokens is None:
            num_host_tokens = config.host_bytes * kv_bytes // whole // row_bytes
        if num_host_slots is None:
            num_host_slots = config.host_bytes * state_bytes // whole // config.state_bytes
        self.row_bytes = row_bytes
        self.num_host_tokens = self.free_host_tokens = num_host_tokens
        self.num_host_slots = self.free_host_slots = num_host_slots
        self.host_leaves: SortedDict[int, PrefixNode] = SortedDict()
        """Nodes that may be evicted to make room for KV, by recency."""
        self.host_states: OrderedDict[PrefixNode, None] = OrderedDict()
        """Nodes with their state in host memory alone."""

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> SglangSession | None:
        """Begin as ``SglangCache.begin``, and load the part of the prefix that only host memory
        has. O(prompt)."""
        root = self.roots.setdefault(namespace, new_root())
        best, kv_len = self.match(root, tokens[:-1])
        session = SglangSession(self, root, tokens, best)
        if not self._is_here(best) and not self._fetch(session):
            session.abort()
            while not self._is_here(best):
                assert best.parent is not None
                best = best.parent
            session = SglangSession(self, root, tokens, best)
        if not session.prefill(kv_len):
            session.abort()
            return None
        return session

    def match(self, root: PrefixNode, tokens: Tokens) -> tuple[PrefixNode, int]:
        """Match as ``SglangCache.match``; the node's KV or state may be in host memory alone."""
        node, matched = walk(root, tokens)
        if matched < node.depth:
            lower, node = node, split(node, matched)
            self._touch(node)
            self._touch(lower)
        while node.parent is not None and not (node.has_state or node.has_host_state):
            node = node.parent
        if node.has_state:
            self.states.move_to_end(node)
        self.refresh(node)
        return node, matched

    def insert(self, root: PrefixNode, tokens: Tokens) -> PrefixNode:
        """Insert as ``SglangCache.insert``, with a copy of everything in host memory."""
        walked, _ = walk(root, tokens)
        for step in reversed(list(walked.path())):
            self._touch(step)
        node, new, fork = grow(root, tokens)
        if fork is not None:
            self._touch(fork)
            self._touch(walked)
        for step in node.path():
            if not step.has_kv:
                step.has_kv = True
                new += len(step.tokens)
        self.held_tokens -= new
        self.held_slots -= 1
        if node.has_state:
            self.free_slots += 1
            self.states.move_to_end(node)
        else:
            self._put_state(node)
        self._touch(node)
        for step in node.path():
            self._unlist(step)
            self.list_leaf(step)
        self._write_through(node)
        self._cap_path(node)
        return node

    def list_leaf(self, node: PrefixNode) -> None:
        """Make ``node`` a candidate, of the device or of host memory, if it qualifies.
        O(children)."""
        if node.parent is None or node.locks:
            return
        if not node.has_kv:
            if not node.children:
                self.host_leaves[node.time] = node
        elif not any(child.has_kv for child in node.children.values()):
            self.leaves[node.time] = node

    def unlist_leaf(self, node: PrefixNode) -> None:
        """Remove a node from the candidates if it is one."""
        self._unlist(node)

    def drop_state(self, node: PrefixNode) -> None:
        """Free a node's slot on the device."""
        super().drop_state(node)
        if node.has_host_state:
            self.host_states[node] = None

    def drop_leaf(self, leaf: PrefixNode) -> None:
        """Free a leaf's KV and state on the device; the node is kept if host memory has its KV."""
        if leaf.has_state:
            self.drop_state(leaf)
        self.free_tokens += len(leaf.tokens)
        parent = leaf.parent
        assert parent is not None
        if leaf.has_host_kv:
            leaf.has_kv = False
            self.list_leaf(leaf)
        else:
            assert not leaf.children
            remove_leaf(leaf)
        self.list_leaf(parent)

    def check(self) -> None:
        """Check as ``SglangCache.check``, for both memories. Also checks that no child is on the
        device without its parent."""
        cached = stored = 0
        found: dict[str, set[PrefixNode]] = {
            "states": set(), "leaves": set(), "host states": set(), "host leaves": set()
        }  # fmt: skip
        num_host_states = 0
        for root in self.roots.values():
            for node in nodes(root):
                cached += node.has_kv * len(node.tokens)
                stored += node.has_host_kv * len(node.tokens)
                num_host_states += node.has_host_state
                assert node.has_kv or node.has_host_kv, "a node that is nowhere"
                assert node.has_kv or not node.has_state, "a state without KV under it"
                assert node.has_host_kv or not node.has_host_state, "the same in host memory"
                above = node.parent
                if above is not None and above.parent is not None:
                    assert above.has_kv or not node.has_kv, "KV on the device under a hole"
                    assert above.has_host_kv or not node.has_host_kv, "the same in host memory"
                if node.has_state:
                    found["states"].add(node)
                elif node.has_host_state:
                    found["host states"].add(node)
                if node.locks:
                    continue
                if not node.has_kv and not node.children:
                    found["host leaves"].add(node)
                elif node.has_kv and not any(one.has_kv for one in node.children.values()):
                    found["leaves"].add(node)
        assert self.free_tokens + cached + self.held_tokens == self.num_tokens, "KV books"
        used = len(found["states"]) + self.held_slots
        assert self.free_slots + used == self.num_slots, "slot books"
        assert self.free_host_tokens + stored == self.num_host_tokens, "host KV books"
        assert self.free_host_slots + num_host_states == self.num_host_slots, "host slot books"
        assert found["states"] == set(self.states), "state list"
        assert found["leaves"] == set(self.leaves.values()), "leaf set"
        assert found["host states"] == set(self.host_states), "host state list"
        assert found["host leaves"] == set(self.host_leaves.values()), "host leaf set"

    def _is_here(self, node: PrefixNode) -> bool:
        return node.parent is None or node.has_state

    def _unlist(self, node: PrefixNode) -> None:
        for candidates in (self.leaves, self.host_leaves):
            if candidates.get(node.time) is node:
                del candidates[node.time]

    def _touch(self, node: PrefixNode) -> None:
        self._unlist(node)
        self.clock += 1
        node.time = self.clock
        self.list_leaf(node)

    def _put_state(self, node: PrefixNode) -> None:
        node.has_state = True
        self.states[node] = None
        self.host_states.pop(node, None)

    def _fetch(self, session: SglangSession) -> bool:
        """Load the KV and the state of the session's locked node to the device. Returns False if
        there is no room; nothing but evictions has then changed."""
        node = session.node
        holes = [step for step in node.path() if not step.has_kv]
        num_tokens = sum(len(step.tokens) for step in holes)
        if not session.take_slot() or not self.allocate_tokens(num_tokens):
            return False
        if not self.allocate_slot():
            self.free_tokens += num_tokens
            self.held_tokens -= num_tokens
            return False
        self.held_tokens -= num_tokens
        self.held_slots -= 1
        for step in holes:
            step.has_kv = True
        self._put_state(node)
        session.fetched_bytes = num_tokens * self.row_bytes + 2 * self.config.state_bytes
        return True

    def _write_through(self, node: PrefixNode) -> None:
        for step in reversed(list(node.path())):
            if not step.has_host_kv:
                if not self._store(step):
                    return
            elif step.has_state and not step.has_host_state and step is node:
                self._store(step)

    def _store(self, node: PrefixNode) -> bool:
        """Copy the parts of ``node`` that host memory lacks. Returns False if there is no room for
        both."""
        num_tokens = 0 if node.has_host_kv else len(node.tokens)
        while self.free_host_tokens < num_tokens and self.host_leaves:
            self._drop_host_leaf(self.host_leaves.peekitem(0)[1])
        if self.free_host_tokens < num_tokens:
            return False
        with_state = node.has_state and not node.has_host_state
        if with_state and not self.free_host_slots and not self._evict_host_state():
            return False
        self.free_host_tokens -= num_tokens
        node.has_host_kv = True
        self.spilled_bytes += num_tokens * self.row_bytes
        if with_state:
            self.free_host_slots -= 1
            node.has_host_state = True
            self.spilled_bytes += self.config.state_bytes
        return True

    def _evict_host_state(self) -> bool:
        if not self.host_states:
            return False
        victim = next(iter(self.host_states))
        if self.host_leaves.get(victim.time) is victim:
            self._drop_host_leaf(victim)
        else:
            self._drop_host_state(victim)
        return True

    def _drop_host_state(self, node: PrefixNode) -> None:
        self.host_states.pop(node, None)
        node.has_host_state = False
        self.free_host_slots += 1

    def _drop_host_leaf(self, leaf: PrefixNode) -> None:
        self._unlist(leaf)
        if leaf.has_host_state:
            self._drop_host_state(leaf)
        self.free_host_tokens += len(leaf.tokens)
        self.list_leaf(remove_leaf(leaf))
