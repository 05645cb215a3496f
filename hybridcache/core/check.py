"""What must hold between tree, allocators and policy, recomputed from scratch."""

from __future__ import annotations

import numpy as np

from hybridcache.core.check_lower import check_lower
from hybridcache.core.residency import Residency
from hybridcache.radix.check import check_tree
from hybridcache.radix.node import Checkpoint, RadixNode, members
from hybridcache.tokens import Indices


def check_cache(residency: Residency, step: int) -> None:
    """AssertionError names the first invariant that fails. ``step``: what checkpoint positions are
    multiples of. O(tree + pools)."""
    tree = residency.tree
    check_tree(tree, residency.ghosts)
    resident = [node for node in tree.nodes() if node.kv is not None]
    checkpoints = [node.checkpoint for node in resident if node.checkpoint is not None]
    _check_rows(residency, resident)
    _check_slots(residency, checkpoints)
    for checkpoint in checkpoints:
        assert checkpoint.position % step == 0, f"{checkpoint} is off the grid"
        expected = is_superseded(checkpoint)
        assert checkpoint.superseded == expected, f"{checkpoint} superseded: {not expected}"
    locked = {node for node in tree.nodes() if node.locks}
    assert locked == set(residency.locked), "the locked nodes are not those listed"
    assert residency.locked_path_tokens == sum(node.end for node in locked), "locked path tokens"
    residency.locked_paths.check(tree.nodes())
    residency.gathered.check(residency.cached_tokens)
    for segment, rows in residency.gathered.rows.items():
        assert np.array_equal(rows, _path_rows(segment.node)), (
            f"gather of {segment} is not its path"
        )
    for item in residency.withheld:
        assert item.node.locks, f"{item} is withheld but not locked"
        assert item in (item.node.kv, item.node.checkpoint), f"{item} is withheld but gone"
    _check_candidates(residency)
    if residency.lower is not None:
        check_lower(residency.lower, list(tree.nodes()), [*tree.roots.values()])
    serials = [item.serial for node in resident for item in (node.kv, node.checkpoint) if item]
    assert len(set(serials)) == len(serials), "two items share a serial"
    assert all(serial < residency.num_items for serial in serials), "a serial from the future"


def _path_rows(node: RadixNode) -> Indices:
    parts = []
    while node.kv is not None and node.parent is not None:
        parts.append(node.kv.indices)
        node = node.parent
    return np.concatenate(parts[::-1])


def _check_candidates(residency: Residency) -> None:
    listed = residency.policy.candidates()
    if listed is None:
        return
    held, due = list(listed), set(residency.candidates())
    assert len(set(held)) == len(held), "the policy holds an item twice"
    for item in due.difference(held):
        raise AssertionError(f"the policy does not know of {item}")
    for item in set(held) - due:
        raise AssertionError(f"the policy holds {item}, which is no candidate")


def is_superseded(checkpoint: Checkpoint) -> bool:
    """By definition: going down single children from it, a checkpoint comes before a fork or the
    end. O(path)."""
    node: RadixNode = checkpoint.node
    while len(children := list(members(node.children))) == 1:
        node = children[0]
        if node.checkpoint is not None:
            return True
    return False


def _check_rows(residency: Residency, resident: list[RadixNode]) -> None:
    pages = residency.pages
    pages.check()
    parts = [node.kv.indices for node in resident if node.kv is not None]
    cached = np.concatenate(parts) if parts else np.empty(0, np.int32)
    assert len(cached) == residency.cached_tokens, (
        f"{len(cached)} rows cached, counted {residency.cached_tokens}"
    )
    assert len(cached) == 0 or (cached.min() >= 0 and cached.max() < pages.capacity), (
        "a cached row is out of range"
    )
    both = np.concatenate([cached, pages.free_rows()])
    assert len(np.unique(both)) == len(both), "a KV row is cached twice, or cached and free"
    if residency.owners is not None and pages.arena is not None:
        residency.owners.check(parts)
        pages.arena.check_taken(cached)
        assert residency.owners in pages.arena.holders, "the tree is not notified of moves"
    if pages.budget is not None:
        taken = pages.num_taken * pages.unit_bytes
        taken += residency.slots.num_taken * residency.slots.unit_bytes
        free = pages.budget.total_bytes - taken
        assert free == pages.budget.free_bytes, (
            f"{free} bytes free, counted {pages.budget.free_bytes}"
        )
        assert free >= 0, "over the byte budget"


def _check_slots(residency: Residency, checkpoints: list[Checkpoint]) -> None:
    slots = residency.slots
    slots.check()
    cached = [checkpoint.slot for checkpoint in checkpoints]
    assert len(cached) == residency.num_checkpoints, (
        f"{len(cached)} checkpoints, counted {residency.num_checkpoints}"
    )
    assert all(0 <= slot < slots.capacity for slot in cached), "a cached slot is out of range"
    both = cached + slots.free_slots()
    assert len(set(both)) == len(both), "a slot is cached twice, or cached and free"
