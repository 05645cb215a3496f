"""Host and disk tiers: what they hold, what moves between them.

Memory below the device's: what is evicted from one tier is offered to the next.

The tree stays as it is: what left the device is a tombstone or a ghost, whose KV and state may now
be in a lower tier (``RadixNode.offloaded``). Each is in one tier only: when it is loaded or
computed again on the device, it leaves the tier it was in.

A tier is rows, and nothing in it ever moves: a token's KV takes one, a state as many as hold its
bytes, anywhere. Rules:

- KV in tier t has its parent's KV in t or nearer, so a path is resumable from wherever it lies;
- KV is in a tier only for something that needs it there: a state of that tier or nearer, at it or
  below it. So what a tier's policy orders are its states, and KV follows them: when the last that
  needs it goes a tier down, so does the KV; when that goes for good, the KV is freed;
- a state that is offered is a candidate at once, and is let in unless it is itself the one that the
  tier's policy would let go: admission is the eviction policy's word, ghosts and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np

from hybridcache.allocators.moves import DEVICE, DISK, Copy, Drop, StepQueue
from hybridcache.allocators.pages import PageAllocator
from hybridcache.policies.protocol import EvictionPolicy
from hybridcache.radix.ghosts import GhostList
from hybridcache.radix.tree import (
    Checkpoint,
    ItemBytes,
    OffloadedCheckpoint,
    OffloadedEntry,
    RadixNode,
    is_superseded,
    members,
)
from hybridcache.tokens import Indices, Tokens

NO_ROWS: Indices = np.empty(0, np.int32)


class Tier(NamedTuple):
    """One lower memory."""

    name: str
    pages: PageAllocator
    """Its rows."""
    policy: EvictionPolicy
    """Orders the states that it holds, and them alone."""
    is_shared: bool = False
    """True if the policy shares what the device's policy learns (``EvictionPolicy.for_tier``). Then
    only the device's is notified of uses and ghost hits, and items keep their memos."""


class Taken(NamedTuple):
    """What was on its way to the device and belongs to no node for the moment."""

    nodes: tuple[RadixNode, ...]
    """Ghosts, parents first; the last is the target unless that is resident."""
    pieces: tuple[tuple[int, Indices], ...]
    """(tier, rows) of the KV of each."""
    state: OffloadedCheckpoint


class OffloadTiers:
    """The offloaded parts of one cache's nodes. Every change is also a transfer of the next
    ``StepPlan``; the numbers are in force at once.

    An eviction costs O(log of the tier) in its policy, and O(1) a node that goes with it.
    """

    def __init__(
        self,
        tiers: tuple[Tier, ...],
        ghosts: GhostList,
        item_bytes: ItemBytes,
        state_rows: int,
        steps: StepQueue,
    ) -> None:
        """``steps`` receives a transfer for every change."""
        self.tiers = tiers
        self.names = tuple(tier.name for tier in tiers)
        """Of the tiers, the nearest first."""
        self.state_rows = state_rows
        self.row_bytes = item_bytes.kv_token
        self._steps = steps
        self._closed: set[int] = set()
        self.copied_rows: dict[tuple[str, str], int] = {}
        """Rows that went from one tier to another, by their words, so far."""
        self._ghosts = ghosts

    def close(self, word: str) -> None:
        """Offload nothing more to the tier ``word``, which cannot be written; it can be read."""
        self._closed.add(self.names.index(word))

    def open(self, word: str) -> None:
        """Offload to the tier ``word`` again."""
        self._closed.discard(self.names.index(word))

    def add_checkpoint(self, node: RadixNode, checkpoint: Checkpoint) -> None:
        """``checkpoint`` is about to leave the device: offer it to the nearest tier, and so on."""
        src = np.array([checkpoint.slot], np.int32)
        self._offer_state(checkpoint, 0, DEVICE, src)
        entry = node.offloaded
        checkpoint.stored = None if entry is None else entry.state

    def _offer_state(
        self, was: Checkpoint | OffloadedCheckpoint, number: int, src_tier: str, src: Indices
    ) -> bool:
        """Let ``was`` into tier ``number`` or a lower one. False: none has it."""
        while number < len(self.tiers):
            if number in self._closed:
                number += 1
                continue
            node, tier = was.node, self.tiers[number]
            state = OffloadedCheckpoint.offered(was, number, NO_ROWS)
            if tier.is_shared:
                state.memo = was.memo
            entry = self._entry(node)
            entry.state = state
            tier.policy.add(state)
            while tier.pages.num_free < self.state_rows:
                victim = self._victim(number)
                if victim is None or victim is state:
                    break
                self._evict(victim)
            if tier.pages.num_free >= self.state_rows:
                rows = tier.pages.allocate(self.state_rows)
                assert rows is not None
                state.rows = rows
                self._copy("checkpoint", src_tier, src, tier.name, rows, node)
                self._supersede_above(node)
                return True
            tier.policy.discard(state, evicted=True)
            entry.state = None
            self._tidy(node)
            number += 1
        return False

    def add_kv(self, ghost: RadixNode, rows: Indices) -> bool:
        """``ghost`` has just left the device with ``rows``: keep its KV where something below it
        needs it. False: nothing does, or there is no room, and then nothing below it stays
        either."""
        return self._offer_kv(ghost, 0, DEVICE, rows)

    def _offer_kv(self, node: RadixNode, first: int, src_tier: str, src: Indices) -> bool:
        """Let ``node``'s KV into the tier that needs it, ``first`` or below."""
        while node.offloaded is not None and (number := node.offloaded.nearest) is not None:
            number = max(number, first)
            tier = self.tiers[number]
            if number in self._closed:
                self._prune(node)
                break
            if tier.pages.num_free >= len(src):
                rows = tier.pages.allocate(len(src))
                assert rows is not None
                self.hold_kv(node, number, rows)
                self._copy("kv", src_tier, src, tier.name, rows, node)
                return True
            victim = self._victim(number)
            if victim is None:
                self._prune(node)
                break
            self._evict(victim)
        return False

    def _victim(self, number: int) -> OffloadedCheckpoint | None:
        """What tier ``number`` lets go first, by what is known of it now."""
        policy = self.tiers[number].policy
        while (item := policy.victim("checkpoint")) is not None:
            assert isinstance(item, OffloadedCheckpoint)
            if not self._review(item):
                return item
        return None

    def _review(self, state: OffloadedCheckpoint) -> bool:
        """Whether ``state`` has become superseded, or is so no more; its policy is told."""
        superseded = is_superseded(state.node)
        if superseded == state.superseded:
            return False
        policy = self.tiers[state.tier].policy
        policy.discard(state, evicted=False)
        state.superseded = superseded
        policy.add(state)
        return True

    def _supersede_above(self, node: RadixNode) -> None:
        """A state came to ``node``: the one above it on its path is superseded now, unless the path
        forks between them. O(nodes between)."""
        above = node.parent
        while above is not None and above.checkpoint is None:
            if above.offloaded is not None and above.offloaded.state is not None:
                self._review(above.offloaded.state)
                return
            above = above.parent

    def _evict(self, item: OffloadedCheckpoint) -> None:
        """``item``, its tier's victim, goes a tier down or for good, and the KV with it that its
        tier held for it alone."""
        node, number = item.node, item.tier
        tier, entry = self.tiers[number], node.offloaded
        assert entry is not None and entry.state is item
        tier.policy.discard(item, evicted=True)
        entry.state = None
        self._offer_state(item, number + 1, tier.name, item.rows)
        self._release(number, item.rows)
        self._sink(node, number)

    def _sink(self, node: RadixNode, number: int) -> None:
        """KV of tier ``number`` that nothing in it needs any more, from ``node`` upward, goes a
        tier down with what needs it there, or is freed."""
        above: RadixNode | None = node
        while above is not None:
            node, above = above, above.parent
            entry = node.offloaded
            if entry is None:
                return
            if entry.kv is None or entry.kv_tier != number:
                self._tidy(node)
                return
            nearest = entry.nearest
            if nearest is not None and nearest <= number:
                return
            rows = entry.kv
            self._let_go_of_kv(node)
            if not self._offer_kv(node, number + 1, self.names[number], rows):
                self._prune(node)
                self._forget(node)
            self._release(number, rows)

    def _prune(self, node: RadixNode) -> None:
        """Free all that lies at ``node`` and below it, but for its own KV."""
        found = [node]
        for one in found:
            found += [child for child in members(one.ghosts) if child.offloaded is not None]
        for one in reversed(found):
            entry = one.offloaded
            if entry is None:
                continue
            if entry.state is not None:
                self.drop_state(one)
            if one is not node and entry.kv is not None:
                number, rows = entry.kv_tier, entry.kv
                self._let_go_of_kv(one)
                self._release(number, rows)
                self._forget(one)
            self._tidy(one)

    def drop_state(self, node: RadixNode) -> None:
        """``node``'s stored state goes: it is on the device again, or can not be resumed from."""
        entry = node.offloaded
        if entry is None or entry.state is None:
            return
        state = entry.state
        self.tiers[state.tier].policy.discard(state, evicted=False)
        entry.state = None
        self._release(state.tier, state.rows)
        self._tidy(node)

    def drop_kv(self, node: RadixNode) -> None:
        """``node``'s KV is on the device again, computed anew; it is a ghost still, or was one."""
        entry = node.offloaded
        if entry is None or entry.kv is None:
            return
        number, rows = entry.kv_tier, entry.kv
        self._let_go_of_kv(node)
        self._release(number, rows)
        self._tidy(node)

    def split(self, upper: RadixNode, lower: RadixNode) -> bool:
        """A ghost was cut in two. False: it holds no KV here. O(tokens)."""
        entry = lower.offloaded
        if entry is None or entry.kv is None:
            return False
        cut = upper.end - upper.start
        above = self._entry(upper)
        above.kv, above.kv_tier = entry.kv[:cut].copy(), entry.kv_tier
        above.num_children[entry.kv_tier] = 1
        entry.kv = entry.kv[cut:].copy()
        return True

    def take(self, target: RadixNode) -> Taken:
        """Part the state at ``target`` and the KV down to it from their nodes, before room is made
        for them on the device, which may need theirs. ``put_back`` or ``give`` is owed. O(path)."""
        assert target.offloaded is not None and target.offloaded.state is not None
        state = target.offloaded.state
        self.tiers[state.tier].policy.discard(state, evicted=False)
        target.offloaded.state = None
        nodes, node = [], target
        while node.kv is None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        pieces = []
        for node in nodes:
            assert node.offloaded is not None and node.offloaded.kv is not None
            pieces.append((node.offloaded.kv_tier, node.offloaded.kv))
            self._let_go_of_kv(node)
        return Taken(tuple(reversed(nodes)), tuple(reversed(pieces)), state)

    def put_back(self, taken: Taken) -> None:
        """Undo ``take``: the device had no room. O(path)."""
        for node, (number, rows) in zip(taken.nodes, taken.pieces, strict=True):
            self.hold_kv(node, number, rows)
        self.hold_state(taken.state)
        # What was evicted meanwhile may have been all that needed some of this KV where it was.
        for node in reversed(taken.nodes):
            if node.offloaded is not None and node.offloaded.kv is not None:
                self._sink(node, node.offloaded.kv_tier)

    def give(self, taken: Taken, rows: Indices, slot: int) -> None:
        """What was taken goes to ``rows``, the KV of all its nodes one after the other, and to
        ``slot`` on the device. O(rows)."""
        start = 0
        for node, (number, src) in zip(taken.nodes, taken.pieces, strict=True):
            end = start + len(src)
            self._copy("kv", self.names[number], src, DEVICE, rows[start:end], node)
            self._release(number, src)
            self._tidy(node)
            start = end
        state = taken.state
        dst = np.array([slot], np.int32)
        self._copy("checkpoint", self.names[state.tier], state.rows, DEVICE, dst, state.node)
        self._release(state.tier, state.rows)
        self._tidy(state.node)

    def used(self, state: OffloadedCheckpoint, now: int) -> None:
        """A request resumes from ``state``, which is about to be fetched: its tier's policy learns
        of the use. ``unused`` is owed."""
        state.last_used = now
        state.uses += 1
        tier = self.tiers[state.tier]
        if not tier.is_shared:
            tier.policy.touch(state)

    def unused(self, state: OffloadedCheckpoint) -> None:
        """``state``, which belongs to no tier for the moment, is counted as before ``used``."""
        state.uses -= 1

    def on_ghost_hit(self, checkpoint: Checkpoint) -> None:
        """A request would have resumed from ``checkpoint``: if a tier had it, and let it go, its
        policy is told, unless the device's has learnt it for both."""
        state = checkpoint.stored
        if state is None or self.tiers[state.tier].is_shared:
            return
        entry = state.node.offloaded
        if entry is None or entry.state is not state:
            self.tiers[state.tier].policy.on_ghost_hit(state)

    def lose(
        self, nodes: Iterable[RadixNode], number: int, is_lost: Callable[[Indices], bool]
    ) -> None:
        """Free the states and KV of tier ``number`` whose rows ``is_lost``, and everything that
        cannot be resumed without them. ``nodes``: parents first. O(nodes)."""
        for node in nodes:
            entry = node.offloaded
            if entry is None:
                continue
            state, rows = entry.state, entry.kv
            if rows is not None and entry.kv_tier == number and is_lost(rows):
                self._let_go_of_kv(node)
                self._prune(node)
                self._forget(node)
                self._release(number, rows)
                assert node.parent is not None
                self._sink(node.parent, number)
            elif state is not None and state.tier == number and is_lost(state.rows):
                self.drop_state(node)
                self._sink(node, number)

    def clear(self) -> None:
        """Free everything. O(stored)."""
        for number, tier in enumerate(self.tiers):
            while (victim := tier.policy.victim("checkpoint")) is not None:
                node: RadixNode = victim.node  # type: ignore[attr-defined]
                self.drop_state(node)
                self._prune(node)
                self._sink(node, number)

    def is_stored(self, node: RadixNode) -> bool:
        """Whether the KV of ``node``, a ghost, lies here. O(1)."""
        return node.offloaded is not None and node.offloaded.kv is not None

    def _entry(self, node: RadixNode) -> OffloadedEntry:
        if node.offloaded is None:
            node.offloaded = OffloadedEntry(len(self.tiers))
        return node.offloaded

    def _tidy(self, node: RadixNode) -> None:
        if node.offloaded is not None and node.offloaded.is_empty:
            node.offloaded = None

    def hold_state(self, state: OffloadedCheckpoint) -> None:
        """``state``, whose rows are its tier's already, hangs on its node from now on."""
        self._entry(state.node).state = state
        self.tiers[state.tier].policy.add(state)

    def hold_kv(self, node: RadixNode, number: int, rows: Indices) -> None:
        """``rows`` of tier ``number`` are those of ``node``, a ghost, from now on."""
        entry, parent = self._entry(node), node.parent
        assert entry.kv is None and parent is not None
        entry.kv, entry.kv_tier = rows, number
        self._entry(parent).num_children[number] += 1

    def _let_go_of_kv(self, node: RadixNode) -> None:
        """``node``'s rows are the caller's."""
        entry, parent = node.offloaded, node.parent
        assert entry is not None and parent is not None and parent.offloaded is not None
        entry.kv = None
        parent.offloaded.num_children[entry.kv_tier] -= 1
        self._tidy(parent)

    def _forget(self, ghost: RadixNode) -> None:
        """Only the tokens of ``ghost`` are left."""
        self._tidy(ghost)
        self._ghosts.add(ghost)

    def _release(self, number: int, rows: Indices) -> None:
        tier = self.tiers[number]
        tier.pages.release(rows)
        if tier.name == DISK:
            self._steps.add(Drop(DISK, rows))

    def _copy(
        self,
        kind: Literal["kv", "checkpoint"],
        src_tier: str,
        src: Indices,
        dst_tier: str,
        dst: Indices,
        node: RadixNode,
    ) -> None:
        num_rows = len(src) if kind == "kv" else self.state_rows
        key = src_tier, dst_tier
        self.copied_rows[key] = self.copied_rows.get(key, 0) + num_rows
        path = path_of(node) if dst_tier == DISK else None
        self._steps.add(Copy(kind, src_tier, src.copy(), dst_tier, dst.copy(), node.end, path))


def path_of(node: RadixNode) -> tuple[object, Tokens]:
    """(namespace, tokens from the root to the end of ``node``). O(position)."""
    parts = []
    while node.parent is not None:
        parts.append(node.tokens)
        node = node.parent
    return node.key, np.concatenate(parts[::-1])


ON_DEVICE = -1
"""The device, where tiers are numbered from the nearest, 0."""


def check_offload(offload: OffloadTiers, nodes: list[RadixNode], roots: list[RadixNode]) -> None:
    """AssertionError names the first invariant that fails. O(tree + pools)."""
    num_tiers = len(offload.tiers)
    for node in (*roots, *nodes):
        _check_counts(node, num_tiers)
    for node in nodes:
        _check_node(node)
    for number, tier in enumerate(offload.tiers):
        states = [node.offloaded.state for node in nodes if node.offloaded is not None]
        held = [state for state in states if state is not None and state.tier == number]
        _check_rows(tier, number, nodes, held, offload.state_rows)
        listed = tier.policy.candidates()
        if listed is not None:
            known = list(listed)
            assert len(known) == len(held), f"{tier.name} orders {len(known)} of {len(held)} states"
            assert set(known) == set(held), f"{tier.name} orders other states than it holds"


def _place(node: RadixNode) -> int | None:
    """The tier in which the KV of ``node`` lies; None: in none."""
    if node.kv is not None or node.parent is None:
        return ON_DEVICE
    return (
        node.offloaded.kv_tier
        if node.offloaded is not None and node.offloaded.kv is not None
        else None
    )


def _check_counts(node: RadixNode, num_tiers: int) -> None:
    places = [_place(child) for child in members(node.ghosts)]
    counts = [places.count(number) for number in range(num_tiers)]
    entry = node.offloaded
    if entry is None:
        assert not any(counts), f"{node} does not know of {counts} children below"
    else:
        assert entry.num_children == counts, f"{node} counts {entry.num_children}, not {counts}"
        assert not entry.is_empty, f"{node} has an empty lower part"


def _check_node(node: RadixNode) -> None:
    entry, parent = node.offloaded, node.parent
    assert parent is not None
    if entry is None:
        return
    place, above = _place(node), _place(parent)
    if entry.kv is not None:
        assert node.kv is None, f"the KV of {node} is on the device and below"
        assert len(entry.kv) == node.end - node.start, f"{node} has {len(entry.kv)} rows below"
        assert above is not None and above <= entry.kv_tier, f"{parent} lies further than {node}"
        nearest = entry.nearest
        assert nearest is not None, f"nothing needs the KV of {node} below"
        assert nearest <= entry.kv_tier, f"nothing needs the KV of {node} as near as it is"
    if entry.state is not None:
        state = entry.state
        assert node.checkpoint is None, f"the state of {node} is on the device and below"
        assert state.node is node, f"{state} belongs elsewhere"
        assert place is not None and place <= state.tier, f"{state} lies nearer than its KV"


def _check_rows(
    tier: Tier,
    number: int,
    nodes: list[RadixNode],
    held: list[OffloadedCheckpoint],
    state_rows: int,
) -> None:
    pages = tier.pages
    pages.check()
    parts = [
        node.offloaded.kv
        for node in nodes
        if node.offloaded is not None
        and node.offloaded.kv is not None
        and node.offloaded.kv_tier == number
    ]
    for state in held:
        assert len(state.rows) == state_rows, f"{state} has {len(state.rows)} rows"
        parts.append(state.rows)
    both = np.concatenate([*parts, pages.free_rows()])
    assert len(np.unique(both)) == len(both), f"a row of {tier.name} is stored twice, or and free"
    assert len(both) == pages.capacity, (
        f"{len(both)} rows of {tier.name} are stored or free, not {pages.capacity}"
    )
