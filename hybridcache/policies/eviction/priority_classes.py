"""Priority classes in front of a policy: dead KV, then superseded checkpoints, then the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hybridcache.radix.protocol import EvictionPolicy, Item, Kind, PolicyError


class PriorityClasses(EvictionPolicy):
    """Combination of three instances of one policy, evicted from in this order:

    - *dead*: leaf KV without a checkpoint at its end. It cannot be resumed from. The same object as
      ``rest`` disables this class.
    - *superseded*: checkpoints with a deeper one on the same unforked path. A repeated prompt can
      still hit them while there is room.
    - *rest*: everything else.

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

    @property
    def failure(self) -> PolicyError | None:  # type: ignore[override]
        return self._rest.failure or self._dead.failure or self._superseded.failure

    def set_clock(self, clock: Callable[[], float]) -> None:
        super().set_clock(clock)
        for policy in (self._rest, self._dead, self._superseded):
            policy.set_clock(clock)

    def _class_of(self, item: Item) -> EvictionPolicy:
        return self._dead if item.dead else self._superseded if item.superseded else self._rest

    def add(self, item: Item) -> None:
        self._class_of(item).add(item)

    def discard(self, item: Item, evicted: bool) -> None:
        self._class_of(item).discard(item, evicted)

    def touch(self, item: Item) -> None:
        self._class_of(item).touch(item)

    def on_relabelled(self, item: Item) -> None:
        self._class_of(item).on_relabelled(item)

    def on_ghost_hit(self, item: Item) -> None:
        """Notify both classes with checkpoints, because the ghost can be from either."""
        self._rest.on_ghost_hit(item)
        self._superseded.on_ghost_hit(item)

    def on_ghost_hit_above(self, item: Item) -> None:
        self._rest.on_ghost_hit_above(item)
        self._superseded.on_ghost_hit_above(item)

    def state_dict(self) -> dict[str, Any] | None:
        states = [policy.state_dict() for policy in (self._rest, self._dead, self._superseded)]
        return None if states == [None] * 3 else {"classes": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        policies = self._rest, self._dead, self._superseded
        for policy, own in zip(policies, state["classes"], strict=True):
            if own is not None:
                policy.load_state_dict(own)

    def memo_state(self, item: Item) -> Any:
        return self._class_of(item).memo_state(item)

    def load_memo(self, item: Item, state: Any) -> None:
        self._class_of(item).load_memo(item, state)

    def candidates(self) -> Iterable[Item] | None:
        held: list[Item] = []
        for tier in {self._rest, self._dead, self._superseded}:
            listed = tier.candidates()
            if listed is None:
                return None
            held += listed
        return held

    def victim(self, kind: Kind | None) -> Item | None:
        first: Item | None = None
        if kind != "checkpoint" and self._dead is not self._rest:
            first = self._dead.victim("kv")
        if first is None and kind != "kv":
            first = self._superseded.victim("checkpoint")
        return first if first is not None else self._rest.victim(kind)
