"""Eviction by the expected value of a byte, learned from uses and ghost hits. No parameters.

A *class* is a short tuple of facts about an item. Its *age* is the number of requests since it
entered its present stage (was created, used or superseded). For every class and age bin the hazard
of a use is estimated. Evicted items stay at risk, because their ghosts report the uses that were
missed, so the estimate does not depend on the evictions. Open stages count with their present age
(censored).

The *index* of a class at an age is the highest rate of uses per unit of time from keeping an item:
``max over T of P(used within T) / E[time kept until then]``, the index of Gittins. Where the hazard
falls with age, it is the present hazard, and the ranking is that of LRU. Where uses come at a known
distance (a loop), old items have a higher index than young ones, and a fixed part of the loop is
kept.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable, Sequence
from itertools import chain, islice
from math import inf
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hybridcache.policies.eviction.scored import Columns, Seat, doubled
from hybridcache.policies.placement import MEMORY, REJOIN
from hybridcache.radix.protocol import EvictionPolicy, Item, Kind
from hybridcache.radix.tree import SESSION_END, SHARED

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_FAR = 10
"""Old ages are binned by their number of 2**10 requests."""
EDGES = np.array(
    [
        *range(4),
        *(round(2 ** (half / 2)) for half in range(4, 33)),
        *(round(2 ** (half / 2 - _FAR)) << _FAR for half in range(33, 45)),
    ],
    np.int64,
)
"""Left edges of the age bins, in requests, two per octave. The last bin has no right edge."""
NUM_BINS = len(EDGES)
_EDGE_LIST: list[int] = EDGES.tolist()
WIDTHS: Floats = np.diff(EDGES, append=2 * EDGES[-1]).astype(np.float64)
UNUSED = 16.0
"""Requests without a use that precede each stage, as the prior assumes."""
_MIDDLES: Floats = EDGES + WIDTHS / 2
_BIN_OF, _FAR_BIN_OF = (
    (np.searchsorted(EDGES, ages, side="right") - 1).astype(np.int8)
    for ages in (np.arange(1 << 16), np.arange((EDGES[-1] >> _FAR) + 1) << _FAR)
)
"""Bins of young and of old ages; the larger one counts. A binary search takes five times longer."""
DOUBT = 2.0
"""Standard deviations by which the difference between the uses of a class and the prediction of its
parent is reduced, and that between the uses with a fact in all classes and their prediction."""
WEIGHT = 4.0
"""Uses that weigh as much as a prediction: in an age bin, and in the effect of a fact."""
_ROW_BITS = 24
_ROW_MASK = (1 << _ROW_BITS) - 1
"""Stages are coded as one number: time of entry or age, shifted by this number of bits, and row."""

SAVED = (
    *("now", "_parents", "_priors", "_events", "_reached", "_partial", "index"),
    *("num_uses", "_num_opened", "_refreshed_at", "_uses_then", "_ended", "_used"),
)
"""Attributes of ``Hazards`` that are saved as they are."""


def _cells(first: Ints, ages: Ints) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the cell of each stage in a table with rows that begin at ``first``, and the time that
    it spent in the last bin."""
    bins = np.maximum(_BIN_OF.take(ages, mode="clip"), _FAR_BIN_OF.take(ages >> _FAR, mode="clip"))
    return first + bins, ages - EDGES.take(bins) + 0.5


class _Generation(NamedTuple):
    """Rows with keys of equal ``length``, either all with a model or all without."""

    length: int
    places: slice
    """Places of these rows in the order of all, grouped by parent."""
    parents: Ints
    """Place of the parent of each row; -1 for keys of length one."""
    models: Ints | None
    """Place of the model of each row, or None for rows that begin with the hazard of their parent.
    """
    heirs: Ints
    """Distinct parents; ``first`` has the number of the first row of each."""
    first: Ints
    facts: Ints
    """Number of each row's last fact; with ``models``, of its parent."""
    priors: Floats


Key = tuple[Hashable, ...]


class Hazards:
    """Hazards and indices of all classes.

    A class without evidence takes the hazard of its parent, the class without the last fact. From
    fact number ``general_from`` on, this hazard is multiplied by the effect of the fact in all
    classes. A class can have another model than its parent (``row``). The ratio to the model is
    learned over all such classes of one parent.

    ``open`` and ``close`` take O(1). ``refresh`` takes O(open stages + classes * bins**2).
    """

    def __init__(self, max_open: int = 8192, general_from: int = 1) -> None:
        self.now = 0
        """Logical time of the newest use, set by the policies."""
        self.num_uses = 0
        """Number of stages that ended in a use."""
        self._max_open = max_open
        self._general_from = general_from
        self._models: dict[int, int] = {}
        """Row of the model of each row that has one."""
        self.rows: dict[Key, int] = {}
        self.row_of_facts: dict[Hashable, int] = {}
        """Rows that a policy has looked up, by its own keys."""
        self._parents: list[int | None] = []
        self._priors: list[float] = []
        self._families: list[int] = []
        """Generation of each row in ``_order`` and its parent, as one number: rows are ordered by
        it."""
        self._facts: list[int] = []
        self._fact_numbers: dict[Hashable, int] = {}
        self._order: Ints = np.empty(0, np.int64)
        """All rows, parents first: those of one generation after another. It is too short after a
        new row, as ``_generations`` is."""
        self._generations: list[_Generation] = []
        self._events: Floats = np.zeros((64, NUM_BINS))
        self._reached: Floats = np.zeros((64, NUM_BINS))
        """Number of ended stages by last bin. ``_partial``: the time they spent in this bin."""
        self._partial: Floats = np.zeros((64, NUM_BINS))
        self.index: Floats = np.zeros((64, NUM_BINS))
        """Index by row and age bin, in uses per request, for ages before the next ``refresh``."""
        self.stages: dict[int, int] = {}
        """Code of each open stage, oldest stage first. One that is removed counts for nothing."""
        self._oldest = 0
        """Number of a stage; all before it have ended."""
        self._num_opened = self._refreshed_at = 0
        self._uses_then = 0
        """``num_uses`` at the latest ``refresh``."""
        self.due = 8
        """Time before which ``refresh`` changes nothing."""
        self._ended: list[int] = []
        """Codes of the stages that ended since the last count, with their ages; ``_used``: of those
        that ended in a use."""
        self._used: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the learned state as plain data and arrays. O(size)."""
        codes = np.fromiter(self.stages.values(), np.int64)
        return {
            "keys": list(self.rows),
            "models": list(self._models.items()),
            "open": codes,
            "places": list(zip(self.stages, range(len(codes)), strict=True)),
            **{name: getattr(self, name) for name in SAVED},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the learned state by the result of ``state_dict``, without a copy. O(size)."""
        self.rows = {}
        self._models = dict(state["models"])
        codes = state["open"].tolist()
        self.stages = {stage: codes[place] for stage, place in state["places"]}
        self._oldest, self.row_of_facts, self.due = next(iter(self.stages), 0), {}, 0
        for name in SAVED:
            setattr(self, name, state[name])
        self._families, self._facts, self._fact_numbers, self._order = [], [], {}, self._order[:0]
        for row, key in enumerate(state["keys"]):  # JSON has lists in place of tuples
            facts = tuple(tuple(fact) if isinstance(fact, list) else fact for fact in key)
            self.rows[facts] = row

    def row(self, key: Key, prior: float = 1.0, model: tuple[Key, float] | None = None) -> int:
        """Return the row of class ``key``, whose parent is ``key[:-1]``.

        ``prior`` scales the assumed hazard of a class without parent and evidence, which is one use
        in ``(age + UNUSED) / prior`` requests. With ``model``, (class, factor), a new class begins
        with ``factor`` times the hazard of that class, whose key has the same length.
        """
        found = self.rows.get(key)
        if found is not None:
            return found
        parent = self.row(key[:-1], prior) if len(key) > 1 else None
        begins_as = parent
        if model is not None:
            begins_as, prior = self.row(model[0], prior), model[1]
            self._models[len(self._parents)] = begins_as
        elif parent is not None:
            prior = 1.0
        row = self.rows[key] = len(self._parents)
        self._parents.append(parent)
        self._priors.append(prior)
        if row == len(self.index):
            self._events, self._reached = doubled(self._events), doubled(self._reached)
            self._partial, self.index = doubled(self._partial), doubled(self.index)
        first = 1 / (_MIDDLES + UNUSED) if begins_as is None else self.index[begins_as]
        self.index[row] = prior * first
        return row

    def open(self, row: int, now: int) -> int:
        """Begin a stage in the class of ``row``. Returns the number of the stage."""
        stage = self._num_opened
        self._num_opened = stage + 1
        if len(self.stages) == self._max_open:
            while self._oldest not in self.stages:
                self._oldest += 1
            self.close(self._oldest, now, used=False)
        self.stages[stage] = now << _ROW_BITS | row
        return stage

    def close(self, stage: int, now: int, used: bool) -> None:
        """End a stage. ``used`` is True for a use or a ghost hit. A second call has no effect."""
        code = self.stages.pop(stage, None)
        if code is None:
            return
        ended = (now - (code >> _ROW_BITS)) << _ROW_BITS | code & _ROW_MASK
        self._ended.append(ended)
        if used:
            self._used.append(ended)
            self.num_uses += 1
        if len(self._ended) >= self._max_open:  # Nothing was evicted since, so ``refresh`` rests.
            self._count_ended()

    def index_at(self, row: int, age: int) -> float:
        return float(self.index[row, max(bisect_right(_EDGE_LIST, age) - 1, 0)])

    def refresh(self, now: int) -> bool:
        """Recompute the indices if enough has changed. Return whether it did."""
        waited = now - self._refreshed_at
        if waited < max(
            8 if self.num_uses > self._uses_then else 64, min(now // 6, 128), len(self.stages) // 32
        ):
            return False
        self._refreshed_at, self._uses_then = now, self.num_uses
        self.due = now + max(8, min(now // 6, 128))
        latest = now + max(128, self._max_open // 32)
        num_bins = bisect_right(_EDGE_LIST, latest)
        hazard = self._hazards(now, num_bins)
        self.index[: len(hazard), :num_bins] = index_of(hazard)
        num_events = self._events[: len(hazard)].sum(axis=1)
        if num_events.max(initial=0.0) > MEMORY:
            heavy = (num_events > MEMORY).nonzero()[0]
            for counts in (self._events, self._reached, self._partial):
                counts[heavy] *= 0.5
        return True

    def _hazards(self, now: int, num_bins: int = NUM_BINS) -> Floats:
        """Return uses per unit of time at risk, by row and bin. No stage is older than the first
        ``num_bins`` bins."""
        if len(self._order) < len(self._parents):
            self._arrange()
        self._count_ended()
        exposure, order = self._at_risk(now, num_bins), self._order
        both = np.concatenate((exposure, self._events[: len(order), :num_bins]), axis=1)
        both = both.take(order, axis=0)
        for generation in reversed(self._generations):
            if generation.length > 1:
                sums = np.add.reduceat(both[generation.places], generation.first)
                both[generation.heirs] += sums
        exposure, events = both[:, :num_bins].copy(), both[:, num_bins:].copy()
        uses = events.sum(axis=1)
        hazard = np.empty_like(exposure)
        for length, places, parents, models, _, _, facts, priors in self._generations:
            if models is not None:
                shape, doubt = priors * hazard.take(models, axis=0), 0.0
            elif length == 1:
                shape, doubt = priors / (_MIDDLES[:num_bins] + UNUSED), 0.0
            else:
                shape, doubt = hazard.take(parents, axis=0), DOUBT
            exposed, num_used = exposure[places], uses[places]
            foretold = (exposed * shape).sum(axis=1)
            if models is not None or length > self._general_from:
                all_used, all_foretold = np.bincount(facts, num_used), np.bincount(facts, foretold)
                effects = _level(all_used, all_foretold, DOUBT, WEIGHT)[facts]
                shape, foretold = shape * effects[:, None], foretold * effects
            inherited = _level(num_used, foretold, doubt, 1.0)[:, None] * shape
            np.divide(events[places] + WEIGHT, exposed + WEIGHT / inherited, out=hazard[places])
        by_row = np.empty_like(hazard)
        by_row[order] = hazard
        return by_row

    def _arrange(self) -> None:
        """Compute the order of all rows, and their generations: shortest keys first, and rows with
        models after others of their length. O(rows log rows)."""
        first_new, numbers = len(self._families), self._fact_numbers
        for row, key in enumerate(islice(self.rows, first_new, None), first_new):
            is_modelled, parent = row in self._models, self._parents[row]
            generation = 2 * len(key) + is_modelled
            self._families.append(generation << _ROW_BITS | (0 if parent is None else parent + 1))
            fact = generation, parent if is_modelled else key[-1]
            self._facts.append(numbers.setdefault(fact, len(numbers)))
        by_family = sorted(range(len(self._families)), key=self._families.__getitem__)
        families, facts = np.array((self._families, self._facts), np.int64)
        self._order = order = np.array(by_family, np.int64)
        families, facts, priors = families.take(order), facts.take(order), np.array(self._priors)
        place_of = np.empty(len(order) + 1, np.int64)
        place_of[0], place_of[order + 1] = -1, np.arange(len(order))
        above_of, is_first = place_of.take(families & _ROW_MASK), np.ones(len(order), np.bool_)
        np.not_equal(families[1:], families[:-1], out=is_first[1:])
        self._generations, end = [], 0
        for generation, size in enumerate(np.bincount(families >> _ROW_BITS).tolist()):
            if not size:
                continue
            length, has_model = divmod(generation, 2)
            begin, end = end, end + size
            places, models = slice(begin, end), None
            if has_model:
                models = place_of.take([self._models[row] + 1 for row in order[places].tolist()])
            parents, first = above_of[places], is_first[places].nonzero()[0]
            heirs, its_priors = parents.take(first), priors.take(order[places])[:, None]
            found = length, places, parents, models, heirs, first, facts[places], its_priors
            self._generations.append(_Generation(*found))

    def _at_risk(self, now: int, num_bins: int) -> Floats:
        """Return the time spent in each bin by all stages, open or ended, by row."""
        codes = np.fromiter(self.stages.values(), np.int64, len(self.stages))
        cells, spent = _cells((codes & _ROW_MASK) * num_bins, now - (codes >> _ROW_BITS))
        shape = len(self._parents), num_bins
        open_ = np.bincount(cells, minlength=shape[0] * num_bins).astype(np.float64)
        reached = open_.reshape(shape) + self._reached[: shape[0], :num_bins]
        partial = np.bincount(cells, spent, shape[0] * num_bins).reshape(shape)
        # Number of stages that came further. It is exact, because counts are dyadic fractions.
        beyond = reached[:, ::-1].cumsum(axis=1)[:, ::-1] - reached
        return beyond * WIDTHS[:num_bins] + (partial + self._partial[: shape[0], :num_bins])

    def _count_ended(self) -> None:
        """Add the stages that ended to the tables."""
        num_ended, codes = len(self._ended), np.array(self._ended + self._used, np.int64)
        ages, rows = codes >> _ROW_BITS, codes & _ROW_MASK
        cells, spent = _cells(rows * NUM_BINS, ages)
        ended = cells[:num_ended]
        np.add.at(self._reached.reshape(-1), ended, 1.0)
        np.add.at(self._partial.reshape(-1), ended, spent[:num_ended])
        np.add.at(self._events.reshape(-1), cells[num_ended:], 1.0)
        self._ended.clear()
        self._used.clear()

    def check(self) -> None:
        """Raise AssertionError unless the open stages are few and in order. O(open stages)."""
        assert len(self.stages) <= self._max_open, "more stages are open than allowed"
        assert list(self.stages) == sorted(self.stages), "the oldest stage is not the first"
        for counts in (self._events, self._reached, self._partial):
            assert not counts[len(self._parents) :].any(), "something was counted in no class"


def _level(
    uses: npt.NDArray[Any], foretold: npt.NDArray[Any], doubt: float, added: float
) -> Floats:
    """Return the ratio of ``uses`` to ``foretold`` uses, with their difference reduced by ``doubt``
    standard deviations. ``added`` uses are added to each."""
    difference = uses - foretold
    if doubt:
        doubtful = doubt * np.sqrt(np.maximum(np.maximum(uses, foretold), 1.0))
        difference = difference - np.minimum(np.maximum(difference, -doubtful), doubtful)
    return np.asarray(np.maximum((foretold + difference + added) / (foretold + added), 1e-3))


def index_of(hazard: Floats) -> Floats:
    """Return ``max over T of P(use within T) / E[time until then]`` by row and first bin. T is the
    end of one of the bins of ``hazard``."""
    num_rows, num_bins = hazard.shape
    widths = WIDTHS[:num_bins, None]
    steps = np.minimum(hazard.T.copy() * widths, 8.0)
    # Part that is unused at the end of each bin, and the expected time until then, negated.
    ends = np.zeros((2, num_bins + 1, num_rows))
    survive, spent = ends
    np.cumsum(steps, axis=0, out=survive[1:])
    np.exp(-survive, out=survive)
    np.cumsum(survive[:-1] * np.expm1(-steps) * widths / steps, axis=0, out=spent[1:])
    best = np.zeros((num_bins, num_rows))
    # With very few survivors, rounding can keep the expected time from growing.
    is_stuck = (spent[:-1] - spent[1:]).min(initial=1.0) <= 0.0
    for length in range(1, num_bins + 1):
        used, time = ends[:, :-length] - ends[:, length:]
        if is_stuck:
            time[time <= 0.0] = np.inf
        first = best[: len(used)]
        np.maximum(first, np.divide(used, time, out=used), out=first)
    return best.T


# --- The policy -----------------------------------------------------------------------------------


TRUSTED_AFTER = 8
"""Uses before tokens and bytes are weighed in full."""
UNLIKELY = 0.125
"""Assumed hazard where no use is expected, without evidence: of speculative labels relative to
common ones, and of superseded checkpoints relative to others of their label. With a hazard of their
own they would outlast tips in a new cache, because time without a use lowers that of tips."""
COMMON = frozenset(
    {"", "decode", "end", "prompt", "branch", "boundary", "backoff", "back", "rejoin", "head"}
)
"""Labels of positions where prompts are known to diverge. Others are speculative, and so are
back-offs further than one token from the end of the prompt."""
MAX_TURN = 8
"""Highest generation that has its classes apart."""
SAMPLE = 1024
"""Maximum number of candidates compared for one victim."""
GENERAL_FROM = 3
"""First fact of a class with an effect in all classes: the generation."""

PACE = "pace"
"""Name of the pace of a session in a class."""

Class = tuple[tuple[bool, bool], tuple[str, int], *tuple[str | int | tuple[str, int], ...]]
"""((superseded, speculative), (label, distance), uses, generation, pace of the session if it has
two tips or more, octave of the position, half octave), and the stop reason of the answer behind it,
if that is known."""


class _Memo(Seat):
    """Data of one item: its stage, and its place in the order and in its lineage."""

    __slots__ = (
        "active",
        "demand",
        "entered",
        "pace",
        "row",
        "stage",
        "superseded",
        "turn",
        "uses",
    )

    def __init__(self, item: Item) -> None:
        self.place = -1
        self.uses = item.uses
        self.superseded = item.superseded
        self.turn = 0
        """Number of earlier tips in the lineage, through forks too: a prompt may end at one."""
        self.pace = 0
        """Octave of the requests between the latest two tips of the lineage; 0 with one tip."""
        before = item.predecessor
        if before is not None and isinstance(before.memo, _Memo):
            label = "" if before.stop_reason else before.label  # An answer's end is no fork.
            is_tip = label not in SHARED and (before.uses > 0 or not before.superseded)
            is_earlier = before.position < item.position and (is_tip or label == REJOIN)
            self.turn, self.pace = before.memo.turn + is_earlier, before.memo.pace
            if is_earlier and item.created > before.created:
                self.pace = (item.created - before.created).bit_length()
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

    - *Class*: superseded or not, label, uses, generation, pace, position and stop reason.
      ``Hazards`` has the indices.
    - *Tokens lost*: the distance to the nearest checkpoint above.
    - *Bytes freed*: the state, and for a leaf also its KV tail. States and tails are compared by
      the tokens that they save per byte.
    - *Generation*: the number of earlier tips of the conversation. The predecessor, which may be
      evicted already, counts if a request resumed from it, it was a tip until its eviction, or an
      earlier request ended there. Forks do not count, and tips after them count those before them.
      KV has the generation of the checkpoint at its end.
    - *Pace*: the octave of the number of requests between the latest two tips of the conversation.
      Agents think for seconds and people for minutes, so the next gap is like the last. Shared
      positions have none.
    - *Evidence*: from the first use until ``TRUSTED_AFTER`` uses were seen, (tokens lost) / (bytes
      freed) is raised to the part of them that was, so that the policy begins as LRU by class.
      Before any use, as in the first round of a loop, LRU would evict each item before its use.
    - *Demand*: if a tip leaves the last tier, its predecessor takes over its class.
    - *Ghosts*: a ghost hit counts as a use of the class. This holds for each ghost from which the
      request would have resumed if only this item had been kept.
    - *Session end*: the checkpoints of an ended session go first, with their KV.
    - *Promise*: until a promised return, the index of an item is at least that of one certain use
      in the requests that will arrive until then, at the rate since the promise. This counts within
      its namespace only: if the victim has a promise, the least item of its namespace is evicted
      instead, and the victim takes that item's place in the order. So promises move memory within
      a namespace, and no namespace gets more by them.

    Candidates are leaf KV without a checkpoint, which goes first, and checkpoints, for a leaf with
    its tail. Leaf KV is a candidate alone if KV has a separate pool. A use refreshes the consumed
    checkpoint. O(1) per event, O(1024) per victim.

    Source: this project. The index is that of Gittins (1979), on hazards as in LHD (NSDI'18).
    """

    def __init__(self, seed: int = 0) -> None:
        self.hazards = Hazards(general_from=GENERAL_FROM)
        self._is_last = True
        """True if there is no lower tier, so that eviction is final."""
        self._random = random.Random(seed)
        self._checkpoints = Columns()
        self._kv = Columns()
        self._dead: dict[Item, None] = {}
        """Leaf KV that goes first: without a checkpoint, or with one of an ended session."""
        self._next_dead: dict[Item, None] = {}
        """The first ones of ``_dead``, last first."""
        self._ended: OrderedDict[Item, None] = OrderedDict()
        """Checkpoints of ended sessions, which go next."""
        self._idle_kv: dict[Item, None] | None = {}
        """Leaf KV until a call of ``victim`` needs it ranked. None from then on."""
        self._stale: dict[Item, None] = {}
        """Checkpoints with an outdated value: those with an evicted descendant, and new ones."""
        self._lent: dict[Item, None] = {}
        """Promised candidates in the place of an item that was evicted instead."""
        self._exchange: tuple[Item, Item] | None = None
        """Latest victim that was chosen instead of another candidate, and that candidate."""
        self._just_used = False
        """True if the latest call was a use: a ghost hit then belongs to the same request."""

    def for_tier(self) -> Survival:
        """Return a policy that shares the hazards, so that stages continue in other tiers."""
        lower = Survival()
        lower.hazards, self._is_last = self.hazards, False
        return lower

    def candidates(self) -> Iterable[Item]:
        ranked = self._checkpoints.items, self._kv.items
        return chain(*ranked, self._ended, self._dead, self._idle_kv or ())

    def state_dict(self) -> dict[str, Any]:
        return self.hazards.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hazards.load_state_dict(state)

    def memo_state(self, item: Item) -> list[Any] | None:
        memo = item.memo
        return None if memo is None else [getattr(memo, name) for name in _Memo.__slots__]

    def load_memo(self, item: Item, state: list[Any] | None) -> None:
        item.memo = None
        if state is not None:
            item.memo = _Memo(item)
            for name, value in zip(_Memo.__slots__, state, strict=True):
                setattr(item.memo, name, value)

    def add(self, item: Item) -> None:
        hazards = self.hazards
        if item.last_used > hazards.now:
            hazards.now = item.last_used
        self._just_used = False
        if item.kind == "kv":
            is_first = item.dead or item.node.checkpoint in self._ended
            unranked = self._dead if is_first else self._idle_kv
            if unranked is not None:
                unranked[item] = None
                return
        memo = item.memo
        if memo is None:
            item.memo = memo = _Memo(item)
            self._stale[item] = None
            if len(self._stale) > SAMPLE:  # Nothing was evicted since.
                self._update_worths(self._stale)
                self._stale = {}
            self._enter(item, memo, used=None)
        elif item.uses > memo.uses:
            self._enter(item, memo, used=True)
        elif item.superseded != memo.superseded:
            self._enter(item, memo, used=False)
        if item.stop_reason == SESSION_END or (self._ended and item.kind != "kv"):
            self._move_tail(item)
            if item in self._ended:
                return
        self._put(item, memo)

    def _move_tail(self, item: Item) -> None:
        """Let the checkpoint ``item`` of an ended session, and its leaf KV, go first; or its KV no
        more, if the session goes on after all."""
        tail = item.node.kv
        if item.stop_reason == SESSION_END and item.superseded:
            self._ended[item] = None
            memo = None if tail is None else tail.memo
            is_moved = tail in (self._idle_kv or ()) or (memo is not None and memo.place >= 0)
        else:
            is_moved = tail in self._dead
        if is_moved and tail is not None:
            self.discard(tail, evicted=False)
            self.add(tail)

    def touch(self, item: Item) -> None:
        hazards = self.hazards
        if item.last_used > hazards.now:
            hazards.now = item.last_used
        self._just_used = True
        memo = item.memo
        if memo is not None and item.uses > memo.uses:
            self._enter(item, memo, used=True)
            if memo.place >= 0:
                self._put(item, memo)

    def discard(self, item: Item, evicted: bool) -> None:
        self._just_used = False
        is_kv = item.kind == "kv"
        if is_kv and self._idle_kv is not None and item in self._idle_kv:
            del self._idle_kv[item]
            return
        if self._exchange is not None:
            if evicted and item is self._exchange[0]:
                self._lend(*self._exchange)
            self._exchange = None
        self._lent.pop(item, None)
        above = item.above
        if above is not None:
            self._stale[above] = None
        if item in self._ended:
            del self._ended[item]
        elif not is_kv:
            self._checkpoints.remove(item)
        elif item in self._dead:
            del self._dead[item]
            self._next_dead.pop(item, None)
        else:
            self._kv.remove(item)
        if evicted and not is_kv and self._is_last and above is not None and above.superseded:
            memo = above.memo
            if isinstance(memo, _Memo):
                memo.active = max(memo.active, item.memo.active)
                memo.demand = item.memo.row

    def on_relabelled(self, item: Item) -> None:
        memo = item.memo
        if isinstance(memo, _Memo):
            self._enter(item, memo, used=None)
            if memo.place >= 0:
                self._put(item, memo)
                if item.stop_reason == SESSION_END and item.superseded:
                    self.discard(item, evicted=False)
                    self.add(item)

    def on_ghost_hit(self, item: Item, used: bool = True) -> None:
        memo = item.memo
        if isinstance(memo, _Memo):
            self.hazards.close(memo.stage, self.hazards.now + (not self._just_used), used)

    def on_ghost_hit_above(self, item: Item) -> None:
        """Count a use of ``item``, unless it was evicted while superseded: its value next to a
        deeper checkpoint ended when that one was evicted too."""
        if isinstance(item.memo, _Memo):
            self.on_ghost_hit(item, used=not item.memo.superseded)

    def victim(self, kind: Kind | None) -> Item | None:
        if kind != "checkpoint" and self._dead:
            if not self._next_dead:
                self._next_dead = dict.fromkeys([*islice(self._dead, SAMPLE)][::-1])
            return next(reversed(self._next_dead))
        if kind != "kv" and self._ended:
            return next(iter(self._ended))
        hazards = self.hazards
        if hazards.now >= hazards.due:
            hazards.refresh(hazards.now)
        if self._lent:
            now_s = self.clock()
            for item in [item for item in self._lent if item.promise_at(now_s) is None]:
                self._put(item, item.memo)
        columns, stale = self._checkpoints, self._stale
        # A random one too, which bounds the age of changes that were not noticed.
        if num_items := len(columns.items):
            draw, num_bits = self._random.getrandbits, num_items.bit_length()
            while (place := draw(num_bits)) >= num_items:  # As ``random.choice``, in fewer calls.
                pass
            if (item := columns.items[place]) not in self._lent:
                span, size_bytes = item.span_and_size()
                columns.worths[place] = span / size_bytes
        self._stale, waiting = {}, {}
        ranks_kv = kind == "kv" or (kind is None and not columns.items)
        if ranks_kv and self._idle_kv is not None:  # The first time.
            waiting, self._idle_kv = self._idle_kv, None
            for item in waiting:
                self.add(item)
        self._update_worths(chain(stale, waiting))
        return self._least(self._kv if ranks_kv else columns, stale)

    def _update_worths(self, items: Iterable[Item]) -> None:
        """Compute the outdated values of those of ``items`` that are candidates."""
        for item in items:
            memo = item.memo
            if memo is not None and memo.place >= 0 and item not in self._lent:
                span, size_bytes = item.span_and_size()
                worths = (self._kv if item.kind == "kv" else self._checkpoints).worths
                worths[memo.place] = span / size_bytes

    def _put(self, item: Item, memo: _Memo) -> None:
        """Enter the numbers of ``item`` in its columns."""
        self._lent.pop(item, None)
        worth = 0.0
        if item not in self._stale:  # else ``victim`` computes it
            span, size_bytes = item.span_and_size()
            worth = span / size_bytes
        columns = self._kv if item.kind == "kv" else self._checkpoints
        columns.put(item, memo.row * NUM_BINS, memo.entered, worth)

    def _enter(self, item: Item, memo: _Memo, used: bool | None) -> None:
        """End the stage of ``item``, and begin one in its present class. ``used`` is as in
        ``Hazards.close``, or None to count nothing. After the end of its session none begins: that
        nothing continues from it is certain, and says nothing about others.

        An item that stands in for an evicted tip is used by the request that the tip waits for, or
        by a fork, as superseded items are. The class with the higher index counts.
        """
        hazards, has_ended = self.hazards, item.stop_reason == SESSION_END
        if used is None and not has_ended:
            hazards.stages.pop(memo.stage, None)
        elif memo.stage >= 0:
            hazards.close(memo.stage, item.last_used if used else hazards.now, bool(used))
        if used:
            memo.uses = item.uses
            memo.active = item.last_used
        memo.superseded = superseded = item.superseded
        demand = None if superseded else memo.demand
        is_covered, stop_reason = superseded or demand is not None, item.stop_reason
        label, distance, uses, position = item.label, item.distance, item.uses, item.position
        if uses > 2:
            uses = 2
        turn, pace = memo.turn if memo.turn < MAX_TURN else MAX_TURN, memo.pace
        octave = position.bit_length()
        half = position << 2 >> octave & 1  # 1 in the upper half of the octave
        kind = item.kind
        facts = is_covered, kind, label, distance, stop_reason, uses, turn, pace, octave, half
        row = hazards.row_of_facts.get(facts)
        if row is None:
            is_speculative = distance > 1 or label not in COMMON
            prior = UNLIKELY if is_speculative else 1.0
            coarse = (is_covered, is_speculative), (label or kind, distance)
            if is_covered:
                hazards.row(coarse, prior, (((False, is_speculative), coarse[1]), UNLIKELY))
            paces = ((PACE, pace),) if pace else ()
            if label in SHARED:
                turn, paces = 0, ()
            key: Class = (*coarse, uses, turn, *paces, octave, 2 * octave + half)
            if stop_reason:
                key = (*key, stop_reason)
            row = hazards.row_of_facts[facts] = hazards.row(key, prior)
        if demand is not None:
            age = hazards.now - memo.active
            if hazards.index_at(demand, age) >= hazards.index_at(row, age):
                row = demand
        memo.row, memo.entered = row, memo.active
        memo.stage = -1 if has_ended else hazards.open(row, memo.active)

    def _least(self, columns: Columns, fresh: Container[Item]) -> Item | None:
        """Return the candidate with the least value per byte, or None. Outdated values of chosen
        candidates are corrected, except those of ``fresh`` ones."""
        count = len(columns.items)
        if not count:
            return None
        first, last, rates, now = 0, count, None, self.hazards.now
        num_uses = self.hazards.num_uses
        trust = min(num_uses / TRUSTED_AFTER, 1.0) if num_uses else 1.0
        for _ in range(8):
            if count > SAMPLE:
                first = self._random.randrange(count - SAMPLE)
                last, rates = first + SAMPLE, None
            if rates is None:
                ages = now - columns.times[first:last]
                bins = _BIN_OF.take(ages, mode="clip")
                if now >= len(_BIN_OF):
                    np.maximum(bins, _FAR_BIN_OF.take(ages >> _FAR, mode="clip"), out=bins)
                rates = self.hazards.index.take(columns.cells[first:last] + bins)
                worths = columns.worths[first:last]
                values = rates * (worths if trust == 1.0 else worths**trust)
            place = int(values.argmin())
            item = columns.items[first + place]
            if item in fresh or item in self._lent:
                break
            span, size_bytes = item.span_and_size()
            worth = span / size_bytes
            if worth <= worths.item(place) * 1.0001:
                break
            worths[place] = worth
            values[place] = rates.item(place) * worth**trust
        if item.promise is None or (item.promise_at(now_s := self.clock())) is None:
            return item
        return self._instead_of(item, values, columns.items[first:last], now_s, trust)

    # --- Promises ---------------------------------------------------------------------------------

    def _instead_of(
        self, item: Item, values: Floats, items: Sequence[Item], now_s: float, trust: float
    ) -> Item:
        """Return the item to evict when the promised ``item`` has the least of ``values``: the one
        of its namespace with the least value including promises, perhaps itself. O(candidates)."""
        owner, chosen, least = item.namespace, item, inf
        for place in values.argsort(kind="stable").tolist():
            value, other = values.item(place), items[place]
            if value >= least:
                break
            if other is not item and other.namespace != owner:
                continue
            if (promise := other.promise_at(now_s)) is not None:
                span, size_bytes = other.span_and_size()
                waited = max(self.hazards.now - promise.made, 0) + 1
                rate = (now_s - promise.made_s) / (promise.until_s - now_s) / waited
                value = max(value, rate * (span / size_bytes) ** trust)
            if value < least:
                chosen, least = other, value
        if chosen is not item:
            self._exchange = chosen, item
        return chosen

    def _lend(self, evicted: Item, promised: Item) -> None:
        """Give ``promised`` the place of ``evicted`` in the order, until its promise ends."""
        columns = self._kv if evicted.kind == "kv" else self._checkpoints
        place = evicted.memo.place
        if min(place, promised.memo.place) >= 0:
            numbers = (columns.cells, columns.times, columns.worths)
            columns.put(promised, *(column.item(place) for column in numbers))
            self._lent[promised] = None
