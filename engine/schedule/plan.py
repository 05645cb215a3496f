"""Plan of one step: a batch, and the task of each request in it. Hooks around the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct

from engine.requests.request import Request
from engine.schedule.batch import Batch, Segment
from engine.schedule.drafter import Draft
from engine.text.outputs import SampledToken
from hybridcache.tokens import Tokens

NO_TOKENS: Tokens = np.empty(0, np.int32)
NO_TOKENS.setflags(write=False)
UNKNOWN: Tokens = np.zeros(1, np.int32)
"""Placeholder for a token that is drawn but has not reached the host."""


class Task(Struct, frozen=True):
    """One request's part of a step."""

    request: Request
    lease: object
    """Lease of the request when the step was planned. If the request has lost it in the meantime,
    the results of the step do not apply to it."""
    start: int
    end: int
    """``computed_len`` before and after the step."""
    is_decode: bool
    samples: bool
    """True if the logits of the last position give the next token."""
    scores: bool
    """True if the logits of all positions are needed, for the prompt's log-probabilities."""
    draft: Draft | None
    """Draft that is verified in this step; its tokens are the last below ``end``."""
    is_late: bool = False
    """True if the token to compute is drawn but has not reached the host."""

    @classmethod
    def of(cls, request: Request, end: int, draft: Draft | None = None) -> Task:
        """Make the task that computes ``request`` from its scheduled length up to ``end``, and
        ``draft``."""
        is_decode = request.scheduled_len >= request.prefill_len
        return cls(
            request=request,
            lease=request.lease,
            start=request.scheduled_len,
            end=end + (0 if draft is None else len(draft.tokens)),
            is_decode=is_decode,
            samples=end == request.known_len < request.max_len,
            scores=not is_decode and request.wants_scores,
            draft=draft,
            is_late=end > request.num_tokens,
        )

    @property
    def drafts(self) -> Tokens:
        return NO_TOKENS if self.draft is None else self.draft.tokens

    @property
    def token_ids(self) -> Tokens:
        """Token ids to compute, with a placeholder for a late one."""
        if self.is_late:
            return UNKNOWN
        if self.draft is None:
            return self.request.tokens[self.start : self.end]
        sure = self.request.tokens[self.start : self.end - len(self.draft.tokens)]
        return np.concatenate([sure, self.draft.tokens])

    def segment(self, exports: tuple[tuple[int, int], ...]) -> Segment:
        """Return the segment of this task; see ``Segment`` for ``exports``."""
        lease, row = self.request.claims
        return Segment(
            row=row,
            slot=lease.state_slot,
            token_ids=self.token_ids,
            start=self.start,
            is_decode=self.is_decode,
            exports=exports,
            logits="all" if self.scores or self.draft else "last" if self.samples else "none",
            namespace=self.request.namespace,
            num_drafts=0 if self.draft is None else len(self.draft.tokens),
        )

    def run_of(self, sampled: Iterator[SampledToken]) -> list[SampledToken]:
        """Return the tokens that the step gave the request: the accepted drafts and one more.

        Consumes all tokens that were drawn for the task. Each was drawn as if the drafts before it
        were accepted.
        """
        if not self.samples:
            return []
        run = [next(sampled)]
        if self.draft is None:
            return run
        drawn = [next(sampled) for _ in self.drafts]
        for guess, token in zip(self.drafts.tolist(), drawn, strict=True):
            if run[-1].token_id != guess:
                break
            run.append(token)
        return run


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch and its tasks, in the same order."""

    batch: Batch
    tasks: tuple[Task, ...]

    @property
    def num_decode_tokens(self) -> int:
        return sum(task.end - task.start for task in self.tasks if task.is_decode)

    @property
    def num_prefill_tokens(self) -> int:
        return self.batch.num_tokens - self.num_decode_tokens

    @property
    def has_drafts(self) -> bool:
        return any(task.draft is not None for task in self.tasks)


EMPTY = Plan(Batch(()), ())
"""Plan without work: the runner is not called."""


class StepHooks:
    """Hooks around the steps of one engine, called in its thread. Each does nothing by default."""

    @property
    def has_work(self) -> bool:
        """True if ``before_step`` has something to do although no request waits or runs."""
        return False

    def before_step(self) -> None:
        """Process events since the last step, in a bounded time."""

    def wait(self) -> None:
        """Sleep briefly, or until ``before_step`` has work, because nothing can be computed."""

    def after_step(self, plan: Plan, seconds: float) -> None:
        """Record that ``plan`` was computed in ``seconds``. It is committed next."""

    def on_step_failed(self) -> None:
        """End work that depends on the step, which failed with unknown results."""

    def on_cache_lost(self) -> None:
        """End transfers in progress: the contents of all rows are unknown, and the cache is about
        to be emptied."""

    def on_cache_emptied(self, *, was_lost: bool) -> None:
        """Update the plugin after the cache was emptied. ``was_lost``: its rows were lost, and no
        caller requested it."""

    def on_idle(self) -> float | None:
        """Do background work. Returns the seconds until the next task is due, or None if there is
        none."""
        return None

    def stop_accepting(self) -> None:
        """Accept no more work from other processes and finish the work in progress. May be called
        repeatedly."""

    def disconnect(self) -> None:
        """End all work done for other processes or requested from them. May be called
        repeatedly."""

    def close(self) -> None:
        """Complete pending writes after the last step."""

    def report(self) -> Mapping[str, Any]:
        """Return fields of ``CacheReport``."""
        return {}
