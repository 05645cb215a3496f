"""The checkpoints that one lease saves: where, in which slot, and until when."""

from __future__ import annotations

from hybridcache.interface import PrefixCache
from hybridcache.policies.protocol import PlacementPolicy, Prefill

Saved = tuple[int, int]
"""(position, slot) of a checkpoint that was, or is being, written to a slot we hold."""


class Saving:
    """Positions are planned, get a slot when they are about to be computed, and wait with it for
    the ``publish`` that covers them. In decode one slot rolls: it is written again at each
    crossing, and published only at the end."""

    __slots__ = (
        "_cache",
        "_interval",
        "_overwritten",
        "_pending",
        "_plan",
        "_prompt_len",
        "_rolling",
        "_step",
    )

    def __init__(self, cache: PrefixCache, step: int, prompt_len: int) -> None:
        """``step``: checkpoints sit on its multiples."""
        self._cache = cache
        self._step = step
        self._prompt_len = prompt_len
        self._plan: dict[int, str] = {}
        self._pending: dict[Saved, str] = {}
        self._rolling: Saved | None = None
        self._overwritten: Saved | None = None
        """What the rolling slot held before, as long as it may still hold that."""
        self._interval: int | None = None

    def ask(self, placement: PlacementPolicy, prefill: Prefill, decodes: bool) -> None:
        """Plan what ``placement`` wants of ``prefill``, and of the answer if it ``decodes``
        something worth keeping."""
        plan, step = self._plan, self._step
        for position, label in placement.positions(prefill):
            floored = prefill.floor(position)
            if floored is not None:
                plan.setdefault(floored, label)
        interval = placement.decode_interval()
        if interval is not None and decodes:
            self._interval = -(-interval // step) * step

    @property
    def planned(self) -> tuple[int, ...]:
        """Positions that have no slot yet, ascending."""
        return tuple(sorted(self._plan))

    @property
    def slots(self) -> tuple[int, ...]:
        """Those held."""
        rolling = (self._rolling[1],) if self._rolling is not None else ()
        return (*(slot for _, slot in self._pending), *rolling)

    def plan(self, position: int, label: str) -> None:
        """Plan a checkpoint, but where one has its slot already."""
        if not self.is_pending(position):
            self._plan.setdefault(position, label)

    def is_pending(self, position: int) -> bool:
        """Whether a checkpoint at ``position`` has its slot and waits for its ``publish``."""
        return any(saved == position for saved, _ in self._pending)

    def wants(self, position: int) -> bool:
        """Whether a state at ``position``, where the request ends, is one to keep."""
        if position > self._prompt_len:
            return self._interval is not None
        return position in self._plan

    def label(self, position: int) -> str:
        """Of the state that a request which ends at ``position`` leaves there."""
        return "decode" if position > self._prompt_len else self._plan.get(position, "preempt")

    def take(self, start: int, end: int) -> tuple[Saved, ...]:
        """See ``Lease.take_checkpoint_slots``."""
        if start >= self._prompt_len:
            return self._roll(start, end)
        if not self._plan and not self._pending:
            return ()
        self._save(start, end, len(self._plan))
        return tuple(sorted(saved for saved in self._pending if start < saved[0] <= end))

    def reserve(self, start: int, end: int, max_slots: int) -> int:
        """See ``Lease.reserve_checkpoint_slots``."""
        if start >= self._prompt_len:
            rolls = self._rolling is None and bool(self._crossing(start, end))
            if rolls and max_slots:
                self._roll(start, end)
                return 0
            return int(rolls)
        if not self._save(start, end, max_slots):
            return 0
        return sum(start < position <= end for position in self._plan)

    def _save(self, start: int, end: int, max_slots: int) -> bool:
        """Take slots for planned positions in (start, end]. False: none is available for the
        next."""
        plan, num_taken = self._plan, 0
        for position, label in tuple(plan.items()):
            if start < position <= end and num_taken < max_slots:
                slot = self._cache.allocate_slot()
                if slot is None:
                    return False
                del plan[position]
                self._pending[position, slot] = label
                num_taken += 1
        return True

    def _roll(self, start: int, end: int) -> tuple[Saved, ...]:
        position = self._crossing(start, end)
        if position is None:
            return ()
        slot = self._rolling[1] if self._rolling else self._cache.allocate_slot()
        if slot is None:
            return ()
        if self._rolling is None or self._rolling[0] != position:
            self._overwritten, self._rolling = self._rolling, (position, slot)
        return ((position, slot),)

    def roll_back(self, computed_len: int) -> None:
        """See ``Lease.roll_back``."""
        if self._rolling is None or self._rolling[0] <= computed_len:
            return
        if self._overwritten is None:
            self._cache.free_slot(self._rolling[1])
        self._rolling = self._overwritten

    def _crossing(self, start: int, end: int) -> int | None:
        """The last position in (start, end] at which decoding saves a state; None: there is
        none."""
        interval = self._interval
        if interval is None or end // interval * interval <= start:
            return None
        return end // interval * interval

    def done(self, computed_len: int) -> dict[Saved, str]:
        """Give out those of a prefill whose positions are computed, with their labels: they are
        the caller's from here on."""
        done = self._pending
        if not done:
            return done
        later: dict[Saved, str] = {}
        if max(done)[0] > computed_len:
            later = {saved: label for saved, label in done.items() if saved[0] > computed_len}
            done = {saved: label for saved, label in done.items() if saved[0] <= computed_len}
        self._pending = later
        return done

    def end(self, published_len: int) -> dict[Saved, str]:
        """Give out all that have a slot, the rolling one too, but those past ``published_len``,
        whose slots are freed."""
        saved = self._pending
        if self._rolling is not None:
            saved[self._rolling] = "decode"
        if saved and max(saved)[0] > published_len:
            for unfinished in [one for one in saved if one[0] > published_len]:
                self._cache.free_slot(unfinished[1])
                del saved[unfinished]
        self._forget()
        return saved

    def abort(self) -> None:
        """Free every slot."""
        for slot in self.slots:
            self._cache.free_slot(slot)
        self._forget()

    def _forget(self) -> None:
        self._plan, self._pending, self._rolling = {}, {}, None
