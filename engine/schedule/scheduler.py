"""Steps of an engine: one step as data (``Batch``, of segments, with its results), and the
scheduler, which applies the rules of ``StepPlanner``, builds batches and commits their results."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from engine.requests.request import Request
from engine.schedule.drafting import Draft, Drafting
from engine.text.answers import NO_TOKEN, FinishReason, SampledToken
from engine.text.grammar import GrammarError
from hybridcache.allocators.moves import Transfer
from hybridcache.radix.lease import Lease
from hybridcache.radix.tokens import Tokens
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.planner import StepPlanner
from hybridcache.scheduling.request import AdmissionPolicy

if TYPE_CHECKING:
    import torch


class BytesLost(RuntimeError):
    """Data that a batch had to load is missing, so its rows must not be read."""


class Pending(Protocol):
    """Tokens with their log-probabilities, possibly still being copied to the host (``Drawn``)."""

    tokens: torch.Tensor

    def wait(self) -> Sequence[SampledToken]: ...


UNKNOWN: Tokens = np.zeros(1, np.int32)
"""Tokens of a segment whose one token is drawn but has not reached the host."""


KEPT = {"request": None, "lease": None, "samples": False, "scores": False, "draft": None}
"""Fields of a segment that only the scheduler reads, and their values elsewhere."""


class Segment(Struct, frozen=True):
    """One request's tokens in a step. Other processes receive it without the fields in ``KEPT``."""

    row: int
    """Row in the RequestTable, which has a KV index for every position up to ``end``."""
    slot: int | None
    """State slot of the request, read and written in place; None for attention-only models."""
    token_ids: npt.NDArray[np.int32]
    """The tokens to compute."""
    start: int
    """Position of the first token; in a prefill a multiple of the grid. The state at 0 is zero."""
    is_decode: bool
    """True for one token, and its drafts, on the recurrent path. A prefill of one token takes the
    chunked path, for exactness."""
    exports: tuple[tuple[int, int], ...] = ()
    """Checkpoints to save: (position on the grid in (start, end], slot)."""
    num_logits: int = 1
    """Number of last positions that need logits."""
    namespace: Hashable = None
    """Namespace of the request, for a runner that verifies its reads."""
    num_drafts: int = 0
    """Draft tokens at the end of a decode. ``ModelRunner.commit`` writes its state and exports."""
    request: Request = None  # type: ignore[assignment]
    """Request of the tokens; set in every segment that the scheduler makes."""
    lease: Lease = None  # type: ignore[assignment]
    """Lease of the request when the step was planned. The results apply only if it still has it."""
    samples: bool = False
    """True if the logits of the last position give the next token."""
    scores: bool = False
    """True if the logits give the prompt's log-probabilities."""
    draft: Draft | None = None
    """Draft at the end of ``token_ids``, or None."""

    @classmethod
    def of(
        cls,
        request: Request,
        end: int,
        exports: tuple[tuple[int, int], ...],
        draft: Draft | None = None,
    ) -> Segment:
        """Make the segment from the scheduled length of ``request`` to ``end``, and ``draft``."""
        lease, row = request.claims
        start = request.scheduled_len
        is_decode = start >= request.prefill_len
        samples = end == request.known_len < request.max_len
        token_ids = request.buffer[start:end] if end <= request.num_tokens else UNKNOWN
        scores = not is_decode and request.wants_scores
        num_logits, num_drafts = len(token_ids) if scores else int(samples), 0
        if draft is not None:
            token_ids = np.concatenate([token_ids, draft.tokens])
            num_logits, num_drafts = len(token_ids), len(draft.tokens)
        return cls(
            row,
            lease.state_slot,
            token_ids,
            start,
            is_decode,
            exports,
            num_logits,
            request.namespace,
            num_drafts,
            request,
            lease,
            samples,
            scores,
            draft,
        )

    def __reduce__(self) -> tuple[type[Segment], tuple[object, ...]]:
        fields = self.__struct_fields__
        return Segment, tuple(KEPT[one] if one in KEPT else getattr(self, one) for one in fields)

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def run_of(self, sampled: Iterator[SampledToken]) -> list[SampledToken]:
        """Return the tokens that the step gave the request: the accepted drafts and one more.

        Consumes all tokens that were drawn for the segment, each as if the drafts before it were
        accepted.
        """
        if not self.samples:
            return []
        run = [next(sampled)]
        if self.draft is None:
            return run
        drawn = [next(sampled) for _ in range(self.num_drafts)]
        for guess, token in zip(self.draft.tokens.tolist(), drawn, strict=True):
            if run[-1].token_id != guess:
                break
            run.append(token)
        return run


@dataclass(slots=True)
class Batch:
    """One step: decode segments without drafts, then those with drafts, then prefill segments; and
    its results. Other processes receive it without results.

    Before the forward pass, ``moves``, ``row_writes`` and ``restores`` are executed, in this order.
    A batch with neither segments nor moves is never executed and contains no copies.
    """

    segments: tuple[Segment, ...]
    restores: tuple[tuple[int, int], ...] = ()
    """State copies before the forward pass: (checkpoint slot, request slot)."""
    row_writes: tuple[tuple[int, int, npt.NDArray[np.int32]], ...] = ()
    """RequestTable updates before the forward pass: (row, start, KV indices)."""
    late_tokens: tuple[tuple[int, int], ...] = ()
    """Decode tokens that are only on the device: (segment, row of the last step's drawn tokens)."""
    moves: tuple[Transfer, ...] = ()
    """Moves of arena rows and transfers between tiers, in this order."""
    drawn: Pending | None = None
    """Drawn by the sampler: the next token of each segment that samples, and one after each of
    its drafts; or None."""
    scores: Sequence[Pending] = ()
    """Prompt tokens with their log-probabilities, for each segment that scores."""

    def __reduce__(self) -> tuple[type[Batch], tuple[object, ...]]:
        inputs = self.segments, self.restores, self.row_writes, self.late_tokens, self.moves
        return Batch, inputs

    @property
    def num_decode_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments if segment.is_decode)

    @property
    def has_drafts(self) -> bool:
        return any(segment.num_drafts for segment in self.segments)


def pieces(batch: Batch, max_exports: int) -> list[Batch]:
    """Split a batch into parts that are executed one after the other, so that the prefills of each
    export at most ``max_exports`` checkpoints (1 or more).

    A prefill is cut after a checkpoint, which is on the grid, so no bit changes. The rows of logits
    of all parts together are those of ``batch``.
    """
    if sum(len(one.exports) for one in batch.segments if not one.is_decode) <= max_exports:
        return [batch]
    parts: list[list[Segment]] = [[]]
    room = max_exports
    for segment in batch.segments:
        exports = sorted(segment.exports)
        cut_after = [] if segment.is_decode else exports[max_exports - 1 : -1 : max_exports]
        bounds = [segment.start, *(position for position, _ in cut_after), segment.end]
        for start, end in pairwise(bounds):
            own = tuple(export for export in exports if start < export[0] <= end)
            piece = structs.replace(
                segment,
                token_ids=segment.token_ids[start - segment.start : end - segment.start],
                start=start,
                exports=own,
                num_logits=max(0, end - max(start, segment.end - segment.num_logits)),
            )
            num_exports = 0 if segment.is_decode else len(own)
            if num_exports > room:
                parts.append([])
                room = max_exports
            parts[-1].append(piece)
            room -= num_exports
    first, *others = map(tuple, parts)
    return [replace(batch, segments=first), *map(Batch, others)]


def logit_rows(segments: Sequence[Segment]) -> list[int]:
    """Return the rows of hidden states that need logits."""
    rows: list[int] = []
    end = 0
    for segment in segments:
        end += len(segment.token_ids)
        rows += range(end - segment.num_logits, end)
    return rows


NO_STEP = Batch(())
"""Step without work: the runner is not called."""


logger = logging.getLogger(__name__)


class Scheduler(StepPlanner[Request]):
    """Plans steps and commits their results."""

    def __init__(
        self, manager: CacheManager, *, drafting: Drafting | None = None, **options: Any
    ) -> None:
        """``options`` are those of ``StepPlanner``."""
        super().__init__(manager, **options)
        self.drafting = drafting
        self._verifies = False
        self.progressed = OrderedDict[Request, None]()
        """Requests with something to report, also after a failed commit. Emptied by the caller."""

    @property
    def must_commit(self) -> bool:
        """True if the step in flight has drafts, so memory must not change before its commit."""
        return self._verifies and self.num_in_flight > 0

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End ``request`` at once, in any state, and publish the computed tokens: a client that
        ends an answer often goes on from it."""
        self.progressed.pop(request, None)
        if request.finish_reason is not None:
            return
        try:
            request.finish(reason, self.clock())
        except Exception as error:
            self._fail(request, error)
        if request.lease is None:
            self.remove(request)
        else:
            self.leave(request)

    def recover(self) -> tuple[Request, ...]:
        """Requeue the running requests after a failed step, which left their states unknown. They
        continue from published entries. Returns those without their last token."""
        interrupted = []
        for request in tuple(self.running):
            if request.finish_reason is None:
                self.requeue(request, aborts=True)
                interrupted.append(request)
            else:
                self.remove(request)
        for request in self.waiting:
            if request.lease is not None:  # The step failed while it was being admitted.
                self.manager.release(request, aborts=True)
        self.num_in_flight = 0
        self._renew_rules(interrupted)
        return tuple(interrupted)

    def begin_again(
        self, requests: Iterable[Request], admission: AdmissionPolicy
    ) -> tuple[Request, ...]:
        """Begin again with an empty cache after a step that may have left anything half changed.
        ``requests`` are all that have not been reported as ended. Returns those that ran and have
        no last token."""
        known = sorted(requests, key=attrgetter("arrival"))
        going = [one for one in known if one.finish_reason is None]
        interrupted = tuple(one for one in self.running if one.finish_reason is None)
        self.restart(going, admission)
        for request in known:
            if self.drafting is not None:
                self.drafting.forget(request)
            if request.finish_reason is not None:
                request.lose_claims()
                self.progressed[request] = None
        self._verifies = False
        self._renew_rules(going)
        return interrupted

    def _renew_rules(self, requests: Iterable[Request]) -> None:
        """Make the rules of waiting ``requests`` again: the step may have failed while it used
        them. A request whose rules cannot be made ends with the error."""
        for request in requests:
            try:
                request.make_rules()
            except Exception as error:
                self.progressed[request] = None
                self._fail(request, error)
                self.remove(request)

    def schedule(self) -> Batch:
        """Choose the next step's segments and claim the memory for it.

        A step may be scheduled before the previous one is committed, with tokens that are only on
        the device. No request is then preempted. It is empty if the previous one must be committed
        first: if memory is short, the previous step has drafts, or a request is due for a draft.
        """
        if self.must_commit or (self.num_in_flight and self.must_wait):
            return NO_STEP
        if self.num_in_flight and self.drafting and self.drafting.may_guess(self.running):
            return NO_STEP
        ends = self.choose()
        drafts = {} if self.drafting is None else self._drafts(self.drafting, ends)
        segments: list[Segment] = []
        late_tokens: list[tuple[int, int]] = []
        num_drawn = 0
        for request in sorted(
            ends, key=lambda one: (one.scheduled_len < one.prefill_len, one in drafts)
        ):
            draft, end = drafts.get(request), ends[request]
            full_end = end if draft is None else end + len(draft.tokens)
            exports = self.take_checkpoint_slots(request, full_end)
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
        if not segments and not self.manager.has_moves:
            # Changes that ``publish`` makes to a request's row wait for the next segments.
            return NO_STEP
        self.num_in_flight += bool(segments)
        self._verifies = bool(drafts)
        copies = self.manager.take_step()
        late = tuple(late_tokens)
        return Batch(tuple(segments), copies.restores, copies.row_writes, late, copies.transfers)

    def _drafts(self, drafting: Drafting, ends: Mapping[Request, int]) -> dict[Request, Draft]:
        """Return drafts for requests that compute their newest token, if there is memory."""
        # A draft follows the newest token, which a step in flight has yet to draw.
        drafts = drafting.propose(
            (request, request.max_len - 1 - end)
            for request, end in ends.items()
            if not self.num_in_flight
            and request.scheduled_len >= request.prefill_len
            and end == request.num_tokens
        )
        return {
            request: draft
            for request, draft in drafts.items()
            if self.extend(request, ends[request] + len(draft.tokens))
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
        request with NaN logits ends alone, with its ``error``.

        Returns the number of computed tokens that count for each segment with drafts.
        """
        self.num_in_flight -= bool(step.segments)
        taken: list[int] = []
        tokens, scores, now_s = iter(sampled), iter(scored), self.clock()
        is_whole = all(one.token_id != NO_TOKEN for one in chain(sampled, *scored))
        for segment in step.segments:
            run = segment.run_of(tokens)
            request, lease = segment.request, segment.lease
            scored_now = next(scores) if segment.scores else ()
            if request.lease is not lease:
                taken += [0] * bool(segment.num_drafts)
                continue
            request.num_drawn -= segment.samples
            num_before = request.num_tokens
            has_logits = is_whole or all(one.token_id != NO_TOKEN for one in (*run, *scored_now))
            if segment.scores and has_logits:  # After a preemption, those of the first run go.
                request.scores[segment.start :] = scored_now
            self.advance(request, segment.end, publishes=has_logits)
            is_scored_through = request.computed_len >= request.max_len
            if run or is_scored_through or not has_logits:
                self.progressed[request] = None
                try:
                    if run or not has_logits:
                        request.accept(run, now_s, has_logits)
                    else:  # It only scored its prompt.
                        request.finish("length", now_s)
                except BaseException as error:  # Its text may be half a token ahead.
                    self._fail(request, error)
                    if not isinstance(error, Exception):
                        raise
            draft, drafting = segment.draft, self.drafting
            if draft is not None and drafting is not None and has_logits:
                # The newest token is not computed. Tokens after a stop do not count.
                request.computed_len = request.scheduled_len = request.num_tokens - 1
                lease.roll_back(request.computed_len, unwritten=True)
                drafting.learn(request, draft, len(run) - 1, request.num_tokens - num_before)
            if segment.num_drafts:
                taken.append(request.computed_len - segment.start if has_logits else 0)
            if request.finish_reason is not None:
                # Without logits, the KV and states of this step may be NaN too.
                self.leave(request, publishes=has_logits)
        return tuple(taken)

    def _fail(self, request: Request, error: BaseException) -> None:
        """End ``request`` alone with an error that was raised for it."""
        request.fail(error, self.clock())
        if isinstance(error, GrammarError | FloatingPointError):
            logger.warning("Request %s ends: %s", request.request_id, error)
        else:
            logger.exception("Request %s failed; the others go on.", request.request_id)

    def check(self) -> None:
        super().check()
        drafted = set() if self.drafting is None else self.drafting.requests
        assert drafted <= {*self.waiting, *self.running, *self.progressed}
