"""What the structure says goes first, whatever the policy: dead KV, then superseded checkpoints,
then the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.protocol import EvictionPolicy, Item, Kind, candidates_of


class Tiers(EvictionPolicy):
    """Three instances of one policy, asked in this order; each an ordinary ``EvictionPolicy``.
    ``rest`` is one of them, ``make`` makes the others.

    - *dead*: leaf KV without a checkpoint at its end. Nothing can resume from it, so it is worth
      nothing;
    - *superseded*: checkpoints with a deeper one on the same unforked path. Worth less, not
      nothing: a prompt sent again still hits them while there is room, so they are demoted and
      never deleted at once;
    - *rest*: everything else, where the policy's own order decides.

    ``item.dead`` and ``item.superseded`` change only between ``discard`` and ``add``.
    """

    def __init__(
        self,
        rest: EvictionPolicy,
        make: Callable[[], EvictionPolicy],
        dead_first: bool,
        demote_superseded: bool,
    ) -> None:
        self._rest = rest
        self._dead = make() if dead_first else self._rest
        self._superseded = make() if demote_superseded else self._rest

    def add(self, item: Item) -> None:
        tier = self._dead if item.dead else self._superseded if item.superseded else self._rest
        tier.add(item)

    def discard(self, item: Item, evicted: bool) -> None:
        tier = self._dead if item.dead else self._superseded if item.superseded else self._rest
        tier.discard(item, evicted)

    def touch(self, item: Item) -> None:
        tier = self._dead if item.dead else self._superseded if item.superseded else self._rest
        tier.touch(item)

    def missed(self, item: Item) -> None:
        """Both tiers are notified that hold checkpoints: the ghost may have been of either."""
        self._rest.missed(item)
        if self._superseded is not self._rest:
            self._superseded.missed(item)

    def candidates(self) -> Iterable[Item] | None:
        """All that its tiers hold; None where they can not tell."""
        held: list[Item] = []
        for tier in {self._rest, self._dead, self._superseded}:
            listed = candidates_of(tier)
            if listed is None:
                return None
            held += listed
        return held

    def victim(self, kind: Kind | None) -> Item | None:
        """Of the first tier that has one of ``kind``."""
        first: Item | None = None
        if kind != "checkpoint" and self._dead is not self._rest:
            first = self._dead.victim("kv")
        if first is None and kind != "kv" and self._superseded is not self._rest:
            first = self._superseded.victim("checkpoint")
        return first if first is not None else self._rest.victim(kind)


def in_tiers(policy: object) -> bool:
    """Whether dead KV or superseded checkpoints go before what ``policy`` orders by its own
    rule."""
    return isinstance(policy, Tiers) or (isinstance(policy, LRU) and policy.has_tiers)
