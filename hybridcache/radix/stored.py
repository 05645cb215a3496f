"""What of a node lies in lower memory: the rows of its KV, and a state.

A node on which something hangs there, or a child of which does, has a ``Below``; all others have
None and cost nothing. ``StoredState`` is what a tier's policy orders.
"""

from __future__ import annotations

from typing import Any, Literal

from hybridcache.radix.node import Checkpoint, ItemBytes, RadixNode, members, tail_bytes
from hybridcache.tokens import Indices


class Below:
    """The lower part of one node. Tiers are numbered from the nearest, 0."""

    __slots__ = ("kv", "kv_tier", "num_children", "state")

    def __init__(self, num_tiers: int) -> None:
        self.kv: Indices | None = None
        """Rows of the edge, of a ghost only: what is on the device is nowhere else."""
        self.kv_tier = 0
        self.state: StoredState | None = None
        """None where the checkpoint is on the device, or nowhere."""
        self.num_children = [0] * num_tiers
        """By tier: ghosts below this node whose KV is there."""

    @property
    def is_empty(self) -> bool:
        return self.kv is None and self.state is None and not any(self.num_children)

    @property
    def nearest(self) -> int | None:
        """The nearest tier that holds something that needs this node's KV; None: nothing does.
        O(tiers)."""
        for tier, num_children in enumerate(self.num_children):
            if num_children or (self.state is not None and self.state.tier == tier):
                return tier
        return None


def is_superseded(node: RadixNode) -> bool:
    """Whether going down single children from ``node``, on the device or below, a state comes
    before a fork or the end. O(nodes to it)."""
    while (child := _only_child(node)) is not None:
        if child.checkpoint is not None or (child.below is not None and child.below.state):
            return True
        node = child
    return False


def _only_child(node: RadixNode) -> RadixNode | None:
    resident, below = members(node.children), node.below
    num_stored = 0 if below is None else sum(below.num_children)
    if len(resident) + num_stored != 1:
        return None
    if resident:
        return next(iter(resident))
    return next(
        ghost for ghost in members(node.ghosts) if ghost.below and ghost.below.kv is not None
    )


class StoredState:
    """A state in a lower tier: an evictable item of kind ``checkpoint``."""

    __slots__ = (
        "created",
        "item_bytes",
        "label",
        "last_used",
        "memo",
        "node",
        "rows",
        "serial",
        "superseded",
        "tier",
        "uses",
    )

    kind: Literal["checkpoint"] = "checkpoint"
    dead = False

    def __init__(
        self,
        node: RadixNode,
        tier: int,
        rows: Indices,
        now: int,
        serial: int,
        item_bytes: ItemBytes,
    ) -> None:
        self.node = node
        self.tier = tier
        self.rows = rows
        """Of its tier; none until there is room for them."""
        self.created = self.last_used = now
        self.uses = 0
        self.serial = serial
        self.superseded = False
        """A deeper state, in whatever tier, stands on its unforked path. Brought up to date where
        it decides: when the item is let in, when a deeper one is, and before it goes."""
        self.label = ""
        self.item_bytes = item_bytes
        self.memo: Any = None

    @classmethod
    def offered(cls, was: Checkpoint | StoredState, tier: int, rows: Indices) -> StoredState:
        """What ``was`` one tier nearer. Use and age carry over; the memo does not, where another
        policy made it."""
        state = cls(was.node, tier, rows, was.created, was.serial, was.item_bytes)
        state.last_used, state.uses = was.last_used, was.uses
        state.superseded, state.label = is_superseded(was.node), was.label
        return state

    @property
    def position(self) -> int:
        return self.node.end

    @property
    def above(self) -> StoredState | None:
        """The nearest one above it that is of the same tier. O(nodes between)."""
        above = self.node.parent
        while above is not None:
            below = above.below
            if below is not None and below.state is not None and below.state.tier == self.tier:
                return below.state
            above = above.parent
        return None

    @property
    def span(self) -> int:
        """Tokens back to the nearest state above, in whatever tier. O(nodes between)."""
        above = self.node.parent
        while above is not None and above.checkpoint is None:
            if above.below is not None and above.below.state is not None:
                break
            above = above.parent
        return self.node.end - (0 if above is None else above.end)

    @property
    def size_bytes(self) -> int:
        """Its state, and the KV that its tier holds for it alone. O(nodes of that)."""
        node, item_bytes = self.node, self.item_bytes
        if node.kv is not None:
            # It has just left the device: where it was a leaf, its tail is about to follow.
            return item_bytes.state + (0 if node.children else tail_bytes(node, item_bytes))
        num_tokens, tier = 0, self.tier
        below = node.below
        while below is not None and below.kv is not None and below.kv_tier == tier:
            if any(below.num_children[: tier + 1]) and num_tokens == 0:
                break
            assert node.parent is not None
            num_tokens += node.end - node.parent.end
            node = node.parent
            below = node.below
            if below is None or below.num_children[tier] > 1:
                break
            if below.state is not None and below.state.tier <= tier:
                break
        return item_bytes.state + num_tokens * item_bytes.kv_token

    def __repr__(self) -> str:
        return f"<state in tier {self.tier} at {self.node.end} used={self.last_used}>"
