"""Between forward and commit: which rows of a step's logits become tokens, and which are only
scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.interfaces import PendingTokens, TokenSampler
from engine.requests.sampling_params import SamplingInput
from engine.schedule.plan import EMPTY, Plan, Task


class InFlight(NamedTuple):
    """A step that is on its way, or through: what will come of it, in the step's order."""

    plan: Plan
    drawn: PendingTokens | None
    """The next token of each task that samples, and one behind each of its drafts; None: none
    does."""
    scores: Sequence[PendingTokens]
    """The prompt's tokens with their log-probabilities, for each task that scores."""


NO_STEP = InFlight(EMPTY, None, ())


def sample_step(plan: Plan, logits: Any, sampler: TokenSampler) -> InFlight:
    """Begin to draw the step's tokens, and to score the prompts that ask for it. Waits for
    nothing."""
    inputs: list[SamplingInput] = []
    rows: list[int] = []
    scores: list[PendingTokens] = []
    num_rows = 0
    for task, segment in zip(plan.tasks, plan.batch.segments, strict=True):
        first, num_rows = num_rows, num_rows + segment.num_logits
        if task.scores:
            scores.append(_score(task, logits[first:num_rows], sampler))
        if task.samples:
            inputs += task.request.sampling_inputs(task.drafts)
            rows += range(num_rows - 1 - len(task.drafts), num_rows)
    if not inputs:
        return InFlight(plan, None, scores)
    return InFlight(plan, sampler.launch(logits, inputs, rows), scores)


def _score(task: Task, logits: Any, sampler: TokenSampler) -> PendingTokens:
    """Of the prompt tokens that follow the task's tokens."""
    request = task.request
    following = request.tokens[task.start + 1 : min(task.end + 1, request.prompt_len)]
    return sampler.score(logits[: len(following)], following.tolist(), request.prompt_logprobs or 0)
