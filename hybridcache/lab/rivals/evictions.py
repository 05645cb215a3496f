"""Eviction policies of the simulator only: textbook rules that no server needs.

``Scenario.policy`` takes their names next to those of ``EVICTION_NAMES``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hybridcache.policies import registry
from hybridcache.policies.eviction.gdsf import Ageing
from hybridcache.policies.eviction.scored import SampledPolicy
from hybridcache.policies.eviction.sieve import BothKinds, OneQueue, Queue, QueuePolicy, QueueState
from hybridcache.policies.registry import EVICTION_NAMES, NamedPolicy
from hybridcache.radix.protocol import EvictionPolicy, Item


class Random(SampledPolicy):
    """Evict a uniformly random candidate. Deterministic for a given seed.

    Source: folklore; a control on loops, where LRU has no hits.
    Two kinds: drawn together, so the kind with more candidates loses more.
    """

    orders_classes = False

    sample = 1

    def score(self, item: Item) -> float:
        return 0.0


class LFU(Ageing):
    """Evict the least used item; new items start at the score of the last victim (LFU-DA).

    Source: Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000.
    Two kinds: one order over both. Sizes are ignored (``gdsf`` adds sizes and costs).
    """

    def score(self, item: Item) -> float:
        return item.uses + 1 + self.age_of(item)


class Clock(OneQueue):
    """Evict the first item in the ring that was not used since the hand's last round.

    Source: Corbató, "A paging experiment with the Multics system", 1968.
    Two kinds: one ring for each. Sizes are ignored.
    """

    def choose(self) -> Item | None:
        """Return the first item without its bit. The hand clears the bits that it passes."""
        while (oldest := self.queue.oldest()) is not None and oldest.memo.mark:
            oldest.memo.mark = 0
            self.move(oldest, self.queue)
        return oldest


SMALL_SHARE = 0.1
"""Part of the bytes that the small FIFO may hold."""


class S3Fifo(QueuePolicy):
    """Evict most items from a small FIFO. Items used twice or returned as ghosts go to a main FIFO.

    Source: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP'23).
    Two kinds: separate queues, with shares in bytes. The tree's ghosts (checkpoints only) are the
    ghost queue.
    """

    def __init__(self) -> None:
        super().__init__()
        self.small, self.main = Queue(), Queue()

    def enter(self, item: Item, ghost: QueueState | None) -> Queue:
        """Enter ``small``, or ``main`` if a ghost of ``small`` returns."""
        if ghost is None or not isinstance(ghost.owner, type(self)):
            return self.small
        return self.main if ghost.queue is ghost.owner.small else self.small

    def used(self, item: Item, record: QueueState) -> None:
        """Increment the counter, up to 3. The item does not move."""
        record.mark = min(record.mark + 1, 3)

    def choose(self) -> Item | None:
        """Return the oldest of ``small`` if that has its share or more, else of ``main``. If it was
        used, in ``small`` more than once, it moves to ``main`` instead."""
        while True:
            total = self.small.num_bytes + self.main.num_bytes
            is_full = self.small.num_bytes >= SMALL_SHARE * total
            from_small = len(self.small) > 0 and (is_full or not len(self.main))
            item = (self.small if from_small else self.main).oldest()
            if item is None or item.memo.mark <= (1 if from_small else 0):
                return item
            record = item.memo
            record.mark = 0 if from_small else record.mark - 1
            self.move(item, self.main)


class ARC(QueuePolicy):
    """Evict from one of two LRU lists, used once and used again. Ghost hits adapt their sizes.

    Source: Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST'03).
    Two kinds: two lists for each, with the target in bytes. The tree's ghosts are B1 and B2. They
    exist for checkpoints only, so KV's target stays 0 and its used items are kept longest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recent, self.frequent = Queue(), Queue()
        self.target_bytes = 0.0
        self.num_ghosts = {True: 0, False: 0}
        """Evicted and not returned items, by origin: True for ``recent``."""
        self._chosen: Item | None = None
        self._frequent_asked = False
        """True if the latest ghost hit was of ``frequent``. T1 then also shrinks at its target."""

    def enter(self, item: Item, ghost: QueueState | None) -> Queue:
        """Enter ``recent``, or ``frequent`` if a ghost returns."""
        self._frequent_asked = False
        return self.recent if ghost is None else self.frequent

    def used(self, item: Item, record: QueueState) -> None:
        """Move to the young end of ``frequent``, from either list."""
        self.move(item, self.frequent)

    def choose(self) -> Item | None:
        """Return the oldest of ``recent`` above its target, else of ``frequent`` (REPLACE)."""
        held = self.recent.num_bytes
        over = held > self.target_bytes or (self._frequent_asked and held == self.target_bytes)
        first, second = (self.recent, self.frequent) if over else (self.frequent, self.recent)
        self._chosen = first.oldest() or second.oldest()
        return self._chosen

    def gone(self, item: Item, record: QueueState, evicted: bool) -> None:
        """Count the chosen victim as a ghost, unless it was only locked."""
        if item is not self._chosen:
            return
        self._chosen = None
        if evicted:
            self.num_ghosts[record.queue is self.recent] += 1

    def on_ghost_hit(self, item: Item) -> None:
        """Enlarge the list of the ghost by the item's bytes times the ratio of ghost counts."""
        super().on_ghost_hit(item)
        record: QueueState | None = item.memo
        if record is None or record.owner is not self:
            return
        from_recent = record.queue is self.recent
        self._frequent_asked = not from_recent
        own, other = self._remembered(from_recent), self._remembered(not from_recent)
        step = max(1.0, other / own) * item.size_bytes
        total = self.recent.num_bytes + self.frequent.num_bytes
        self.target_bytes += step if from_recent else -step
        self.target_bytes = min(max(self.target_bytes, 0.0), float(total))
        self.num_ghosts[from_recent] = max(0, self.num_ghosts[from_recent] - 1)

    def _remembered(self, from_recent: bool) -> int:
        """Return |B1| or |B2|, at least 1. T1 with B1, and B1 with B2, may not exceed the size of
        the cache."""
        recent = min(self.num_ghosts[True], len(self.frequent))
        if from_recent:
            return max(1, recent)
        capacity = len(self.recent) + len(self.frequent)
        return max(1, min(self.num_ghosts[False], capacity - recent))


AGE_AFTER = 10
"""Uses per candidate after which all counters are halved."""
WINDOW, PROTECTED = 0.01, 0.8
"""Parts of the bytes: of the window in all, and of the protected queue in main."""


class WTinyLFU(QueuePolicy):
    """Admit an item from the window to main only if it is used more often than the item it evicts.

    Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy" (TOS
    2017).
    Two kinds: separate queues, with shares in bytes. Main has room for 99 % of the bytes held at
    the previous eviction. Counters are exact, while the paper uses a sketch. They outlive eviction
    for checkpoints only, because only these have ghost hits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window, self.probation, self.protected = Queue(), Queue(), Queue()
        self._uses = 0
        self._full_bytes: int | None = None
        """Bytes held at the previous eviction: an estimate of the capacity."""
        self._duel: tuple[Item, Item] | None = None
        """(incumbent to evict, newcomer that takes its place in main)."""

    def enter(self, item: Item, ghost: QueueState | None) -> Queue:
        return self.window

    def add(self, item: Item) -> None:
        """Add an item. A returning item continues its ghost's counter."""
        ghost = self._returned(item)
        super().add(item)
        if ghost is not None:
            item.memo.mark = ghost.mark + 1

    def used(self, item: Item, record: QueueState) -> None:
        """Count a use, and move the item in the window or to the protected queue, whose overflow
        returns to probation."""
        record.mark += 1
        self._uses += 1
        self.move(item, self.window if record.queue is self.window else self.protected)
        share = PROTECTED * self._main_bytes()
        while self.protected.num_bytes > share and len(self.protected) > 1:
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest, self.probation)
        queues = self.window, self.probation, self.protected
        if self._uses > AGE_AFTER * sum(map(len, queues)):
            self._uses = 0
            for queue in queues:
                for held, _ in queue.entries.values():
                    held.memo.mark //= 2

    def choose(self) -> Item | None:
        """Move the window's overflow to main while there is room, then compare it with main's
        oldest item. Returns the less frequent one."""
        total = self.window.num_bytes + self._main_bytes()
        full = total if self._full_bytes is None else self._full_bytes
        self._full_bytes = total
        room = (1 - WINDOW) * full
        while (newcomer := self.window.oldest()) is not None:
            # The victim makes room for an item that enters the window: count one more of this size.
            if self.window.num_bytes + newcomer.size_bytes <= WINDOW * total:
                break
            if self._main_bytes() + newcomer.size_bytes <= room:
                self.move(newcomer, self.probation)
                continue
            incumbent = self._main_oldest()
            if incumbent is None or newcomer.memo.mark <= incumbent.memo.mark:
                return newcomer
            self._duel = (incumbent, newcomer)
            return incumbent
        return self._main_oldest() or newcomer

    def gone(self, item: Item, record: QueueState, evicted: bool) -> None:
        """Move a newcomer that won its comparison to the place of the evicted item."""
        if self._duel is None:
            return
        loser, winner = self._duel
        if item is loser and evicted:
            self.move(winner, self.probation)
        if item is loser or item is winner:
            self._duel = None

    def _main_bytes(self) -> int:
        return self.probation.num_bytes + self.protected.num_bytes

    def _main_oldest(self) -> Item | None:
        return self.probation.oldest() or self.protected.oldest()


LAB_NAMES: dict[str, NamedPolicy] = {
    "arc": NamedPolicy(partial(BothKinds, ARC)),
    "clock": NamedPolicy(partial(BothKinds, Clock)),
    "lfu": NamedPolicy(LFU),
    "random": NamedPolicy(Random),
    "s3-fifo": NamedPolicy(partial(BothKinds, S3Fifo)),
    "w-tinylfu": NamedPolicy(partial(BothKinds, WTinyLFU)),
}
"""Names that only simulations know."""
ALL_NAMES = EVICTION_NAMES | LAB_NAMES


def make_eviction(spec: Any) -> Callable[[], EvictionPolicy]:
    """Return a factory of the policy ``spec``, with the names of this module."""
    return registry.make_eviction(spec, ALL_NAMES)
