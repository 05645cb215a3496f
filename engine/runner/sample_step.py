"""Between forward and commit: which rows of a step's logits become tokens, and which are only
scored."""

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
    """A step that is on its way, or through: what will come of it, in the step's order."""

    plan: Plan
    drawn: PendingTokens | None
    """The next token of each task that samples, and one behind each of its drafts; None: none
    does."""
    scores: Sequence[PendingTokens]
    """The prompt's tokens with their log-probabilities, for each task that scores."""
    late: frozenset[int] = frozenset()
    """Tasks whose tokens among those drawn only keep their place: their requests hold the logits
    until their grammars say what may come."""


NO_STEP = InFlight(EMPTY, None, ())


def sample_step(
    plan: Plan, logits: Any, sampler: TokenSampler, before: InFlight | None = None
) -> InFlight:
    """Begin to draw the step's tokens, and to score the prompts that ask for it. Waits for
    nothing; but where a grammar depends on a token that the step ``before`` draws, for that,
    while the device computes this step."""
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
    """The token in ``row`` of those that the step ``before`` draws, waited for."""
    assert before is not None and before.drawn is not None
    return before.drawn.wait()[row].token_id


def _score(task: Task, logits: Any, sampler: TokenSampler) -> PendingTokens:
    """Of the prompt tokens that follow the task's tokens."""
    request = task.request
    following = request.tokens[task.start + 1 : min(task.end + 1, request.prompt_len)]
    return sampler.score(logits[: len(following)], following.tolist(), request.prompt_logprobs or 0)


class LateDraws(StepHooks):
    """Draws the tokens of requests whose grammars were late, between two steps.

    Such a request keeps its lease, its row and the logits of its newest token, and sits out the
    steps until its mask is found.
    """

    def __init__(self, scheduler: Scheduler, sampler: TokenSampler, news: Event) -> None:
        """``news`` is set whenever a mask was found in the background."""
        self._scheduler = scheduler
        self._sampler = sampler
        self._news = news

    def before_step(self) -> None:
        """Draw every token whose mask was found."""
        self._news.clear()
        for request in self._scheduler.awaiting_draw:
            found = request.late_input()
            if found is None:
                self._scheduler.take_late(request)
            else:
                [sampled] = self._sampler.launch(request.held_logits, [found], [0]).wait()
                self._scheduler.take_late(request, sampled)

    def wait(self) -> None:
        """Nothing can be computed: sleep a little, or until a mask is found."""
        if self._scheduler.awaiting_draw:
            self._news.wait(IDLE_S)
