"""Interfaces of eviction and placement policies, and their view of the cache and of prompts.

An *item* is a unit of eviction: one checkpoint, or the KV of one node. Policies never use the tree.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

from hybridcache.radix.tokens import require_bool, require_index
from hybridcache.radix.tree import Item as Item
from hybridcache.radix.tree import Kind as Kind


class PolicyError(ValueError):
    """Failure of a user's policy. The message names the policy, the method and the line."""


def raise_failure(failure: PolicyError | None) -> None:
    """Raise ``failure`` again, at a place where nothing is half done. Does nothing for None."""
    if failure is not None:
        raise PolicyError(str(failure)) from failure


def is_built_in(kind: type[Any]) -> bool:
    """Return whether ``kind`` is a policy of this package, or guards a user's policy."""
    return kind.__module__.startswith(("hybridcache.policies.", "hybridcache.lab."))


class EvictionPolicy(ABC):
    """Eviction order over the items of one cache.

    Each cache makes one instance, which sees all items unless ``orders_classes`` is False.
    Subclasses implement ``add``, ``discard`` and ``victim``. The other methods do nothing by
    default.

    ``add`` makes an item a candidate: every checkpoint, and the KV of a leaf. ``discard`` removes
    it, because its node got a child or it was evicted. Locks have no immediate effect: a victim
    that is locked is discarded at that moment, and added again when it is unlocked. An item that
    changes its priority class (``priority_classes.py``) moves to another instance of the policy
    and keeps its ``memo``. Calls should take O(log n) or less.
    """

    orders_classes: bool = True
    """Class attribute. True if the policy sees all items and ranks dead KV and superseded
    checkpoints itself. If False, the cache makes an instance per priority class: dead KV,
    superseded checkpoints and the rest. Classes are evicted in this order
    (``CacheConfig.priority_classes``)."""

    has_priority_classes: bool = False
    """True if it evicts dead KV and superseded checkpoints before all others, by class."""

    clock: Callable[[], float] = time.monotonic
    """Seconds, for policies that depend on time. Simulations set the clock of the simulated
    machine; ``item.last_used`` and ``created`` count requests."""

    failure: PolicyError | None = None
    """First failure of a user's policy, or None. The cache finishes the operation in which the
    policy failed, and evicts the oldest item from then on. Every later ``match`` raises the
    failure."""

    def __str__(self) -> str:
        return type(self).__name__

    def set_clock(self, clock: Callable[[], float]) -> None:
        """Read seconds from ``clock`` from now on."""
        self.clock = clock

    @abstractmethod
    def add(self, item: Item) -> None:
        """Add ``item`` as a candidate. Its ``last_used`` and ``uses`` include earlier uses."""

    @abstractmethod
    def discard(self, item: Item, evicted: bool) -> None:
        """Remove ``item`` from the candidates.

        ``evicted`` is True if the item leaves the cache, as a victim or together with one. It is
        False if the item was locked, got a child or changed its priority class.
        """

    @abstractmethod
    def victim(self, kind: Kind | None) -> Item | None:
        """Return the next candidate to evict, or None if there is none.

        ``kind`` restricts the choice; it is None if both kinds share one budget. The item remains a
        candidate until the cache calls ``discard``.
        """

    def touch(self, item: Item) -> None:  # noqa: B027
        """Record a use of the candidate ``item``. Its ``last_used`` and ``uses`` include it."""

    def on_relabelled(self, item: Item) -> None:  # noqa: B027
        """Record that the label of ``item`` has changed: its answer ended, and the stop reason was
        added. The item may be locked."""

    def on_ghost_hit(self, item: Item) -> None:  # noqa: B027
        """Record a ghost hit: a request would have resumed from ``item``, an evicted checkpoint.

        Called at most once per request, with the deepest such checkpoint on its path. ``item`` has
        its values at eviction, including ``memo``. Items that a file restored in a new process have
        the ``memo`` that ``load_memo`` set.
        """

    def on_ghost_hit_above(self, item: Item) -> None:  # noqa: B027
        """Record a further ghost hit of the same request, above the one passed to
        ``on_ghost_hit``.

        Called for each evicted checkpoint between that one and the position where the request
        resumed, the deepest first. Each of them would have sufficed to resume deeper.
        """

    def for_tier(self) -> EvictionPolicy | None:
        """Return a policy for the next lower tier that shares the learned state, or None.

        If None, the tier gets a separate instance, which learns from the items offered to it. A
        shared policy keeps the ``memo`` of items that move down, and only the device's policy is
        notified of uses and ghost hits.
        """
        return None

    def candidates(self) -> Iterable[Item] | None:
        """Return all candidates, unordered, for consistency checks, or None. O(n)."""
        return None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the learned state for a restart, or None (default) if the policy keeps none.

        It consists of numbers, strings, lists, dicts with strings as keys, and numpy arrays
        (``hybridcache.radix.warm_state``). None also leaves out the memos.
        """
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Replace the learned state by the result of ``state_dict`` in an earlier process."""

    def memo_state(self, item: Item) -> Any:
        """Return ``item.memo`` in the form of ``state_dict``, or None (default)."""
        return None

    def load_memo(self, item: Item, state: Any) -> None:  # noqa: B027
        """Set ``item.memo``, of an evicted checkpoint, to what ``memo_state`` returned."""


class LoadRule(Protocol):
    """Rule that decides if loading from a lower tier is worth the copy, in seconds."""

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """Return the seconds saved by loading a prefix, 0 or less (or NaN) if loading is not
        worthwhile.

        Compares the prefill of ``prompt_len`` tokens from ``cached_len`` at once with the prefill
        from ``position`` after copying ``num_bytes`` from each tier.
        """


class Placed(NamedTuple):
    """Checkpoint position with the label of its rule (``Item.label``)."""

    position: int
    """Number of tokens before the checkpoint."""
    label: str
    """Name of the rule."""
    distance: int = 0
    """Tokens from there to the end of the prompt, as the rule counts them. 0 for most rules: only
    those of ``adaptive`` that save at several distances tell their checkpoints apart by it."""


class Prefill(NamedTuple):
    """Prompt data for placement policies, known before the prefill. All lengths are in tokens."""

    prompt_len: int
    """Length of the prompt."""
    cached_len: int
    """Resumed length. Positions at or before it need no checkpoint."""
    kv_match_len: int
    """Length of the matching KV, at least ``cached_len``."""
    seen_len: int
    """Length of the tokens seen before, including ghosts."""
    boundaries: tuple[int, ...]
    """Positions that later prompts are known to share (end of the system segment, last stable
    boundary), ascending."""
    grid: int
    """Checkpoint grid. Checkpoints are saved at its multiples."""
    resumed: Item | None = None
    """Checkpoint that the request resumes from, or None."""
    evicted: tuple[Item, ...] = ()
    """Evicted checkpoints that the request would have resumed from, the deepest first. For each,
    ``uses`` and ``earlier_uses`` together count the requests, with this one, that resumed from a
    checkpoint at its position or would have."""
    forks: bool = True
    """True if other prompts continued differently at ``seen_len``. False if the prompt extends
    an earlier request from its end."""
    answer_survives: bool = True
    """False if no checkpoint of the answer will be saved, because later prompts omit the answer or
    its rows are not published."""
    free_slots: int | None = None
    """Checkpoints that could be saved now without an eviction, or None if that is not known."""
    num_checkpoints: int = 0
    """Checkpoints that the cache holds now; counts only if ``free_slots`` is known."""
    shares_memory: bool = True
    """True if KV can take the memory of a free slot (arena), False with two pools."""

    def floor(self, position: int) -> int | None:
        """Return the deepest grid position at or before ``position``.

        None if no checkpoint can be saved there.
        """
        floored = position - position % self.grid
        return floored if self.cached_len < floored <= self.prompt_len else None

    def on_grid(self, wanted: Iterable[Placed]) -> list[Placed]:
        """Round positions down to the grid. Returns one checkpoint each, in the given order.

        Positions without a possible checkpoint are omitted. The first of several rules is kept.
        Raises TypeError if one is no ``Placed`` with an integer.

        >>> from hybridcache import Placed, Prefill
        >>> prefill = Prefill(200, 64, 64, 64, (), 64)
        >>> prefill.on_grid([Placed(199, "end"), Placed(192, "again"), Placed(70, "low")])
        [Placed(position=192, label='end', distance=0)]
        """
        found: dict[int, Placed] = {}
        prompt_len, cached_len, grid = self.prompt_len, self.cached_len, self.grid
        for placed in islice(wanted, prompt_len):  # A plan may have no end.
            if type(placed) is not Placed:
                raise TypeError(f"each of a plan must be Placed(position, label) (got {placed!r})")
            position, label, distance = placed
            if type(position) is not int:
                position = require_index(position, "each position of a plan")
            floored = position - position % grid
            if cached_len < floored <= prompt_len and floored not in found:
                found[floored] = Placed(floored, label, distance)
        return [*found.values()]


class PlacementPolicy(ABC):
    """Choice of the positions at which requests save checkpoints.

    ``plan`` and ``decode_interval`` must not change the policy: routers and schedulers also call
    them for requests that may never be computed. Policies learn in the ``on_`` methods, which do
    nothing by default.

    For every computed request the lease calls, in this order: ``on_hit`` and ``on_ghost_hit`` if
    they apply, ``on_prefill``, ``plan``, ``decode_interval``. Later it calls either ``on_saved`` or
    ``on_dropped`` for each planned checkpoint.
    """

    is_guarded: bool = False
    """True if it is built in, or guards a user's policy: leases take no other."""

    def __init_subclass__(cls) -> None:
        cls.is_guarded = is_built_in(cls)

    def __str__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        """Return positions in (cached_len, prompt_len] to save at, by descending priority.

        The caller takes at most ``prompt_len`` of them, rounds them down to the grid and drops
        repeats (``Prefill.on_grid``).
        """

    @property
    def rules(self) -> tuple[PlacementPolicy, ...]:
        """Policies that this one combines, in order; itself if it is no combination."""
        return (self,)

    def decode_interval(self) -> int | None:
        """Return the distance of checkpoints during decode, or None for no checkpoints.

        Only the last one is kept when the answer ends.
        """
        return None

    def on_prefill(self, prefill: Prefill) -> None:  # noqa: B027
        """Record that a request starts to compute ``prefill``. ``plan`` is called next."""

    def on_hit(self, item: Item) -> None:  # noqa: B027
        """Record that a request resumes from ``item``."""

    def on_ghost_hit(self, item: Item, num_tokens: int) -> None:  # noqa: B027
        """Record that ``item``, an evicted checkpoint, would have saved ``num_tokens`` more."""

    def on_saved(self, placed: Placed) -> None:  # noqa: B027
        """Record that a checkpoint was published.

        Its label can come from another source: "decode", "preempt", "asked" or another policy.
        """

    def on_dropped(self, placed: Placed) -> None:  # noqa: B027
        """Record that a planned checkpoint was not published.

        Reasons are a missing slot, an early end of the request, or an existing checkpoint.
        """

    def state_dict(self) -> dict[str, Any] | None:
        """Return the learned state; see ``EvictionPolicy.state_dict``."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Replace the learned state by the result of ``state_dict`` in an earlier process."""


def require_placement(placement: object) -> None:
    """Raise TypeError unless ``placement`` is a ``PlacementPolicy`` that is built in or guarded."""
    if not isinstance(placement, PlacementPolicy) or not placement.is_guarded:
        raise TypeError(
            "placement must be made by parse_placement, once for all requests, from names or a "
            f"policy of yours (got {placement!r})."
        )


# --- Boundaries of prompts ------------------------------------------------------------------------


class PromptBoundaries(NamedTuple):
    """Boundaries of one prompt, from its template to ``LeaseRequest``."""

    positions: tuple[int, ...] = ()
    """Positions up to which later prompts are known to be equal, ascending. Those past the prompt
    have no effect."""
    answer_survives: bool = True
    """Whether later prompts contain the answer. Some chat templates drop the reasoning. Then decode
    saves no state: it would never be used, and would make the checkpoint at the boundary look
    superseded."""


NO_BOUNDARIES = PromptBoundaries()
"""Boundaries of a prompt without known ones."""


def require_boundaries(boundaries: object) -> None:
    """Raise TypeError unless ``boundaries`` is a ``PromptBoundaries`` with integers and a bool, and
    ValueError unless its positions ascend from 0 on. O(positions)."""
    if not isinstance(boundaries, PromptBoundaries):
        raise TypeError(f"boundaries must be PromptBoundaries(...) (got {boundaries!r})")
    positions, answer_survives = boundaries
    require_bool(answer_survives, "answer_survives of boundaries")
    if not isinstance(positions, tuple | list):
        raise TypeError(f"positions of boundaries must be a tuple (got {positions!r})")
    for position in positions:
        require_index(position, "each of boundaries", 0)
    if [*positions] != sorted(positions):
        raise ValueError(f"boundaries must ascend (got {positions!r})")


def chat_boundaries(
    prompt_len: int, shared: Iterable[int] = (), kept: Iterable[int] = ()
) -> PromptBoundaries:
    """Return the boundaries of a prompt of ``prompt_len`` tokens.

    Chat endpoints, readers of chat traces and generators call it, so that simulations and servers
    send the same. The second example is a template that drops the end of the prompt, as those of
    reasoning models do:

    >>> chat_boundaries(1000, shared=(300,), kept=(1000,))
    PromptBoundaries(positions=(300, 1000), answer_survives=True)
    >>> chat_boundaries(1000, shared=(300,), kept=(997,))
    PromptBoundaries(positions=(300, 997), answer_survives=False)

    Args:
        prompt_len: length of the prompt.
        shared: ends of text that prompts of other conversations repeat: the system message, a
            document, or a place that the client declares.
        kept: for each possible next turn, the number of tokens of this prompt that it repeats.
            Empty if that is not known.
    """
    kept = tuple(kept)
    positions = sorted({end for end in (*shared, *kept) if 0 < end <= prompt_len})
    return PromptBoundaries(tuple(positions), not kept or max(kept) == prompt_len)


def end_of_prompt(prompt_len: int, boundaries: tuple[int, ...], max_header: int) -> int | None:
    """Return the boundary from which the next turn differs, or None if there is none.

    It is the last one, if at most ``max_header`` tokens follow: the header of the answer.

    >>> end_of_prompt(1000, (300, 997), 16), end_of_prompt(1000, (300,), 16)
    (997, None)
    """
    if not boundaries or not 0 <= prompt_len - boundaries[-1] <= max_header:
        return None
    return boundaries[-1]
