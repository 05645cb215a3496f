"""Radix tree: nodes, the items on them, walks, splits.

Token ids as bytes: how an edge is compared with a prompt and how a child is found.

An edge is int32 ids as bytes (4 a token), so that comparing a whole edge is one ``memcmp``; a split
makes two views of the same bytes. A child is found by the edge's first page: by its int id where a
page is one token (a memoryview hands it out without a numpy scalar), by its bytes where a page is
longer.

One node of the tree, and the two things that can hang on it: KV rows and a checkpoint.

``RadixNode`` is the structure. ``Segment`` (the KV rows of its edge) and ``Checkpoint`` (a state at
its end) are the evictable items: they carry what a policy may see (``policies.protocol.Item``). A
node without a segment is a *ghost*: its tokens are remembered, nothing can be read from it.

What of a node lies in lower memory: the rows of its KV, and a state.

A node with offloaded KV or an offloaded state, or with such a child, has an ``OffloadedEntry``;
all others have None. ``OffloadedCheckpoint`` is the item that a tier's policy orders.

The compressed radix tree over token ids: walk, split, grow, revive, detach.

Pure structure: one root per namespace, edges as byte views that a split shares, resident children
and ghost children apart so that "how deep does KV reach" and "how deep were the tokens seen" are
two plain walks. No recursion.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Hashable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from hybridcache.tokens import PLAIN, Indices, Tokens, common_prefix_len, require_namespace

TOKEN_BYTES = 4
"""Bytes of one int32 token id."""

ChildKey = int | bytes
Edge = bytes | memoryview


def child_key(edge: Edge, page_size: int) -> ChildKey:
    """The dict key under which an edge hangs at its parent: its first page. O(page)."""
    if page_size == 1:
        return int.from_bytes(edge[:TOKEN_BYTES], sys.byteorder, signed=True)
    return bytes(edge[: page_size * TOKEN_BYTES])


def first_page(tokens: Tokens, at: int, page_size: int) -> ChildKey:
    """The key of the child that ``tokens`` go on to from ``at``. O(page)."""
    return tokens.item(at) if page_size == 1 else tokens[at : at + page_size].tobytes()


def edge_tokens(edge: Edge) -> Tokens:
    """The ids of an edge: int32 view, read-only. O(1)."""
    return np.frombuffer(edge, dtype=np.int32)


Family: TypeAlias = "RadixNode | dict[Hashable, RadixNode] | None"
"""The children of a node: None, the one child itself, or a dict of two and more by their keys. Most
nodes have one child or none, since a conversation is a chain: a dict for each would take 64 to 224
bytes and two cold cache lines at every step of a walk."""


class ItemBytes(NamedTuple):
    """What one cached thing weighs on the device, bytes."""

    kv_token: int
    state: int
    """0 in an attention-only cache."""


class NodeHandle:
    """An opaque position in a cache's tree, as ``match`` and ``insert`` return it.

    Pass it to ``lock``, ``gather``, ``insert(after=...)`` of the same cache, and look at nothing in
    it. It is valid until the next insertion or eviction, or for as long as it is locked.
    """

    __slots__ = ()


class RadixNode(NodeHandle):
    """Tokens (``start``, ``end``] of some prompts. Mutable; one of the ``children`` or of the
    ``ghosts`` of its parent."""

    __slots__ = (
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
        "offloaded",
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
        self.offloaded: OffloadedEntry | None = None
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
        self.stored: OffloadedCheckpoint | None = None
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


class OffloadedEntry:
    """The lower part of one node. Tiers are numbered from the nearest, 0."""

    __slots__ = ("kv", "kv_tier", "num_children", "state")

    def __init__(self, num_tiers: int) -> None:
        self.kv: Indices | None = None
        """Rows of the edge, of a ghost only: what is on the device is nowhere else."""
        self.kv_tier = 0
        self.state: OffloadedCheckpoint | None = None
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
        if child.checkpoint is not None or (child.offloaded is not None and child.offloaded.state):
            return True
        node = child
    return False


def _only_child(node: RadixNode) -> RadixNode | None:
    resident, entry = members(node.children), node.offloaded
    num_stored = 0 if entry is None else sum(entry.num_children)
    if len(resident) + num_stored != 1:
        return None
    if resident:
        return next(iter(resident))
    return next(
        ghost
        for ghost in members(node.ghosts)
        if ghost.offloaded and ghost.offloaded.kv is not None
    )


class OffloadedCheckpoint:
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
    def offered(
        cls, was: Checkpoint | OffloadedCheckpoint, tier: int, rows: Indices
    ) -> OffloadedCheckpoint:
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
    def above(self) -> OffloadedCheckpoint | None:
        """The nearest one above it that is of the same tier. O(nodes between)."""
        above = self.node.parent
        while above is not None:
            entry = above.offloaded
            if entry is not None and entry.state is not None and entry.state.tier == self.tier:
                return entry.state
            above = above.parent
        return None

    @property
    def span(self) -> int:
        """Tokens back to the nearest state above, in whatever tier. O(nodes between)."""
        above = self.node.parent
        while above is not None and above.checkpoint is None:
            if above.offloaded is not None and above.offloaded.state is not None:
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
        entry = node.offloaded
        while entry is not None and entry.kv is not None and entry.kv_tier == tier:
            if any(entry.num_children[: tier + 1]) and num_tokens == 0:
                break
            assert node.parent is not None
            num_tokens += node.end - node.parent.end
            node = node.parent
            entry = node.offloaded
            if entry is None or entry.num_children[tier] > 1:
                break
            if entry.state is not None and entry.state.tier <= tier:
                break
        return item_bytes.state + num_tokens * item_bytes.kv_token

    def __repr__(self) -> str:
        return f"<state in tier {self.tier} at {self.node.end} used={self.last_used}>"


Walk = tuple[RadixNode, RadixNode | None, int]
"""How far a prompt follows the resident part of the tree:

- the deepest node whose edge, and all edges above, the prompt has whole;
- the child of it in whose edge the walk ended (the prompt leaves it there, or ends there), or None;
- tokens from the root to where it ended, whole pages.
"""


class RadixTree:
    """Nodes under one root per namespace. Every length given to it is a multiple of
    ``page_size``."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.roots: dict[Hashable, RadixNode] = {}
        self.num_nodes = 0
        """Resident and ghost nodes, roots not counted."""

    def root(self, namespace: Hashable) -> RadixNode:
        """Return the root of ``namespace``, made if it is not there. O(1). ValueError: no value
        for a namespace (``hybridcache.tokens``)."""
        node = self.find_root(namespace)
        if node is None:
            node = self.roots[namespace] = RadixNode(None, namespace, b"", 0)
        return node

    def find_root(self, namespace: Hashable) -> RadixNode | None:
        """Return the root of ``namespace``, or None if nothing is known of it. O(1). ValueError: no
        value for a namespace."""
        if type(namespace) not in PLAIN:
            require_namespace(namespace)
        return self.roots.get(namespace)

    def walk(self, node: RadixNode, tokens: Tokens, ghosts: bool = False) -> Walk:
        """Follow ``tokens``, which start at ``node``'s end, through resident edges, or through
        ghosts only. Reads only. O(len(tokens)).

        A whole edge is compared by one ``memcmp``; where it differs is looked for once, at the end.
        An only child is compared unasked: its key need not be looked up.
        """
        base = end = node.end
        family = node.ghosts if ghosts else node.children
        if family is None:
            return node, None, base
        stop = base + len(tokens)
        starts_with, token = tokens.tobytes().startswith, tokens.item
        page_size = self.page_size
        child: RadixNode | None
        while family is not None:
            at = end - base
            if isinstance(family, dict):
                if end >= stop:
                    break
                key = token(at) if page_size == 1 else first_page(tokens, at, page_size)
                child = family.get(key)
                if child is None:
                    break
            else:
                child = family
            if not starts_with(child.edge, at * TOKEN_BYTES):
                if end >= stop or child.key != first_page(tokens, at, page_size):
                    break
                shared = common_prefix_len(edge_tokens(child.edge), tokens[at:], page_size)
                return node, child, end + shared
            node = child
            end = node.end
            family = node.ghosts if ghosts else node.children
        return node, None, end

    def grow(self, parent: RadixNode, tokens: Tokens) -> RadixNode:
        """Hang a new node with a copy of ``tokens`` under ``parent``, as a resident child.
        O(len(tokens))."""
        edge = tokens.tobytes()
        key = tokens.item(0) if self.page_size == 1 else child_key(edge, self.page_size)
        child = RadixNode(parent, key, edge, parent.end + len(tokens))
        parent.children = with_child(parent.children, child)
        self.num_nodes += 1
        return child

    def split(self, lower: RadixNode, position: int) -> RadixNode:
        """Cut ``lower``'s edge at ``position``; the new upper node is returned. Copies no tokens.
        O(page).

        ``lower`` keeps its identity: its end, checkpoint and locks. The upper half is a ghost if
        ``lower`` is one, else the caller owes it a segment.
        """
        parent = lower.parent
        assert parent is not None and parent.end < position < lower.end
        cut = (position - parent.end) * TOKEN_BYTES
        edge = memoryview(lower.edge)
        upper = RadixNode(parent, lower.key, edge[:cut], position)
        lower.edge = edge[cut:]
        lower.key = child_key(lower.edge, self.page_size)
        lower.parent = upper
        family = parent.ghosts if lower.kv is None else parent.children
        if isinstance(family, dict):
            family[upper.key] = upper
        elif lower.kv is None:
            parent.ghosts = upper
        else:
            parent.children = upper
        if lower.kv is None:
            upper.ghosts = lower
        else:
            upper.children = lower
        self.num_nodes += 1
        return upper

    def revive(self, ghost: RadixNode) -> None:
        """Make a ghost a resident child again; the caller owes it a segment. O(1)."""
        parent = ghost.parent
        assert parent is not None
        parent.ghosts = without_child(parent.ghosts, ghost)
        parent.children = with_child(parent.children, ghost)

    def fade(self, leaf: RadixNode) -> None:
        """Turn a resident node without resident children into a ghost. O(1)."""
        parent = leaf.parent
        assert parent is not None and leaf.children is None
        parent.children = without_child(parent.children, leaf)
        parent.ghosts = with_child(parent.ghosts, leaf)

    def forget(self, ghost: RadixNode) -> None:
        """Remove a ghost without children. O(1)."""
        parent = ghost.parent
        assert parent is not None and ghost.ghosts is None
        parent.ghosts = without_child(parent.ghosts, ghost)
        self.num_nodes -= 1

    def prune_root(self, namespace: Hashable) -> None:
        """Drop the root of ``namespace`` if nothing hangs on it. O(1)."""
        root = self.roots.get(namespace)
        if root is not None and not root.children and not root.ghosts:
            del self.roots[namespace]

    def nodes(self, start: RadixNode | None = None) -> Iterator[RadixNode]:
        """Every node below ``start`` (default: below all roots), parents before children. O(tree),
        no recursion."""
        stack = [start] if start is not None else list(self.roots.values())
        while stack:
            node = stack.pop()
            below = [*members(node.children), *members(node.ghosts)]
            yield from below
            stack += below
