"""Base classes of eviction and placement policies, and the view of the cache that they get.

An *item* is something that can be evicted: one checkpoint, or the KV of one node. A policy never
sees the tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
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
        """The placement word that asked for it: end, branch, boundary, backoff, every ... An
        answer's end carries its stop reason where that is known: decode/tool_use."""
        ...


class EvictionPolicy(ABC):
    """Eviction order over the items of one cache.

    A policy is made once per cache and sees all items, unless ``orders_tiers`` is False. Subclasses
    implement ``add``, ``discard`` and ``victim``; all other methods have a default that does
    nothing. A policy that derives from another one without changes behaves exactly like it.

    An item becomes a candidate by ``add`` (every checkpoint; KV of a leaf) and stops being one by
    ``discard`` (its node got a child, or it was evicted). A lock discards nothing by itself: a
    victim that turns out to be locked is discarded then and added again when it is unlocked. An
    item that changes its tier (``policies.tiers``) moves to another instance of the same policy and
    keeps its ``memo``. Each call should take O(log n) or less.
    """

    orders_tiers: bool = True
    """A class attribute. True: the policy sees all items and orders dead KV and superseded
    checkpoints itself. False: the cache makes three instances, for dead KV, superseded checkpoints
    and the rest, and asks them in this order (``CacheConfig.dead_first``,
    ``demote_superseded``)."""

    @abstractmethod
    def add(self, item: Item) -> None:
        """Accept ``item`` as a candidate. Uses that happened while it was none show in its
        ``last_used`` and ``uses``."""

    @abstractmethod
    def discard(self, item: Item, evicted: bool) -> None:
        """Remove ``item`` from the candidates. ``evicted`` is True if it leaves the cache, as a
        victim or together with one; False if it stays: it is locked, its node got a child, or it
        changes its tier."""

    @abstractmethod
    def victim(self, kind: Kind | None) -> Item | None:
        """Return the candidate that should go first: of ``kind``, or of either kind if both share
        one budget (None). The candidate stays one; the cache calls ``discard`` afterwards."""

    def touch(self, item: Item) -> None:  # noqa: B027
        """Note a use of ``item``, a candidate. Its ``last_used`` and ``uses`` already count it."""

    def missed(self, item: Item) -> None:  # noqa: B027
        """Note a ghost hit: a request would have resumed from ``item``, an evicted checkpoint.

        Called at most once per request, with the deepest such checkpoint on its path. ``item`` is
        as it was when evicted, ``memo`` included; ``memo`` is None if a snapshot brought it.
        """

    def missed_above(self, item: Item) -> None:  # noqa: B027
        """Note a further ghost hit of the same request, above the one given to ``missed``.

        Called once for each evicted checkpoint between that one and the position where the request
        resumed, the deepest first. The request would have resumed from any of them if that one
        alone had been kept.
        """

    def below(self) -> EvictionPolicy | None:
        """Return a policy for the next lower tier that shares what this one learns, or None.

        With None the tier gets an instance of its own, which learns from what it is offered. A
        shared policy keeps the ``memo`` of items that move down, and only the device's policy is
        told of uses and ghost hits there.
        """
        return None

    def candidates(self) -> Iterable[Item] | None:
        """List all candidates in any order for consistency checks, or return None. O(n)."""
        return None


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


class Placed(NamedTuple):
    """One checkpoint position with the label of the rule that wants it (``Item.label``)."""

    position: int
    label: str


def base_label(label: str) -> str:
    """Return ``label`` without the stop reason that may follow a slash.

    >>> base_label("decode/tool_use"), base_label("back:4")
    ('decode', 'back:4')
    """
    return label.partition("/")[0]


class Prefill(NamedTuple):
    """Facts that a placement policy knows about a prompt before it is computed. Positions and
    lengths are in tokens."""

    prompt_len: int
    cached_len: int
    """Resumed from here; positions at or before it need no checkpoint."""
    kv_len: int
    """Length of the matching KV; at least ``cached_len``."""
    branch_len: int
    """Length of the tokens seen before, ghosts included; 0 if none was."""
    boundaries: tuple[int, ...]
    """Positions known to survive into later prompts (end of the system segment, last stable
    boundary), ascending."""
    grid: int
    """Checkpoints are saved at multiples of it."""
    resumed: Item | None = None
    """Checkpoint that the request resumes from, or None."""
    missed: Item | None = None
    """Deepest evicted checkpoint that the request would have resumed from, or None."""
    forks: bool = True
    """Whether other tokens were seen to follow at ``branch_len``. False if the prompt continues
    where an earlier request ended."""
    answer_survives: bool = True
    """False if no checkpoint of the answer will be saved: later prompts leave it out, or its rows
    are never published."""
    free_slots: int | None = None
    """Checkpoints that could be saved now without an eviction, or None if that is not known."""
    num_checkpoints: int = 0
    """Checkpoints that the cache holds now; counts only if ``free_slots`` is known."""

    def floor(self, position: int) -> int | None:
        """Return the deepest grid position at or before ``position``, or None if no checkpoint can
        be saved there."""
        floored = position - position % self.grid
        return floored if self.cached_len < floored <= self.prompt_len else None

    def on_grid(self, wanted: Iterable[Placed]) -> dict[int, str]:
        """Floor ``wanted`` to the grid: label by position, the most wanted first.

        Positions at which nothing can be saved are left out; the first of a repeat wins.

        >>> prefill = Prefill(200, 64, 64, 64, (), 64)
        >>> prefill.on_grid([Placed(199, "end"), Placed(192, "again"), Placed(70, "low")])
        {192: 'end'}
        """
        found: dict[int, str] = {}
        for position, label in wanted:
            floored = self.floor(position)
            if floored is not None:
                found.setdefault(floored, label)
        return found


class PlacementPolicy(ABC):
    """Choice of the positions at which requests save checkpoints.

    ``plan`` and ``decode_interval`` change nothing: routers and schedulers call them for requests
    that may never be computed. A policy that learns does so in the ``on_`` methods; their defaults
    do nothing. For every request that is computed a lease calls, in this order: ``on_hit`` and
    ``on_ghost_hit`` if they apply, ``on_prefill``, ``plan``, ``decode_interval``; and later exactly
    one of ``on_saved`` and ``on_dropped`` for each checkpoint that it planned.
    """

    @abstractmethod
    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        """Return positions in (cached_len, prompt_len] to save at, the most wanted first. The
        caller floors them to the grid and keeps the first of a repeat (``Prefill.on_grid``)."""

    def decode_interval(self) -> int | None:
        """Return the tokens between checkpoints in decode, or None for no checkpoint. Only the last
        one is kept when the answer ends."""
        return None

    def on_prefill(self, prefill: Prefill) -> None:  # noqa: B027
        """Note that a request begins to compute ``prefill``; ``plan`` is called next."""

    def on_hit(self, item: Item) -> None:  # noqa: B027
        """Note that a request resumes from ``item``."""

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:  # noqa: B027
        """Note that ``item``, an evicted checkpoint, would have saved a request ``num_tokens``
        more."""

    def on_saved(self, position: int, label: str) -> None:  # noqa: B027
        """Note that a checkpoint was published. ``label`` may be one that this policy did not give:
        "decode", "preempt" or "asked", or another policy's."""

    def on_dropped(self, position: int, label: str) -> None:  # noqa: B027
        """Note that a planned checkpoint was not published: there was no slot, the request ended
        before, or the cache had one there already."""
