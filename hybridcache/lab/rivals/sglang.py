"""SGLang 0.5.23's hybrid radix cache: one tree, separate KV and state components and LRUs, static
split.

Source: the published behaviour of its unified radix cache and Mamba component at 0.5.23. Rules that
decide its hit rates:

- A match considers ``prompt - 1`` tokens and ends at the deepest node with a state; only that
  node's state is refreshed. It splits edges, and a split leaves the state on the lower node.
- ``extra_buffer`` saves one state per extend: at ``prefix + floor(extend / grid) * grid``, *or
  instead* at the branch point (the length of the KV match, floored to the grid). In decode it
  saves one every 256 tokens. A finished request that crossed no such boundary keeps nothing of its
  answer. ``end`` saves one state at the very end of the request.
- KV is evicted leaf by leaf, least recently used, together with a leaf's state. States are evicted
  least recently used: an inner node becomes a tombstone, and a leaf also loses its KV.
- ``max_states_per_path`` drops the shallowest states of the inserted path beyond it, never the tail
  or a fork.
- Memory is split between states and KV in the ratio 0.9, once.
- A running request holds a live state and, with ``extra_buffer``, two more to save to, from its
  admission to its end. At most a fifth as many requests as slots (``end``: a third) run at once.

With ``sessions`` (its flag ``--enable-session-radix-cache``, pull request 29173), the newest state
of each branch of an open session is evicted after all others, and so is the KV of its whole text,
that of fewer sessions first. A state whose KV a session still uses is evicted without the KV. A
request whose answer saves no state leaves its session where it was.

Left out: pages of more than one token, the host tier (HiCache), speculative decoding, retraction,
and lazy buffers. The server needs slots for one request to start; here one always runs. The server
sweeps leaves that are left without a state; here they are the next to be evicted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
from sortedcontainers import SortedDict

from hybridcache.lab.rivals.protocol import BaselineConfig, PeerSession
from hybridcache.lab.traces.prefix_tree import (
    PrefixNode,
    grow,
    new_root,
    nodes,
    remove_leaf,
    split,
    walk,
)
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import SESSION_END

STATE_TO_KV_RATIO = 0.9
DECODE_INTERVAL = 256
"""Tokens between states in decode."""

PlacementWord = Literal["end", "extra_buffer"]


class SessionReferences:
    """References of open sessions to their newest states, or to the KV above their ends."""

    def __init__(self, states: OrderedDict[PrefixNode, None] | None) -> None:
        """``states``, the least recently used first, or None for references to KV."""
        self._states = states
        self.counts: Counter[PrefixNode] = Counter()
        self._ends: dict[Hashable, set[PrefixNode]] = {}
        """Nodes at which a session continues, one on each branch."""

    def add(self, session: Hashable, node: PrefixNode) -> None:
        """Let ``session`` continue from the nearest item at or above ``node``."""
        ends, end = self._ends.setdefault(session, set()), self._nearest(node)
        if end is None or end in ends:
            return
        above = next((step for step in islice(end.path(), 1, None) if step in ends), None)
        self._move(above, end)
        ends.add(end)
        if above is not None:
            ends.remove(above)

    def close(self, session: Hashable) -> None:
        for end in self._ends.pop(session, ()):
            self._move(end, None)

    def removed(self, leaf: PrefixNode) -> None:
        """Let sessions that end at a removed leaf continue from the nearest item above it."""
        assert leaf.parent is not None
        for ends in [ends for ends in self._ends.values() if leaf in ends]:
            above = self._nearest(leaf.parent)
            self._move(leaf, None if above in ends else above)
            ends.remove(leaf)
            if above is not None:
                ends.add(above)
        self.counts.pop(leaf, None)

    def check(self) -> None:
        """Raise AssertionError unless the counts are those of the ends. O(ends * depth)."""
        covered = map(self._covered, chain.from_iterable(self._ends.values()))
        assert +self.counts == Counter(chain.from_iterable(covered)), "references of sessions"

    def _nearest(self, node: PrefixNode) -> PrefixNode | None:
        return next((at for at in node.path() if self._states is None or at.has_state), None)

    def _covered(self, end: PrefixNode) -> Iterable[PrefixNode]:
        return end.path() if self._states is None else (end,)

    def _move(self, source: PrefixNode | None, target: PrefixNode | None) -> None:
        """Move a reference along a path. A state that gains the first one, or loses the last one,
        is then the most recently used of its kind."""
        both = (target, 1), (source, -1)
        for node, change in [(at, by) for at, by in both if at is not None]:
            for step in self._covered(node):
                self.counts[step] += change
            if self.counts[node] == (change > 0) and self._states and node in self._states:
                self._states.move_to_end(node)


class SglangCache:
    """SGLang 0.5.23. ``num_kv_tokens`` and ``num_slots`` override the split of the bytes."""

    takes: tuple[str, ...] = ()

    def __init__(
        self,
        config: BaselineConfig,
        placement: PlacementWord = "extra_buffer",
        max_states_per_path: int | None = None,
        num_kv_tokens: int | None = None,
        num_slots: int | None = None,
        sessions: bool = False,
    ) -> None:
        kv_bytes = config.budget_bytes / (1 + STATE_TO_KV_RATIO)
        self.config = config
        self.placement = placement
        self.max_states_per_path = max_states_per_path
        self.grid = max(1, config.grid // config.unit)
        self.decode_interval = max(1, DECODE_INTERVAL // config.unit)
        if num_kv_tokens is None:
            num_kv_tokens = int(kv_bytes // (config.kv_bytes_per_token * config.unit))
        if num_slots is None:
            num_slots = int((config.budget_bytes - kv_bytes) // config.state_bytes)
        self.num_tokens = self.free_tokens = num_kv_tokens
        self.num_slots = self.free_slots = num_slots
        self.held_tokens = self.held_slots = 0
        self.slots_per_request = 3 if placement == "extra_buffer" else 1
        self.num_running, self.max_running = 0, max(1, num_slots // (2 + self.slots_per_request))
        self.clock = 0
        self.roots: dict[Hashable, PrefixNode] = {}
        self.states: OrderedDict[PrefixNode, None] = OrderedDict()
        self.leaves: SortedDict[int, PrefixNode] = SortedDict()
        self.references: tuple[SessionReferences, ...] = ()
        """Those to KV and to states, with ``sessions``."""
        if sessions:
            self.takes = "session", "stop_reason"
            self.references = SessionReferences(None), SessionReferences(self.states)

    def begin(
        self, tokens: Tokens, namespace: Hashable = None, **facts: Any
    ) -> SglangSession | None:
        if self.num_running >= self.max_running:
            return None
        root = self.roots.setdefault(namespace, new_root())
        node, kv_len = self.match(root, tokens[:-1])
        ends = facts.get("stop_reason") == SESSION_END
        session = SglangSession(self, root, tokens, node, facts.get("session"), ends)
        if not session.prefill(kv_len, facts.get("boundaries", ())):
            session.abort()
            return None
        return session

    def positions(
        self, start: int, end: int, cached_len: int, kv_len: int, boundaries: tuple[int, ...]
    ) -> list[int]:
        """Return the positions in (start, end] of an extend at which states are saved, ascending.
        ``kv_len`` is the length of the KV match."""
        if self.placement != "extra_buffer":
            return []
        branch = kv_len // self.grid * self.grid
        position = start + (end - start) // self.grid * self.grid
        is_reached = max(cached_len, start) < branch <= end
        if is_reached and not (branch - start) % self.grid:
            position = branch
        return [position] if position > start else []

    def check(self) -> None:
        """Raise AssertionError if a token or slot is lost or owned twice. O(tree)."""
        everything = [node for root in self.roots.values() for node in nodes(root)]
        cached = sum(len(node.tokens) for node in everything)
        with_state = {node for node in everything if node.has_state}
        leaves = {node for node in everything if not node.children and not node.locks}
        for node in everything:
            assert all(node.locks >= child.locks for child in node.children.values())
        assert self.free_tokens + cached + self.held_tokens == self.num_tokens, "KV books"
        assert self.free_slots + len(with_state) + self.held_slots == self.num_slots, "slot books"
        assert with_state == set(self.states), "state list"
        assert leaves == set(self.leaves.values()), "leaf set"
        for references in self.references:
            references.check()

    def match(self, root: PrefixNode, tokens: Tokens) -> tuple[PrefixNode, int]:
        """Return the deepest node with a state, and the length of the KV match; splits its edge."""
        node, matched = walk(root, tokens)
        if matched < node.depth:
            lower, node = node, split(node, matched)
            self._copy_references(node, lower)
        self.refresh(node)
        while node.parent is not None and not node.has_state:
            node = node.parent
        if node.has_state:
            self.states.move_to_end(node)
        return node, matched

    def refresh(self, node: PrefixNode) -> None:
        """Stamp the path, parents older than children."""
        path = list(node.path())
        for step in path:
            self.unlist_leaf(step)
        for step in reversed(path):
            self.clock += 1
            step.time = self.clock
        for step in path:
            self.list_leaf(step)

    def list_leaf(self, node: PrefixNode) -> None:
        """Make an unlocked leaf a candidate; has no effect on other nodes. O(log leaves)."""
        if node.parent is not None and not node.children and not node.locks:
            self.leaves[node.time] = node

    def unlist_leaf(self, node: PrefixNode) -> None:
        """Remove a node from the candidates if it is one. O(log leaves)."""
        if self.leaves.get(node.time) is node:
            del self.leaves[node.time]

    def lock(self, node: PrefixNode, change: int) -> None:
        """Lock (+1) or unlock (-1) the path's KV and the node's own state."""
        node.state_locks += change
        for step in node.path():
            step.locks += change
            self.unlist_leaf(step)
            self.list_leaf(step)

    def drop_state(self, node: PrefixNode) -> None:
        """Free a node's slot and keep its KV."""
        del self.states[node]
        node.has_state = False
        self.free_slots += 1

    def drop_leaf(self, leaf: PrefixNode) -> None:
        """Free a leaf's KV and its state; its parent may become a candidate."""
        if leaf.has_state:
            self.drop_state(leaf)
        self.free_tokens += len(leaf.tokens)
        parent = remove_leaf(leaf)
        for references in self.references:
            references.removed(leaf)
        self.list_leaf(parent)

    def evict_leaf(self) -> None:
        """Evict an unlocked leaf."""
        leaf: PrefixNode = self.leaves.peekitem(0)[1]
        if self.references:
            leaf = min(self.leaves.values(), key=self.references[0].counts.__getitem__)
        self.unlist_leaf(leaf)
        self.drop_leaf(leaf)

    def evict_state(self) -> bool:
        """Evict a state, and the KV of a leaf with it. Returns False if all are in use."""
        unlocked = (node for node in self.states if not node.state_locks)
        victim, drops_kv = None if self.references else next(unlocked, None), True
        if self.references:
            of_kv, of_states = (references.counts for references in self.references)
            victim = min(unlocked, key=lambda node: of_states[node] > 0, default=None)
            drops_kv = victim is None or of_states[victim] > 0 or not of_kv[victim]
        if victim is None:
            return False
        if drops_kv and self.leaves.get(victim.time) is victim:
            self.unlist_leaf(victim)
            self.drop_leaf(victim)
        else:
            self.drop_state(victim)
        return True

    def insert(self, root: PrefixNode, tokens: Tokens) -> PrefixNode:
        """Transfer one held slot, and the KV of ``tokens`` that the tree lacks, to the tree. The
        slot is freed if a state is already present. The caller no longer owns the new KV."""
        walked, matched = walk(root, tokens)
        self.unlist_leaf(walked)
        node, new, fork = grow(walked, matched, tokens)
        if fork is not None:
            self._copy_references(fork, walked)
        self.held_tokens -= new
        self.held_slots -= 1
        if node.has_state:
            self.free_slots += 1
            self.states.move_to_end(node)
        else:
            node.has_state = True
            self.states[node] = None
        self.refresh(node)
        self.list_leaf(walked)
        self._cap_path(node)
        return node

    def _copy_references(self, upper: PrefixNode, lower: PrefixNode) -> None:
        """Give ``upper`` the references to KV of ``lower``, from which it was split off."""
        for references in self.references[:1]:
            references.counts[upper] = references.counts[lower]

    def _cap_path(self, tail: PrefixNode) -> None:
        if self.max_states_per_path is None:
            return
        path = [node for node in tail.path() if node.has_state]
        for node in reversed(path[1:]):
            if len(path) <= self.max_states_per_path:
                return
            if len(node.children) == 1 and not node.state_locks:
                self.drop_state(node)
                path.remove(node)


@dataclass(slots=True, eq=False)
class SglangSession(PeerSession):
    """One request: a locked node, its own slots, and KV rows in addition to the tree's."""

    cache: SglangCache
    root: PrefixNode
    tokens: Tokens
    node: PrefixNode
    session: Hashable
    ends: bool
    held: int = 0
    num_slots: int = 0
    num_chunks: int = 0
    cached_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.cached_len = self.node.depth
        self.cache.lock(self.node, 1)
        self.cache.num_running += 1

    def prefill(self, kv_len: int, boundaries: tuple[int, ...]) -> bool:
        """Take memory and compute the prompt, publishing each extend. False if it is refused."""
        cache, length = self.cache, len(self.tokens)
        has_slots = all(self.take_slot() for _ in range(cache.slots_per_request))
        if not has_slots or not self._take_tokens(length - self.cached_len):
            return False
        chunk = max(1, cache.config.prefill_chunk // cache.config.unit)
        for start in range(self.cached_len, length, chunk):
            end = min(start + chunk, length)
            self.num_chunks += 1
            for position in cache.positions(start, end, self.cached_len, kv_len, boundaries):
                if self.take_slot():
                    self._publish(self.tokens[:position])
        return True

    def finish(self, output: Tokens) -> None:
        """Decode ``output``, publish the tracked states and their KV, and release the rest."""
        cache, length = self.cache, len(self.tokens)
        total = length + len(output)
        if self._take_tokens(len(output)):
            is_end = cache.placement == "end"
            tracked = total if is_end else total // cache.decode_interval * cache.decode_interval
            if tracked > length or is_end:
                self._publish(np.concatenate([self.tokens, output])[:tracked])
                for references in cache.references:
                    references.add(self.session, self.node)
        for references in cache.references if self.ends else ():
            references.close(self.session)
        self.abort()

    def abort(self) -> None:
        """Release everything held."""
        cache = self.cache
        cache.lock(self.node, -1)
        cache.num_running -= 1
        cache.free_tokens += self.held
        cache.held_tokens -= self.held
        cache.free_slots += self.num_slots
        cache.held_slots -= self.num_slots
        self.held = self.num_slots = 0

    def take_slot(self) -> bool:
        """Take one more slot, evicting the least recently used state. False if all are in use."""
        cache = self.cache
        if not cache.free_slots and not cache.evict_state():
            return False
        cache.free_slots -= 1
        cache.held_slots += 1
        self.num_slots += 1
        return True

    def _take_tokens(self, num_tokens: int) -> bool:
        """Take KV rows, evicting leaves. Returns False, and takes nothing, if refused."""
        cache = self.cache
        while cache.free_tokens < num_tokens and cache.leaves:
            cache.evict_leaf()
        if cache.free_tokens < num_tokens:
            return False
        cache.free_tokens -= num_tokens
        cache.held_tokens += num_tokens
        self.held += num_tokens
        return True

    def _publish(self, tokens: Tokens) -> None:
        """Donate a slot at the end of ``tokens``, move the lock there, and free duplicate rows."""
        cache = self.cache
        before = cache.held_tokens
        node = cache.insert(self.root, tokens)
        self.num_slots -= 1
        self.held -= before - cache.held_tokens
        cache.lock(node, 1)
        cache.lock(self.node, -1)
        duplicates = self.held - (len(self.tokens) - node.depth)
        if node.depth < len(self.tokens) and duplicates > 0:
            self.held -= duplicates
            cache.held_tokens -= duplicates
            cache.free_tokens += duplicates
        self.node = node
