"""Checkpoints of the sessions that clients name, in the tree: what one session alone has used."""

from __future__ import annotations

from hybridcache.radix.tree import SESSION_END, SHARED, Checkpoint, RadixNode, members

MAX_RELATED = 1024
"""Most nodes that are looked at for the checkpoints of an ended session."""


def claim(node: RadixNode, session: str) -> list[RadixNode]:
    """Note that a prompt of ``session`` ("" if that is not known) passed the checkpoints up to
    ``node``. Returns the nodes of an ended session that serve another one after all.

    Prompts pass whole paths, so those above a checkpoint that ``session`` has passed are known.
    O(nodes up to that one).
    """
    above: RadixNode | None = node
    resumed: list[RadixNode] = []
    while above is not None:
        item = above.checkpoint or above.lost_checkpoint
        if item is not None:
            if item.session in (session, ""):
                break
            item.session = session if item.session is None else ""
            if item is above.checkpoint and item.stop_reason == SESSION_END:
                resumed.append(above)
        above = above.parent
    return resumed


def mark_ended(node: RadixNode, session: str) -> list[Checkpoint]:
    """Set the stop reason of the checkpoints that only ``session`` has used, without those at
    shared positions, and return them, nearest to ``node`` first. O(nodes of the session, and
    neighbours of its path): looks at ``MAX_RELATED`` nodes at most."""
    found, num_seen, before = list[Checkpoint](), 0, None
    above: RadixNode | None = node
    while above is not None:
        known = above.checkpoint or above.lost_checkpoint
        if known is not None and known.session != session:
            break
        waiting = [above]
        while waiting and num_seen < MAX_RELATED:
            num_seen, related = num_seen + 1, waiting.pop()
            item = related.checkpoint
            known = item or related.lost_checkpoint
            if known is None or known.session == session:
                waiting += [one for one in members(related.children) if one is not before]
                is_own = item is not None and item.label not in SHARED
                if item is not None and is_own and item.stop_reason != SESSION_END:
                    item.stop_reason = SESSION_END
                    found.append(item)
        before, above = above, above.parent
    return found
