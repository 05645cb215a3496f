"""What one step is to do: a batch, and the task of each request in it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.requests.request import Request
from engine.schedule.batch import Batch


@dataclass(frozen=True, slots=True)
class Task:
    """One request's part of a step."""

    request: Request
    lease: object
    """The request's lease when the step was made: a request that lost it meanwhile takes nothing
    from the step."""
    start: int
    end: int
    """``computed_len`` before and after the step."""
    is_decode: bool
    samples: bool
    """Its last position's logits give the next token."""
    scores: bool
    """All its positions' logits are wanted, for the prompt's log-probabilities."""

    @classmethod
    def of(cls, request: Request, end: int) -> Task:
        """``request`` computes from where it stands up to ``end``."""
        is_decode = request.scheduled_len >= request.prefill_len
        return cls(
            request=request,
            lease=request.lease,
            start=request.scheduled_len,
            end=end,
            is_decode=is_decode,
            samples=end == request.known_len < request.max_len,
            scores=not is_decode and request.wants_scores,
        )


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
