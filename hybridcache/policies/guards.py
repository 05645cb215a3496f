"""Guards of users' policies: each failure is reported in one sentence, with method and line.

No guard changes a decision of a policy that works. Users' policies see the items of the cache
through read-only views.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import attrgetter, index
from pathlib import Path
from typing import Any, cast

from hybridcache.policies.admission.base import AdmissionPolicy, Load, WaitingRequest
from hybridcache.policies.protocol import (
    EvictionPolicy,
    Item,
    Kind,
    Placed,
    PlacementPolicy,
    PolicyError,
    Prefill,
    raise_failure,
)


def _called(name: str) -> Any:
    """Return a method that calls the method ``name`` of the user's policy."""
    return lambda self, *arguments: self._call(name, *arguments)


def _noted(name: str) -> Any:
    """Return a method that calls the method ``name`` of the user's policy until one fails.

    The failure is kept, so that the operation of the cache is finished.
    """

    def note(self: _Guard, item: Item, *arguments: object) -> None:
        if self.failure is None:
            try:
                self._call(name, self._seen(item), *arguments)
            except PolicyError as error:
                self.failure = error

    return note


class ItemView:
    """An item as a user's policy sees it: it can write ``memo`` only, or the order of the cache
    would be lost."""

    __slots__ = ("_item", "memo")

    kind, size_bytes, position, span, serial, created, last_used, uses, dead, superseded, label = (
        property(attrgetter(f"_item.{name}"))
        for name in (
            *("kind", "size_bytes", "position", "span", "serial", "created", "last_used", "uses"),
            *("dead", "superseded", "label"),
        )
    )

    def __init__(self, item: Item, memo: object = None) -> None:
        self._item = item
        self.memo = memo

    @property
    def above(self) -> Item | None:
        return view_of(self._item.above)

    @property
    def predecessor(self) -> Item | None:
        return view_of(self._item.predecessor)

    def __lt__(self, other: object) -> bool:
        """Return False: items with one serial are equal, as in a tier (``OffloadedCheckpoint``)."""
        return False

    __gt__ = __lt__

    def __repr__(self) -> str:
        return repr(self._item)


class PlacementView(ItemView):
    """An item as a user's placement sees it. Every use makes a new view, because the item's own
    ``memo`` is the eviction policy's."""

    __slots__ = ()

    @property
    def above(self) -> Item | None:
        above = self._item.above
        return None if above is None else cast(Item, PlacementView(above))

    @property
    def predecessor(self) -> Item | None:
        before = self._item.predecessor
        return None if before is None else cast(Item, PlacementView(before))


def view_of(item: Item | None) -> Item | None:
    """Return the view of ``item``, which is its ``memo``. An item that takes over the memo of
    another one, in a lower tier, gets a view with the same data. O(1)."""
    if item is None:
        return None
    view = item.memo
    if not isinstance(view, ItemView):
        view = item.memo = ItemView(item)
    elif view._item is not item:
        view = item.memo = ItemView(item, view.memo)
    return cast(Item, view)


class _Guard:
    """Caller of a user's methods. Their exceptions become a PolicyError with method and line."""

    def __init__(self, label: str, policy: Any) -> None:
        self._label, self._policy = label, policy
        self.failure: PolicyError | None = None
        """First failure of a notification, which ends all notifications."""

    def __str__(self) -> str:
        return self._label

    def _seen(self, item: Any) -> Any:
        """Return ``item``, the first argument of a notification, as the user's policy sees it."""
        return view_of(item)

    def _call(self, name: str, *arguments: object, at_most: int | None = None) -> Any:
        """Call a method. With ``at_most`` it returns several values, perhaps without an end, and
        the first of them are returned as a list."""
        try:
            found = getattr(self._policy, name)(*arguments)
            if at_most is None:
                return found
            if not isinstance(found, Iterable):
                raise self._error(name, f"returned {found!r}; return a list")
            return list(islice(found, at_most))
        except PolicyError:
            raise
        except (Exception, SystemExit) as error:  # user code can raise anything
            files = {  # of the code: a class of a notebook has no module with a file
                method.__code__.co_filename
                for kind in type(self._policy).__mro__
                if not kind.__module__.startswith("hybridcache.")
                for method in vars(kind).values()
                if hasattr(method, "__code__")
            }
            frames = [
                one for one in traceback.extract_tb(error.__traceback__) if one.filename in files
            ]
            last = frames[-1] if frames else None
            where = f" ({Path(last.filename).name}, line {last.lineno})" if last else ""
            # The method of the user may have been called by one of its base class.
            name = frames[0].name if frames else name
            fault = f"{name} raised {type(error).__name__}: {error}{where}"
            raise PolicyError(f"{self._label!r}: {fault}") from error

    def _error(self, name: str, fault: str) -> PolicyError:
        """Return the error of the method ``name``, which ended with a wrong result, with the line
        where that method begins."""
        code = getattr(getattr(type(self._policy), name), "__code__", None)
        where = f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""
        return PolicyError(f"{self._label!r}: {name} {fault}{where}")


class GuardedEviction(_Guard, EvictionPolicy):
    """A user's eviction policy. Refuses a victim that is no candidate. O(1) in addition to it.

    After its first failure it is not called any more; see ``EvictionPolicy.failure``.
    """

    touch = _noted("touch")
    on_relabelled = _noted("on_relabelled")
    on_ghost_hit = _noted("on_ghost_hit")
    on_ghost_hit_above = _noted("on_ghost_hit_above")
    set_clock = _called("set_clock")
    _add = _noted("add")
    _discard = _noted("discard")

    def __init__(self, label: str, policy: EvictionPolicy) -> None:
        super().__init__(label, policy)
        self._held: dict[Item, None] = {}
        self._num_held: dict[Kind, int] = {"kv": 0, "checkpoint": 0}
        self.orders_classes = bool(policy.orders_classes)

    def add(self, item: Item) -> None:
        self._held[item] = None
        self._num_held[item.kind] += 1
        self._add(item)

    def discard(self, item: Item, evicted: bool) -> None:
        del self._held[item]
        self._num_held[item.kind] -= 1
        self._discard(item, evicted)

    def for_tier(self) -> EvictionPolicy | None:
        lower = self._call("for_tier")
        if lower is not None and not isinstance(lower, EvictionPolicy):
            raise self._error("for_tier", f"returned {lower!r}; return an EvictionPolicy, or None")
        return None if lower is None else GuardedEviction(self._label, lower)

    def candidates(self) -> Iterable[Item]:
        return self._held

    def victim(self, kind: Kind | None) -> Item | None:
        if self.failure is None:
            try:
                victim: Item | None = self._call("victim", kind)
                if isinstance(victim, ItemView):
                    victim = victim._item
                self._check(kind, victim)
                return victim
            except PolicyError as error:
                self.failure = error
        return next((item for item in self._held if kind in (None, item.kind)), None)

    def _check(self, kind: Kind | None, victim: Item | None) -> None:
        """Raise PolicyError if ``victim`` is no candidate, or None although there are candidates:
        memory would never be freed, and requests would wait for ever."""
        if victim is None:
            if self._held if kind is None else self._num_held[kind]:
                of_kind = "" if kind is None else f" of kind {kind!r}"
                raise self._error(
                    "victim",
                    f"returned None although there are candidates{of_kind}, so nothing is evicted; "
                    "return one of the items that were added",
                )
        elif victim not in self._held or kind not in (None, victim.kind):
            raise self._error(
                "victim",
                f"returned {victim!r} for {kind!r}, which is not a candidate of that kind; return "
                "an item that was added and not discarded since, or None if there is none",
            )


class GuardedAdmission(_Guard, AdmissionPolicy):
    """A user's admission policy. Refuses requests that do not wait, and repeated requests."""

    arrived = _called("arrived")
    admitted = _called("admitted")
    computed = _called("computed")
    left = _called("left")
    report = _called("report")

    @property
    def wakes_at_s(self) -> float | None:  # type: ignore[override]
        """Attribute of the user's policy."""
        wakes_at_s: float | None = self._policy.wakes_at_s
        return wakes_at_s

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> list[WaitingRequest]:
        ordered: list[WaitingRequest] = self._call("order", waiting, load, at_most=len(waiting) + 1)
        if len(set(ordered)) < len(ordered) or not set(ordered) <= set(waiting):
            raise self._error(
                "order",
                f"must return waiting requests, each at most once (got {len(ordered)} for "
                f"{len(waiting)} that wait)",
            )
        return ordered


class GuardedPlacement(_Guard, PlacementPolicy):
    """A user's placement policy. Refuses malformed positions.

    The first failure of a notification is raised by the next ``plan``.
    """

    on_prefill = _noted("on_prefill")
    on_hit = _noted("on_hit")
    on_ghost_hit = _noted("on_ghost_hit")
    on_saved = _noted("on_saved")
    on_dropped = _noted("on_dropped")

    def _seen(self, item: Any) -> Any:
        if isinstance(item, Prefill):
            return item._replace(resumed=self._seen(item.resumed), missed=self._seen(item.missed))
        return PlacementView(item) if hasattr(item, "memo") else item

    def plan(self, prefill: Prefill) -> list[Placed]:
        raise_failure(self.failure)
        wanted = []
        for placed in self._call("plan", self._seen(prefill), at_most=prefill.prompt_len):
            is_pair = isinstance(placed, tuple) and len(placed) == 2
            if not (is_pair and hasattr(placed[0], "__index__") and isinstance(placed[1], str)):
                raise self._error(
                    "plan",
                    f"returned {placed!r}; return Placed(position, label) with an integer and a "
                    "string",
                )
            if not 0 <= placed[0] <= prefill.prompt_len:
                raise self._error(
                    "plan",
                    f"returned {placed!r}; the position must be in [0, {prefill.prompt_len}]",
                )
            wanted.append(Placed(int(placed[0]), placed[1]))
        return wanted

    def decode_interval(self) -> int | None:
        interval: int | None = self._call("decode_interval")
        if interval is None:
            return None
        if hasattr(interval, "__index__") and index(interval) >= 1:
            return index(interval)
        raise self._error(
            "decode_interval",
            f"returned {interval!r}; return the number of tokens between checkpoints, or None",
        )


GUARDS: dict[type[Any], type[Any]] = {
    EvictionPolicy: GuardedEviction,
    AdmissionPolicy: GuardedAdmission,
    PlacementPolicy: GuardedPlacement,
}
