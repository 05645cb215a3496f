"""Tests of the leaderboard on a small split: custom policies, pairs, intervals, resumed runs."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridcache import closed_loop
from hybridcache.lab import leaderboard as module
from hybridcache.lab.cli import main
from hybridcache.lab.leaderboard import BUILT_IN, Board, Split, leaderboard
from hybridcache.policies.eviction.lru import LRU

SPLITS = Path(__file__).resolve().parents[2] / "experiments" / "splits.toml"
TINY = Split("tiny", "qwen3-next", (1, 2, 3, 4, 5), {"short?head=20": (0.3, 1.0)})


@pytest.fixture(scope="module")
def board() -> Board:
    return leaderboard((), TINY, built_in=("lru", "fifo", module.DEFAULT_EVICTION))


def test_packaged_split_is_the_evaluation_split_of_the_studies() -> None:
    ours = Split.load()
    studies = tomllib.loads(SPLITS.read_text())["default-pair"]["evaluation"]
    assert list(ours.seeds) == studies["seeds"] and len(ours.seeds) >= 10
    assert {trace: list(sizes) for trace, sizes in ours.gib.items()} == studies["gib"]
    loops = {trace: [list(cell) for cell in cells] for trace, cells in ours.closed_loop.items()}
    assert loops == studies["closed-loop"] and ours.head(1).seeds == ours.seeds[:1]
    assert len(BUILT_IN) > 10


def test_scores_are_means_over_cells_with_intervals_over_seeds(board: Board) -> None:
    [row] = [row for row in board.rows() if row.name == "lru"]
    by_seed = [100 * np.mean(scores.rates["lru"]) for scores in board.scores]
    assert row.hit_rate.mean == pytest.approx(np.mean(by_seed))
    assert min(by_seed) <= row.hit_rate.low <= row.hit_rate.mean <= row.hit_rate.high
    own = [100 * np.mean(scores.rates[board.reference]) for scores in board.scores]
    assert row.difference.mean == pytest.approx(np.mean(by_seed) - np.mean(own))
    assert row.share_running.mean >= row.share.mean > 0
    for scores in board.scores:
        assert all(a >= b for a, b in zip(scores.plan, scores.plan_running, strict=True))
    means = [row.hit_rate.mean for row in board.rows()]
    assert means == sorted(means, reverse=True)
    assert "[95 % interval over seeds]" in board.table() and "No intervals" not in board.table()
    one = replace(board, split=board.split.head(1)).table()
    assert "No intervals: they need at least 5 seeds (got 1)" in one and "[" not in one


def test_closed_loops_decide_the_order(board: Board) -> None:
    loops = {"short?head=20": ((0.5, 4.0), (0.3, 8.0))}
    split = replace(TINY, closed_loop=loops)
    served = leaderboard((), split, built_in=tuple(board.scores[0].rates))
    rows = {row.name: row for row in served.rows()}
    assert [row.hit_rate for row in board.rows()] == sorted(
        (row.hit_rate for row in rows.values()), reverse=True
    )
    hits = [row.served.mean for row in rows.values() if row.served is not None]
    assert hits == sorted(hits, reverse=True) and len(hits) == 3
    [run] = closed_loop(
        "short?head=20&seed=2",
        gib=0.3,
        policy="lru",
        checkpoints=["adaptive"],
        rate=8.0,
        admission="sessions",
        seeds=[2],
        progress=False,
    ).runs
    [own] = [one for one in served.scores if (one.rate, one.seed) == (8.0, 2)]
    assert own.rates["lru"] == [run.token_hit_rate] and own.ttft_s["lru"] == run.ttft_mean_s
    first = rows[served.reference]
    assert first.ttft_ratio == (1, 1, 1) and first.served_difference == (0, 0, 0)
    ratios = [
        np.sqrt(np.prod([one.ttft_s["lru"] / one.ttft_s[served.reference] for one in loop]))
        for seed in split.seeds
        for loop in [[one for one in served.scores if one.seed == seed and one.rate is not None]]
    ]
    assert rows["lru"].ttft_ratio.mean == pytest.approx(np.mean(ratios))
    assert "2 closed loops and 2 replayed cells of 1 trace, 5 seeds each" in served.table()


def test_custom_policy_is_scored_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "from hybridcache.policies.eviction.lru import LRU\nclass Mine(LRU):\n    pass\n"
    (tmp_path / "mine_board.py").write_text(text)
    split = tmp_path / "split.toml"
    text = 'model = "qwen3-next"\nseeds = [1, 2]\n[gib]\n"short?head=20" = [0.5]\n'
    split.write_text(f'{text}[closed-loop]\n"short?head=20" = [[0.5, 4]]\n')
    monkeypatch.chdir(tmp_path)
    arguments = ["leaderboard", "mine_board:Mine", "lru@backoff", "--built-in", "lru"]
    assert main([*arguments, "--split", str(split), "--json", "--output", "kept.jsonl"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {"mine_board:Mine", "lru@backoff", "lru"}
    assert rows["mine_board:Mine"]["hit_rate"] == rows["lru"]["hit_rate"]
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 4
    for name in ("simulate", "closed_loop"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a run was repeated"))
    assert main([*arguments, "--split", str(split), "--output", "kept.jsonl"]) == 0
    assert "2 seeds each" in capsys.readouterr().out


def test_changed_trace_file_is_scored_again(tmp_path: Path) -> None:
    path, rates = tmp_path / "t.jsonl", []
    for count in (2, 3, 3):
        path.write_text(f'{{"tokens": {[*range(200)]}}}\n' * count)
        split = Split("file", "qwen3-next", (1,), {str(path): (1.0,)})
        found = leaderboard("lru", split, built_in=(), resume_from=tmp_path / "kept")
        rates.append(found.scores[0].rates["lru"])
    assert rates[0] < rates[1] == rates[2] and (tmp_path / "kept").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 1", "unexpected keyword argument 'modle'"),
        ("[closed_loop]", "multiple values for keyword argument 'closed_loop'"),
        ("model = 3", "model must be a name, a path or a ModelGeometry (got 3)"),
        (
            "seeds = 3",
            "'int' object is not iterable",
        ),
        ("seeds = [1.5]", "seeds must be whole numbers of at least 0 (got (1.5,))"),
        ("seeds = []", "there are no seeds"),
        ("gib = {}", "or no sizes"),
        ("gib = 3", "'int' object has no attribute 'items'"),
        ('gib = {short = ["a"]}', "gib ['a']: GiB above 0"),
        ("gib = {short = [1, 1]}", "gib [1, 1]: one is given twice"),
        ("closed-loop = {chat = []}", "chat has closed loops, and must be in [gib]"),
        ("closed-loop = {short = [1]}", "cannot unpack non-iterable int object"),
        ("closed-loop = {short = [[1, -2]]}", "rate -2: sessions a second above 0"),
        ("#gib", "'gib' is missing"),
        ("x", "Expected"),
    ],
)
def test_wrong_splits_are_refused(tmp_path: Path, text: str, message: str) -> None:
    good = {"model": '"qwen3-next"', "seeds": "[1]", "gib": "{short = [1]}"}
    good.pop(text.split(" ")[0].lstrip("#"), None)
    path = tmp_path / "split.toml"
    path.write_text("\n".join([*(f"{name} = {own}" for name, own in good.items()), text]))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        leaderboard(split=str(path))
    assert str(caught.value).startswith(f"{path}: ")


class Newest(LRU):
    """A policy of a user."""


def test_policies_may_be_classes_and_a_split_its_path(tmp_path: Path) -> None:
    path = tmp_path / "split.toml"
    path.write_text('model = "qwen3-next"\nseeds = [1]\n[gib]\n"short?head=20" = [1]\n')
    found = leaderboard(Newest, str(path), built_in="lru")
    assert {row.name for row in found.rows()} == {"tests.lab.test_leaderboard:Newest", "lru"}
    assert leaderboard("lru", Split.load(str(path)), built_in=()).reference == "lru"
    with pytest.raises(ValueError, match="no written form"):
        leaderboard([lambda: LRU()], path)


def test_a_policy_that_fails_ends_the_board_and_one_run_of_a_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing.py").write_text(
        "from hybridcache.policies.eviction.lru import LRU\n\n\n"
        "class Bad(LRU):\n    def victim(self, *_):\n        return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    split = replace(TINY, closed_loop={"short?head=20": ((0.3, 8.0),)})
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        leaderboard(["failing:Bad"], split, built_in=["lru"], seeds=1)
    command = ["simulate", "--trace=short?head=20", "--gib=0.1,9", "--policy=lru,failing:Bad"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "failing:Bad at 0.1 GiB failed: " in out and "lru" in out
    assert main(["simulate", "--trace=short?head=20", "--gib=0.001,4", "--closed-loop"]) == 1
    assert "survival at 0.001 GiB failed: short: no request fits" in capsys.readouterr().out
