"""Between forward and commit: which rows of a step's logits become tokens, and which are only
scored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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


def sample_step(
    plan: Plan, logits: Any, sampler: TokenSampler, before: InFlight | None = None
) -> InFlight:
    """Begin to draw the step's tokens, and to score the prompts that ask for it. Waits for
    nothing; but where a grammar depends on a token that the step ``before`` draws, for that,
    while the device computes this step."""
    late = dict(plan.batch.late_tokens)
    inputs: list[SamplingInput] = []
    rows: list[int] = []
    scores: list[PendingTokens] = []
    num_rows = 0
    for index, (task, segment) in enumerate(zip(plan.tasks, plan.batch.segments, strict=True)):
        first, num_rows = num_rows, num_rows + segment.num_logits
        if task.scores:
            scores.append(_score(task, logits[first:num_rows], sampler))
        if task.samples:
            drawn = partial(_token, before, late[index]) if index in late else None
            drawn_for = task.request.sampling_inputs(task.drafts, drawn)
            inputs += drawn_for
            rows += range(num_rows - len(drawn_for), num_rows)
    if not inputs:
        return InFlight(plan, None, scores)
    return InFlight(plan, sampler.launch(logits, inputs, rows), scores)


def _token(before: InFlight | None, row: int) -> int:
    """The token in ``row`` of those that the step ``before`` draws, waited for."""
    assert before is not None and before.drawn is not None
    return before.drawn.wait()[row].token_id


def _score(task: Task, logits: Any, sampler: TokenSampler) -> PendingTokens:
    """Of the prompt tokens that follow the task's tokens."""
    request = task.request
    following = request.tokens[task.start + 1 : min(task.end + 1, request.prompt_len)]
    return sampler.score(logits[: len(following)], following.tolist(), request.prompt_logprobs or 0)
