"""Who computes what in the next step. Integers only: no torch here.

Every step serves the running requests from the oldest to the youngest: one token for each that
decodes (where tokens are guessed ahead, the guesses come on top), and from what these leave of the
token budget (64 at least) a chunk for each that prefills; then it admits waiting ones. Chunks end
on the absolute tile grid or at the end of the prompt, so that a prompt is computed in the very same
tiles however it is cut.

The last quarter of that budget is for prefills that fit in it whole, so that a short one does not
wait for a long one before it; what they leave of it goes to the others in the same step. A short
one is let in before an older long one only where a place to run is left for each that it passes.

Memory. A request that finds none preempts the youngest running request that is younger than itself;
one with nobody younger sits the step out. The oldest can always go on, because no request is let in
that would not fit alone, so every request finishes. After a refusal nobody is admitted until a
request has left: what preemption freed is for those who run. Of an arena one slab is emptied a
step, and one more where a request begins with a fetch from below: whose states need another sits
the step out, and the others go on.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

from engine.config import TILE
from engine.drafts.drafter import Draft
from engine.drafts.drafting import Drafting
from engine.errors import QueueFull as QueueFull  # its name before it moved
from engine.requests.request import Request
from engine.schedule.batch import Batch, Segment
from engine.schedule.budget import Budget
from engine.schedule.cache_manager import CacheManager
from engine.schedule.fetching import Fetching
from engine.schedule.plan import EMPTY, Plan, Task
from engine.schedule.sharing import Sharing
from engine.text.outputs import NO_TOKEN, SampledToken

Exports = tuple[tuple[int, int], ...]
logger = logging.getLogger(__name__)


class Scheduler:
    """Waiting and running requests, and the rules between them."""

    def __init__(
        self,
        manager: CacheManager,
        *,
        max_running: int,
        token_budget: int,
        shares: bool = True,
        drafting: Drafting | None = None,
        fetching: Fetching | None = None,
        clock: Callable[[], float],
    ) -> None:
        """``shares``: the cache keeps what is published, so that it can pay to wait for another
        request's prefix. ``drafting``: decoding requests may get several tokens in a step.
        ``fetching``: what a waiting request lacks may be elsewhere."""
        self._manager = manager
        self._max_running = max_running
        self._token_budget = token_budget
        self._sharing = Sharing(manager) if shares else None
        self._drafting = drafting
        self._fetching = fetching
        self._clock = clock
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._is_full = False
        self._num_in_flight = 0
        self._must_wait = self._verifies = False
        self._progressed: list[Request] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def must_commit(self) -> bool:
        """The step in flight has drafts: nobody else may touch memory before its commit."""
        return self._verifies and self._num_in_flight > 0

    @property
    def has_progressed(self) -> bool:
        """Whether ``take_progressed`` has any."""
        return bool(self._progressed)

    def add(self, request: Request) -> None:
        """Let ``request`` wait for its turn."""
        insort(self._waiting, request, key=_age)

    def abort(self, request: Request) -> None:
        """End ``request`` at once, wherever it is; its rows, pages and slots are free when this
        returns."""
        if request in self._progressed:
            self._progressed.remove(request)
        if request.finish_reason is not None:
            return
        if request.lease is not None:
            self._manager.abort(request)
            self._running.remove(request)
            self._is_full = False
        else:
            self._waiting.remove(request)
            if self._sharing is not None:
                self._sharing.forget(request)
            if self._fetching is not None:
                self._fetching.forget(request)
        self._forget_drafts(request)
        try:
            request.finish("abort", self._clock())
        except Exception as error:
            self._fail(request, error)

    def recover(self) -> tuple[Request, ...]:
        """A step broke off: nobody knows what the running requests' states hold. All begin again
        from what is published. Returns them, without those that had their last token already."""
        interrupted = []
        for request in tuple(self._running):
            self._manager.abort(request)
            self._running.remove(request)
            if request.finish_reason is None:
                insort(self._waiting, request, key=_age)
                interrupted.append(request)
            else:
                self._forget_drafts(request)
        self._num_in_flight = 0
        self._must_wait = self._is_full = False
        return tuple(interrupted)

    def take_progressed(self) -> list[Request]:
        """The requests that have something to report since the last call: after a commit that broke
        off, those that it had come to."""
        progressed, self._progressed = self._progressed, []
        return progressed

    def schedule(self) -> Plan:
        """Choose the next step's tasks and claim the memory for it.

        Steps may be made before the one before them is committed (one at most). Then requests go on
        from ``scheduled_len``, with tokens that the host does not know; but nobody is preempted,
        and where memory is short the step is empty: commit first. A request whose sampling rule
        must see every token sits the step out. Empty too: where the step before has drafts, since a
        runner commits those of its newest batch alone; and where somebody is to be drafted for,
        since a guess follows the newest token.
        """
        if self.must_commit or (self._num_in_flight and (self._must_wait or self._may_guess())):
            return EMPTY
        self._must_wait = False
        budget = self._budget()
        ends: dict[Request, int] = {}
        for request in tuple(self._running):
            if request.lease is None or request.must_see_its_token or request.awaits_draw:
                continue
            end = self._end(request, request.scheduled_len, budget)
            if end > request.scheduled_len and self._claim(request, end):
                self._plan(ends, request, end, budget)
        passed = self._admit(self._candidates(), ends, budget)
        if budget.num_for_short and budget.tokens:
            budget.num_for_short = 0
            self._grow(ends, budget)
            self._admit(passed, ends, budget)
        drafts = self._drafts(ends)
        tasks = [Task.of(request, end, drafts.get(request)) for request, end in ends.items()]
        tasks.sort(key=lambda task: (not task.is_decode, task.draft is not None))
        ready = [
            (task, exports)
            for task in tasks
            if (exports := self._manager.take_checkpoint_slots(task.request, task.end)) is not None
        ]
        if not ready and not self._manager.has_moves:
            # What publish changed in a request's row waits for a batch that the runner is given.
            return EMPTY
        self._num_in_flight += bool(ready)
        self._verifies = bool(drafts)
        return Plan(self._batch(ready), tuple(task for task, _ in ready))

    def _batch(self, ready: Sequence[tuple[Task, Exports]]) -> Batch:
        """What the runner must do for the tasks, with every copy that is due before it."""
        segments: list[Segment] = []
        late_tokens: list[tuple[int, int]] = []
        num_drawn = 0
        for task, exports in ready:
            request = task.request
            if task.is_late:
                late_tokens.append((len(segments), request.drawn_row))
            segments.append(task.segment(exports))
            request.scheduled_len = task.end
            if task.samples:
                request.num_drawn += 1
                request.drawn_row = num_drawn
                num_drawn += 1
        moves, row_writes, restores = self._manager.take_step()
        return Batch(tuple(segments), restores, row_writes, tuple(late_tokens), moves)

    def _drafts(self, ends: Mapping[Request, int]) -> dict[Request, Draft]:
        """What is guessed to follow for those that compute their newest token, where there is
        memory for it; nobody is preempted for a guess."""
        if self._drafting is None:
            return {}
        if self._num_in_flight:
            self._drafting.pass_over()
            return {}
        decoding = [
            (request, request.max_len - 1 - end)
            for request, end in ends.items()
            if request.scheduled_len >= request.prefill_len and end == request.num_tokens
        ]
        drafts = self._drafting.propose(decoding)
        return {
            request: draft
            for request, draft in drafts.items()
            if self._manager.extend(request, ends[request] + len(draft.tokens))
        }

    def _decoding(self) -> list[Request]:
        return [r for r in self._running if r.scheduled_len >= r.prefill_len and not r.awaits_draw]

    def _may_guess(self) -> bool:
        return self._drafting is not None and self._drafting.may_guess(self._decoding())

    def _forget_drafts(self, request: Request) -> None:
        if self._drafting is not None:
            self._drafting.forget(request)

    def _budget(self) -> Budget:
        num_decodes = len(self._decoding())
        tokens = max(self._token_budget - num_decodes, TILE)
        is_alone = len(self._running) - num_decodes + len(self._waiting) <= 1
        return Budget.of(tokens, is_shared=not is_alone)

    def _end(self, request: Request, start: int, budget: Budget) -> int:
        """How far ``request``, which has its tokens up to ``start``, may compute in this step."""
        if request.scheduled_len >= request.prefill_len:
            return min(request.scheduled_len + 1, request.max_len - 1)
        end = start + budget.most(request.prefill_len - start, request.wants_scores)
        return end if end == request.prefill_len else max(start, end // TILE * TILE)

    def _plan(self, ends: dict[Request, int], request: Request, end: int, budget: Budget) -> None:
        """``request``, whose memory is claimed, computes up to ``end``."""
        if request.scheduled_len < request.prefill_len:
            start = ends.get(request, request.scheduled_len)
            budget.spend(end - start, request.wants_scores)
        ends[request] = end

    def _grow(self, ends: dict[Request, int], budget: Budget) -> None:
        """Give running prefills, the oldest first, what is left, where there is memory for it."""
        for request in self._running:
            start = ends.get(request, request.scheduled_len)
            if start < request.prefill_len:
                end = self._end(request, start, budget)
                if end > start and self._manager.extend(request, end):
                    self._plan(ends, request, end, budget)

    def _claim(self, request: Request, end: int) -> bool:
        """KV rows up to ``end``, at the cost of younger requests. False: ``request`` sits this step
        out."""
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

    def _candidates(self) -> Iterator[Request]:
        """Yield the oldest waiting requests, as many as one step has time for.

        At most ``2 * max_running`` that wait for nothing but their turn, and ``8 * max_running`` in
        all. Requests that are held for a load cost O(1) each and count for neither limit, so that
        no number of them hides the requests behind them.
        """
        num_looked_at = num_unled = 0
        for request in tuple(self._waiting):
            is_held = self._fetching is not None and self._fetching.is_holding(request)
            yield request
            num_looked_at += not is_held
            num_unled += not self._is_led(request)
            if num_unled == 2 * self._max_running or num_looked_at == 8 * self._max_running:
                return

    def _is_led(self, request: Request) -> bool:
        """Return whether waiting ``request`` is known to wait for another request or a load."""
        if self._fetching is not None and self._fetching.is_holding(request):
            return True
        return self._sharing is not None and self._sharing.follows(request)

    def _admit(
        self, candidates: Iterable[Request], ends: dict[Request, int], budget: Budget
    ) -> list[Request]:
        """Let waiting requests in, oldest first, but for those that follow a prefill ahead of them.
        Returns those passed over for want of budget.

        Followers are looked for even where nobody can be let in, so that their leader saves its
        state in time.
        """
        self._is_full &= bool(self._running)
        passed: list[Request] = []
        for request in candidates:
            goal = self._sharing.goal(request) if self._sharing is not None else 0
            num_taken = len(self._running) + len(passed)
            has_turn = not budget.is_spent and num_taken < self._max_running
            may_begin = has_turn or self._fetching is not None
            if self._is_full or not may_begin or self._manager.must_wait_for_slab:
                continue
            if goal and self._manager.cached_len(request) < goal:
                continue
            if self._fetching is not None and self._fetching.holds(request):
                continue
            if not has_turn:
                continue
            if not self._fits(request, budget):
                passed.append(request)
            elif self._start(request, budget):
                end = self._end(request, request.scheduled_len, budget)
                self._plan(ends, request, end, budget)
        return passed

    def _fits(self, request: Request, budget: Budget) -> bool:
        """Whether waiting ``request`` could compute something. O(its length) where only a short one
        could."""
        if budget.room(request.wants_scores) >= TILE:
            return True
        rest = request.num_tokens
        if rest > budget.tokens and not request.wants_scores:
            rest -= self._manager.cached_len(request)
        return budget.most(rest, request.wants_scores) == rest

    def _start(self, request: Request, budget: Budget) -> bool:
        """Move ``request`` from waiting to running. False: it waits on, for memory for its first
        chunk, or because less than it found could be resumed from and the rest fits no more."""
        if not self._manager.begin(request):
            self._is_full = True
            return False
        end = self._end(request, request.scheduled_len, budget)
        fits = end > request.scheduled_len
        if not fits or not self._manager.extend(request, end):
            self._manager.abort(request)
            self._is_full = fits
            return False
        self._waiting.remove(request)
        insort(self._running, request, key=_age)
        if self._sharing is not None:
            self._sharing.let_in(request)
        if request.scheduled_s is None:
            lease, _ = request.claims
            request.scheduled_s = self._clock()
            request.cached_len, request.losses = lease.cached_len, lease.losses
        return True

    def commit(
        self,
        plan: Plan,
        sampled: Sequence[SampledToken],
        scored: Sequence[Sequence[SampledToken]] = (),
        late: Container[int] = (),
    ) -> tuple[int, ...]:
        """Take a computed step in: publish, append tokens, end what is finished. Returns how many
        computed tokens of each task with a draft count, in the step's order.

        ``sampled`` has one token for each task that samples and each token of its draft, ``scored``
        the log-probabilities for each that scores, both in the step's order. The tokens of the
        tasks whose places are ``late`` are not drawn yet: see ``take_late``. A request whose token
        can not be taken, or whose logits are NaN, ends alone, with its ``error``.
        """
        self._num_in_flight -= bool(plan.tasks)
        taken: list[int] = []
        tokens, scores, now_s = iter(sampled), iter(scored), self._clock()
        for place, task in enumerate(plan.tasks):
            run = task.run_of(tokens)
            if place in late:  # Its tokens keep its place only.
                run = [one for one in run if one.token_id == NO_TOKEN]
            request = task.request
            scored_now = next(scores) if task.scores else ()
            if request.lease is not task.lease:
                taken += [0] * (task.draft is not None)
                continue
            request.computed_len = task.end
            request.num_drawn -= task.samples
            has_logits = all(one.token_id != NO_TOKEN for one in (*run, *scored_now))
            if has_logits:
                request.scores.extend(scored_now)
            if has_logits and not task.is_decode:
                self._manager.publish(request)
            is_scored_through = request.computed_len >= request.max_len
            if run or is_scored_through or not has_logits:
                self._accept(request, run, now_s, has_logits)
            if task.draft is not None:
                taken.append(self._settle(task, task.draft, len(run) - 1) if has_logits else 0)
            self._end_if_finished(request, has_logits)
        return tuple(taken)

    @property
    def awaiting_draw(self) -> list[Request]:
        """Running requests whose newest token is computed and whose next one waits for its
        grammar."""
        return [r for r in self._running if r.awaits_draw and not r.num_drawn]

    def take_late(self, request: Request, sampled: SampledToken | None = None) -> None:
        """Take the token that ``request`` awaited, drawn from its ``held_logits``. Without one, end
        it if its grammar has: because the answer is over, or with an error."""
        if sampled is not None:
            request.held_logits = None
            self._accept(request, [sampled], self._clock())
        else:
            try:
                request.finish_if_over(self._clock())
            except Exception as error:
                self._fail(request, error)
            if request.finish_reason is not None:
                self._progressed.append(request)
        self._end_if_finished(request)

    def _accept(
        self,
        request: Request,
        run: Sequence[SampledToken],
        now_s: float,
        has_logits: bool = True,
    ) -> None:
        """Append tokens; without any, the prompt was to be scored only."""
        self._progressed.append(request)
        try:
            if not has_logits:
                request.accept_before_no_logits(run, now_s)
            elif run:
                request.accept_run(run, now_s)
            else:
                request.finish("length", now_s)
        except Exception as error:
            self._fail(request, error)

    def _end_if_finished(self, request: Request, has_logits: bool = True) -> None:
        """Take back what a request held that is done."""
        if request.finish_reason is not None:
            if has_logits:
                self._manager.finish(request)
            else:  # The KV and states of this step may be NaN too.
                self._manager.abort(request)
            self._forget_drafts(request)
            self._running.remove(request)
            self._is_full = False

    def _settle(self, task: Task, draft: Draft, num_accepted: int) -> int:
        """Decide by what a request took of its draft where it stands: its newest token is not
        computed, unless the next one is late (``num_accepted`` -1), and tokens behind a stop do not
        count. Returns how many of the task's tokens do."""
        assert self._drafting is not None
        request = task.request
        request.computed_len = request.scheduled_len = request.num_tokens - (num_accepted >= 0)
        self._manager.roll_back(request)
        if num_accepted >= 0:
            self._drafting.learn(request, draft, num_accepted)
        return request.computed_len - task.start

    def _fail(self, request: Request, error: Exception) -> None:
        """What was raised for ``request`` (by the decoder of its text, say) ends it and nobody
        else."""
        request.fail(error, self._clock())
        if request.is_refused or isinstance(error, FloatingPointError):
            logger.warning("Request %s ends: %s", request.request_id, error)
        else:
            logger.exception("Request %s failed; the others go on.", request.request_id)

    def check(self) -> None:
        """AssertionError unless those who run, and they alone, have a lease, and both lists are in
        order of age. Between two steps only. O(requests)."""
        for requests, have_leases in ((self._waiting, False), (self._running, True)):
            ages = [_age(request) for request in requests]
            assert ages == sorted(set(ages)), "requests out of order"
            assert all((request.lease is not None) == have_leases for request in requests)
        assert len(self._running) <= self._max_running
        assert self._num_in_flight in (0, 1)
        assert self._sharing is None or self._sharing.followers <= set(self._waiting)
        assert self._fetching is None or self._fetching.requests <= set(self._waiting)
        known = set(self._waiting) | set(self._running)
        assert self._drafting is None or self._drafting.requests <= known


def _age(request: Request) -> int:
    return request.arrival
