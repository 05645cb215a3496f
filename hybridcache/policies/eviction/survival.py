"""Eviction by the expected value of a byte, learned from uses and ghost hits. No parameters."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from hybridcache.policies.eviction.columns import Columns
from hybridcache.policies.eviction.hazards import NUM_BINS, Hazards, age_bins
from hybridcache.policies.protocol import EvictionPolicy, Item, Kind

SUPERSEDED_PRIOR = 0.125
"""Assumed hazard of superseded checkpoints relative to others of their label, without evidence.

With a separate hazard, superseded checkpoints would outlast tips in a new cache: time without a use
lowers the hazard of tips, which are many, and not that of the first superseded checkpoint.
"""
COMMON = frozenset(
    {"", "decode", "end", "prompt", "branch", "boundary", "backoff", "back:1", "rejoin"}
)
"""Labels of positions where prompts are known to diverge. All other labels are speculative."""
SPECULATIVE_PRIOR = 0.125
"""Assumed hazard of classes with a speculative label relative to common ones, without evidence."""
FORKS = frozenset({"branch", "boundary"})
"""Labels of ends of text that other conversations may share. Their class has no generation."""
REJOIN = "rejoin"
"""Label of a position at which an earlier request of the conversation ended."""
MAX_TURN = 8
"""Highest generation that has its classes apart."""
SAMPLE = 1024
"""Maximum number of candidates compared for one victim."""


GENERAL_FROM = 3
"""First fact of a class with an effect in all classes: the generation."""


Class = tuple[tuple[bool, bool], str, *tuple[str | int, ...]]
"""((superseded, speculative), label, uses, generation, octave of the position, half octave), and
the stop reason of the answer behind it, if that is known."""


class _Memo:
    """Data of one item: its stage and its place in its lineage."""

    __slots__ = ("active", "demand", "entered", "row", "stage", "superseded", "turn", "uses")

    def __init__(self, item: Item) -> None:
        self.uses = item.uses
        self.superseded = item.superseded
        self.turn = 0
        """Number of earlier tips in the lineage. It goes on through forks, because a conversation
        does: its prompts may end at one."""
        before = item.predecessor
        if before is not None and isinstance(before.memo, _Memo):
            is_tip = before.label not in FORKS and (before.uses > 0 or not before.superseded)
            is_earlier = before.position < item.position and (is_tip or before.label == REJOIN)
            self.turn = before.memo.turn + is_earlier
        self.active = item.last_used
        """Latest use of the item or of an evicted descendant."""
        self.stage = -1
        self.row: int
        """Row of its class in the tables of ``Hazards``."""
        self.entered: int
        self.demand: int | None = None
        """Row of the class of the evicted tip that the item stands in for, or None."""


class Survival(EvictionPolicy):
    """Evict the item with the least (index of its class and age) * (tokens lost) / (bytes freed).

    - *Class*: superseded or not, label, uses, generation, position and stop reason. ``Hazards`` has
      the indices.
    - *Tokens lost*: the distance to the nearest checkpoint above.
    - *Bytes freed*: the state, and for a leaf also its KV tail. States and tails are compared by
      the tokens that they save per byte.
    - *Generation*: the number of earlier tips of the conversation. The predecessor, which may be
      evicted already, counts if a request resumed from it, it was a tip until its eviction, or an
      earlier request ended there. Forks do not count, and tips after them count those before them.
      KV has the generation of the checkpoint at its end.
    - *Demand*: if a tip leaves the last tier, its predecessor takes over its class.
    - *Ghosts*: a ghost hit counts as a use of the class. This holds for each ghost from which the
      request would have resumed if only this item had been kept.

    Candidates are leaf KV without a checkpoint, which goes first, and checkpoints, for a leaf with
    its tail. Leaf KV is a candidate alone if KV has a separate pool. A use refreshes the consumed
    checkpoint. O(1) per event, O(1024) per victim.

    Source: this project. The index is that of Gittins (1979), on hazards as in LHD (NSDI'18).
    """

    def __init__(self, seed: int = 0) -> None:
        self.hazards = Hazards(general_from=GENERAL_FROM)
        self._owns_hazards = True
        """False if the hazards are those of a higher tier."""
        self._is_last = True
        """True if there is no lower tier, so that eviction is final."""
        self._random = random.Random(seed)
        self._checkpoints = Columns()
        self._kv = Columns()
        self._dead: OrderedDict[Item, None] = OrderedDict()
        """Leaf KV that goes first. The first key of a plain dictionary is not found in O(1)."""
        self._idle_kv: dict[Item, None] | None = {}
        """Leaf KV until the first call of ``victim`` that needs it ranked. None from then on."""
        self._stale: dict[Item, None] = {}
        """Checkpoints with an outdated value: those with an evicted descendant, which can free more
        bytes now, and new ones, which can have got a checkpoint above them since."""
        self._just_used = False
        """True if the latest call was a use. A ghost hit then belongs to the same request."""

    def for_tier(self) -> Survival:
        """Return a policy that shares hazards and clock, so that stages continue in other tiers."""
        lower = Survival()
        lower.hazards, lower._owns_hazards = self.hazards, False
        self._is_last = False
        return lower

    def candidates(self) -> Iterable[Item]:
        """Return all candidates, unordered. O(n)."""
        return chain(self._checkpoints.items, self._kv.items, self._dead, self._idle_kv or ())

    def state_dict(self) -> dict[str, Any]:
        """Return the learned state as plain data and arrays. Items are named by their serial."""
        version, numbers, spare = self._random.getstate()
        idle_kv = self._idle_kv
        return {
            "hazards": self.hazards.state_dict() if self._owns_hazards else None,
            "random": [version, list(numbers), spare],
            "checkpoints": self._checkpoints.rows(),
            "kv": self._kv.rows(),
            "dead": [item.serial for item in self._dead],
            "idle_kv": None if idle_kv is None else [item.serial for item in idle_kv],
            "stale": [item.serial for item in self._stale],
            "just_used": self._just_used,
        }

    def load_state_dict(self, state: dict[str, Any], item_of: Callable[[int], Item | None]) -> None:
        """Replace the learned state by the result of ``state_dict``. ``item_of`` finds items by
        serial; those that no longer exist are left out."""

        def items(serials: list[int]) -> OrderedDict[Item, None]:
            return OrderedDict.fromkeys(item for one in serials if (item := item_of(one)))

        hazards, idle_kv = state["hazards"], state["idle_kv"]
        version, numbers, spare = state["random"]
        self._random.setstate((version, tuple(numbers), spare))
        if hazards is not None:
            self.hazards.load_state_dict(hazards)
        self._checkpoints = Columns.of(state["checkpoints"], item_of)
        self._kv = Columns.of(state["kv"], item_of)
        self._dead, self._stale = items(state["dead"]), items(state["stale"])
        self._idle_kv = None if idle_kv is None else items(idle_kv)
        self._just_used = state["just_used"]

    def memo_state(self, item: Item) -> list[Any] | None:
        """Return the memo of ``item`` as plain data, or None if it has none."""
        memo = item.memo
        if not isinstance(memo, _Memo):
            return None
        return [getattr(memo, name) for name in _Memo.__slots__]

    def memo_of(self, state: list[Any]) -> _Memo:
        """Return the memo that ``memo_state`` described."""
        memo = _Memo.__new__(_Memo)
        for name, value in zip(_Memo.__slots__, state, strict=True):
            setattr(memo, name, value)
        return memo

    def add(self, item: Item) -> None:
        hazards = self.hazards
        if item.last_used > hazards.now:
            hazards.now = item.last_used
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
            item.memo = memo = _Memo(item)
            self._stale[item] = None
            self._enter(item, memo, used=None)
            worth = 0.0 if columns is self._checkpoints else item.span / item.size_bytes
            columns.put(item, memo.row * NUM_BINS, memo.entered, worth)
            return
        if item.uses > memo.uses:
            self._enter(item, memo, used=True)
        elif item.superseded != memo.superseded:
            self._enter(item, memo, used=False)
        columns.put(item, memo.row * NUM_BINS, memo.entered, item.span / item.size_bytes)

    def touch(self, item: Item) -> None:
        hazards = self.hazards
        if item.last_used > hazards.now:
            hazards.now = item.last_used
        self._just_used = True
        memo = item.memo
        if memo is not None and item.uses > memo.uses:
            self._enter(item, memo, used=True)
            columns = self._kv if item.kind == "kv" else self._checkpoints
            if item in columns.places:
                columns.put(item, memo.row * NUM_BINS, memo.entered, item.span / item.size_bytes)

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
                memo.demand = item.memo.row

    def on_relabelled(self, item: Item) -> None:
        memo = item.memo
        if isinstance(memo, _Memo):
            self._enter(item, memo, used=None)
            if item in self._checkpoints.places:
                worth = item.span / item.size_bytes
                self._checkpoints.put(item, memo.row * NUM_BINS, memo.entered, worth)

    def on_ghost_hit(self, item: Item) -> None:
        memo = item.memo
        if isinstance(memo, _Memo):
            now = self.hazards.now + (not self._just_used)
            self.hazards.close(memo.stage, now, used=True)

    def on_ghost_hit_above(self, item: Item) -> None:
        """Count a use of ``item``, unless it was evicted while superseded.

        Without its eviction the request would have resumed from it. Its value next to a deeper
        checkpoint ended when that one was evicted too.
        """
        memo = item.memo
        if isinstance(memo, _Memo):
            now = self.hazards.now + (not self._just_used)
            self.hazards.close(memo.stage, now, used=not memo.superseded)

    def victim(self, kind: Kind | None) -> Item | None:
        if kind != "checkpoint" and self._dead:
            return next(iter(self._dead))
        self.hazards.refresh(self.hazards.now)
        candidates = self._checkpoints.items
        if candidates:  # A random one too, which bounds the age of changes that were not noticed.
            self._stale[candidates[self._random.randrange(len(candidates))]] = None
        for item in self._stale:
            columns = self._kv if item.kind == "kv" else self._checkpoints
            place = columns.places.get(item)
            if place is not None:
                columns.worths[place] = item.span / item.size_bytes
        self._stale.clear()
        chosen = None if kind == "kv" else self._least(self._checkpoints)
        if chosen is None and kind != "checkpoint":
            if self._idle_kv is not None:  # It has a separate pool, or no checkpoint is left.
                waiting, self._idle_kv = self._idle_kv, None
                for item in waiting:
                    self.add(item)
            chosen = self._least(self._kv)
        return chosen

    def _enter(self, item: Item, memo: _Memo, used: bool | None) -> None:
        """End the stage of ``item``, with ``used`` as in ``Hazards.close``, and begin one in its
        present class.

        An item that stands in for an evicted tip had its own continuation already. It is used by
        the request that the tip waits for, or by a fork, as superseded items are. The class with
        the higher index counts.
        """
        hazards = self.hazards
        hazards.close(memo.stage, item.last_used if used else hazards.now, used)
        if used:
            memo.uses = item.uses
            memo.active = item.last_used
        memo.superseded = item.superseded
        key = _class_of(item, memo.turn)
        demand = None if item.superseded else memo.demand
        if demand is not None:
            key = ((True, key[0][1]), *key[1:])
        row = hazards.rows.get(key)
        if row is None:
            (superseded, speculative), label = key[0], key[1]
            prior = SPECULATIVE_PRIOR if speculative else 1.0
            if superseded:
                tips = (False, speculative), label
                hazards.row((key[0], label), prior, (tips, SUPERSEDED_PRIOR))
            row = hazards.row(key, prior)
        if demand is not None:
            age = hazards.now - memo.active
            if hazards.index_at(demand, age) >= hazards.index_at(row, age):
                row = demand
        memo.row, memo.entered = row, memo.active
        memo.stage = hazards.open(row, memo.active)

    def _least(self, columns: Columns) -> Item | None:
        """Return the candidate with the least value per byte, or None. Corrects outdated values of
        chosen candidates."""
        count = len(columns.items)
        if not count:
            return None
        first, last, rates, now = 0, count, None, self.hazards.now
        for _ in range(8):
            if count > SAMPLE:
                first = self._random.randrange(count - SAMPLE)
                last, rates = first + SAMPLE, None
            if rates is None:
                bins = age_bins(now - columns.times[first:last], now)
                bins += columns.cells[first:last]
                rates = self.hazards.index.take(bins)
                worths = columns.worths[first:last]
                values = rates * worths
            place = int(values.argmin())
            item = columns.items[first + place]
            worth = item.span / item.size_bytes
            if worth <= worths.item(place) * 1.0001:
                break
            worths[place] = worth
            values[place] = rates.item(place) * worth
        return item


def _class_of(item: Item, turn: int) -> Class:
    """Return the class of ``item``, from coarse to fine. Classes with little evidence use the
    hazards of the coarser class."""
    uses, position = item.uses, item.position
    label, _, stop_reason = item.label.partition("/")
    octave = position.bit_length()
    found: Class = (
        (item.superseded, label not in COMMON),
        label or item.kind,
        uses if uses < 2 else 2,
        0 if label in FORKS else min(turn, MAX_TURN),
        octave,
        2 * octave + (position << 2 >> octave) % 2,
    )
    return (*found, stop_reason) if stop_reason else found
