"""The best plans that the studies share: worked out once, kept, and never taken for another
trace's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import goals, goals_table, hindsight, provenance
from experiments.lab import QWEN3_NEXT, Workload
from hybridcache.lab.generators import short
from hybridcache.lab.simulation import sweep


@pytest.fixture(autouse=True)
def _results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)


def test_a_plan_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = short().head(40)
    proven = hindsight.Hindsights(trace).at(1.0, QWEN3_NEXT, 64, proven=True)
    assert proven.bound is not None and 0 < proven.reached <= proven.bound + 1e-6
    calls: list[str] = []
    monkeypatch.setattr(hindsight, "optimum", lambda *_, **__: calls.append("worked out"))
    again = hindsight.Hindsights(trace)
    assert again.at(1.0, QWEN3_NEXT, 64, proven=True) == proven
    assert again.at(1.0, QWEN3_NEXT, 64) == proven, "with its bound it serves those who need none"
    assert not calls


def test_another_trace_of_the_same_name_has_a_plan_of_its_own() -> None:
    first, other = short(seed=1).head(30), replace(short(seed=2).head(30), name=short().name)
    plans = [hindsight.Hindsights(trace).at(1.0, QWEN3_NEXT, 64) for trace in (first, other)]
    assert plans[0].trace == plans[1].trace and plans[0].content != plans[1].content
    assert plans[0].bound is None, "the greedy alone proves nothing"
    kept = provenance.read_json_lines(provenance.RESULTS / hindsight.NAME)[1]
    assert len(kept) == 2


def test_fewer_points_are_a_subset() -> None:
    workload = Workload("short", "1:16:15")
    every = workload.sizes()
    assert len(every) == 15 and set(workload.sizes(8)) == set(every[::2])
    assert workload.sizes(3) == (every[0], workload.middle, every[-1])


def test_a_row_of_the_goals_has_bound_and_share_of_the_plan() -> None:
    [goal] = [goal for goal in goals.GOALS if goal.name == "short 40"]
    row = goals.measure(goal, (), goals.Ours("lru", "branch,backoff"))
    assert 0 < row["ours"] <= row["plan"] <= row["no_plan_passes"] + 1e-6 <= row["bound"] + 2e-6
    assert row["ours"] <= max(row["lru"].values()), "the words of this row are among LRU's"
    assert row["share_of_plan"] == row["ours"] / row["plan"]
    assert f"| {100 * row['share_of_plan']:.1f} |" in "\n".join(goals_table.table([row]))


def test_a_goal_beyond_the_grid_is_told_apart_from_one_that_was_missed() -> None:
    bounds = {"bound": 0.86, "bound_grid_64": 0.80}
    beyond = {"wanted": 0.84, "ours_grid_64": 0.79} | bounds
    missed = {"wanted": 0.78, "ours_grid_64": 0.77} | bounds
    assert goals_table.beyond([missed]) == ""
    assert "98.8 to 98.8 % is reached" in goals_table.beyond([missed, beyond])
    words = [goals_table.verdict(row, "ours_grid_64", "bound_grid_64") for row in (beyond, missed)]
    assert words == ["0.840 | missed: no cache reaches it on this grid", "0.780 | missed"]


def test_a_row_of_the_goals_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [goal] = [goal for goal in goals.GOALS if goal.name == "short 40"]
    peers = ("vllm-unit32", "lightllm", "lightllm-counted")
    goals.measure(goal, peers[:1], goals.Ours(), tmp_path)
    [kept] = tmp_path.glob("short-40.jsonl")
    before = kept.read_text()
    row = goals.measure(goal, peers, goals.Ours(), tmp_path)
    assert kept.read_text().startswith(before), "nothing is run again"
    assert len(kept.read_text().splitlines()) == len(before.splitlines()) + 3
    assert set(row["peers"]) == set(peers) and set(row["peers_bfloat16"]) == set(peers[::2])
    monkeypatch.setattr(sweep, "serve", lambda *_: pytest.fail("a run was repeated"))
    assert goals.measure(goal, peers, goals.Ours(), tmp_path) == row


def test_the_best_peer_has_no_memory_beside_the_budget() -> None:
    rates = {"lightllm": 0.9, "lightllm-64": 0.8, "lightllm-counted": 0.5, "vllm": 0.4}
    assert goals.best_peer(rates) == (0.5, "lightllm-counted")
    assert goals.best_peer({"lightllm": 0.9}) is None
