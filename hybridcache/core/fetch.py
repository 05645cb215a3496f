"""What lies in lower tiers comes back to the device, or is made known there."""

from __future__ import annotations

from collections.abc import Hashable

from hybridcache.core.lower import LowerTiers
from hybridcache.core.make_room import make_room_for_kv, make_room_for_slot
from hybridcache.core.residency import Residency
from hybridcache.radix.node import RadixNode
from hybridcache.radix.stored import StoredState
from hybridcache.tokens import Indices, Tokens


def fetch(residency: Residency, lower: LowerTiers, target: RadixNode) -> bool:
    """Make the state at ``target`` and the KV down to it resident. False, and nothing changed but
    what was evicted for it: it is there no more, or the device has no room for it.

    O(tokens fetched), and what making room costs.
    """
    if target.below is None or target.below.state is None:
        return False
    now = residency.now + 1
    lower.used(target.below.state, now)
    if target.lost_checkpoint is not None:
        residency.policy.missed(target.lost_checkpoint)
    taken = lower.take(target)
    base = taken.nodes[0].parent if taken.nodes else target
    assert base is not None
    is_locked = base.parent is not None
    if is_locked:
        residency.lock(base)
    num_tokens = target.end - base.end
    slot = _allocate_slot(residency)
    rows = None if slot is None else _allocate_kv(residency, num_tokens)
    if slot is None or rows is None:
        if slot is not None:
            residency.slots.free(slot)
        lower.unused(taken.state)
        lower.put_back(taken)
        residency.ghosts.trim()
    else:
        _revive(residency, taken.nodes, rows)
        lower.give(taken, rows, slot)
        state = taken.state
        lower.unused(state)  # Who resumes from it touches it there, and that is the use.
        residency.store_checkpoint(target, slot, state.label, not taken.nodes, None, state.uses)
        if taken.nodes:
            residency.offer_leaf(target)
    if is_locked:
        residency.unlock(base)
    return rows is not None


def _allocate_slot(residency: Residency) -> int | None:
    slot = residency.slots.allocate()
    if slot is None and make_room_for_slot(residency):
        slot = residency.slots.allocate()
    return slot


def _allocate_kv(residency: Residency, num_tokens: int) -> Indices | None:
    rows = residency.pages.allocate(num_tokens)
    if rows is None and make_room_for_kv(residency, num_tokens):
        rows = residency.pages.allocate(num_tokens)
    return rows


def _revive(residency: Residency, nodes: tuple[RadixNode, ...], rows: Indices) -> None:
    """``nodes``, a path of ghosts that no list has, become resident."""
    start = 0
    for node in nodes:
        parent = node.parent
        assert parent is not None
        if not start:
            residency.expect_child(parent)
        end = start + node.end - node.start
        residency.tree.revive(node)
        residency.store_rows(node, rows[start:end].copy())
        start = end


def adopt(
    residency: Residency, lower: LowerTiers, tokens: Tokens, namespace: Hashable, number: int
) -> tuple[int, Indices, Indices] | None:
    """See ``TieredRadixCache.adopt``."""
    tree, tier = residency.tree, lower.tiers[number]
    node, inside, length = tree.walk(tree.root(namespace), tokens)
    if inside is None:
        node, inside, length = tree.walk(node, tokens[node.end :], ghosts=True)
    known = node
    while known.parent is not None and known.kv is None and not lower.is_stored(known):
        known = known.parent
    start = known.end
    if inside is not None and known is node:
        is_there = inside.kv is not None or lower.is_stored(inside)
        start, known = (length, inside) if is_there else (start, known)
    # A resident node may have a ``below`` for its children's sake, whose ``kv_tier`` means nothing.
    below = known.below
    too_low = below is not None and below.kv is not None and below.kv_tier > number
    is_whole = inside is None and length == len(tokens)
    has_state = is_whole and (node.checkpoint is not None or _has_state(node))
    num_rows = len(tokens) - start + lower.state_rows
    if too_low or has_state or num_rows > tier.pages.num_free:
        tree.prune_root(namespace)
        return None
    if inside is not None and length > node.end:
        is_plain = inside.kv is None and not lower.is_stored(inside)
        node = residency.split(inside, length)
        if is_plain:
            residency.ghosts.add(node)
    if length < len(tokens):
        node = tree.grow(node, tokens[length:])
        tree.fade(node)
        residency.ghosts.add(node)
    kv_rows = tier.pages.allocate(len(tokens) - start)
    state_rows = tier.pages.allocate(lower.state_rows)
    assert kv_rows is not None and state_rows is not None
    target = node
    while node.end > start:
        assert node.parent is not None
        residency.ghosts.discard(node)
        lower.hold_kv(node, number, kv_rows[node.parent.end - start : node.end - start].copy())
        node = node.parent
    lower.hold_state(_known(residency, target, number, state_rows))
    return start, kv_rows, state_rows


def _known(residency: Residency, target: RadixNode, number: int, rows: Indices) -> StoredState:
    """A state at ``target`` that an earlier process made: as old and as used as is remembered."""
    was = target.lost_checkpoint
    if was is not None:
        was.stored = StoredState.offered(was, number, rows)
        return was.stored
    serial = residency.num_items
    residency.num_items = serial + 1
    return StoredState(target, number, rows, residency.now, serial, residency.item_bytes)


def _has_state(node: RadixNode) -> bool:
    return node.below is not None and node.below.state is not None
