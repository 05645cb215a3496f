"""What a policy sees and what it is asked: the narrow view of the cache, and the two protocols.

An *item* is something that can be evicted: one checkpoint, or the KV of one node. A policy never sees the tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

Kind = Literal["kv", "checkpoint"]


class Item(Protocol):
    """One evictable thing, as a policy sees it. All but ``memo`` is read-only to the policy."""

    kind: Kind
    size_bytes: int
    """Bytes that evicting it now frees."""
    position: int
    """Tokens from the root to its end."""
    span: int
    """Tokens that must be computed again if it goes: kv: the segment's tokens; checkpoint: tokens back to the nearest
    checkpoint above it."""
    created: int
    """Logical time (one tick a request) when it entered the cache."""
    last_used: int
    """Logical time of its last use."""
    uses: int
    """Times a request resumed from it (checkpoint) or through it (kv)."""
    superseded: bool
    """A deeper checkpoint exists on the same unforked path."""
    above: Item | None
    """The nearest checkpoint above it on its path; None: the root. Lineage passes along this link."""
    label: str
    """The placement word that asked for it: end, branch, boundary, backoff, every ..."""
    memo: Any
    """The policy's own; None at first, kept while the item lives."""


class EvictionPolicy(Protocol):
    """Orders the evictable items of one cache.

    The cache calls ``add`` when an item becomes a candidate (unlocked; kv: also a leaf), ``discard`` when it stops being
    one (locked, got a child, evicted), ``touch`` after a use (``last_used`` and ``uses`` already count it), and
    ``victim`` to choose. ``victim`` returns a candidate without removing it: the cache then calls ``discard``.
    ``missed`` is how a ghost speaks: a request came that would have resumed from this evicted checkpoint.
    Each in O(log n) or better.
    """

    def add(self, item: Item) -> None: ...

    def discard(self, item: Item) -> None: ...

    def touch(self, item: Item) -> None: ...

    def missed(self, item: Item) -> None:
        """A request would have resumed from ``item``, a checkpoint that was evicted, had it been kept. The deepest such
        ghost of the request's path, once a request; ``item`` is as it was when evicted, ``memo`` included."""
        ...

    def victim(self, kind: Kind | None) -> Item | None:
        """The candidate that should go first: of ``kind``, or of either where both share one budget (None)."""
        ...


class Prefill(NamedTuple):
    """What a placement policy knows about a prompt that is about to be computed."""

    prompt_len: int
    cached_len: int
    """Resumed from here; positions at or before it need no checkpoint."""
    kv_len: int
    branch_len: int
    """How deep the tokens were seen before, ghosts included (0: never)."""
    boundaries: tuple[int, ...]
    """Positions known to survive into later prompts (end of the system segment, last stable boundary), ascending."""
    grid: int
    """Positions are multiples of it."""


class Placed(NamedTuple):
    """One checkpoint that a placement asks for, and the word that asked (what ``Item.label`` will say)."""

    position: int
    label: str


class PlacementPolicy(Protocol):
    """Where a prefill saves checkpoints, and whether decode does."""

    def positions(self, prefill: Prefill) -> Iterable[Placed]:
        """Positions in (cached_len, prompt_len] to save at, most wanted first; the caller floors them to the grid and
        keeps the first of a repeat."""
        ...

    def decode_interval(self) -> int | None:
        """Tokens between checkpoints while decoding; the last one is kept at the end. None: no checkpoint in decode."""
        ...
