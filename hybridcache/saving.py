"""Checkpoints that one lease saves: their positions, their slots, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence

from hybridcache.interface import PrefixCache
from hybridcache.policies.protocol import PlacementPolicy, Prefill

Saved = tuple[int, int]
"""(position, slot) of a checkpoint that is, or is being, written to a held slot."""


class Saving:
    """Checkpoint plan of one lease.

    A position is planned, gets a slot when it is about to be computed, and keeps it until the
    ``publish`` that covers the position. In decode one slot rolls: it is written again at each
    crossing and published only at the end. The placement learns of each planned checkpoint whether
    it was saved or dropped.
    """

    __slots__ = (
        "_cache",
        "_interval",
        "_overwritten",
        "_pending",
        "_placement",
        "_plan",
        "_prompt_len",
        "_rolling",
        "_step",
    )

    def __init__(
        self, cache: PrefixCache, placement: PlacementPolicy, step: int, prompt_len: int
    ) -> None:
        """``step``: checkpoints sit on its multiples."""
        self._cache = cache
        self._placement = placement
        self._step = step
        self._prompt_len = prompt_len
        self._plan: dict[int, str] = {}
        self._pending: dict[Saved, str] = {}
        self._rolling: Saved | None = None
        self._overwritten: Saved | None = None
        """Earlier contents of the rolling slot, for as long as it may still hold them."""
        self._interval: int | None = None

    def ask(self, prefill: Prefill) -> None:
        """Plan what the placement wants of ``prefill``, and of its answer."""
        plan, step = self._plan, self._step
        for position, label in prefill.on_grid(self._placement.plan(prefill)).items():
            plan.setdefault(position, label)
        if prefill.answer_survives:
            interval = self._placement.decode_interval()
            if interval is not None:
                self._interval = -(-interval // step) * step

    @property
    def planned(self) -> tuple[int, ...]:
        """Positions that have no slot yet, ascending."""
        return tuple(sorted(self._plan))

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots held."""
        rolling = (self._rolling[1],) if self._rolling is not None else ()
        return (*(slot for _, slot in self._pending), *rolling)

    def plan(self, position: int, label: str) -> None:
        """Plan a checkpoint, unless one at ``position`` has its slot already."""
        if not self.is_pending(position):
            self._plan.setdefault(position, label)

    def is_pending(self, position: int) -> bool:
        """Return whether a checkpoint at ``position`` has its slot and waits for its
        ``publish``."""
        return any(saved == position for saved, _ in self._pending)

    def wants(self, position: int) -> bool:
        """Return whether a state at ``position``, where the request ends, is one to keep."""
        if position > self._prompt_len:
            return self._interval is not None
        return position in self._plan

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
        """Take slots for planned positions in (start, end]. Return False if none is available for
        the next one."""
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
        """Return the last position in (start, end] at which decode saves a state, or None."""
        interval = self._interval
        if interval is None or end // interval * interval <= start:
            return None
        return end // interval * interval

    def done(self, computed_len: int) -> dict[Saved, str]:
        """Hand over the checkpoints of a prefill whose positions are computed, with their labels.
        ``settle`` is owed for them."""
        done = self._pending
        if not done:
            return done
        later: dict[Saved, str] = {}
        if max(done)[0] > computed_len:
            later = {saved: label for saved, label in done.items() if saved[0] > computed_len}
            done = {saved: label for saved, label in done.items() if saved[0] <= computed_len}
        self._pending = later
        return done

    def end(
        self, published_len: int, donated: Saved | None = None, stop_reason: str = ""
    ) -> dict[Saved, str]:
        """Hand over all checkpoints up to ``published_len`` that have a slot, with the rolling one
        and ``donated``, and drop the others. ``settle`` is owed. The label of the answer's end
        carries ``stop_reason``."""
        answer = f"decode/{stop_reason}" if stop_reason else "decode"
        saved = self._pending
        if self._rolling is not None:
            saved[self._rolling] = answer
        if saved and max(saved)[0] > published_len:
            for unfinished in [one for one in saved if one[0] > published_len]:
                self._cache.free_slot(unfinished[1])
                self._placement.on_dropped(unfinished[0], saved.pop(unfinished))
        if donated is not None:
            position = donated[0]
            in_decode = position > self._prompt_len
            saved[donated] = answer if in_decode else self._plan.pop(position, "preempt")
        self._drop_plan()
        return saved

    def settle(self, saved: dict[Saved, str], rejected_slots: Sequence[int]) -> None:
        """Note the result of publishing ``saved``; free the slots that the cache did not take."""
        placement = self._placement
        for (position, slot), label in saved.items():
            if slot in rejected_slots:
                self._cache.free_slot(slot)
                placement.on_dropped(position, label)
            else:
                placement.on_saved(position, label)

    def abort(self) -> None:
        """Free every slot and drop every plan."""
        if self._rolling is not None:
            self._pending[self._rolling] = "decode"
        for (position, slot), label in self._pending.items():
            self._cache.free_slot(slot)
            self._placement.on_dropped(position, label)
        self._drop_plan()

    def _drop_plan(self) -> None:
        for position, label in self._plan.items():
            self._placement.on_dropped(position, label)
        self._plan, self._pending, self._rolling = {}, {}, None
