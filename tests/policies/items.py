"""Items without a tree and a cache of single items, for worked examples of policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hybridcache.radix.protocol import EvictionPolicy, Item, Kind
from hybridcache.radix.tree import Promise

_serials = iter(range(10**9))


@dataclass(eq=False, slots=True)
class FakeItem(Item):
    """Item with attributes set by the test."""

    name: str
    kind: Kind = "checkpoint"
    size_bytes: int = 1
    position: int = 64
    span: int = 64
    created: int = 0
    last_used: int = 0
    uses: int = 0
    earlier_uses: int = 0
    dead: bool = False
    superseded: bool = False
    above: Any = None
    label: str = ""
    distance: int = 0
    stop_reason: str = ""
    promise: Promise | None = None
    namespace: str | None = None
    memo: Any = None
    serial: int = field(default_factory=_serials.__next__)
    is_head: bool = False
    evicted_above: Any = None
    """Evicted checkpoint between this item and ``above``."""

    @property
    def node(self) -> Any:
        return SimpleNamespace(checkpoint=self)

    def span_and_size(self) -> tuple[int, int]:
        return self.span, self.size_bytes

    def is_shared_head(self, within: int) -> bool:
        return self.is_head

    @property
    def predecessor(self) -> Any:
        return self.evicted_above or self.above


class ItemCache:
    """Cache of ``capacity`` items with a policy. Each request is for one item.

    A capital letter requests the same item and locks it for the next ``LOCKED_FOR`` requests. A
    locked victim is withheld from the policy, as in the real cache. If all items are locked, the
    request is refused.
    """

    LOCKED_FOR = 3

    def __init__(
        self, policy: EvictionPolicy, capacity: int, make: Callable[[str], FakeItem] = FakeItem
    ) -> None:
        self.policy = policy
        self.capacity = capacity
        self.make = make
        self.items: dict[str, FakeItem] = {}
        self.ghosts: dict[str, FakeItem] = {}
        self.evicted = ""
        """Names of the evicted items, in order."""
        self.locked_until: dict[str, int] = {}
        self.withheld: dict[str, FakeItem] = {}
        self.refused = 0
        self.hits = 0
        self.now = 0

    def serve(self, names: str) -> ItemCache:
        """Serve one request per letter."""
        for letter in names:
            name = letter.lower()
            self._serve(name)
            if letter != name and name in self.items:
                self.locked_until[name] = self.now + self.LOCKED_FOR
        return self

    def _serve(self, name: str) -> None:
        self.now += 1
        self._unlock()
        item = self.items.get(name)
        if item is not None:
            self.hits += 1
            item.last_used = self.now
            item.uses += 1
            if name not in self.withheld:
                self.policy.touch(item)
            return
        if name in self.ghosts:
            self.policy.on_ghost_hit(self.ghosts.pop(name))
        while len(self.items) >= self.capacity:
            victim = self.policy.victim(None)
            if victim is None:
                assert len(self.withheld) == len(self.items), (
                    "no victim, although not all items are locked"
                )
                self.refused += 1
                return
            assert isinstance(victim, FakeItem)
            if victim.name in self.locked_until:
                self.policy.discard(victim, evicted=False)
                self.withheld[victim.name] = victim
                continue
            self.policy.discard(victim, evicted=True)
            del self.items[victim.name]
            self.ghosts[victim.name] = victim
            self.evicted += victim.name
        new = self.make(name)
        new.position = ord(name)
        new.created = new.last_used = self.now
        self.items[name] = new
        self.policy.add(new)

    def _unlock(self) -> None:
        for name, until in list(self.locked_until.items()):
            if until <= self.now:
                del self.locked_until[name]
                if name in self.withheld:
                    self.policy.add(self.withheld.pop(name))


def offer(policy: EvictionPolicy, *items: FakeItem) -> list[str]:
    """Add all ``items`` and evict them one by one. Returns their names in the order of eviction."""
    for item in items:
        policy.add(item)
    order = []
    while (victim := policy.victim(None)) is not None:
        assert isinstance(victim, FakeItem)
        policy.discard(victim, evicted=True)
        order.append(victim.name)
    return order
