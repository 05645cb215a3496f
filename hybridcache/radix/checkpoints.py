"""Runs of checkpoints on unforked paths.

Which checkpoints are superseded: those with a deeper one on the same unforked path (one resident
child at each step).

A *run* is such a path, from the child of a fork or of a root (its *top*) down to the next fork or
leaf. The checkpoints of a run are a doubly linked list, from shallow to deep, whose head is the top
node. So a checkpoint goes in O(1), however many tombstones lie around it. One that comes, and a
fork that begins or ends, look upward for their place in the list: no further than to the root,
which is on the path of the request that brought them, and never down into what others brought.
"""

from __future__ import annotations

from hybridcache.radix.tree import Checkpoint, RadixNode

Link = RadixNode | Checkpoint
"""A place in the list of a run: its top, or one of its checkpoints."""


def last_above(node: RadixNode) -> Link:
    """The nearest checkpoint strictly above ``node`` on its run, or the run's top. O(nodes
    between)."""
    above = node.parent
    assert above is not None
    while above.parent is not None and not isinstance(above.children, dict):
        if above.checkpoint is not None:
            return above.checkpoint
        node, above = above, above.parent
    return node


def is_last_above(link: Link, node: RadixNode) -> bool:
    """Whether ``link``, which was the last above some node below ``node`` on its path, is the last
    above ``node`` too. O(1).

    False where it may be: it lies at ``node`` or below, or a split has put another top above it.
    """
    if isinstance(link, Checkpoint):
        return link.node.end < node.end
    above = link.parent
    is_top = above is not None and (above.parent is None or isinstance(above.children, dict))
    return is_top and link.end <= node.end


def last_at(node: RadixNode) -> Link:
    """As ``last_above``, with ``node``'s own checkpoint counted."""
    return node.checkpoint if node.checkpoint is not None else last_above(node)


def link(before: Link, after: Checkpoint | None) -> None:
    """Make ``after`` follow ``before``, None: nothing does. O(1)."""
    before.deeper = after
    if after is not None:
        after.shallower = before
