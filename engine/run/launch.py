"""Between forward and commit: which rows of a step's logits become tokens, and which are only scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.interfaces import Chooser, Drawn
from engine.requests.request import Request
from engine.schedule.batch import Batch
from engine.schedule.scheduler import Step, Work


class Launched(NamedTuple):
    """A step that is on its way, or through: what will come of it, in the step's order."""

    step: Step
    drawn: Drawn | None
    """The next token of each work that samples; None: none does."""
    scores: Sequence[Drawn]
    """The prompt's tokens with their log-probabilities, for each work that scores."""


NOTHING = Launched(Step(Batch(()), ()), None, ())


def launch(step: Step, logits: Any, sampler: Chooser) -> Launched:
    """Begin to draw the step's tokens, and to score the prompts that ask for it. Waits for nothing."""
    chosen: list[Request] = []
    rows: list[int] = []
    scores: list[Drawn] = []
    num_rows = 0
    for work, segment in zip(step.works, step.batch.segments, strict=True):
        first, num_rows = num_rows, num_rows + segment.num_logits
        if work.scores:
            scores.append(_score(work, logits[first:num_rows], sampler))
        if work.samples:
            chosen.append(work.request)
            rows.append(num_rows - 1)
    if not chosen:
        return Launched(step, None, scores)
    inputs = [request.sampling_input() for request in chosen]
    return Launched(step, sampler.launch(logits, inputs, rows), scores)


def _score(work: Work, logits: Any, sampler: Chooser) -> Drawn:
    """Of the prompt tokens that follow the work's tokens."""
    request = work.request
    following = request.tokens[work.start + 1 : min(work.end + 1, request.prompt_len)]
    return sampler.score(logits[: len(following)], following.tolist(), request.prompt_logprobs or 0)
