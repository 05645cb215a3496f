"""The engine's scheduler: applies the rules of ``StepPlanner``, builds batches and commits their
results.

With speculation, draft tokens are added to the one token of a decoding request.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from engine.requests.request import Request
from engine.schedule.batch import EMPTY, UNKNOWN, Batch, Draft, DraftPlanner, Segment
from engine.schedule.fetching import Fetching
from engine.text.outputs import NO_TOKEN, FinishReason, SampledToken
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.planner import StepPlanner

logger = logging.getLogger(__name__)


class Scheduler(StepPlanner[Request]):
    """Plans steps and commits their results."""

    def __init__(
        self,
        manager: CacheManager,
        *,
        drafting: DraftPlanner | None = None,
        fetching: Fetching | None = None,
        **options: Any,
    ) -> None:
        """Prepare the scheduler. With ``drafting``, decoding requests may get several tokens per
        step. ``options`` are those of ``StepPlanner``."""
        super().__init__(manager, fetching=fetching, **options)
        self.manager = manager
        self.hooks = tuple(part for part in (fetching, drafting) if part is not None)
        self._drafting, self._may_draft = drafting or DraftPlanner(), drafting is not None
        self._verifies = False
        self._progressed: list[Request] = []

    @property
    def must_commit(self) -> bool:
        """True if the step in flight has drafts, so memory must not change before its commit."""
        return self._verifies and self._num_in_flight > 0

    @property
    def has_progressed(self) -> bool:
        """True if ``take_progressed`` would return a request."""
        return bool(self._progressed)

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End ``request`` at once, in any state, and publish the computed tokens: a client that
        ends an answer often goes on from it. Its rows, pages and slots are free afterwards."""
        if request in self._progressed:
            self._progressed.remove(request)
        if request.finish_reason is not None:
            return
        try:
            request.finish(reason, self._clock())
        except Exception as error:
            self._fail(request, error)
        if request.lease is None:
            self.remove(request)
        else:
            self.leave(request)
        self._drafting.forget(request)

    def recover(self) -> tuple[Request, ...]:
        """Requeue the running requests after a failed step, which left the contents of their states
        unknown.

        They continue from published entries. Returns them, except those that had their last token
        already.
        """
        interrupted = []
        for request in tuple(self._running):
            if request.finish_reason is None:
                self._manager.abort(request)
                self._requeue(request)
                interrupted.append(request)
            else:
                self.remove(request)
                self._drafting.forget(request)
        self._num_in_flight = 0
        self._must_wait = self._is_full = False
        return tuple(interrupted)

    def take_progressed(self) -> list[Request]:
        """Return the requests with something to report since the last call. After a failed commit,
        these are the requests that it had processed."""
        progressed, self._progressed = self._progressed, []
        return progressed

    def schedule(self) -> Batch:
        """Choose the next step's segments and claim the memory for it.

        A step may be scheduled before the previous one is committed. Requests then continue from
        ``scheduled_len``, with tokens that are only on the device. No request is preempted, and
        requests with a rule that reads every token are not part of the step.

        Such a step is empty if memory is short, if the previous step has drafts, or if a request is
        due for a draft, which follows the newest token. The previous step is then committed first.
        """
        if self.must_commit or (self._num_in_flight and self._must_wait):
            return EMPTY
        if self._num_in_flight and self._drafting.may_guess(self._running):
            return EMPTY
        ends = self.choose()
        drafts = self._drafts(ends) if self._may_draft else {}
        segments: list[Segment] = []
        late_tokens: list[tuple[int, int]] = []
        num_drawn = 0
        for request in sorted(
            ends, key=lambda one: (one.scheduled_len < one.prefill_len, one in drafts)
        ):
            draft, end = drafts.get(request), ends[request]
            full_end = end if draft is None else end + len(draft.tokens)
            exports = self._manager.take_checkpoint_slots(request, full_end)
            if exports is None:
                continue
            segment = Segment.of(request, end, exports, draft)
            if segment.token_ids is UNKNOWN:
                late_tokens.append((len(segments), request.drawn_row))
            segments.append(segment)
            request.scheduled_len = full_end
            if segment.samples:
                request.num_drawn += 1
                request.drawn_row = num_drawn
                num_drawn += 1
        if not segments and not self._manager.has_moves:
            # Changes that ``publish`` makes to a request's row wait for the next segments.
            return EMPTY
        self._num_in_flight += bool(segments)
        self._verifies = bool(drafts)
        copies = self._manager.take_step()
        return Batch(
            tuple(segments),
            copies.restores,
            copies.row_writes,
            tuple(late_tokens),
            copies.transfers,
        )

    def _drafts(self, ends: Mapping[Request, int]) -> dict[Request, Draft]:
        """Return drafts for requests that compute their newest token, if there is memory for them.
        No request is preempted for a draft."""
        # A draft follows the newest token, which a step in flight has yet to draw.
        drafts = self._drafting.propose(
            (request, request.max_len - 1 - end)
            for request, end in ends.items()
            if not self._num_in_flight
            and request.scheduled_len >= request.prefill_len
            and end == request.num_tokens
        )
        return {
            request: draft
            for request, draft in drafts.items()
            if self._manager.extend(request, ends[request] + len(draft.tokens))
        }

    def commit(
        self,
        step: Batch,
        sampled: Sequence[SampledToken],
        scored: Sequence[Sequence[SampledToken]] = (),
    ) -> tuple[int, ...]:
        """Commit a computed step: publish, append tokens, end finished requests.

        ``sampled`` has one token for each segment that samples and each of its drafts. ``scored``
        has the log-probabilities for each segment that scores. Both are in the step's order. A
        request with an invalid token or NaN logits ends alone, with its ``error``.

        Returns the number of computed tokens that count for each segment with drafts, in the step's
        order.
        """
        self._num_in_flight -= bool(step.segments)
        taken: list[int] = []
        tokens, scores, now_s = iter(sampled), iter(scored), self._clock()
        for segment in step.segments:
            run = segment.run_of(tokens)
            request = segment.request
            scored_now = next(scores) if segment.scores else ()
            if request.lease is not segment.lease:
                taken += [0] * bool(segment.num_drafts)
                continue
            request.num_drawn -= segment.samples
            num_before = request.num_tokens
            has_logits = all(one.token_id != NO_TOKEN for one in (*run, *scored_now))
            if has_logits:
                request.scores.extend(scored_now)
            self.advance(request, segment.end, publishes=has_logits)
            is_scored_through = request.computed_len >= request.max_len
            if run or is_scored_through or not has_logits:
                self._accept(request, run, now_s, has_logits)
            if segment.num_drafts:
                num_new = request.num_tokens - num_before
                settled = self._settle(segment, len(run) - 1, num_new) if has_logits else 0
                taken.append(settled)
            if request.finish_reason is not None:
                # Without logits, the KV and states of this step may be NaN too.
                self.leave(request, publishes=has_logits)
                self._drafting.forget(request)
        return tuple(taken)

    def _accept(
        self,
        request: Request,
        run: Sequence[SampledToken],
        now_s: float,
        has_logits: bool,
    ) -> None:
        """Append tokens. Without any, the request only scored its prompt, and ends."""
        self._progressed.append(request)
        try:
            if not has_logits:
                request.accept_before_no_logits(run, now_s)
            elif run:
                request.accept(run, now_s)
            else:
                request.finish("length", now_s)
        except Exception as error:
            self._fail(request, error)

    def _settle(self, segment: Segment, num_accepted: int, num_new: int) -> int:
        """Move a request to the end of the accepted part of its draft. Returns the number of the
        segment's tokens that count.

        The newest token is not computed. Tokens after a stop do not count: ``num_new`` are part of
        the answer.
        """
        request = segment.request
        request.computed_len = request.scheduled_len = request.num_tokens - 1
        self._manager.roll_back(request)
        self._drafting.learn(segment, num_accepted, num_new)
        return request.computed_len - segment.start

    def _fail(self, request: Request, error: Exception) -> None:
        """End ``request`` alone with an error that was raised for it."""
        request.fail(error, self._clock())
        if request.is_refused or isinstance(error, FloatingPointError):
            logger.warning("Request %s ends: %s", request.request_id, error)
        else:
            logger.exception("Request %s failed; the others go on.", request.request_id)

    def check(self) -> None:
        super().check()
        known = set(self._waiting) | set(self._running)
        assert self._drafting.requests <= known
