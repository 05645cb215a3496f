"""Sampling between forward pass and commit: draws tokens from some rows of logits and scores
others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Event
from typing import Any, NamedTuple

from engine.interfaces import PendingTokens, TokenSampler
from engine.requests.sampling_params import SamplingInput
from engine.schedule.fetching import IDLE_S
from engine.schedule.hooks import StepHooks
from engine.schedule.plan import EMPTY, Plan, Task
from engine.schedule.scheduler import Scheduler


class InFlight(NamedTuple):
    """Step in flight or completed, with its results in the step's order."""

    plan: Plan
    drawn: PendingTokens | None
    """Next token of each task that samples, and one after each of its drafts; None if no task
    samples."""
    scores: Sequence[PendingTokens]
    """Prompt tokens with their log-probabilities, for each task that scores."""
    late: frozenset[int] = frozenset()
    """Tasks with placeholder tokens: their requests keep the logits until their grammars are
    ready."""


NO_STEP = InFlight(EMPTY, None, ())


def sample_step(
    plan: Plan, logits: Any, sampler: TokenSampler, before: InFlight | None = None
) -> InFlight:
    """Start drawing the step's tokens, and scoring prompts if requested.

    Does not wait, except if a grammar depends on a token of the step ``before``: then it waits for
    that token while the device computes this step.
    """
    late_tokens = dict(plan.batch.late_tokens)
    late: list[int] = []
    inputs: list[SamplingInput] = []
    rows: list[int] = []
    scores: list[PendingTokens] = []
    num_rows = 0
    for index, (task, segment) in enumerate(zip(plan.tasks, plan.batch.segments, strict=True)):
        first, num_rows = num_rows, num_rows + segment.num_logits
        if task.scores:
            scores.append(_score(task, logits[first:num_rows], sampler))
        if task.samples:
            request = task.request
            drawn = partial(_token, before, late_tokens[index]) if index in late_tokens else None
            drawn_for = request.sampling_inputs(task.drafts, drawn)
            first = num_rows - 1 - len(task.drafts)
            if drawn_for is None:
                request.held_logits = sampler.keep(logits, first)
                late.append(index)
                drawn_for = [request.unguided_input()] * (num_rows - first)
            inputs += drawn_for
            rows += range(first, num_rows)
    if not inputs:
        return InFlight(plan, None, scores)
    return InFlight(plan, sampler.launch(logits, inputs, rows), scores, frozenset(late))


def _token(before: InFlight | None, row: int) -> int:
    """Wait for the token in ``row`` of those drawn by the step ``before``."""
    assert before is not None and before.drawn is not None
    return before.drawn.wait()[row].token_id


def _score(task: Task, logits: Any, sampler: TokenSampler) -> PendingTokens:
    """Start scoring the prompt tokens that follow the task's tokens."""
    request = task.request
    following = request.tokens[task.start + 1 : min(task.end + 1, request.prompt_len)]
    return sampler.score(logits[: len(following)], following.tolist(), request.prompt_logprobs or 0)


class LateDraws(StepHooks):
    """Draws tokens, between two steps, for requests with late grammars.

    Such a request keeps its lease, its row and the logits of its newest token, and is not part of
    any step until its mask is available.
    """

    def __init__(self, scheduler: Scheduler, sampler: TokenSampler, news: Event) -> None:
        """``news`` is set whenever a mask was computed in the background."""
        self._scheduler = scheduler
        self._sampler = sampler
        self._news = news

    def before_step(self) -> None:
        """Draw a token for each request with a new mask."""
        self._news.clear()
        for request in self._scheduler.awaiting_draw:
            found = request.late_input()
            if found is None:
                self._scheduler.take_late(request)
            else:
                [sampled] = self._sampler.launch(request.held_logits, [found], [0]).wait()
                self._scheduler.take_late(request, sampled)

    def wait(self) -> None:
        """Sleep briefly, or until a mask is computed, because nothing else can be."""
        if self._scheduler.awaiting_draw:
            self._news.wait(IDLE_S)
