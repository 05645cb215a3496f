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
    """A cache of ``capacity`` items in front of a policy: each request brings its own time, one item, and evicts if needed."""

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
        self.hits = 0
        self.now = 0

    def ask(self, names: str) -> Shelf:
        """One request a letter."""
        for name in names:
            self._ask(name)
        return self

    def _ask(self, name: str) -> None:
        self.now += 1
        item = self.items.get(name)
        if item is not None:
            self.hits += 1
            item.last_used = self.now
            item.uses += 1
            self.policy.touch(item)
            return
        if name in self.ghosts:
            self.policy.missed(self.ghosts.pop(name))
        while len(self.items) >= self.capacity:
            victim = self.policy.victim(None)
            assert isinstance(victim, FakeItem)
            self.policy.discard(victim)
            del self.items[victim.name]
            self.ghosts[victim.name] = victim
            self.evicted.append(victim.name)
        fresh = self.make(name)
        fresh.position = ord(name)
        fresh.created = fresh.last_used = self.now
        self.items[name] = fresh
        self.policy.add(fresh)

    @property
    def gone(self) -> str:
        """Who went, in order."""
        return "".join(self.evicted)


def offer(policy: EvictionPolicy, *items: FakeItem) -> list[str]:
    """All of ``items`` become candidates and are evicted one after another: their names in that order."""
    for item in items:
        policy.add(item)
    order = []
    while (victim := policy.victim(None)) is not None:
        assert isinstance(victim, FakeItem)
        policy.discard(victim)
        order.append(victim.name)
    return order


def as_item(item: FakeItem) -> Item:
    """A fake item is an item: mypy's word for it."""
    return item
