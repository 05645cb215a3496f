"""What an ``insert`` does to the tree once it is known where the new tokens leave it."""

from __future__ import annotations

from collections.abc import Sequence

from hybridcache.core.residency import Residency
from hybridcache.radix.forks import Link
from hybridcache.radix.node import RadixNode
from hybridcache.tokens import INT32, Indices, Tokens, require_int32


def refuse_bad_insert(
    tokens: Tokens,
    kv_indices: Indices,
    checkpoints: Sequence[tuple[int, int]],
    owned_from: int,
    labels: Sequence[str],
    after: RadixNode | None,
    *,
    page_size: int,
    num_slots: int,
) -> None:
    """ValueError for what is wrong whatever the tree holds. O(checkpoints)."""
    if getattr(tokens, "dtype", None) is not INT32 or tokens.ndim != 1:
        require_int32(tokens, "tokens")
    if getattr(kv_indices, "dtype", None) is not INT32 or kv_indices.ndim != 1:
        require_int32(kv_indices, "KV indices")
    num_tokens = len(tokens)
    if len(kv_indices) != num_tokens:
        raise ValueError(
            f"{len(kv_indices)} KV indices for {num_tokens} tokens: as many as tokens are needed"
        )
    if labels and len(labels) != len(checkpoints):
        raise ValueError(
            f"{len(labels)} labels for {len(checkpoints)} checkpoints: give one each, or none"
        )
    for position, slot in checkpoints:
        if not (type(slot) is type(position) is int and 0 <= slot < num_slots):
            raise ValueError(
                f"checkpoint ({position!r}, {slot!r}) is no (position, slot): two ints, the "
                "slot "
                f"below {num_slots}"
            )
    if len(checkpoints) > 1 and len({slot for _, slot in checkpoints}) < len(checkpoints):
        raise ValueError("two checkpoints share a slot: each needs one of its own")
    num_tokens -= num_tokens % page_size
    if not 0 <= owned_from <= num_tokens:
        raise ValueError(
            f"owned_from is {owned_from}: it must lie in 0..{num_tokens}, in whole pages"
        )
    if after is not None and not after.locks:
        raise ValueError(
            "the node given as ``after`` is not locked: keep its lock until insert is done"
        )


def append(
    residency: Residency,
    step: int,
    node: RadixNode,
    tokens: Tokens,
    rows: Indices,
    checkpoints: Sequence[tuple[int, int]],
) -> RadixNode:
    """Make ``tokens`` resident below ``node`` with copies of ``rows``: revive ghosts, then
    grow. Returns the new leaf.

    What grows ends a node where a checkpoint will stand, so that none of it is split at once:
    nodes that grew apart share no buffer.
    """
    first = node.end
    if node.ghosts is not None:
        ghost, inside, length = residency.tree.walk(node, tokens, ghosts=True)
        path = []
        while ghost is not node:
            path.append(ghost)
            assert ghost.parent is not None
            ghost = ghost.parent
        for ghost in reversed(path):
            residency.revive(ghost, rows[node.end - first : ghost.end - first].copy())
            node = ghost
        if inside is not None and length > node.end:
            upper = residency.split(inside, length)
            residency.tree.revive(upper)
            if residency.lower is not None:
                residency.lower.drop_kv(upper)
            residency.store_rows(upper, rows[node.end - first : length - first].copy())
            node = upper
    start, num_tokens = node.end - first, len(tokens)
    if len(checkpoints) > 1 or (checkpoints and checkpoints[0][0] < first + num_tokens):
        for end in sorted(at - first for at, _ in checkpoints if at % step == 0):
            if start < end < num_tokens:
                node = residency.tree.grow(node, tokens[start:end])
                residency.store_rows(node, rows[start:end].copy())
                start = end
    if start < num_tokens:
        if start:
            tokens, rows = tokens[start:], rows[start:]
        node = residency.tree.grow(node, tokens)
        residency.store_rows(node, rows.copy())
    return node


def refresh(residency: Residency, node: RadixNode) -> None:
    """``node``'s KV came again."""
    kv = node.kv
    if kv is not None:
        kv.last_used = residency.now
        if not node.children and kv not in residency.withheld:
            residency.policy.touch(kv)


def place(
    residency: Residency,
    step: int,
    leaf: RadixNode,
    checkpoints: Sequence[tuple[int, int]],
    labels: Sequence[str],
    offered_to: int,
) -> tuple[int, ...]:
    """Store checkpoints on the path to ``leaf``, splitting where needed; returns the slots not
    taken.

    Nodes that end at or before ``offered_to`` were there before, so the policy knows them.
    O(path).
    """
    rejected: list[int] = []
    node, end = leaf, leaf.end
    before: Link | None = None
    order: Sequence[int] = (0,)
    if len(checkpoints) > 1:
        order = sorted(range(len(checkpoints)), key=checkpoints.__getitem__, reverse=True)
    for index in order:
        position, slot = checkpoints[index]
        if position % step or not 0 < position <= end:
            rejected.append(slot)
            continue
        while (above := node.parent) is not None and above.end >= position:
            node = above
        if node.end > position:
            node = residency.split(node, position)
        if node.checkpoint is not None:
            rejected.append(slot)
            continue
        label = labels[index] if labels else ""
        offered = position <= offered_to
        before = residency.store_checkpoint(node, slot, label, offered, before)
    return tuple(rejected)
