"""Offload tiers: host memory and disk for entries evicted from the device.

An entry evicted from one tier is offered to the next. The tree keeps its shape: a node that left
the device is a tombstone or a ghost, and its KV and state can be in a lower tier
(``RadixNode.offloaded``). Each is in one tier only: when it is loaded or computed again on the
device, it leaves its tier.

A tier consists of rows, which never move. The KV of a token takes one row; a state takes as many as
hold its bytes. Rules:

- If KV is in tier t, the KV of its parent is in t or nearer. So a path can be resumed wherever its
  parts are.
- KV stays in a tier only if a state of that tier or nearer, at its node or deeper, needs it. So the
  policy of a tier orders states, and KV follows them. When the last such state moves down, the KV
  moves with it; when that state is dropped, the KV is freed.
- An offered state is a candidate at once. It is stored unless the policy of the tier chooses it as
  the victim. So the eviction policy also decides admission.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from hybridcache.allocators.moves import DEVICE, DISK, HOST, Copy, Drop, Indices, StepQueue
from hybridcache.allocators.pools import PageAllocator, are_distinct
from hybridcache.radix.api import Resumable
from hybridcache.radix.protocol import EvictionPolicy, raise_failure
from hybridcache.radix.tokens import EMPTY, Tokens
from hybridcache.radix.tree import (
    Checkpoint,
    GhostList,
    Kind,
    OffloadedCheckpoint,
    OffloadedEntry,
    RadixNode,
    is_superseded_in_tiers,
    members,
    next_state,
    tier_of,
)


class Tier(NamedTuple):
    """One offload tier, with the allocator of its rows and the eviction policy of its states."""

    name: str
    pages: PageAllocator
    policy: EvictionPolicy
    is_shared: bool = False
    """True if the policy shares the learned state of the device's (``EvictionPolicy.for_tier``).
    Then only the device's is notified of uses and ghost hits, and items keep their memos."""


class OffloadTiers(GhostList):
    """Offloaded KV and states of one cache, and its other ghosts, of which only tokens remain.

    Every change adds a transfer to the next ``StepPlan``; the new row numbers are valid at once. An
    eviction costs O(log of the tier) in its policy, plus O(1) per node that moves with it.
    """

    def __init__(
        self,
        ghosts: GhostList,
        steps: StepQueue,
        tiers: tuple[Tier, ...],
        row_bytes: int,
        state_rows: int,
    ) -> None:
        """Use ``tiers``, in which a state takes ``state_rows`` rows, in place of ``ghosts``, the
        list of a new cache. ``steps`` gets the transfers."""
        super().__init__(ghosts.tree, ghosts.limit_bytes)
        self.tiers = tiers
        self.names = tuple(tier.name for tier in tiers)
        """Names of the tiers, the nearest first."""
        self.state_rows = state_rows
        self.row_bytes = row_bytes
        self._steps = steps
        self.loading: OffloadedCheckpoint | None = None
        """State that ``load`` is loading: no candidate of its tier. None if it was dropped."""
        self.closed: set[int] = set()
        """Numbers of the tiers to which nothing is offloaded now."""
        self.copied_rows: dict[tuple[str, str], int] = {}
        """Rows copied so far, by (source tier, destination tier)."""

    def add(self, ghost: RadixNode, rows: bytes = b"") -> None:
        """Offer ``rows``, of which the KV is still there, to the tiers; list ``ghost`` if they do
        not take it."""
        if not rows or not self.add_kv(ghost, np.frombuffer(rows, np.int32)):
            super().add(ghost)

    def discard(self, path: Iterable[RadixNode]) -> None:
        """Free the offloaded KV of the ghosts of ``path``, or remove them from the list."""
        super().discard([ghost for ghost in path if not self.drop_kv(ghost)])

    def split(self, upper: RadixNode, lower: RadixNode) -> None:
        """Give ``upper``, the new upper part of the ghost ``lower``, its part of the offloaded KV,
        or add it to the list. O(tokens)."""
        entry = lower.offloaded
        if entry is None or entry.kv is None:
            super().split(upper, lower)
            return
        cut = upper.end - upper.start
        above = self.entry(upper)
        above.kv, above.kv_tier = entry.kv[:cut].copy(), entry.kv_tier
        above.num_children[entry.kv_tier] = 1
        entry.kv = entry.kv[cut:].copy()

    def loadable(
        self, deepest: RadixNode, cached_len: int, num_tokens: int
    ) -> tuple[Resumable, ...]:
        """Return the positions past ``cached_len`` on the path to ``deepest`` that could be loaded.
        O(nodes)."""
        path = []
        for tier in self.tiers:
            if tier.policy.failure is not None:
                raise_failure(tier.policy.failure)
        while deepest.parent is not None and deepest.end > cached_len:
            path.append(deepest)
            deepest = deepest.parent
        loadable, num_rows = [], [0] * len(self.tiers)
        for node in reversed(path):
            entry = node.offloaded
            if node.kv is None:
                if entry is None or entry.kv is None:
                    break
                num_rows[entry.kv_tier] += len(entry.kv)
            if entry is not None and entry.state is not None and node.end < num_tokens:
                rows = list(num_rows)
                rows[entry.state.tier] += self.state_rows
                num_bytes = [num * self.row_bytes for num in rows]
                by_tier = dict(zip(self.names, num_bytes, strict=True))
                loadable.append(Resumable(node.end, node, by_tier))
        return tuple(loadable)

    def add_state(self, was: Checkpoint, first: int, src_tier: str, src: Indices) -> None:
        """Store the state of ``was``, which is leaving ``src_tier``, in tier ``first`` or a lower
        one, unless none takes it."""
        node = was.node
        for number in range(first, len(self.tiers)):
            if number in self.closed:
                continue
            tier = self.tiers[number]
            state = OffloadedCheckpoint(was, number, EMPTY)
            if tier.is_shared:
                state.memo = was.memo
            entry = self.entry(node)
            entry.state = state
            tier.policy.add(state)
            while (rows := tier.pages.allocate(self.state_rows)) is None:
                victim = self._victim(number)
                if victim is None or victim is state:
                    break
                self._evict(victim)
            if rows is not None:
                state.rows = rows
                self.copy("checkpoint", src_tier, src, tier.name, rows, node)
                above = next_state(node)  # superseded now, unless the path forks
                if isinstance(above, OffloadedCheckpoint):
                    self._review(above)
                return
            tier.policy.discard(state, evicted=True)
            entry.state = None

    def add_kv(self, node: RadixNode, src: Indices, src_tier: str = DEVICE) -> bool:
        """Store the KV of ``node``, which is leaving ``src_tier``, in the nearest tier that needs
        it.

        Returns False if none needs it, or if there is no room. Then the states that need it are
        dropped too.
        """
        while node.offloaded is not None and (number := node.offloaded.nearest) is not None:
            tier, is_closed = self.tiers[number], number in self.closed
            if not is_closed and (rows := tier.pages.allocate(len(src))) is not None:
                self.hold_kv(node, number, rows)
                self.copy("kv", src_tier, src, tier.name, rows, node)
                return True
            victim = None if is_closed else self._victim(number)
            if victim is None:
                self._prune(node)
                break
            self._evict(victim)
        return False

    def _victim(self, number: int) -> OffloadedCheckpoint | None:
        """Return the next victim of tier ``number``, after updating which states are superseded."""
        policy = self.tiers[number].policy
        while (item := policy.victim("checkpoint")) is not None:
            assert isinstance(item, OffloadedCheckpoint)
            if not self._review(item):
                return item
        return None

    def _review(self, state: OffloadedCheckpoint) -> bool:
        """Update whether ``state`` is superseded, notify its policy, and return whether that
        changed."""
        superseded = is_superseded_in_tiers(state)
        if superseded == state.superseded:
            return False
        if state is self.loading:
            state.superseded = superseded
            return True
        policy = self.tiers[state.tier].policy
        policy.discard(state, evicted=False)
        state.superseded = superseded
        policy.add(state)
        return True

    def _evict(self, item: OffloadedCheckpoint) -> None:
        """Move ``item``, the victim of its tier, one tier down, or drop it. KV needed by it alone
        follows."""
        node, number = item.node, item.tier
        tier, entry = self.tiers[number], node.offloaded
        assert entry is not None and entry.state is item
        tier.policy.discard(item, evicted=True)
        entry.state = None
        self.add_state(item, number + 1, tier.name, item.rows)
        self._release(number, item.rows)
        self._sink(node, number)

    def _sink(self, node: RadixNode, number: int) -> None:
        """Walk up from ``node``, and demote or free KV that nothing in tier ``number`` needs any
        more."""
        above: RadixNode | None = node
        while above is not None:
            node, above = above, above.parent
            entry = node.offloaded
            if entry is None or entry.kv is None or entry.kv_tier != number:
                return
            nearest = entry.nearest
            if nearest is not None and nearest <= number:
                return
            rows = entry.kv
            self._let_go_of_kv(node)
            if not self.add_kv(node, rows, self.names[number]):
                self._prune(node)
                super().add(node)
            self._release(number, rows)

    def _prune(self, node: RadixNode) -> None:
        """Free everything offloaded at ``node`` and deeper, except for its own KV."""
        found = [node]
        for one in found:
            found += [child for child in members(one.ghosts) if child.offloaded is not None]
        for one in reversed(found):
            self.drop_state(one)
            if one is not node and self.drop_kv(one):
                super().add(one)

    def drop_state(self, node: RadixNode) -> None:
        """Free the offloaded state of ``node``: it is on the device again, or cannot be resumed
        from."""
        entry = node.offloaded
        if entry is None or entry.state is None:
            return
        state = entry.state
        if state is self.loading:
            self.loading = None
        else:
            self.tiers[state.tier].policy.discard(state, evicted=False)
        entry.state = None
        self._release(state.tier, state.rows)

    def drop_kv(self, node: RadixNode) -> bool:
        """Free the offloaded KV of ``node``. Returns False if it has none."""
        entry = node.offloaded
        if entry is None or entry.kv is None:
            return False
        number, rows = entry.kv_tier, entry.kv
        self._let_go_of_kv(node)
        self._release(number, rows)
        return True

    def drop_lost(self, name: str, is_lost: Callable[[Indices], bool]) -> None:
        """Remove entries that the tier ``name`` can no longer read, with those that depend on them.

        ``is_lost`` is called with the rows of one state, or of the KV of one node. Call it only if
        no transfers are pending, because rows that a transfer is about to fill are not lost.
        O(tree).
        """
        number = self.names.index(name)
        for node in list(self.tree.nodes()):  # parents first
            entry = node.offloaded
            if entry is None:
                continue
            state, rows = entry.state, entry.kv
            if rows is not None and entry.kv_tier == number and is_lost(rows):
                self._let_go_of_kv(node)
                self._prune(node)
                super().add(node)
                self._release(number, rows)
                assert node.parent is not None
                self._sink(node.parent, number)
            elif state is not None and state.tier == number and is_lost(state.rows):
                self.drop_state(node)
                self._sink(node, number)
        self.trim()

    def clear(self) -> None:
        """Free everything, and forget all ghosts. O(stored + ghosts)."""
        for node in reversed(list(self.tree.nodes())):
            self.drop_state(node)
            if self.drop_kv(node):
                super().add(node)
        super().clear()

    def entry(self, node: RadixNode) -> OffloadedEntry:
        entry = node.offloaded
        if entry is None:
            entry = node.offloaded = OffloadedEntry(len(self.tiers))
        return entry

    def hold_kv(self, node: RadixNode, number: int, rows: Indices) -> None:
        """Attach ``rows`` of tier ``number`` to ``node``, a ghost."""
        entry, parent = self.entry(node), node.parent
        assert entry.kv is None and parent is not None
        entry.kv, entry.kv_tier = rows, number
        self.entry(parent).num_children[number] += 1

    def _let_go_of_kv(self, node: RadixNode) -> None:
        """Detach the rows of ``node``. The caller then owns them."""
        entry, parent = node.offloaded, node.parent
        assert entry is not None and parent is not None and parent.offloaded is not None
        entry.kv = None
        parent.offloaded.num_children[entry.kv_tier] -= 1

    def _release(self, number: int, rows: Indices) -> None:
        tier = self.tiers[number]
        tier.pages.free(rows)
        if tier.name == DISK:
            self._steps.transfers.append(Drop(DISK, rows))

    def copy(
        self, kind: Kind, src_tier: str, src: Indices, dst_tier: str, dst: Indices, node: RadixNode
    ) -> None:
        """Put a copy of the KV of ``node``, or of the state at its end, into the next plan."""
        num_rows = len(src) if kind == "kv" else self.state_rows
        key = src_tier, dst_tier
        self.copied_rows[key] = self.copied_rows.get(key, 0) + num_rows
        path = path_of(node) if dst_tier == DISK else None
        self._steps.transfers.append(
            Copy(kind, src_tier, src.copy(), dst_tier, dst.copy(), node.end, path)
        )

    def check(self) -> None:
        """Recompute the invariants of the tiers from scratch. O(tree + pools)."""
        stored: list[list[Indices]] = [[] for _ in self.tiers]
        states: list[list[OffloadedCheckpoint]] = [[] for _ in self.tiers]
        for node in (*self.tree.roots.values(), *self.tree.nodes()):
            places = [tier_of(child) for child in members(node.ghosts)]
            counts = [places.count(number) for number in range(len(self.tiers))]
            entry = node.offloaded
            if entry is None:
                assert not any(counts), f"{node} does not know of {counts} children below"
                continue
            assert entry.num_children == counts, f"{node} has {counts} children below: {entry}"
            place, state = tier_of(node), entry.state
            if entry.kv is not None:
                assert node.kv is None, f"the KV of {node} is on the device and below"
                assert len(entry.kv) == node.end - node.start, f"{node} has {len(entry.kv)} rows"
                above = None if node.parent is None else tier_of(node.parent)
                is_near = above is not None and above <= entry.kv_tier
                assert is_near, f"{node.parent} lies further than {node}"
                is_needed = entry.nearest is not None and entry.nearest <= entry.kv_tier
                assert is_needed, f"nothing needs the KV of {node} as near as it is"
                stored[entry.kv_tier].append(entry.kv)
            if state is not None:
                assert node.checkpoint is None, f"the state of {node} is on the device and below"
                assert state.node is node, f"{state} belongs elsewhere"
                assert place is not None and place <= state.tier, f"{state} is nearer than its KV"
                assert len(state.rows) == self.state_rows, f"{state} has {len(state.rows)} rows"
                stored[state.tier].append(state.rows)
                states[state.tier].append(state)
        for tier, parts, held in zip(self.tiers, stored, states, strict=True):
            tier.pages.check()
            both = np.concatenate([*parts, tier.pages.free_rows()])
            is_whole = are_distinct(both) and len(both) == tier.pages.capacity
            assert is_whole, f"a row of {tier.name} is stored twice, or and free, or lost"
            listed = tier.policy.candidates()
            if listed is not None:
                known = list(listed)
                is_same = len(known) == len(held) and set(known) == set(held)
                assert is_same, f"{tier.name} orders other states than it holds"


def path_of(node: RadixNode) -> tuple[Hashable, Tokens]:
    """Return (namespace, tokens from the root to the end of ``node``). O(position)."""
    parts = []
    while node.parent is not None:
        parts.append(node.tokens)
        node = node.parent
    return node.key, np.concatenate(parts[::-1])


# --- Exchange rate between tiers ------------------------------------------------------------------


PCIE_BYTES_PER_S = 50e9
"""PCIe 5.0 x16 from pinned memory, one way: 63 GB/s by its data sheet, less protocol overhead."""
DISK_BYTES_PER_S = 6e9
"""Sequential reads of one NVMe drive of that generation."""
LATENCY_S = {HOST: 20e-6, DISK: 200e-6}
"""Fixed latency of one copy, by tier."""


class PrefillTimes(Protocol):
    """Model of the seconds that one prefill takes."""

    def seconds(self, start: int, end: int) -> float:
        """Return the seconds to compute tokens [start, end) after ``start`` reused tokens; 0.0
        if empty."""


@dataclass(frozen=True)
class Exchange:
    """Copy times by tier and prefill times of a model on a machine. Implements ``LoadRule``."""

    times: PrefillTimes
    """Seconds of a prefill, for example ``MeasuredTimes`` or ``Roofline``."""
    bytes_per_s: Mapping[str, float] = field(
        default_factory=lambda: {HOST: PCIE_BYTES_PER_S, DISK: DISK_BYTES_PER_S}
    )
    """Bandwidth from each tier to the device: measured, or from data sheets."""
    unit: int = 1
    """Tokens per id, for a cache that counts in units of several tokens."""

    def copy_seconds(self, num_bytes: Mapping[str, int]) -> float:
        """Return the seconds to copy these bytes to the device, one tier after the other."""
        return sum(
            LATENCY_S[tier] + size / self.bytes_per_s[tier]
            for tier, size in num_bytes.items()
            if size
        )

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """Return the seconds saved by a load; see ``LoadRule``."""
        unit, seconds = self.unit, self.times.seconds
        without = seconds(cached_len * unit, prompt_len * unit)
        return without - seconds(position * unit, prompt_len * unit) - self.copy_seconds(num_bytes)
