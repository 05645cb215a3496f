"""Tests of the kernel tuner: it chooses the fastest correct candidate over all cases of a key."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest
import torch

from experiments.gpu.kernel_cases import Case
from experiments.gpu.kernel_tuning import table_of, tune
from kernels import tuning

PLAIN, BY_TOKENS = "a.plain_kernel", "a.by_tokens_kernel"
CANDIDATES = tuning.grid(num_warps=(1, 2, 4, 8))


@pytest.fixture(autouse=True)
def tunables(monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = {
        PLAIN: tuning.Tunable(("N",), CANDIDATES),
        BY_TOKENS: tuning.Tunable(("N", "tokens"), CANDIDATES),
    }
    monkeypatch.setattr(tuning, "TUNABLES", tunable)


def case(kernel: str, key: tuple, results: dict[int, float], **options) -> Case:
    """Return a case that computes ``results[num_warps]``, with 2 as the default of num_warps."""

    def run() -> torch.Tensor:
        warps = tuning.tuned(kernel, *key).get("num_warps", 2)
        if results.get(warps) is None:
            raise RuntimeError("out of resources")
        return torch.full((4,), results[warps])

    return Case(run, lambda: torch.ones(4), num_bytes=1, **options)


def seconds_of(times: dict[int, float], kernel: str, key: tuple) -> Callable:
    noise = cycle([1.0, 1.01, 0.99])

    def seconds(run: Callable[[], object]) -> list[float]:
        run()
        return [times[tuning.tuned(kernel, *key).get("num_warps", 2)] * next(noise) for _ in "abc"]

    return seconds


def test_fastest_correct_candidate_is_chosen() -> None:
    key = (64,)
    cases = [case(PLAIN, key, {1: 1.0, 2: 1.0, 4: 1.0001, 8: 1.5})]
    times = {1: 3.0, 2: 2.0, 4: 1.0, 8: 0.1}
    [trial] = tune(cases, seconds_of(times, PLAIN, key))
    assert trial.refused == {3: "wrong"}
    assert table_of([trial]) == {(PLAIN, key): {"num_warps": 4}}
    assert trial.best()[1] == pytest.approx(0.5, rel=0.05)


def test_choice_must_be_correct_for_all_cases_and_clearly_faster() -> None:
    key = (64,)
    right = dict.fromkeys((1, 2, 4, 8), 1.0)
    small, large = case(PLAIN, key, right), case(PLAIN, key, right | {8: 7.0})
    times = {1: 2.1, 2: 2.0, 4: 1.97, 8: 0.1}
    [trial] = tune([small, large], seconds_of(times, PLAIN, key))
    assert trial.refused == {3: "wrong"}
    assert set(trial.ratios) == {0, 1, 2}
    assert table_of([trial]) == {}
    assert trial.record()["chosen"] is None
