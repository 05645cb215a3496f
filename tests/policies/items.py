"""Items without a tree, and the cache's side of the protocol: what a worked example needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hybridcache.policies.protocol import EvictionPolicy, Item, Kind

_serials = iter(range(10**9))


@dataclass(eq=False, slots=True)
class FakeItem:
    """An item whose facts are simply said."""

    name: str
    kind: Kind = "checkpoint"
    size_bytes: int = 1
    position: int = 64
    span: int = 64
    created: int = 0
    last_used: int = 0
    uses: int = 0
    dead: bool = False
    superseded: bool = False
    above: Any = None
    label: str = ""
    memo: Any = None
    serial: int = field(default_factory=_serials.__next__)


class Shelf:
    """A cache of ``capacity`` items in front of a policy: each request brings its own time, one
    item, and evicts if needed.

    A capital letter asks for the same item and keeps it locked until ``LOCKED_FOR`` requests later:
    chosen until then, it is withheld from the policy as the cache does it. Where all are locked the
    request brings nothing.
    """

    LOCKED_FOR = 3

    def __init__(
        self,
        policy: EvictionPolicy,
        capacity: int,
        make: Callable[[str], FakeItem] = FakeItem,
    ) -> None:
        self.policy = policy
        self.capacity = capacity
        self.make = make
        self.items: dict[str, FakeItem] = {}
        self.ghosts: dict[str, FakeItem] = {}
        self.evicted: list[str] = []
        self.locked_until: dict[str, int] = {}
        self.withheld: dict[str, FakeItem] = {}
        self.refused = 0
        self.hits = 0
        self.now = 0

    def ask(self, names: str) -> Shelf:
        """One request a letter."""
        for letter in names:
            name = letter.lower()
            self._ask(name)
            if letter != name and name in self.items:
                self.locked_until[name] = self.now + self.LOCKED_FOR
        return self

    def _ask(self, name: str) -> None:
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
                assert len(self.withheld) == len(self.items), "not all are locked"
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
            self.evicted.append(victim.name)
        fresh = self.make(name)
        fresh.position = ord(name)
        fresh.created = fresh.last_used = self.now
        self.items[name] = fresh
        self.policy.add(fresh)

    def _unlock(self) -> None:
        for name, until in list(self.locked_until.items()):
            if until <= self.now:
                del self.locked_until[name]
                if name in self.withheld:
                    self.policy.add(self.withheld.pop(name))

    @property
    def gone(self) -> str:
        """Who went, in order."""
        return "".join(self.evicted)


def offer(policy: EvictionPolicy, *items: FakeItem) -> list[str]:
    """All of ``items`` become candidates and are evicted one after another: their names in that
    order."""
    for item in items:
        policy.add(item)
    order = []
    while (victim := policy.victim(None)) is not None:
        assert isinstance(victim, FakeItem)
        policy.discard(victim, evicted=True)
        order.append(victim.name)
    return order


def as_item(item: FakeItem) -> Item:
    """A fake item is an item: mypy's word for it."""
    return item
