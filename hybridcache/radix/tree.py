"""Radix tree over token ids: nodes, their items, walks and splits; and a bounded list of ghosts.

``RadixTree`` has one root per namespace. ``RadixNode`` is the structure; its evictable items are
the ``Edge`` (KV rows of its edge) and the ``Checkpoint`` (state at its end), with the attributes
that policies see (``Item``). A node without KV is a *ghost*: its tokens are remembered, but
it has no KV on the device. Resident children and ghosts are separate families, so that the length
of the KV and the length of the seen tokens are two plain walks without recursion.

An edge is stored as the bytes of its int32 ids (4 per token), so that an edge is compared with one
``memcmp``. Its KV rows are stored as bytes too, because an array takes 100 bytes more. A split
copies both parts, so that no node keeps the memory of an evicted one. The key of a child is the
first page of its edge, in bytes.

``RadixTree`` has no policy and no memory: the cache decides when a node changes. ``GhostList``
discards the oldest ghosts beyond its limit of bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator
from itertools import chain, islice
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeAlias, final

import numpy as np

from hybridcache.allocators.moves import Indices
from hybridcache.radix.tokens import PLAIN, Tokens, common_prefix_len, require_namespace

TOKEN_BYTES = 4
"""Bytes of one int32 token id."""
SESSION_END = "session_end"
"""Stop reason of a session of which no request follows, as its client has said."""
SHARED = frozenset({"branch", "boundary", "head"})
"""Labels of positions that several prompts share, also if only one session has used them yet."""


def edge_tokens(edge: bytes) -> Tokens:
    """Return the ids of an edge: an int32 view, read-only. O(1)."""
    return np.frombuffer(edge, dtype=np.int32)


Family: TypeAlias = "RadixNode | dict[Hashable, RadixNode] | None"
"""Children of a node: None, the only child itself, or a dict of two or more by their keys.

Most nodes have at most one child, since a conversation is a chain. A dict for each would take 64 to
224 bytes and two cold cache lines at every step of a walk.
"""


class ItemBytes(NamedTuple):
    """Bytes of one token's KV and of one state on the device."""

    kv_token: int
    state: int
    """It is 0 in an attention-only cache."""


@final
class RadixNode:
    """Node for the tokens in (``start``, ``end``] of some prompts.

    Made by the cache, and for reading only. It is in ``children`` or ``ghosts`` of its parent.
    ``kv`` and ``checkpoint`` also have the attributes of ``Item``.
    """

    __slots__ = (
        "checkpoint",
        "children",
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

    def __init__(self, parent: RadixNode | None, key: Hashable, edge: bytes, end: int) -> None:
        self.parent = parent
        """Parent node; None for a root."""
        self.key = key
        """Namespace for a root, else the first page of the edge."""
        # Bytes of the int32 ids of the edge.
        self.edge = edge
        self.end = end
        """Number of tokens from the root to the end of this node."""
        self.children: Family = None
        """Children with resident KV: None, the only child, or a dict of them."""
        self.ghosts: Family = None
        """Children with evicted KV, in the same form."""
        self.kv: Edge | None = None
        """KV of the edge; None for ghosts and roots. ``kv.indices`` are its rows, int32[n], and
        ``kv.serial`` identifies it for the lifetime of the cache."""
        self.checkpoint: Checkpoint | None = None
        """State at the end, or None. ``checkpoint.slot`` is its slot."""
        self.locks = 0
        """Number of locks of this node. Those below it protect its KV too."""
        self.lost_checkpoint: Checkpoint | None = None
        """Checkpoint that was evicted from here, or None. A resident node with one is a tombstone.
        """
        # 1 if the node is locked, plus the number of children with pins (``protected``).
        self.pins = 0
        self.offloaded: OffloadedEntry | None = None
        """KV and state of this node in offload tiers, or None."""

    @property
    def start(self) -> int:
        """Number of tokens from the root to the start of this node."""
        return 0 if self.parent is None else self.parent.end

    @property
    def serial(self) -> int:
        """Serial of the KV of this resident node, ``kv.serial``."""
        assert self.kv is not None
        return self.kv.serial

    @property
    def namespace(self) -> Hashable:
        """Namespace of the prompts. O(nodes above)."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node.key

    @property
    def tokens(self) -> Tokens:
        """Ids of the edge: int32[end - start], read-only."""
        return edge_tokens(self.edge)

    def __repr__(self) -> str:
        kind = "root" if self.parent is None else "ghost" if self.kv is None else "node"
        slot = f" checkpoint={self.checkpoint.slot}" if self.checkpoint else ""
        return f"<{kind} {self.start}..{self.end}{slot} locks={self.locks}>"


class PathPart:
    """First ``length`` tokens of the path to ``node``. A hit can end inside an edge, and ``match``
    does not split it."""

    __slots__ = ("length", "node")

    def __init__(self, node: RadixNode, length: int) -> None:
        self.node = node
        self.length = length

    def last(self) -> RadixNode:
        """Return the node in which the part ends. O(splits since the match)."""
        node = self.node
        while node.start >= self.length:
            assert node.parent is not None
            node = node.parent
        return node


NodeHandle = RadixNode | PathPart
"""Position in the tree of a cache, returned by ``match`` and ``insert``.

Pass it to ``lock``, ``gather`` or ``insert(after=...)`` of the same cache. It is valid until the
next insertion or eviction, or for as long as it is locked.
"""
Kind = Literal["kv", "checkpoint"]


class Promise(NamedTuple):
    """Announcement of a client that it continues a conversation soon."""

    made_s: float
    """Time of the announcement, by ``EvictionPolicy.clock``."""
    until_s: float
    """Time at which it ends."""
    made: int
    """Logical time of the announcement."""
    uses: int
    """Uses of the checkpoint so far. A further use keeps the promise, and ends it."""


class Item:
    """Unit of eviction, as seen by a policy: one checkpoint, or the KV of one node. Made by the
    cache.

    Write only ``memo``, and that in eviction policies only: other attributes are the cache's.
    """

    __slots__ = ("created", "item_bytes", "last_used", "memo", "node", "serial", "uses")

    memo: Any
    """Data of the policy. None at first, and kept as long as the item lives. An item that was read
    from a file can lack it: see ``EvictionPolicy.on_ghost_hit``."""
    kind: Kind
    """Kind of the freed memory: KV rows, or a checkpoint's slot."""
    position: int = property(attrgetter("node.end"))  # type: ignore[assignment]
    """Number of tokens from the root to its end."""
    serial: int
    """Creation number among all items of the cache. Breaks ties, so that runs are reproducible."""
    created: int
    """Logical time of creation (one tick per request)."""
    last_used: int
    """Logical time of the last use."""
    uses: int
    """Number of requests that resumed from it (checkpoint) or through it (KV)."""
    earlier_uses: int
    """Number of requests that resumed from an evicted checkpoint at this position, or would have.
    Checkpoints only."""
    superseded: bool
    """True if a deeper checkpoint exists on the same unforked path, or is about to: a running
    request has taken its slot. Also True for the last one of a session that has ended."""
    label: str
    """Placement rule that saved it: end, branch, boundary, backoff, every ..."""
    distance: int
    """Tokens to the end of its prompt, of a back-off of ``adaptive``. 0 for other items."""
    session: str | None
    """Name of the only session whose prompts have passed it, "" if that is not known or there are
    several, or None before the end of the first request. Checkpoints only."""
    stop_reason: str
    """Reason why the answer before it ended (``hybridcache.radix.lease.STOP_REASONS``), for the
    deepest checkpoint of a finished request. Empty for others, or if it is not known."""
    promise: Promise | None
    """Latest promise for the end of a conversation (``LeaseRequest.returns_within_s``), or None. KV
    has that of the checkpoint at its end. See ``promise_at``."""
    node: RadixNode
    """Node of the tree, for the cache only."""
    item_bytes: ItemBytes
    """Bytes of a token's KV and of a state."""

    @property
    def dead(self) -> bool:
        """True for a leaf without a checkpoint: its KV cannot be resumed from. O(1).

        Always False in an attention-only cache.
        """
        return False

    @property
    def namespace(self) -> Hashable:
        """Namespace of its prompts. O(nodes above)."""
        return self.node.namespace

    def promise_at(self, now_s: float) -> Promise | None:
        """Return the promise if it still counts at ``now_s``, else None.

        It ends with its time, with the next use, and once a later turn has superseded the item.
        """
        item = self.node.checkpoint
        if item is None or (promise := item.promise) is None or item.superseded:
            return None
        return promise if now_s < promise.until_s and item.uses == promise.uses else None

    @property
    def above(self) -> Item | None:
        """Nearest checkpoint above on its path, or None for the root. O(nodes between)."""
        above = self.node.parent
        while above is not None and above.checkpoint is None:
            above = above.parent
        return None if above is None else above.checkpoint

    @property
    def predecessor(self) -> Item | None:
        """As ``above``, but it may have been evicted. Links items by lineage. For KV, one at its
        own end counts. O(nodes between)."""
        node: RadixNode | None = self.node
        while node is not None:
            found = node.checkpoint or node.lost_checkpoint
            if found is not None and found is not self:
                return found
            node = node.parent
        return None

    def is_shared_head(self, within: int) -> bool:
        """Return whether two different texts or more followed it within ``within`` tokens and have
        checkpoints that were used, or would have been. O(1): looks at the latest 128 nodes."""
        count, waiting = 0, [self.node]
        for _ in range(128):
            if not waiting or count > 1:
                break
            node = waiting.pop()
            found = node.checkpoint or node.lost_checkpoint
            is_behind = node.end >= self.position + within
            if is_behind and found is not None and found.uses + found.earlier_uses:
                count += 1
            else:
                waiting += (*members(node.children), *members(node.ghosts))
        return count > 1

    @property
    def span(self) -> int:
        """Number of tokens that must be computed again to resume here after its eviction.

        This is the distance to the nearest checkpoint above, for both kinds, regardless of rows
        that remain in between. Neither ``span`` nor ``size_bytes`` depends on earlier node splits.
        An attention-only cache evicts whole edges and can resume anywhere: there it is the
        length of the edge. Costs as ``above``.
        """
        if not self.item_bytes.state:
            return self.position - self.node.start
        above = self.above
        return self.position if above is None else self.position - above.position

    @property
    def size_bytes(self) -> int:
        """Bytes that evicting it now frees. O(nodes in the tail).

        - KV: its rows, the state at its end, and the tail above. The tail is the path up to the
          nearest checkpoint, fork or lock, which is evicted with it.
        - Checkpoint: its state, and for a leaf the same tail.
        - Attention-only cache: the rows of the edge.
        """
        return Item.span_and_size(self)[1]

    def span_and_size(self) -> tuple[int, int]:
        """Return ``span`` and ``size_bytes``, after one walk for both."""
        node, (kv_token, state) = self.node, self.item_bytes
        if not state:
            return self.span, self.span * kv_token
        size_bytes, above = state, node.parent
        if node.children is None or self.kind == "kv":
            below, top = node, node if node.kv is None else above
            assert top is not None
            while (above := top.parent) is not None and top.checkpoint is None:
                if top.children is not below or top.locks:
                    break
                below, top = top, above
            size_bytes, above = (node.end - top.end) * kv_token, top
            if self.kind == "checkpoint" or node.checkpoint is not None:
                size_bytes += state
        while above is not None and above.checkpoint is None:
            above = above.parent
        return self.position if above is None else self.position - above.end, size_bytes


class Edge(Item):
    """KV rows of the edge of one node: an evictable item of kind ``kv``."""

    __slots__ = ("rows",)

    kind = "kv"
    superseded = False
    label = stop_reason = ""
    distance = 0

    def __init__(
        self, node: RadixNode, rows: bytes, now: int, serial: int, item_bytes: ItemBytes
    ) -> None:
        self.node = node
        # Bytes of the int32 rows, which the cache replaces.
        self.rows = rows
        self.created = self.last_used = now
        self.serial = serial
        self.item_bytes = item_bytes
        self.uses = 0
        self.memo = None

    @property
    def indices(self) -> Indices:
        """KV rows: int32[n], read-only. The cache replaces them if they move."""
        return np.frombuffer(self.rows, np.int32)

    @property
    def promise(self) -> Promise | None:  # type: ignore[override]
        checkpoint = self.node.checkpoint
        return None if checkpoint is None else checkpoint.promise

    @property
    def dead(self) -> bool:
        node = self.node
        return node.checkpoint is None and not node.children and self.item_bytes.state > 0

    def __repr__(self) -> str:
        return f"<kv {self.node.start}..{self.node.end} used={self.last_used}>"


class Checkpoint(Item):
    """State after exactly ``node.end`` tokens: an evictable item of kind ``checkpoint``."""

    __slots__ = (
        "distance",
        "earlier_uses",
        "label",
        "num_successors",
        "promise",
        "session",
        "slot",
        "stop_reason",
        "stored",
        "superseded",
    )

    kind = "checkpoint"
    dead = False

    def __init__(
        self, node: RadixNode, slot: int, now: int, serial: int, item_bytes: ItemBytes
    ) -> None:
        self.node = node
        self.slot = slot
        self.created = self.last_used = now
        self.serial = serial
        self.item_bytes = item_bytes
        self.label = self.stop_reason = ""
        self.distance = 0
        self.session = None
        self.uses = self.earlier_uses = 0
        self.num_successors = 0
        """Running requests that will save a deeper checkpoint (``LockHandle.superseded``)."""
        self.superseded = False
        self.promise = None
        self.stored: OffloadedCheckpoint | None = None
        """Item in an offload tier that replaced it, or None."""
        self.memo = None

    @property
    def title(self) -> str:
        """Label, distance and stop reason, those that it has, for people: decode/tool_use."""
        label = f"{self.label}:{self.distance}" if self.distance else self.label
        return f"{label}/{self.stop_reason}" if self.stop_reason else label

    def __repr__(self) -> str:
        return f"<checkpoint slot={self.slot} at {self.node.end} used={self.last_used}>"


def with_child(family: RadixNode | dict[Hashable, RadixNode], child: RadixNode) -> Family:
    """Return ``family`` with ``child`` added. O(1)."""
    if type(family) is RadixNode:
        return {family.key: family, child.key: child}
    family[child.key] = child
    return family


def without_child(family: Family, child: RadixNode) -> Family:
    """Return ``family`` with ``child``, one of its members, removed. O(1)."""
    if type(family) is not dict:
        return None
    del family[child.key]
    if len(family) > 1:
        return family
    (only,) = family.values()
    return only


def members(family: Family) -> Collection[RadixNode]:
    """Return all children, in order of their creation. O(1)."""
    if isinstance(family, dict):
        return family.values()
    return () if family is None else (family,)


# --- Superseded checkpoints -----------------------------------------------------------------------
#
# A checkpoint is superseded if a deeper one is on its unforked path (one resident child at each
# step), or if its session has ended and the path does not fork. A checkpoint or fork that comes or
# goes can change this for the nearest one above only.


def last_checkpoint(node: RadixNode) -> Checkpoint | None:
    """Return the checkpoint of ``node``, else the nearest one above from which the path to ``node``
    does not fork, or None. O(nodes between)."""
    while node.checkpoint is None:
        above = node.parent
        if above is None or above.children is not node:
            return None
        node = above
    return node.checkpoint


def is_superseded(item: Checkpoint) -> bool:
    """Return whether a checkpoint is on the unforked path below ``item``, or all below it is the
    rest of an ended session. O(nodes to it)."""
    child = item.node.children
    while type(child) is RadixNode:
        if child.checkpoint is not None:
            return True
        child = child.children
    return item.stop_reason == SESSION_END and (child is None or bool(item.session))


# --- Offloaded parts ------------------------------------------------------------------------------


class OffloadedEntry:
    """Offloaded parts of one node. Tiers are numbered from the nearest, 0."""

    __slots__ = ("kv", "kv_tier", "num_children", "state")

    def __init__(self, num_tiers: int) -> None:
        self.kv: Indices | None = None
        """Rows of the edge in tier ``kv_tier``, or None. Only ghosts have offloaded KV."""
        self.kv_tier = 0
        self.state: OffloadedCheckpoint | None = None
        """Offloaded state, or None if the checkpoint is on the device or does not exist."""
        self.num_children = [0] * num_tiers
        """Number of ghosts below this node with KV in each tier."""

    @property
    def nearest(self) -> int | None:
        """Nearest tier with an entry that needs the KV of this node, or None. O(tiers)."""
        for tier, num_children in enumerate(self.num_children):
            if num_children or (self.state is not None and self.state.tier == tier):
                return tier
        return None


ON_DEVICE = -1
"""Number of the device; tiers are numbered from the nearest, 0."""


def tier_of(node: RadixNode) -> int | None:
    """Return the number of the tier that holds the KV of ``node``, or None."""
    if node.kv is not None or node.parent is None:
        return ON_DEVICE
    entry = node.offloaded
    return entry.kv_tier if entry is not None and entry.kv is not None else None


def is_superseded_in_tiers(item: Checkpoint) -> bool:
    """Return whether a state, on the device or offloaded, is on the unforked path below ``item``,
    or all below it is the rest of an ended session. O(nodes to it)."""
    node = item.node
    while True:
        resident, entry = members(node.children), node.offloaded
        num_stored = 0 if entry is None else sum(entry.num_children)
        if len(resident) + num_stored != 1:
            is_rest = bool(item.session) or not (resident or num_stored)
            return item.stop_reason == SESSION_END and is_rest
        stored = (ghost for ghost in members(node.ghosts) if tier_of(ghost) is not None)
        node = next(chain(resident, stored))
        if node.checkpoint is not None or (node.offloaded and node.offloaded.state):
            return True


def next_state(node: RadixNode) -> Checkpoint | None:
    """Return the nearest state above ``node``, on the device or offloaded. O(nodes between)."""
    above = node.parent
    while above is not None:
        entry = above.offloaded
        state = above.checkpoint or (None if entry is None else entry.state)
        if state is not None:
            return state
        above = above.parent
    return None


class OffloadedCheckpoint(Checkpoint):
    """State in an offload tier. It has no slot.

    ``superseded`` is updated only when this item or a deeper one is stored, and before it is
    evicted.
    """

    __slots__ = ("rows", "tier")

    def __init__(self, was: Checkpoint, tier: int, rows: Indices) -> None:
        """Make the item for ``was`` in ``tier``, with its uses and age but without its memo."""
        super().__init__(was.node, -1, was.created, was.serial, was.item_bytes)
        self.label, self.distance, self.stop_reason = was.label, was.distance, was.stop_reason
        self.session = was.session
        self.last_used, self.uses, self.earlier_uses = was.last_used, was.uses, was.earlier_uses
        self.superseded = is_superseded_in_tiers(was)
        self.tier = tier
        self.rows = rows
        """Rows of its tier. Empty until there is room for them."""

    @property
    def above(self) -> OffloadedCheckpoint | None:
        """Nearest item above in the same tier. O(nodes between)."""
        above = self.node.parent
        while above is not None:
            entry = above.offloaded
            if entry is not None and entry.state is not None and entry.state.tier == self.tier:
                return entry.state
            above = above.parent
        return None

    predecessor = above

    @property
    def span(self) -> int:
        """Number of tokens back to the nearest state above, in any tier. O(nodes between)."""
        above = next_state(self.node)
        return self.node.end - (0 if above is None else above.position)

    @property
    def size_bytes(self) -> int:
        """Bytes of its state, and of the KV that its tier holds for it alone. O(nodes of it)."""
        node, item_bytes = self.node, self.item_bytes
        if node.kv is not None:
            # It has just left the device: where it was a leaf, its tail is about to follow.
            return super().size_bytes
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

    def span_and_size(self) -> tuple[int, int]:
        return self.span, self.size_bytes

    def __lt__(self, other: object) -> bool:
        """Return False, because a state that is stored again has the serial of its first item,
        which a policy's heap may still hold."""
        return False

    __gt__ = __lt__

    def __repr__(self) -> str:
        return f"<state in tier {self.tier} at {self.node.end} used={self.last_used}>"


# --- The tree -------------------------------------------------------------------------------------

Walk = tuple[RadixNode, RadixNode | None, int]
"""Result of following a prompt through the resident part of the tree:

- the deepest node with a fully matched path;
- its child with a partly matched edge, or None;
- the number of matched tokens from the root, in whole pages.
"""


class RadixTree:
    """Nodes under one root per namespace.

    All lengths passed to it are multiples of ``page_size``.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.key_bytes = page_size * TOKEN_BYTES
        self.roots: dict[Hashable, RadixNode] = {}
        self.num_nodes = 0
        """Number of resident nodes and ghosts, without roots."""

    def root(self, namespace: Hashable) -> RadixNode:
        """Return the root of ``namespace``, or a new one that the tree has not yet. O(1).

        The tree has a new root from the first ``grow`` below it. Raises ValueError if the namespace
        is invalid (``hybridcache.radix.tokens``).
        """
        if type(namespace) not in PLAIN:
            require_namespace(namespace)
        node = self.roots.get(namespace)
        return RadixNode(None, namespace, b"", 0) if node is None else node

    def walk(self, node: RadixNode, ids: bytes, base: int, ghosts: bool = False) -> Walk:
        """Follow ``ids``, the tokens of a prompt from position ``base`` on, from ``node``, which is
        on their path, through resident edges or through ghosts.

        Changes nothing. O(tokens after node): an edge is compared with one ``memcmp``, and the
        position of a difference is searched once, at the end. An only child is compared without
        looking up its key.
        """
        at, key_bytes = (node.end - base) * TOKEN_BYTES, self.key_bytes
        family = node.ghosts if ghosts else node.children
        starts_with = ids.startswith
        while True:
            if type(family) is not RadixNode:
                family = None if family is None else family.get(ids[at : at + key_bytes])
                if family is None:
                    return node, None, node.end
            edge = family.edge
            if not starts_with(edge, at):
                if family.key != ids[at : at + key_bytes]:
                    return node, None, node.end
                rest = np.frombuffer(ids, np.int32, offset=at)
                shared = common_prefix_len(edge_tokens(edge), rest, self.page_size)
                return node, family, node.end + shared
            node = family
            at += len(edge)
            family = node.ghosts if ghosts else node.children

    def grow(self, parent: RadixNode, edge: bytes) -> RadixNode:
        """Add a resident child with the tokens of ``edge`` to ``parent``, and return it. O(1)."""
        end = parent.end + len(edge) // TOKEN_BYTES
        child = RadixNode(parent, edge[: self.key_bytes], edge, end)
        family = parent.children
        parent.children = child if family is None else with_child(family, child)
        if parent.parent is None:
            self.roots[parent.key] = parent
        self.num_nodes += 1
        return child

    def split(self, lower: RadixNode, position: int) -> RadixNode:
        """Split the edge of ``lower`` at ``position``, and return the new upper node.

        ``lower`` keeps its end, checkpoint and locks. The upper half is a ghost if ``lower`` is
        one; otherwise the caller must give it KV. O(tokens of the edge).
        """
        parent = lower.parent
        assert parent is not None and parent.end < position < lower.end
        cut = (position - parent.end) * TOKEN_BYTES
        upper = RadixNode(parent, lower.key, lower.edge[:cut], position)
        lower.edge = lower.edge[cut:]
        lower.key = lower.edge[: self.key_bytes]
        lower.parent = upper
        family = parent.ghosts if lower.kv is None else parent.children
        if type(family) is dict:
            family[upper.key] = upper
        else:
            family = upper
        if lower.kv is None:
            parent.ghosts, upper.ghosts = family, lower
        else:
            parent.children, upper.children = family, lower
        self.num_nodes += 1
        return upper

    def revive(self, path: Iterable[RadixNode]) -> None:
        """Turn ghosts into resident children. The caller must give them KV. O(ghosts)."""
        for ghost in path:
            parent = ghost.parent
            assert parent is not None
            ghosts, family = parent.ghosts, parent.children
            parent.ghosts = None if ghosts is ghost else without_child(ghosts, ghost)
            parent.children = ghost if family is None else with_child(family, ghost)

    def fade(self, leaf: RadixNode) -> None:
        """Turn a resident node without resident children into a ghost. O(1)."""
        parent = leaf.parent
        assert parent is not None
        family, ghosts = parent.children, parent.ghosts
        parent.children = None if family is leaf else without_child(family, leaf)
        parent.ghosts = leaf if ghosts is None else with_child(ghosts, leaf)

    def forget(self, ghost: RadixNode) -> None:
        """Remove a ghost without children, and its root if that is empty then. O(1)."""
        parent = ghost.parent
        assert parent is not None and ghost.ghosts is None
        ghosts = parent.ghosts
        parent.ghosts = None if ghosts is ghost else without_child(ghosts, ghost)
        self.num_nodes -= 1
        if parent.parent is None and parent.children is None and parent.ghosts is None:
            del self.roots[parent.key]

    def check(self, ghosts: GhostList) -> None:
        """Recompute the invariants of the tree and its ``ghosts``. O(tree)."""
        listed = {ghost: place for place, ghost in enumerate(ghosts.oldest_first())}
        for namespace, root in self.roots.items():
            is_root = root.parent is None and root.end == 0 and root.kv is None and not root.locks
            assert is_root and root.key == namespace, f"bad root {root} of {namespace!r}"
            assert root.children or root.ghosts, f"empty root of {namespace!r} was not dropped"
        num_nodes = 0
        for node in self.nodes():
            num_nodes += 1
            self._check_node(node)
            is_stored = node.offloaded is not None and node.offloaded.kv is not None
            is_listed = node.kv is None and not is_stored
            assert (node in listed) == is_listed, f"{node} in the ghost list: {not is_listed}"
            if is_listed:
                later = [ghost for ghost in members(node.ghosts) if listed[ghost] > listed[node]]
                assert not later, f"ghosts {later} outlive their parent {node}"
        assert num_nodes == self.num_nodes, f"{num_nodes} nodes, counted {self.num_nodes}"
        num_bytes = sum(len(ghost.edge) + GHOST_NODE_BYTES for ghost in listed)
        assert num_bytes == ghosts.num_bytes, f"ghosts take {num_bytes}, counted {ghosts.num_bytes}"
        assert num_bytes <= ghosts.limit_bytes, "ghosts are over their limit"

    def _check_node(self, node: RadixNode) -> None:
        parent, kv, checkpoint = node.parent, node.kv, node.checkpoint
        assert parent is not None, f"{node} hangs on nothing"
        families = (
            (parent.ghosts, parent.children) if kv is None else (parent.children, parent.ghosts)
        )
        is_dict = isinstance(families[0], dict)
        assert is_dict == (len(members(families[0])) > 1), f"{parent} has a dict for one child"
        own, other = ({child.key: child for child in members(family)} for family in families)
        assert own.get(node.key) is node, f"{node} is not the child of its parent"
        assert node.key not in other, f"{node} has a twin that is resident and a ghost"
        length = node.end - parent.end
        is_right = length > 0 and length % self.page_size == 0 and len(node.tokens) == length
        assert is_right, f"edge of {node} has the wrong length"
        assert node.key == node.edge[: self.key_bytes], f"{node} is under the wrong key"
        assert node.locks >= 0, f"{node} was unlocked too often"
        if kv is None:
            is_bare = not node.children and checkpoint is None and not node.locks
            assert is_bare, f"ghost {node} has resident children, a checkpoint or a lock"
        else:
            assert len(kv.rows) == len(node.edge), f"{node} has {len(kv.indices)} rows"
            assert kv.node is node, f"the rows of {node} belong to {kv.node}"
        if checkpoint is not None:
            assert checkpoint.node is node, f"checkpoint of {node} belongs elsewhere"
            assert node.lost_checkpoint is None, f"{node} has a checkpoint and a tombstone"

    def nodes(self) -> Iterator[RadixNode]:
        """Iterate over all nodes, parents before children. O(tree), without recursion."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            below = [*members(node.children), *members(node.ghosts)]
            yield from below
            stack += below


# --- Ghosts ---------------------------------------------------------------------------------------
#
# They are ordered by the eviction of their KV. KV is evicted from the leaves up, so the children of
# a ghost precede it, and the oldest ghost never has children. Removing it is O(1) and needs no
# search. A ghost is revived if its tokens are published again.

GHOST_NODE_BYTES = 640
"""Host bytes of a ghost node in addition to its tokens (measured: node, bytes, dict entries)."""


def read_ghosts(
    tree: RadixTree, node: RadixNode, ids: bytes
) -> tuple[RadixNode, int, Checkpoint | None, bool]:
    """Follow ``ids``, all of a prompt, through the ghosts below ``node``, the end of their resident
    part. O(n).

    Returns the deepest node, the length of the tokens seen before, the deepest evicted checkpoint
    on the way that could be resumed from (or None), and whether other tokens were seen to follow.
    """
    last, inside, length = tree.walk(node, ids, 0, ghosts=True)
    forks, missed, ghost = inside is not None or bool(last.ghosts), None, last
    while missed is None and ghost is not node:
        if ghost.end * TOKEN_BYTES < len(ids):
            missed = ghost.lost_checkpoint
        assert ghost.parent is not None
        ghost = ghost.parent
    return last, length, missed, forks


class GhostList:
    """Ghosts of one tree, bounded in bytes, the oldest removed first.

    Every operation is O(1); ``trim`` is O(1) per removed ghost.
    """

    def __init__(self, tree: RadixTree, limit_bytes: int) -> None:
        self.tree = tree
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._order: OrderedDict[RadixNode, None] = OrderedDict()

    def oldest_first(self) -> Iterator[RadixNode]:
        """Iterate over all ghosts, the next to be removed first."""
        return iter(self._order)

    def add(self, ghost: RadixNode, rows: bytes = b"") -> None:
        """Add ``ghost``, which has just lost its KV in ``rows``."""
        parent = ghost.parent
        assert parent is not None
        self._order[ghost] = None
        # Without a look at the edge, which has been cold for as long as the node was old.
        self.num_bytes += (ghost.end - parent.end) * TOKEN_BYTES + GHOST_NODE_BYTES

    def discard(self, path: Iterable[RadixNode]) -> None:
        """Remove the ghosts of ``path``, which become resident again."""
        order, num_bytes = self._order, self.num_bytes
        for ghost in path:
            del order[ghost]
            num_bytes -= len(ghost.edge) + GHOST_NODE_BYTES
        self.num_bytes = num_bytes

    def split(self, upper: RadixNode, lower: RadixNode) -> None:
        """Add ``upper``, the new upper part of the ghost ``lower``, out of order: callers must
        ``discard`` it next."""
        self._order[upper] = None
        self.num_bytes += GHOST_NODE_BYTES

    def trim(self) -> None:
        """Remove the oldest ghosts until the others fit in ``limit_bytes``."""
        while self.num_bytes > self.limit_bytes:
            ghost, _ = self._order.popitem(last=False)
            self.num_bytes -= len(ghost.edge) + GHOST_NODE_BYTES
            self.tree.forget(ghost)
            ghost.edge = b""  # a policy's queue may hold the node for a while yet

    def clear(self) -> None:
        limit, self.limit_bytes = self.limit_bytes, 0
        self.trim()
        self.limit_bytes = limit


# --- Drawing --------------------------------------------------------------------------------------

MAX_TITLE = 80
"""Maximum length of a drawn label or namespace; longer ones are shortened."""


def render_text(tree: RadixTree, max_nodes: int) -> str:
    """Return an outline with one line per node, depth first and ghosts last. An only child is not
    indented. ``*`` checkpoint, ``-`` tombstone, ``~`` ghost, ``v`` offloaded. O(nodes drawn)."""
    lines: list[str] = []
    num_drawn = num_namespaces = 0
    stack = [(root, "", "") for root in reversed(tree.roots.values())]
    while stack and num_drawn < max_nodes:
        node, branch, margin = stack.pop()
        if node.parent is None:
            num_namespaces += 1
            lines.append(f"namespace {_short(repr(node.key))}")
        else:
            num_drawn += 1
            lines.append(branch + _describe(node))
        those = chain(members(node.children), members(node.ghosts))
        children = list(islice(those, max_nodes - num_drawn + 1))  # One more than can be drawn.
        for child in reversed(children):
            if len(children) == 1 and node.parent is not None:
                stack.append((child, margin, margin))
            elif child is children[-1]:
                stack.append((child, margin + "`- ", margin + "   "))
            else:
                stack.append((child, margin + "|- ", margin + "|  "))
    if tree.num_nodes > num_drawn:
        left_out = f"... nodes left out: {tree.num_nodes - num_drawn}"
        if len(tree.roots) > num_namespaces:
            left_out += f", namespaces: {len(tree.roots) - num_namespaces}"
        lines.append(left_out)
    return "\n".join(lines)


def _describe(node: RadixNode) -> str:
    words = [f"{node.start}..{node.end}"]
    if node.kv is None:
        stored = node.offloaded is not None and node.offloaded.kv is not None
        words.append("v below" if stored else "~ ghost")
    if node.checkpoint is not None:
        superseded = " superseded" if node.checkpoint.superseded else ""
        title = node.checkpoint.title
        label = f" {_short(repr(title)[1:-1])}" if title else ""
        words.append(f"* slot {node.checkpoint.slot}{label}{superseded}")
    elif node.offloaded is not None and node.offloaded.state is not None:
        words.append("v checkpoint below")
    elif node.lost_checkpoint is not None:
        words.append("- checkpoint evicted")
    if node.locks:
        words.append(f"locked {node.locks}x")
    return " ".join(words)


def _short(text: str) -> str:
    """Return at most ``MAX_TITLE`` letters of ``text``."""
    return text if len(text) <= MAX_TITLE else text[: MAX_TITLE - 3] + "..."
