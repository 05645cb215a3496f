"""One node of the tree, and the two things that can hang on it: KV rows and a checkpoint.

``RadixNode`` is the structure. ``Segment`` (the KV rows of its edge) and ``Checkpoint`` (a state at
its end) are the evictable items: they carry what a policy may see (``policies.protocol.Item``). A
node without a segment is a *ghost*: its tokens are remembered, nothing can be read from it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from hybridcache.radix.key import Edge, edge_tokens
from hybridcache.tokens import Indices, Tokens

if TYPE_CHECKING:
    from hybridcache.radix.stored import Below, StoredState

Family: TypeAlias = "RadixNode | dict[Hashable, RadixNode] | None"
"""The children of a node: None, the one child itself, or a dict of two and more by their keys. Most
nodes have one child or none, since a conversation is a chain: a dict for each would take 64 to 224
bytes and two cold cache lines at every step of a walk."""


class ItemBytes(NamedTuple):
    """What one cached thing weighs on the device, bytes."""

    kv_token: int
    state: int
    """0 in an attention-only cache."""


class RadixNode:
    """Tokens (``start``, ``end``] of some prompts. Mutable; one of the ``children`` or of the
    ``ghosts`` of its parent."""

    __slots__ = (
        "below",
        "checkpoint",
        "children",
        "deeper",
        "edge",
        "end",
        "ghosts",
        "key",
        "kv",
        "locks",
        "lost_checkpoint",
        "parent",
        "pins",
    )

    def __init__(self, parent: RadixNode | None, key: Hashable, edge: Edge, end: int) -> None:
        self.parent = parent
        """None at a root."""
        self.key = key
        self.edge = edge
        """The edge's int32 ids as bytes, or a view of some."""
        self.end = end
        """Tokens from the root to this node's end."""
        self.children: Family = None
        """Children whose KV is resident."""
        self.ghosts: Family = None
        """Children of which only tokens are left."""
        self.kv: Segment | None = None
        """None: a ghost (or a root)."""
        self.checkpoint: Checkpoint | None = None
        self.locks = 0
        self.lost_checkpoint: Checkpoint | None = None
        """The checkpoint that stood here and was evicted: a tombstone while KV is resident, a
        regret in a ghost."""
        self.deeper: Checkpoint | None = None
        """At the top of a run: its first checkpoint (``radix.forks``)."""
        self.pins = 0
        """See ``locked_paths``."""
        self.below: Below | None = None
        """What lower memory holds of it (``radix.stored``)."""

    @property
    def start(self) -> int:
        return 0 if self.parent is None else self.parent.end

    @property
    def tokens(self) -> Tokens:
        """The edge's ids: int32[end - start], read-only."""
        return edge_tokens(self.edge)

    def __repr__(self) -> str:
        kind = "root" if self.parent is None else "ghost" if self.kv is None else "node"
        slot = f" checkpoint={self.checkpoint.slot}" if self.checkpoint else ""
        return f"<{kind} {self.start}..{self.end}{slot} locks={self.locks}>"


class Segment:
    """The KV rows of one node's edge: an evictable item of kind ``kv``."""

    __slots__ = ("created", "indices", "item_bytes", "last_used", "memo", "node", "serial", "uses")

    kind: Literal["kv"] = "kv"
    superseded = False
    label = ""

    def __init__(
        self, node: RadixNode, indices: Indices, now: int, serial: int, item_bytes: ItemBytes
    ) -> None:
        self.node = node
        self.indices = indices
        self.created = self.last_used = now
        self.serial = serial
        self.item_bytes = item_bytes
        self.uses = 0
        self.memo: Any = None

    @property
    def position(self) -> int:
        return self.node.end

    @property
    def above(self) -> Checkpoint | None:
        """Nearest checkpoint above. O(nodes between)."""
        return checkpoint_above(self.node)

    @property
    def dead(self) -> bool:
        """A leaf from which nothing can be resumed. O(1)."""
        node = self.node
        return node.checkpoint is None and not node.children and self.item_bytes.state > 0

    @property
    def span(self) -> int:
        """Tokens back to the nearest checkpoint above; its own where there are no states. O(nodes
        between)."""
        if not self.item_bytes.state:
            return len(self.indices)
        above = self.above
        return self.node.end - (0 if above is None else above.node.end)

    @property
    def size_bytes(self) -> int:
        """Its rows, the state that can not outlive them, and the tail above that goes with them.
        O(nodes in the tail)."""
        state = 0 if self.node.checkpoint is None else self.item_bytes.state
        return state + tail_bytes(self.node, self.item_bytes)

    def __repr__(self) -> str:
        return f"<kv {self.node.start}..{self.node.end} used={self.last_used}>"


class Checkpoint:
    """A state after exactly ``node.end`` tokens: an evictable item of kind ``checkpoint``."""

    __slots__ = (
        "created",
        "deeper",
        "item_bytes",
        "label",
        "last_used",
        "memo",
        "node",
        "serial",
        "shallower",
        "slot",
        "stored",
        "superseded",
        "uses",
    )

    kind: Literal["checkpoint"] = "checkpoint"
    dead = False

    def __init__(
        self,
        node: RadixNode,
        slot: int,
        now: int,
        serial: int,
        item_bytes: ItemBytes,
        label: str,
    ) -> None:
        self.node = node
        self.slot = slot
        self.created = self.last_used = now
        self.serial = serial
        self.item_bytes = item_bytes
        self.label = label
        self.uses = 0
        self.superseded = False
        self.shallower: RadixNode | Checkpoint | None = None
        self.deeper: Checkpoint | None = None
        """Its neighbours on its run (``radix.forks``); None and None once it was evicted."""
        self.stored: StoredState | None = None
        """What it became in a lower tier when it was evicted, if one let it in."""
        self.memo: Any = None

    @property
    def position(self) -> int:
        return self.node.end

    @property
    def above(self) -> Checkpoint | None:
        """Nearest checkpoint above. O(1) on its own run, else O(nodes between its top and that
        one)."""
        before = self.shallower
        if isinstance(before, Checkpoint):
            return before
        return checkpoint_above(self.node if before is None else before)

    @property
    def span(self) -> int:
        """Tokens back to the nearest checkpoint above. Costs as ``above``."""
        above = self.above
        return self.node.end - (0 if above is None else above.node.end)

    @property
    def size_bytes(self) -> int:
        """Its state, and at a leaf the KV tail that nothing could resume from any more. O(nodes in
        the tail)."""
        size = self.item_bytes.state
        return size if self.node.children else size + tail_bytes(self.node, self.item_bytes)

    def __repr__(self) -> str:
        return f"<checkpoint slot={self.slot} at {self.node.end} used={self.last_used}>"


def checkpoint_above(node: RadixNode) -> Checkpoint | None:
    """The nearest checkpoint strictly above ``node``'s end; None up to the root. O(nodes
    between)."""
    above = node.parent
    while above is not None and above.checkpoint is None:
        above = above.parent
    return None if above is None else above.checkpoint


def ghosts_above(node: RadixNode) -> Iterator[Checkpoint]:
    """Evicted checkpoints strictly above ``node``'s end, up to the nearest one that is there, the
    deepest first. O(nodes between)."""
    above = node.parent
    while above is not None and above.checkpoint is None:
        if above.lost_checkpoint is not None:
            yield above.lost_checkpoint
        above = above.parent


def tail_bytes(node: RadixNode, item_bytes: ItemBytes) -> int:
    """Bytes of KV that go with ``node``'s: its own rows, and those of the stateless, unlocked,
    unforked nodes above it, from which nothing could resume any more. O(nodes in the tail)."""
    num_tokens = 0
    while node.kv is not None and node.parent is not None:
        num_tokens += node.end - node.parent.end
        node = node.parent
        kept = node.checkpoint is not None or node.locks or isinstance(node.children, dict)
        if kept or not item_bytes.state:
            break
    return num_tokens * item_bytes.kv_token


def with_child(family: Family, child: RadixNode) -> Family:
    """``family`` and ``child``, which has a key of its own. O(1)."""
    if family is None:
        return child
    if isinstance(family, dict):
        family[child.key] = child
        return family
    return {family.key: family, child.key: child}


def without_child(family: Family, child: RadixNode) -> Family:
    """``family`` less ``child``, which is in it. O(1)."""
    if not isinstance(family, dict):
        return None
    del family[child.key]
    if len(family) > 1:
        return family
    (only,) = family.values()
    return only


def only_child(family: Family) -> RadixNode | None:
    """The one child; None if there is none, or more than one. O(1)."""
    return None if isinstance(family, dict) else family


def members(family: Family) -> Collection[RadixNode]:
    """All of them, in the order in which they came. O(1)."""
    if isinstance(family, dict):
        return family.values()
    return () if family is None else (family,)
