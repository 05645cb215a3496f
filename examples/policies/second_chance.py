"""A stateful eviction policy that learns from evictions it regrets.

A policy is notified when items come, are used, and go, and when a request would have resumed from
an evicted checkpoint (``on_ghost_hit``). This one keeps two queues and learns which checkpoints
come back, by the label of the placement rule that saved them. It orders all items itself, so it is
compared with policies that do so too:

    hybridcache simulate --trace short --model qwen3-next --gib 1 --no-priority-classes \\
        --policy lru,second_chance:SecondChance
"""

from collections import Counter
from collections.abc import Iterable

from hybridcache import EvictionPolicy, Item


class SecondChance(EvictionPolicy):
    """Evicts the oldest item first, with a second chance for used items and often missed labels."""

    def __init__(self) -> None:
        self.queues: dict[str, dict[Item, None]] = {"kv": {}, "checkpoint": {}}
        self.misses: Counter[str] = Counter()  # ghost hits by label
        self.evictions: Counter[str] = Counter()

    def add(self, item: Item) -> None:
        """Append ``item`` to its queue. O(1)."""
        if item.memo is None:  # the cache keeps ``memo`` for as long as the item lives
            item.memo = 3 * self.misses[item.label] > self.evictions[item.label]
        self.queues[item.kind][item] = None

    def touch(self, item: Item) -> None:
        """Give ``item`` another chance. O(1)."""
        item.memo = True

    def discard(self, item: Item, evicted: bool) -> None:
        """Remove ``item``: it was evicted, is locked, or is not a leaf any more. O(1)."""
        del self.queues[item.kind][item]
        if evicted and item.kind == "checkpoint":
            self.evictions[item.label] += 1

    def on_ghost_hit(self, item: Item) -> None:
        """Note that evicting ``item`` cost a request its prefix."""
        self.misses[item.label] += 1

    def victim(self, kind: str | None) -> Item | None:
        """Return the oldest item without a chance left. O(1) amortised."""
        queues = self.queues.values() if kind is None else [self.queues[kind]]
        fronts = [self.front(queue) for queue in queues if queue]
        return min(fronts, key=lambda item: item.serial, default=None)

    def front(self, queue: dict[Item, None]) -> Item:
        """Move items with a chance left to the back; return the first one without."""
        while (item := next(iter(queue))).memo:
            item.memo = False
            del queue[item]
            queue[item] = None
        return item

    def candidates(self) -> Iterable[Item]:
        """List all candidates, so that ``cache.check()`` can compare them with the tree."""
        return [*self.queues["kv"], *self.queues["checkpoint"]]
