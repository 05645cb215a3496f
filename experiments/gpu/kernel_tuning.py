"""Find fast launch parameters for this device: `python -m experiments.gpu.kernels --tune` with the
cases of the benchmark.

Every kernel that a case launches is run with each candidate of `kernels.tuning`. One that is wrong,
does not fit the device, or changes a bit where the choice hangs on the number of tokens is out; the
others are timed in alternation. A candidate is taken if over all cases with its key it is faster
than the launcher's own by more than what repetition moves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from experiments.gpu.kernel_cases import Case
from kernels import tuning

ROUNDS = 3
LEAST_GAIN = 0.03
"""Minimum gain as a share of the time: less is noise."""

Seconds = Callable[[Callable[[], object]], list[float]]
Error = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class Trial:
    """A kernel at one key: what became of its candidates over the cases that launch it."""

    kernel: str
    key: tuning.Key
    ratios: dict[int, list[float]] = field(default_factory=dict)
    """Candidate to its share of the launcher's own time, case by case; candidates that are out are
    not in it."""
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def candidates(self) -> tuple[tuning.Config, ...]:
        return tuning.TUNABLES[self.kernel].candidates

    def best(self) -> tuple[tuning.Config, float] | None:
        """The fastest candidate and its share of the launcher's own time; None if that is as
        good."""
        means = {i: math.exp(statistics.fmean(map(math.log, r))) for i, r in self.ratios.items()}
        best = min(means, key=means.__getitem__, default=None)
        if best is None or means[best] > 1 - LEAST_GAIN:
            return None
        return self.candidates[best], means[best]

    def record(self) -> dict[str, Any]:
        chosen = self.best()
        return {
            "kernel": self.kernel,
            "key": [str(part) for part in self.key],
            "right": len(self.candidates) - len(self.refused),
            "refused": [dict(self.candidates[i]) | {"why": w} for i, w in self.refused.items()],
            "chosen": dict(chosen[0]) if chosen else None,
            "time_ratio": chosen[1] if chosen else None,
        }


def tune(cases: Iterable[Case], error: Error, seconds: Seconds | None) -> list[Trial]:
    """Try every candidate of every kernel that the cases launch; without ``seconds`` it is only
    seen which are right."""
    trials: dict[tuple[str, tuning.Key], Trial] = {}
    for case in cases:
        expected = case.expected()
        with tuning.using({}) as asked:
            own = _first_call(case)
        for kernel, key in dict.fromkeys(asked):
            trial = trials.setdefault((kernel, key), Trial(kernel, key))
            _try(trial, case, expected, own, error, seconds)
    return list(trials.values())


def _try(
    trial: Trial,
    case: Case,
    expected: torch.Tensor,
    own: torch.Tensor,
    error: Error,
    seconds: Seconds | None,
) -> None:
    is_by_tokens = "tokens" in tuning.TUNABLES[trial.kernel].keys
    tables: dict[int, tuning.Table] = {}
    for i, config in enumerate(trial.candidates):
        table = {(trial.kernel, trial.key): config}
        if i in trial.refused:
            continue
        try:
            with tuning.using(table):
                result = _first_call(case)
        except Exception as failure:  # most often: more shared memory than the device has
            trial.refused[i] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            continue
        if error(result, expected) > case.tolerance:
            trial.refused[i] = "wrong"
        elif is_by_tokens and not torch.equal(result, own):
            trial.refused[i] = "other bits"
        else:
            tables[i] = table
    for i in trial.refused:
        trial.ratios.pop(i, None)
    if seconds is None:
        return
    times: dict[int | None, list[float]] = {}
    for _ in range(ROUNDS):
        for i, table in {None: {}, **tables}.items():
            with tuning.using(table):
                times.setdefault(i, []).extend(seconds(case.run))
    medians = {i: statistics.median(t) for i, t in times.items()}
    for i in tables:
        trial.ratios.setdefault(i, []).append(medians[i] / medians[None])


def _first_call(case: Case) -> torch.Tensor:
    if case.reset:
        case.reset()
    return case.run().clone()


def table_of(trials: Iterable[Trial]) -> tuning.Table:
    """Return the table that `kernels.tuning` reads."""
    return {(t.kernel, t.key): best[0] for t in trials if (best := t.best())}
