"""survival: what a byte is worth, learnt from what was used and from what ghosts say was missed. No
knob."""

from __future__ import annotations

import random

from hybridcache.policies.eviction.columns import Columns
from hybridcache.policies.eviction.hazards import NUM_BINS, Hazards, age_bins
from hybridcache.policies.protocol import EvictionPolicy, Item, Kind

SUPERSEDED_PRIOR = 0.125
"""What a superseded checkpoint is believed to be worth, against one that is not, before anything
was seen."""
COMMON = frozenset(
    {"", "decode", "end", "prompt", "branch", "boundary", "backoff", "back:1", "rejoin"}
)
"""Labels of places where prompts are known to part; all others speculate."""
SPECULATIVE_PRIOR = 0.125
PRIORS = {
    (False, False): 1.0,
    (False, True): SPECULATIVE_PRIOR,
    (True, False): SUPERSEDED_PRIOR,
    (True, True): SUPERSEDED_PRIOR * SPECULATIVE_PRIOR,
}
"""By (superseded, speculative)."""
MAX_TURN = 8
"""Generations of a lineage that are distinguished."""
SAMPLE = 1024
"""Candidates looked at for one victim; all, while there are no more."""


Class = tuple[tuple[bool, bool], str, int, int, int]
"""((superseded, speculative), label, uses, generation, log2 of the position)."""


class _Memo:
    """What the policy knows of one item: its stage, and its place in the line of checkpoints it
    descends from."""

    __slots__ = (
        "active",
        "cell",
        "demand",
        "entered",
        "key",
        "stage",
        "superseded",
        "turn",
        "uses",
    )

    def __init__(self, item: Item, turn: int) -> None:
        self.uses = item.uses
        self.superseded = item.superseded
        self.turn = turn
        self.active = item.last_used
        """Latest use of the item or of a descendant that was evicted."""
        self.stage: int
        self.cell: int
        """Where the indices of its class begin."""
        self.entered: int
        self.key: Class
        """Its class."""
        self.demand: Class | None = None
        """Class of the evicted tip that the item stands in for, or None."""


class Survival(EvictionPolicy):
    """Least (index of class and age) * (tokens lost) / (bytes freed).

    *Class*: label, superseded or not, uses, and how many generations its lineage has; the index is
    ``Hazards``'s. *Tokens lost*: back to the nearest checkpoint above, so what a neighbour covers
    is not paid twice. *Bytes freed*: the state, and at a leaf the KV tail that dies with it, so
    tails and states trade at what they save per byte. *Lineage*: a checkpoint takes over its
    predecessor's generation + 1; when a tip leaves the last tier, the predecessor takes over the
    tip's demand, where that is more than its own. *Ghosts*: the use that a ghost reports counts as
    a use of its class, for every ghost that the request would have resumed from had it alone been
    kept: what is judged is the eviction of one item, the rest being as it is.

    Source: this project; the index is Gittins' (1979) on hazards as in LHD (NSDI'18), marginal
    coverage as in k-median on a tree. Candidates: leaf KV without a checkpoint at once; else
    checkpoints, a leaf's with its tail; leaf KV by itself where KV has a pool of its own. Refresh:
    the consumed checkpoint. O(1) per event, O(1024) per victim.
    """

    def __init__(self, seed: int = 0) -> None:
        self.survival = Hazards()
        self._is_last = True
        """Nothing lies below: what it lets go is gone."""
        self._random = random.Random(seed)
        self._checkpoints = Columns()
        self._kv = Columns()
        self._dead: dict[Item, None] = {}
        self._idle_kv: dict[Item, None] | None = {}
        """Leaf KV while nobody has asked for a victim among KV alone; None from then on."""
        self._ghost = (0, 0, 0)
        """(time, position, generation) of the latest ghost that spoke."""
        self._stale: dict[Item, None] = {}
        """Checkpoints below which something went (they may free more than when they were last
        looked at) and new ones (others of the same prompt may have come to stand above them)."""
        self._just_used = False
        """The latest call was a use: a ghost that speaks now belongs to the same request."""

    def for_tier(self) -> Survival:
        """Hazards and clock are one for all tiers: a stage goes on wherever its item lies."""
        lower = Survival()
        lower.survival = self.survival
        self._is_last = False
        return lower

    def add(self, item: Item) -> None:
        survival = self.survival
        if item.last_used > survival.now:
            survival.now = item.last_used
        self._just_used = False
        columns = self._checkpoints
        if item.kind == "kv":
            if item.dead:
                self._dead[item] = None
                return
            if self._idle_kv is not None:
                self._idle_kv[item] = None
                return
            columns = self._kv
        memo = item.memo
        if memo is None:
            item.memo = memo = _Memo(item, self._turn(item))
            self._stale[item] = None
            self._enter(item, memo)
            worth = 0.0 if columns is self._checkpoints else _worth(item)
            columns.put(item, memo.cell, memo.entered, worth)
            return
        if item.uses > memo.uses:
            self._used(item, memo)
        elif item.superseded != memo.superseded:
            survival.close(memo.stage, survival.now, used=False)
            self._enter(item, memo)
        columns.put(item, memo.cell, memo.entered, _worth(item))

    def touch(self, item: Item) -> None:
        survival = self.survival
        if item.last_used > survival.now:
            survival.now = item.last_used
        self._just_used = True
        memo = item.memo
        if memo is not None and item.uses > memo.uses:
            self._used(item, memo)
            columns = self._kv if item.kind == "kv" else self._checkpoints
            if item in columns.places:
                columns.put(item, memo.cell, memo.entered, _worth(item))

    def discard(self, item: Item, evicted: bool) -> None:
        self._just_used = False
        if item.kind == "kv" and self._idle_kv is not None and item in self._idle_kv:
            del self._idle_kv[item]
            return
        above = item.above
        if above is not None:
            self._stale[above] = None
        if item.kind == "kv":
            if item in self._dead:
                del self._dead[item]
                return
            self._kv.remove(item)
        else:
            self._checkpoints.remove(item)
        is_gone = evicted and self._is_last and item.kind == "checkpoint"
        if is_gone and above is not None and above.superseded:
            memo = above.memo
            if isinstance(memo, _Memo):
                memo.active = max(memo.active, item.memo.active)
                memo.demand = item.memo.key

    def on_ghost_hit(self, item: Item) -> None:
        memo = item.memo
        if isinstance(memo, _Memo):
            survival = self.survival
            now = survival.now + (not self._just_used)
            survival.close(memo.stage, now, used=True)
            self._ghost = (now, item.position, memo.turn)

    def on_ghost_hit_above(self, item: Item) -> None:
        """``item`` would have been resumed from, had it alone been kept: a use, unless it went
        while superseded. What it is worth beside a deeper one ended when that went too."""
        memo = item.memo
        if isinstance(memo, _Memo):
            now = self.survival.now + (not self._just_used)
            self.survival.close(memo.stage, now, used=not memo.superseded)

    def victim(self, kind: Kind | None) -> Item | None:
        if kind != "checkpoint" and self._dead:
            return next(iter(self._dead))
        self.survival.refresh(self.survival.now)
        self._revalue()
        chosen = None if kind == "kv" else self._least(self._checkpoints)
        if chosen is None and kind != "checkpoint":
            self._rank_kv()
            chosen = self._least(self._kv)
        return chosen

    def _revalue(self) -> None:
        """Bring the worth of stale candidates up to date, and of one more at random: what is missed
        is met in time."""
        candidates = self._checkpoints.items
        if candidates:
            self._stale[candidates[self._random.randrange(len(candidates))]] = None
        for item in self._stale:
            columns = self._kv if item.kind == "kv" else self._checkpoints
            place = columns.places.get(item)
            if place is not None:
                columns.worths[place] = _worth(item)
        self._stale.clear()

    def _rank_kv(self) -> None:
        """From now on follow leaf KV for itself: it has a pool of its own, or nothing else is
        left."""
        if self._idle_kv is not None:
            waiting, self._idle_kv = self._idle_kv, None
            for item in waiting:
                self.add(item)

    def _turn(self, item: Item) -> int:
        """Generation of a new item: its predecessor's, one more if another request made that."""
        above = item.above
        turn = 0
        if above is not None and isinstance(above.memo, _Memo):
            turn = above.memo.turn + (above.created < item.created)
        when, position, ghost_turn = self._ghost
        if when == item.created and item.position > position:
            turn = max(turn, ghost_turn + 1)
        return turn

    def _used(self, item: Item, memo: _Memo) -> None:
        self.survival.close(memo.stage, item.last_used, used=True)
        memo.uses = item.uses
        memo.active = item.last_used
        self._enter(item, memo)

    def _enter(self, item: Item, memo: _Memo) -> None:
        """Begin a stage in the class that ``item`` has now."""
        survival = self.survival
        memo.superseded = item.superseded
        memo.key = _class_of(item, memo.turn)
        demand = None if item.superseded else memo.demand
        if demand is not None:
            memo.key = ((True, memo.key[0][1]), *memo.key[1:])
        row = survival.row(memo.key, PRIORS[memo.key[0]])
        if demand is not None:
            tip_row = survival.row(demand, PRIORS[demand[0]])
            age = survival.now - memo.active
            if survival.index_at(tip_row, age) >= survival.index_at(row, age):
                memo.key, row = demand, tip_row
        memo.cell, memo.entered = row * NUM_BINS, memo.active
        memo.stage = survival.open(row, memo.active)

    def _least(self, columns: Columns) -> Item | None:
        """The candidate worth least per byte. Worths that neighbours changed are put right as they
        come up."""
        count = len(columns.items)
        if not count:
            return None
        first, last, rates, now = 0, count, None, self.survival.now
        for _ in range(8):
            if count > SAMPLE:
                first = self._random.randrange(count - SAMPLE)
                last, rates = first + SAMPLE, None
            if rates is None:
                bins = age_bins(now - columns.times[first:last], now)
                bins += columns.cells[first:last]
                rates = self.survival.index.take(bins)
                worths = columns.worths[first:last]
                values = rates * worths
            place = int(values.argmin())
            item = columns.items[first + place]
            worth = _worth(item)
            if worth <= worths.item(place) * 1.0001:
                break
            worths[place] = worth
            values[place] = rates.item(place) * worth
        return item


def _class_of(item: Item, turn: int) -> Class:
    """From coarse to fine: each entry narrows the one before, and where evidence is short the
    coarser one speaks."""
    label, uses = item.label, item.uses
    place = label.partition("/")[0]
    return (
        (item.superseded, place not in COMMON),
        label or item.kind,
        uses if uses < 2 else 2,
        turn if turn < MAX_TURN else MAX_TURN,
        item.position.bit_length(),
    )


def _worth(item: Item) -> float:
    return item.span / item.size_bytes
