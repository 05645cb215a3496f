"""Who computes what in the next step. Integers only: no torch here.

Every step serves the running requests from the oldest to the youngest: one token for each that decodes, and from what these
leave of the token budget (64 at least) a chunk for each that prefills; then it admits waiting ones. Chunks end on the absolute tile grid or at the
end of the prompt, so that a prompt is computed in the very same tiles however it is cut.

Memory. A request that finds none preempts the youngest running request that is younger than itself; one with nobody younger
sits the step out. The oldest can always go on, because no request is let in that would not fit alone, so every request
finishes. After a refusal nobody is admitted until a request has left: what preemption freed is for those who run.
Of an arena one slab is emptied a step: a request whose states need another sits the step out, and the others go on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from engine.config import TILE
from engine.requests.request import Request
from engine.schedule.batch import Batch, Segment
from engine.schedule.cache_manager import CacheManager
from engine.schedule.sharing import Sharing
from engine.text.outputs import SampledToken

Exports = tuple[tuple[int, int], ...]
UNKNOWN = np.zeros(1, np.int32)
"""Stands for a token that is drawn but not known to the host."""


class QueueFull(RuntimeError):
    """As many requests wait as may wait."""

    def __init__(self, max_queue: int) -> None:
        super().__init__(f"{max_queue} requests are waiting already; try again later.")


@dataclass(frozen=True, slots=True)
class Task:
    """One request's part of a step."""

    request: Request
    lease: object
    """The request's lease when the step was made: a request that lost it meanwhile takes nothing from the step."""
    start: int
    end: int
    """``computed_len`` before and after the step."""
    is_decode: bool
    samples: bool
    """Its last position's logits give the next token."""
    scores: bool
    """All its positions' logits are wanted, for the prompt's log-probabilities."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch, and what each of its segments is for; in the same order."""

    batch: Batch
    tasks: tuple[Task, ...]

    @property
    def num_decode_tokens(self) -> int:
        return sum(task.is_decode for task in self.tasks)

    @property
    def num_prefill_tokens(self) -> int:
        return self.batch.num_tokens - self.num_decode_tokens


EMPTY = Plan(Batch(()), ())
"""Nothing to compute now: the runner is not asked."""


class Scheduler:
    """Waiting and running requests, and the rules between them."""

    def __init__(
        self,
        manager: CacheManager,
        *,
        max_running: int,
        token_budget: int,
        shares: bool = True,
        clock: Callable[[], float],
    ) -> None:
        """``shares``: the cache keeps what is published, so that it can pay to wait for another request's prefix."""
        self._manager = manager
        self._max_running = max_running
        self._token_budget = token_budget
        self._sharing = Sharing(manager) if shares else None
        self._clock = clock
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._is_full = False
        self._num_in_flight = 0
        self._must_wait = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Let ``request`` wait for its turn."""
        insort(self._waiting, request, key=_age)

    def abort(self, request: Request) -> None:
        """End ``request`` at once, wherever it is; its rows, pages and slots are free when this returns."""
        if request.finish_reason is not None:
            return
        if request.lease is not None:
            self._manager.abort(request)
            self._running.remove(request)
            self._is_full = False
        else:
            self._waiting.remove(request)
        request.finish("abort", self._clock())

    def recover(self) -> tuple[Request, ...]:
        """A step broke off: nobody knows what the running requests' states hold. All begin again from what is published.
        Returns them."""
        interrupted = tuple(self._running)
        for request in interrupted:
            self._manager.abort(request)
            self._running.remove(request)
            insort(self._waiting, request, key=_age)
        self._num_in_flight = 0
        self._must_wait = self._is_full = False
        return interrupted

    def schedule(self) -> Plan:
        """Choose the next step's tasks and claim the memory for it.

        Steps may be made before the one before them is committed (one at most). Then requests go on from ``scheduled_len``,
        with tokens that the host does not know; but nobody is preempted, and where memory is short or a sampling rule must
        see every token, the step is empty: commit first.
        """
        if self._num_in_flight and (self._must_wait or self._needs_history()):
            return EMPTY
        self._must_wait = False
        tasks: list[Task] = []
        num_decodes = sum(r.scheduled_len >= r.prefill_len for r in self._running)
        budget = max(self._token_budget - num_decodes, TILE)
        for request in tuple(self._running):
            if request.lease is None:
                continue
            end = self._end(request, budget)
            if end > request.scheduled_len and self._claim(request, end):
                tasks.append(_task(request, end))
                budget -= 0 if tasks[-1].is_decode else end - request.scheduled_len
        self._admit(tasks, budget)
        tasks.sort(key=lambda task: not task.is_decode)
        ready = [
            (task, exports)
            for task in tasks
            if (exports := self._manager.take_checkpoint_slots(task.request, task.end)) is not None
        ]
        if not ready and not self._manager.has_moves:
            # What publish changed in a request's row waits for a batch that the runner is given.
            return EMPTY
        self._num_in_flight += bool(ready)
        return Plan(self._batch(ready), tuple(task for task, _ in ready))

    def _batch(self, ready: Sequence[tuple[Task, Exports]]) -> Batch:
        """What the runner must do for the tasks, with every copy that is due before it."""
        late_tokens = tuple(
            (index, task.request.drawn_row)
            for index, (task, _) in enumerate(ready)
            if task.end > task.request.num_tokens
        )
        segments = tuple(self._segment(task, exports) for task, exports in ready)
        for row, request in enumerate(task.request for task, _ in ready if task.samples):
            request.drawn_row = row
        moves, row_writes, restores = self._manager.take_copies()
        return Batch(segments, restores, row_writes, late_tokens, moves)

    def _needs_history(self) -> bool:
        return any(request.params.needs_history for request in self._running)

    def _end(self, request: Request, budget: int) -> int:
        """How far ``request`` may compute in this step."""
        if request.scheduled_len >= request.prefill_len:
            return min(request.scheduled_len + 1, request.max_len - 1)
        end = request.scheduled_len + budget
        return request.prefill_len if end >= request.prefill_len else end // TILE * TILE

    def _claim(self, request: Request, end: int) -> bool:
        """KV rows up to ``end``, at the cost of younger requests. False: ``request`` sits this step out."""
        while not self._manager.extend(request, end):
            if self._num_in_flight:
                self._must_wait = True
                return False
            youngest = self._running[-1]
            if youngest is request:
                self._is_full = True
                return False
            self._preempt(youngest)
        return True

    def _preempt(self, request: Request) -> None:
        self._manager.preempt(request)
        self._running.remove(request)
        insort(self._waiting, request, key=_age)
        self._is_full = True

    def _admit(self, tasks: list[Task], budget: int) -> None:
        """Let waiting requests in, oldest first, but for those that follow a prefill ahead of them.

        Followers are looked for even where nobody can be let in, so that their leader saves its state in time.
        """
        self._is_full &= bool(self._running)
        for request in tuple(islice(self._waiting, 2 * self._max_running)):
            goal = self._sharing.goal(request) if self._sharing is not None else 0
            if self._is_full or budget < TILE or len(self._running) >= self._max_running:
                continue
            if self._manager.must_wait_for_slab:
                continue
            if goal and self._manager.cached_len(request) < goal:
                continue
            if not self._start(request, budget):
                self._is_full = True
                continue
            tasks.append(_task(request, self._end(request, budget)))
            budget -= tasks[-1].end - request.scheduled_len

    def _start(self, request: Request, budget: int) -> bool:
        """Move ``request`` from waiting to running. False: no memory for its first chunk; it waits on."""
        if not self._manager.begin(request):
            return False
        if not self._manager.extend(request, self._end(request, budget)):
            self._manager.abort(request)
            return False
        self._waiting.remove(request)
        insort(self._running, request, key=_age)
        if self._sharing is not None:
            self._sharing.let_in(request)
        if request.scheduled_s is None:
            request.scheduled_s = self._clock()
        return True

    def _segment(self, task: Task, exports: Exports) -> Segment:
        """What the runner must know of ``task``; from here on it counts as scheduled."""
        request = task.request
        lease, row = request.claims
        request.scheduled_len = task.end
        request.num_drawn += task.samples
        return Segment(
            row=row,
            slot=lease.state_slot,
            token_ids=UNKNOWN
            if task.end > request.num_tokens
            else request.tokens[task.start : task.end],
            start=task.start,
            is_decode=task.is_decode,
            exports=exports,
            logits="all" if task.scores else "last" if task.samples else "none",
            namespace=request.namespace,
        )

    def commit(
        self,
        plan: Plan,
        sampled: Sequence[SampledToken],
        scored: Sequence[Sequence[SampledToken]] = (),
    ) -> list[Request]:
        """Take a computed step in: publish, append tokens, end what is finished.

        ``sampled`` has one token for each task that samples, ``scored`` the log-probabilities for each that scores, both in
        the step's order. Returns the requests that have something to report.
        """
        self._num_in_flight -= bool(plan.tasks)
        tokens, scores, now_s = iter(sampled), iter(scored), self._clock()
        progressed: list[Request] = []
        for task in plan.tasks:
            token = next(tokens) if task.samples else None
            request = task.request
            if task.scores:
                request.scores.extend(next(scores))
            if request.lease is not task.lease:
                continue
            request.computed_len = task.end
            if not task.is_decode:
                self._manager.publish(request)
            if token is not None:
                request.accept(token, now_s)
                progressed.append(request)
            elif request.computed_len >= request.max_len:
                request.finish("length", now_s)
                progressed.append(request)
            if request.finish_reason is not None:
                self._manager.finish(request)
                self._running.remove(request)
                self._is_full = False
        return progressed

    def check(self) -> None:
        """AssertionError unless those who run, and they alone, have a lease, and both lists are in
        order of age. Between two steps only. O(requests)."""
        for requests, have_leases in ((self._waiting, False), (self._running, True)):
            ages = [_age(request) for request in requests]
            assert ages == sorted(set(ages)), "requests out of order"
            assert all((request.lease is not None) == have_leases for request in requests)
        assert len(self._running) <= self._max_running
        assert self._num_in_flight in (0, 1)


def _age(request: Request) -> int:
    return request.arrival


def _task(request: Request, end: int) -> Task:
    is_decode = request.scheduled_len >= request.prefill_len
    return Task(
        request=request,
        lease=request.lease,
        start=request.scheduled_len,
        end=end,
        is_decode=is_decode,
        samples=end == request.known_len < request.max_len,
        scores=not is_decode and request.wants_scores,
    )
