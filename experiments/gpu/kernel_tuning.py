"""Search for fast launch parameters of this device (`experiments.gpu --part tune`).

Uses the cases of the benchmark. Every kernel of a case runs with each candidate of
`kernels.tuning`. A candidate is refused if it is wrong or does not fit the device. It is also
refused if it changes a bit where the choice depends on the number of tokens. The others are timed
in alternation. A candidate is chosen if it is faster than the launcher's own over all cases with
its key, by more than the noise of repetitions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from experiments.gpu.kernel_cases import Case, error
from kernels import tuning

ROUNDS = 3
LEAST_GAIN = 0.03
"""Minimum gain as a share of the time. Less is noise."""

Seconds = Callable[[Callable[[], object]], list[float]]


@dataclass
class Trial:
    """Results of the candidates of one kernel at one key, over the cases that launch it."""

    kernel: str
    key: tuning.Key
    ratios: dict[int, list[float]] = field(default_factory=dict)
    """Time relative to the launcher's own, case by case, for each candidate that is not refused."""
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def candidates(self) -> tuple[tuning.Config, ...]:
        return tuning.TUNABLES[self.kernel].candidates

    def best(self) -> tuple[tuning.Config, float] | None:
        """Return the fastest candidate and its relative time, or None if no candidate is faster."""
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


def tune(cases: Iterable[Case], seconds: Seconds | None) -> list[Trial]:
    """Try every candidate of every kernel that the cases launch.

    Without ``seconds``, only the correctness of the candidates is checked, in the first case of
    each key.
    """
    trials: dict[tuple[str, tuning.Key], Trial] = {}
    for case in cases:
        expected = case.expected()
        with tuning.using({}) as lookups:
            default = case.first_call()
        for kernel, key in dict.fromkeys(lookups):
            if seconds is None and (kernel, key) in trials:
                continue
            trial = trials.setdefault((kernel, key), Trial(kernel, key))
            _try(trial, case, expected, default, seconds)
    return list(trials.values())


def _try(
    trial: Trial, case: Case, expected: torch.Tensor, default: torch.Tensor, seconds: Seconds | None
) -> None:
    is_by_tokens = "tokens" in tuning.TUNABLES[trial.kernel].keys
    tables: dict[int, tuning.Table] = {}
    for i, config in enumerate(trial.candidates):
        table = {(trial.kernel, trial.key): config}
        if i in trial.refused:
            continue
        try:
            with tuning.using(table):
                result = case.first_call()
        except Exception as failure:  # Usually more shared memory than the device has.
            trial.refused[i] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            continue
        if error(result, expected) > case.tolerance:
            trial.refused[i] = "wrong"
        elif is_by_tokens and not torch.equal(result, default):
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


def table_of(trials: Iterable[Trial]) -> tuning.Table:
    """Return the table for `kernels.tuning`."""
    return {(t.kernel, t.key): best[0] for t in trials if (best := t.best())}
