"""Priority classes in front of a policy: dead KV, then superseded checkpoints, then the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hybridcache.policies.protocol import EvictionPolicy, Item, Kind, PolicyError


class PriorityClasses(EvictionPolicy):
    """Combination of three instances of one policy, evicted from in the order below.

    ``dead`` can be the same object as ``rest``, which disables that class.

    - *dead*: leaf KV without a checkpoint at its end. It cannot be resumed from.
    - *superseded*: checkpoints with a deeper one on the same unforked path. A repeated prompt can
      still hit them while there is room, so they are demoted and not deleted immediately.
    - *rest*: everything else, in the policy's order.

    ``item.dead`` and ``item.superseded`` change only between ``discard`` and ``add``.
    """

    has_priority_classes = True

    def __init__(
        self, rest: EvictionPolicy, dead: EvictionPolicy, superseded: EvictionPolicy
    ) -> None:
        self._rest = rest
        self._dead = dead
        self._superseded = superseded

    def __str__(self) -> str:
        return str(self._rest)

    def __getattr__(self, name: str) -> Any:
        """Return a further attribute of the policy of the rest, for inspection."""
        if name.startswith("_"):  # Not set yet, as in a copy under construction.
            raise AttributeError(name)
        return getattr(self._rest, name)

    @property
    def failure(self) -> PolicyError | None:  # type: ignore[override]
        """The first failure of a class."""
        return self._rest.failure or self._dead.failure or self._superseded.failure

    def set_clock(self, clock: Callable[[], float]) -> None:
        for policy in (self._rest, self._dead, self._superseded):
            policy.set_clock(clock)

    def add(self, item: Item) -> None:
        tier = self._dead if item.dead else self._superseded if item.superseded else self._rest
        tier.add(item)

    def discard(self, item: Item, evicted: bool) -> None:
        tier = self._dead if item.dead else self._superseded if item.superseded else self._rest
        tier.discard(item, evicted)

    def touch(self, item: Item) -> None:
        tier = self._dead if item.dead else self._superseded if item.superseded else self._rest
        tier.touch(item)

    def on_relabelled(self, item: Item) -> None:
        tier = self._superseded if item.superseded else self._rest
        tier.on_relabelled(item)

    def on_ghost_hit(self, item: Item) -> None:
        """Notify both classes with checkpoints, because the ghost can be from either."""
        self._rest.on_ghost_hit(item)
        self._superseded.on_ghost_hit(item)

    def on_ghost_hit_above(self, item: Item) -> None:
        """Notify both classes with checkpoints."""
        self._rest.on_ghost_hit_above(item)
        self._superseded.on_ghost_hit_above(item)

    def candidates(self) -> Iterable[Item] | None:
        """Return the items of all classes, or None if one of them cannot list its items."""
        held: list[Item] = []
        for tier in {self._rest, self._dead, self._superseded}:
            listed = tier.candidates()
            if listed is None:
                return None
            held += listed
        return held

    def victim(self, kind: Kind | None) -> Item | None:
        """Return the victim of the first class that has one of ``kind``."""
        first: Item | None = None
        if kind != "checkpoint" and self._dead is not self._rest:
            first = self._dead.victim("kv")
        if first is None and kind != "kv":
            first = self._superseded.victim("checkpoint")
        return first if first is not None else self._rest.victim(kind)
