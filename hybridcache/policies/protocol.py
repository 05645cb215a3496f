"""What a policy sees and what it is asked: the narrow view of the cache, and the two protocols.

An *item* is something that can be evicted: one checkpoint, or the KV of one node. A policy never
sees the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

Kind = Literal["kv", "checkpoint"]


class PolicyError(ValueError):
    """A policy of the user's own failed; the message says in one sentence which, where and how."""


class Item(Protocol):
    """One evictable thing, as a policy sees it. All but ``memo`` is read-only."""

    memo: Any
    """The policy's own; None at first, kept while the item lives. A snapshot does not keep it:
    after one was loaded, ``missed`` may be called with an item whose ``memo`` is None."""

    @property
    def kind(self) -> Kind:
        """What is freed: KV rows, or a checkpoint's slot."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes that evicting it now frees. kv: its rows, the state at its end, and the tail above:
        rows of the path up to the nearest checkpoint, fork or lock, which go with it. checkpoint:
        its state, and at a leaf the same tail. An attention-only cache: the segment's rows."""
        ...

    @property
    def position(self) -> int:
        """Tokens from the root to its end."""
        ...

    @property
    def span(self) -> int:
        """Tokens that the next request to resume here must compute again if it goes: back to the
        nearest checkpoint above, for both kinds, whatever rows stay on the way. Neither it nor
        ``size_bytes`` depends on where the path was once split. An attention-only cache evicts a
        segment at a time and can resume anywhere: the segment's tokens."""
        ...

    @property
    def serial(self) -> int:
        """Order of creation among all items of the cache; breaks ties, so that a run can be
        repeated exactly."""
        ...

    @property
    def created(self) -> int:
        """Logical time (one tick a request) when it entered the cache."""
        ...

    @property
    def last_used(self) -> int:
        """Logical time of its last use."""
        ...

    @property
    def uses(self) -> int:
        """Times a request resumed from it (checkpoint) or through it (kv)."""
        ...

    @property
    def dead(self) -> bool:
        """KV that nothing can resume from: a leaf without a checkpoint. False in an attention-only
        cache."""
        ...

    @property
    def superseded(self) -> bool:
        """A deeper checkpoint exists on the same unforked path."""
        ...

    @property
    def above(self) -> Item | None:
        """The nearest checkpoint above it on its path; None: the root. Lineage passes along this
        link."""
        ...

    @property
    def label(self) -> str:
        """The placement word that asked for it: end, branch, boundary, backoff, every ..."""
        ...


class EvictionPolicy(Protocol):
    """Orders the evictable items of one cache. It is made once for a cache and sees all items,
    unless it says ``orders_tiers = False``.

    The cache calls ``add`` when an item becomes a candidate (a checkpoint; KV of a leaf),
    ``discard`` when it stops being one (its node got a child, it was evicted), ``touch`` after a
    use of a candidate (``last_used`` and ``uses`` already count it; what was used while it was none
    shows in them at ``add``), and ``victim`` to choose. A lock discards nothing by itself: a victim
    that turns out to be locked is discarded then (``evicted`` False) and added again when it is
    unlocked. An item that changes its tier (``policies.tiers``) moves to another instance of the
    same policy, its ``memo`` with it. ``victim`` returns a candidate without removing it: the cache
    then calls ``discard``. ``missed`` is how a ghost speaks: a request came that would have resumed
    from this evicted checkpoint. Each in O(log n) or better. One that has a method ``candidates``
    too, all items it holds, is compared with the tree by ``check``; it need not.
    """

    orders_tiers: bool = True
    """A class attribute. True: it sees all items and orders dead KV and superseded checkpoints
    itself. False: it leaves that to the cache, which makes three of it, for dead KV, superseded
    checkpoints and the rest, asked in this order (``CacheConfig.dead_first``,
    ``demote_superseded``)."""

    def add(self, item: Item) -> None:
        """``item`` is a candidate from now on."""
        ...

    def discard(self, item: Item, evicted: bool) -> None:
        """``item`` is a candidate no more. ``evicted``: it leaves the cache, as a victim or with
        one; else it stays: it is locked, its node got a child, or it changes its tier."""
        ...

    def touch(self, item: Item) -> None:
        """``item``, a candidate, was just used: its ``last_used`` and ``uses`` are new."""
        ...

    def missed(self, item: Item) -> None:
        """A request would have resumed from ``item``, a checkpoint that was evicted, had it been
        kept. The deepest such ghost of the request's path, once a request; ``item`` is as it was
        when evicted, ``memo`` included, which is None where a snapshot brought it: no policy of
        this process has seen it."""
        ...

    def victim(self, kind: Kind | None) -> Item | None:
        """The candidate that should go first: of ``kind``, or of either where both share one budget
        (None)."""
        ...


def candidates_of(policy: EvictionPolicy) -> Iterable[Item] | None:
    """What ``policy`` says that it holds; None where it can not tell."""
    tell: Callable[[], Iterable[Item] | None] | None = getattr(policy, "candidates", None)
    return None if tell is None else tell()


def policy_below(policy: EvictionPolicy) -> EvictionPolicy | None:
    """What ``policy``'s method ``below``, if it has one, gives: a policy that orders the states of
    the next lower memory by what this one learns. What goes down keeps its ``memo``, and the
    device's policy alone is told what was used there (``missed``). None: another instance is made,
    which learns by itself from what it is offered."""
    make: Callable[[], EvictionPolicy | None] | None = getattr(policy, "below", None)
    return None if make is None else make()


def misses_above(policy: EvictionPolicy) -> Callable[[Item], None] | None:
    """``policy``'s method ``missed_above``, if it has one: called after ``missed`` with each
    evicted checkpoint between that ghost and where the request resumed, the deepest first. The
    request would have resumed from any of them, had that one alone been kept."""
    tell: Callable[[Item], None] | None = getattr(policy, "missed_above", None)
    return tell


class FetchRule(Protocol):
    """Whether what lies in a lower tier is worth its copy: one exchange rate, seconds against
    seconds."""

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """Seconds that a prompt of ``prompt_len`` tokens is sooner computed where it resumes at
        ``position`` after copying ``num_bytes`` from each tier, than where it resumes at
        ``cached_len`` at once. 0 or less: not worth it."""
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
    """Positions known to survive into later prompts (end of the system segment, last stable
    boundary), ascending."""
    grid: int
    """Positions are multiples of it."""
    resumed: Item | None = None
    """The checkpoint it resumes from; its ``label`` and ``span`` say which word earned what."""
    missed: Item | None = None
    """The evicted checkpoint it would have resumed from."""
    forks: bool = True
    """Whether other tokens were seen to follow at ``branch_len``. False: the prompt goes on where
    an earlier request ended."""

    def floor(self, position: int) -> int | None:
        """The deepest grid position at or before ``position``; None: nothing can be saved there."""
        floored = position - position % self.grid
        return floored if self.cached_len < floored <= self.prompt_len else None


class Placed(NamedTuple):
    """One checkpoint that a placement asks for, and the word that asked (what ``Item.label`` will
    say)."""

    position: int
    label: str


class PlacementPolicy(Protocol):
    """Where a prefill saves checkpoints, and whether decode does."""

    def positions(self, prefill: Prefill) -> Iterable[Placed]:
        """Positions in (cached_len, prompt_len] to save at, most wanted first; the caller floors
        them to the grid and keeps the first of a repeat."""
        ...

    def decode_interval(self) -> int | None:
        """Tokens between checkpoints while decoding; the last one is kept at the end. None: no
        checkpoint in decode."""
        ...


class PrefillRule(PlacementPolicy):
    """A rule that saves nothing in decode."""

    def decode_interval(self) -> int | None:
        """None, whatever the prompt."""
        return None
