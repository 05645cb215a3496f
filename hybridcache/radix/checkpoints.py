"""Runs of checkpoints on unforked paths, for the detection of superseded checkpoints.

A checkpoint is superseded if a deeper one is on the same unforked path (one resident child at each
step). A *run* is such a path, from the child of a fork or of a root (its *top*) down to the next
fork or leaf. The checkpoints of a run form a doubly linked list, from shallow to deep, with the
top node as its head. So a checkpoint is removed in O(1), regardless of the number of
tombstones around it. A new checkpoint, or a fork that begins or ends, searches upward for its place
in the list. The search ends at the root at the latest, stays on the path of the request that caused
it, and never descends.
"""

from __future__ import annotations

from hybridcache.radix.tree import Checkpoint, RadixNode

Link = RadixNode | Checkpoint
"""Place in the list of a run: its top, or one of its checkpoints."""


def last_above(node: RadixNode) -> Link:
    """Return the nearest checkpoint strictly above ``node`` on its run, or the top of the run.

    O(nodes between).
    """
    above = node.parent
    assert above is not None
    while above.parent is not None and not isinstance(above.children, dict):
        if above.checkpoint is not None:
            return above.checkpoint
        node, above = above, above.parent
    return node


def is_last_above(link: Link, node: RadixNode) -> bool:
    """Return whether ``link``, the last above a deeper node of the path, is also that of ``node``.

    False if a search is needed. Nothing but checkpoints of the path may have been stored, and nodes
    of the path split, since ``link`` was found. O(1).
    """
    above = link.node if isinstance(link, Checkpoint) else link
    return above.end < node.end


def last_at(node: RadixNode) -> Link:
    """Return the checkpoint of ``node`` itself, or else ``last_above``."""
    return node.checkpoint if node.checkpoint is not None else last_above(node)


def link(before: Link, after: Checkpoint | None) -> None:
    """Make ``after`` follow ``before``. ``after`` is None if nothing follows. O(1)."""
    before.deeper = after
    if after is not None:
        after.shallower = before
