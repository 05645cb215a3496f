"""Tests of the optimal plans shared by the studies: computed once and stored per trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import provenance
from experiments.studies import hindsight
from experiments.studies.common import QWEN3_NEXT, Workload
from hybridcache.lab.generators import short


@pytest.fixture(autouse=True)
def _results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)


def test_plan_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = short().head(40)
    first = hindsight.Hindsights(trace).at(1.0, QWEN3_NEXT, 64)
    assert 0 < first.reached < 1
    calls: list[str] = []
    monkeypatch.setattr(hindsight, "best_plan", lambda *_, **__: calls.append("computed"))
    again = hindsight.Hindsights(trace)
    assert again.at(1.0, QWEN3_NEXT, 64) == first
    assert not calls


def test_traces_with_the_same_name_have_separate_plans() -> None:
    first, other = short(seed=1).head(30), replace(short(seed=2).head(30), name=short().name)
    plans = [hindsight.Hindsights(trace).at(1.0, QWEN3_NEXT, 64) for trace in (first, other)]
    assert plans[0].trace == plans[1].trace and plans[0].content != plans[1].content
    records = provenance.read_json_lines(provenance.RESULTS / hindsight.NAME)[1]
    assert len(records) == 2


def test_fewer_points_are_a_subset_of_all_points() -> None:
    workload = Workload("short", "1:16:15")
    every = workload.sizes()
    assert len(every) == 15 and set(workload.sizes(8)) == set(every[::2])
    assert workload.sizes(3) == (every[0], workload.middle, every[-1])
