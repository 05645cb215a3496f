"""Tests of boards: frozen data, own policies and cheats, intervals, resumed runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridcache import closed_loop
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.board import entry
from hybridcache.lab.board import ranking as module
from hybridcache.lab.board.ranking import (
    BUILT_IN,
    PLAN,
    Board,
    Cell,
    Job,
    Measured,
    Split,
    board,
    disguised,
    drawn,
    run_job,
)
from hybridcache.lab.cli import main
from hybridcache.lab.scenario import sources_of
from hybridcache.lab.traces import SHIPPED
from hybridcache.lab.traces.sizes import shares, working_set_bytes
from hybridcache.lab.traces.trace import Trace
from hybridcache.policies.eviction.lru import LRU
from tests.documents import blocks
from tests.refused import refused

SPLITS = Path(__file__).resolve().parents[3] / "experiments" / "splits.toml"
FROZEN = Split.load("benchmark")
WITHIN = [cell for cell in FROZEN.cells if not cell.source]
SHORT = Cell("short?head=20", (0.3, 1.0))
TINY = Split("tiny", "qwen3-next", (1, 2, 3, 4, 5), (SHORT,))


@pytest.fixture(scope="module")
def tiny() -> Board:
    return board((), TINY, built_in=("lru", "fifo", module.DEFAULT_EVICTION))


@pytest.mark.full("chat", "oasst-trees")
@pytest.mark.parametrize("cell", WITHIN, ids=[cell.name for cell in WITHIN])
def test_data_are_those_of_the_hashes(cell: Cell) -> None:
    """A generator that draws other bytes breaks every published comparison: add an option."""
    for place, seed in list(enumerate(FROZEN.seeds))[: len(cell.sha256)]:
        assert len(list(drawn(cell, place, seed, None))) > 100


def test_sizes_grow_with_the_load_to_hundreds_of_states() -> None:
    [cell] = [cell for cell in FROZEN.cells if cell.name == "many-conversations"]
    geometry = ModelGeometry.load(FROZEN.model)
    whole_bytes = working_set_bytes(drawn(cell, 0, FROZEN.seeds[0], None), geometry)
    assert isinstance(cell.sizes, str)
    largest = shares(cell.sizes, whole_bytes)[-1]
    assert largest * GIB / geometry.state_bytes > 800


def test_other_data_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    [cell] = [cell for cell in FROZEN.cells if cell.name == "toolbench-dfs"]
    with pytest.raises(ValueError, match="toolbench-dfs, seed 1: its data have the hash 6e55"):
        drawn(replace(cell, sha256=("0",)), 0, 1, None)
    with pytest.raises(ValueError, match=r"data: there is no folder .*absent"):
        board((), FROZEN, quick=True, data=tmp_path / "absent")
    local = replace(cell, trace="own.jsonl", source="a place", starts="")
    with pytest.raises(FileNotFoundError, match=r"no file own.jsonl in .*; source: a place"):
        drawn(local, 0, 1, tmp_path)
    shutil.copy(SHIPPED["toolbench-dfs"], tmp_path / "own.jsonl.gz")
    assert next(iter(drawn(local, 0, 1, tmp_path))).timestamp_s == 2.174


def test_seeds_draw_the_starts_of_sessions_in_a_file() -> None:
    [cell] = [cell for cell in FROZEN.cells if cell.name == "toolbench-dfs"]
    one, two = (list(drawn(cell, place, seed, None)) for place, seed in enumerate((201, 202)))
    assert len(one) == len(two) and [a.session for a in one] != [b.session for b in two]
    assert "sessions poisson:0.05" in cell.arrivals


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Split:
    [cell] = [cell for cell in WITHIN if cell.name == "short"]
    cell = replace(cell, sizes="5%,20%", loops=(("10%", 7.0),))
    away = replace(cell, name="away", trace="away.jsonl", source="https://nowhere")
    found = replace(
        FROZEN, cells=(cell, away), quick=("short", "away"), rebuilt=("vllm",),
        policies=("lru@adaptive",),
    )  # fmt: skip
    monkeypatch.setattr(Split, "load", lambda _: found)
    return found


def test_a_policy_of_a_stranger_is_ranked_by_one_command(
    small: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "from hybridcache.policies.eviction.lru import LRU\nclass Mine(LRU):\n    pass\n"
    (tmp_path / "mine_frozen.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    command = ["benchmark", "--quick", "--policy", "mine_frozen:Mine@adaptive"]
    assert main([*command, "--json", "a.json", "--output", "a.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "left out: away: no file away.jsonl in the folder of --data" in shown
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["benchmark"] == "v4" and list(record["left_out"]) == ["away"]
    runs = {run["system"]: run for run in record["runs"]}
    mine, lru, peer = (runs[name] for name in ("mine_frozen:Mine@adaptive", "lru@adaptive", "vllm"))
    assert {**mine, "system": ""} == {**lru, "system": ""} and mine["pools"] and not peer["pools"]
    assert 0 < mine["loops"][0]["in_time"] <= 1 and mine["loops"][0]["goodput"] > 0
    assert record["facts"]["cells"][0]["arrivals"] == "drawn by the generator"
    assert next(iter(record["scores"])) == "(upper bound)"
    # A second file adds its systems; other cells are refused.
    fifo = board(["fifo", "lru"], "benchmark", quick=True, progress=False)
    assert fifo.systems.count("lru@adaptive") == 1 and "lru" not in fifo.systems
    fifo.write(tmp_path / "b.json")
    assert main(["leaderboard", "--results", "a.json", "b.json"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) < 130, "it fits into a wide terminal"
    assert table.count("\nlru@adaptive  ") == 2, "a row of replays and one of closed loops"
    assert "\nfifo" in table and "mine_frozen:Mine" in table
    # So does another policy of the same name; built-in ones are listed once.
    other = json.loads((tmp_path / "a.json").read_text())
    for run in other["runs"]:
        run["replay"] = [rate / 2 for rate in run["replay"]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    both = Board.read(tmp_path / "a.json", tmp_path / "other.json")
    added = f"mine_frozen:Mine@adaptive ({tmp_path / 'other.json'})"
    assert both.systems == [*Board.read(tmp_path / "a.json").systems, added]
    assert both.replays(added).mean() == both.replays("mine_frozen:Mine@adaptive").mean() / 2
    with pytest.raises(ValueError, match=r"c.json: its cells, seeds or data are not those of a"):
        record["facts"]["seeds"] = [7]
        (tmp_path / "c.json").write_text(json.dumps(record))
        Board.read("a.json", "c.json")
    refused(r"a\.jsonl: not a result of hybridcache", Board.read, "a.jsonl")
    assert main([*command, "--json", "a.json"]) == 2


def test_rows_are_means_over_cells_with_the_worst_and_the_best_rebuilt_system_of_each() -> None:
    cells = (Cell("a", (1.0,)), Cell("b", (1.0,)))
    split = Split("v", "qwen3-next", (1, 2, 3, 4, 5), cells, reference="lru@adaptive")
    rates = {
        "lru@adaptive": (0.5, 0.5),
        "mine:P": (0.7, 0.4),
        "vllm": (0.6, 0.1),
        "sglang": (0.2, 0.4),
        PLAN: (0.7, 0.7),
    }
    runs = [
        Measured(
            *(cell, seed, name, [1.0], [9.0], [rate + seed / 100]),
            bound=[0.9] * (name == PLAN),
            is_rebuilt=name in ("vllm", "sglang"),
        )
        for name, both in rates.items()
        for seed in split.seeds
        for cell, rate in zip("ab", both, strict=True)
    ]
    found = Board(split, tuple(runs))
    rows = {row.name: row for row in found.rows()}
    assert [*rows][:2] == ["(upper bound)", PLAN]
    assert f"{rows['lru@adaptive'].hit_rate:.1f}".startswith("53.0 [")
    assert f"{rows['lru@adaptive'].of_bound:.1f}".startswith("58.9 [")
    assert f"{rows[module.BEST_REBUILT].hit_rate}" == "53.0 [51.2, 54.6]"
    assert f"{rows[module.BEST_REBUILT].difference}" == "0.0 [0.0, 0.0]"
    assert rows["vllm"].difference.mean == pytest.approx(-15) and rows["vllm"].pools is None
    worst, lost = rows["mine:P"].worst, rows["mine:P"].lost
    assert worst == (pytest.approx(-10), "b, 1 GiB") and lost == (1, 2)
    assert "-10.0 (b, 1 GiB)" in found.table() and "1 of 2" in found.table()
    assert rows["lru@adaptive"].worst is None and "vllm (rebuilt)" in found.table()


def test_rates_above_the_bound_are_an_error(tmp_path: Path) -> None:
    runs = [
        Measured("a", 1, PLAN, [1.0], [9.0], [0.4], bound=[0.5]),
        Measured("a", 1, "mine:P", [1.0], [9.0], [0.5], pools=[0.5]),
    ]
    split = Split("v", "qwen3-next", (1,), (Cell("a", (1.0,)),), reference="mine:P")
    Board(split, tuple(runs)).check()
    message = r"mine:P on a, seed 1, 1 GiB \({}\): a token hit rate of 52.00 % is above .* 50.00 %"
    for field in ("replay", "pools"):
        grown = Board(split, (runs[0], replace(runs[1], **{field: [0.52]})))
        refused(message.format(field), grown.check)
        grown.write(tmp_path / "grown.json")
        refused(r"grown\.json: mine:P on a", Board.read, tmp_path / "grown.json")


def test_numbers_of_seeds_that_do_not_exist_are_refused() -> None:
    assert FROZEN.subset(False, 2).seeds == FROZEN.seeds[:2]
    assert len(FROZEN.subset(True, None).cells) == 3
    refused(r"seeds must be from 1 to 5, the seeds of the split", board, (), FROZEN, seeds=6)


# --- Own policies ---------------------------------------------------------------------------------

CHEATS = {
    # Counts its own hits: 1.3 times as many.
    "grow": """
from hybridcache.lab.board import ranking
from hybridcache.lab.results.result import RunResult
from hybridcache.policies.eviction.lru import LRU as Policy
RunResult.token_hit_rate = property(lambda self: 0.99)
ranking._replayed = lambda *_: 1 / 0
""",
    # Looks for requests that have not come yet, and for what an earlier run has left.
    "store": """
import gc, sys
from hybridcache.lab.traces.trace import Trace, TraceRequest
from hybridcache.policies.eviction.lru import LRU
RUNS = []
class Policy(LRU):
    def __init__(self):
        super().__init__()
        frame, seen = sys._getframe(), []
        while frame := frame.f_back:
            seen += [one for one in frame.f_locals.values() if isinstance(one, Trace)]
        seen += [one for one in gc.get_objects() if isinstance(one, (Trace, TraceRequest))]
        RUNS.append(self)
        assert not seen and len(RUNS) <= 3, "requests or runs"  # An instance per priority class.
""",
    # Changes its cache instead of deciding.
    "tamper": """
from hybridcache.policies.eviction.lru import LRU
class Policy(LRU):
    def victim(self, kind):
        item = super().victim(kind)
        if item is not None and item.last_used > 8: item.serial = 10**9
        return item
""",
    # Ends its process.
    "leave": """
import os
from hybridcache.policies.eviction.lru import LRU as Policy
Policy.touch = lambda *_: os._exit(0)
""",
}


ENTRIES = {
    # Sends a box that runs code when it is unpickled.
    "box": """
import gc
from multiprocessing.connection import Connection
class Box:
    def __reduce__(self): return eval, ("open('ran', 'w')",)
class Policy(LRU):
    def victim(self, _):
        [Connection.send(one, Box()) for one in gc.get_objects() if type(one) is Connection]
""",
    # Writes files, reads the memory of the process that started it, and signals it.
    "reach": """
import os
class Policy(LRU):
    def __init__(self):
        super().__init__()
        for call in ("open('kept', 'w')", "os.mkdir('kept')", "open('/dev/shm/kept', 'w')",
                     "open(f'/proc/{os.getppid()}/mem')", "os.kill(os.getppid(), 0)"):
            try: eval(call)
            except OSError: continue
            raise RuntimeError(call)
""",
    # Looks for the answer of the present request, and draws the trace again to know it.
    "peek": """
import sys, numpy as np
from hybridcache.lab.board import Split
from hybridcache.lab.board.ranking import drawn
from hybridcache.lab.traces.trace import TraceRequest
from hybridcache.policies.placement import Backoff
KNOWN = [one.tokens for one in drawn(Split.load("own.toml").cells[0], 0, 1, None)]
class Policy(Backoff):
    def plan(self, prefill):
        frame = sys._getframe()
        while frame := frame.f_back:
            for one in [one for one in frame.f_locals.values() if isinstance(one, TraceRequest)]:
                assert not len(one.output), "the answer is known"
                assert not any(np.array_equal(one.tokens, known) for known in KNOWN), "known ids"
        return super().plan(prefill)
""",
    "hang": """
import time
class Policy(LRU):
    def victim(self, kind): time.sleep(1000)
""",
}


def test_an_entry_reaches_neither_files_nor_processes_nor_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in ENTRIES.items():
        head = "from hybridcache.policies.eviction.lru import LRU"
        (tmp_path / f"entry_{name}.py").write_text(head + text)
    head = 'model = "qwen3-next"\nseeds = [1]\ndisguises = true\n[cells]\n'
    (tmp_path / "own.toml").write_text(head + '"short?head=20" = {sizes = [0.3, 0.5]}')
    monkeypatch.chdir(tmp_path)
    split = Split.load("own.toml")
    refused("its process sent no decision", board, "entry_box:Policy", split, built_in=())
    found = board(["lru@backoff", "lru@entry_peek:Policy"], split, built_in=())
    assert found.runs[1].replay == found.runs[2].replay
    monkeypatch.setattr(entry, "LIMIT_S", 0.5)
    refused(r"no decision within 0\.5 s", board, "entry_hang:Policy", split, built_in=())
    if entry.landlock_version() >= entry.CONFINING:
        board("entry_reach:Policy", split, built_in=())
    assert not {path.name for path in tmp_path.iterdir()} & {"kept", "ran"}


def test_a_disguise_changes_ids_and_order_but_no_length() -> None:
    trace = drawn(SHORT, 0, 1, None)
    one, again, other = (list(disguised(trace, 1, place)) for place in (0, 0, 1))
    lengths = [[(len(r.tokens), len(r.output)) for r in of] for of in (one, again, other)]
    assert lengths[0] == lengths[1] and sorted(lengths[0]) == sorted(lengths[2])
    assert [r.session for r in one] != [r.session for r in other]
    assert any((r.tokens != s.tokens).any() for r, s in zip(one, again, strict=True))


def test_an_entry_neither_counts_hits_nor_sees_later_requests_or_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in CHEATS.items():
        (tmp_path / f"cheat_{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    cell = replace(SHORT, sizes=(0.3,), loops=((0.3, 8.0),))
    split = replace(TINY, seeds=(1,), cells=(cell,), kv_share=0.53)
    found = board(["cheat_grow:Policy", "cheat_store:Policy"], split, built_in=["lru"])
    [_, grown, stored, plain] = found.runs
    assert replace(grown, system="lru") == replace(stored, system="lru") == plain
    assert "cheat_grow" not in sys.modules
    refused("no candidate of the board's cache", board, "cheat_tamper:Policy", split, built_in=())
    refused("its process ended", board, "cheat_leave:Policy", split, built_in=())


def test_sources_cover_imported_modules_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_family"
    package.mkdir()
    files = {
        package / "__init__.py": "print('run')",
        package / "policy.py": "from . import near\nimport own_helper, numpy\nclass P: pass",
        package / "near.py": "def f():\n    from .far import x",
        package / "far.py": "x = 1",
        tmp_path / "own_helper.py": "import json",
        tmp_path / "own_stranger.py": "y = 1",
    }
    for path, text in files.items():
        path.write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = sources_of(["own_family.policy:P(alpha=2)"])
    for path in files:
        path.write_text(path.read_text() + "# changed\n")
        after = sources_of(["own_family.policy:P(alpha=2)"])
        assert (after != before) is (path.name != "own_stranger.py"), path
        before = after
    assert "import json" in before and "numpy.org" not in before
    assert "own_family" not in sys.modules and not sources_of(["lru", "marconi:2"])
    refused("its source cannot be read", sources_of, ["own_absent:P"])


# --- The evaluation split -------------------------------------------------------------------------


def test_packaged_split_is_the_evaluation_split_of_the_studies() -> None:
    ours = Split.load("evaluation")
    studies = tomllib.loads(SPLITS.read_text())["default-pair"]["evaluation"]
    assert list(ours.seeds) == studies["seeds"] and len(ours.seeds) >= 10
    assert {cell.spec: [*cell.sizes] for cell in ours.cells} == studies["gib"]
    loops = {cell.spec: [[*one] for one in cell.loops] for cell in ours.cells if cell.loops}
    assert loops == studies["closed-loop"] and len(ours.policies) == len(BUILT_IN) > 10


def test_scores_are_means_over_cells_with_intervals_over_seeds(tiny: Board) -> None:
    rows = {row.name: row for row in tiny}
    flat = {row["name"]: row["hit_rate"] for row in tiny.to_dicts()}
    assert flat == {name: row.hit_rate.mean for name, row in rows.items()}
    row, rates = rows["lru"], tiny.replays("lru")
    by_seed = rates.mean(axis=1)
    assert row.hit_rate.mean == pytest.approx(np.mean(by_seed))
    assert by_seed.min() <= row.hit_rate.low <= row.hit_rate.mean <= row.hit_rate.high
    own = tiny.replays(tiny.split.reference).mean(axis=1)
    assert row.difference.mean == pytest.approx(np.mean(by_seed) - np.mean(own))
    assert row.of_plan is not None and row.of_bound is not None
    assert row.of_plan.mean >= row.of_bound.mean > 0
    means = [row.hit_rate.mean for row in tiny.rows()]
    assert means == sorted(means, reverse=True)
    assert "[95 % interval over seeds]" in tiny.table() and "No intervals" not in tiny.table()
    one = replace(tiny, split=tiny.split.subset(False, 1)).table()
    assert "No intervals: they need at least 5 seeds (got 1)" in one


def test_a_policy_with_the_name_of_a_rebuilt_system_is_the_policy() -> None:
    split = replace(TINY, seeds=(1,), rebuilt=("marconi",))
    found = board((), split, built_in=("marconi", "lru"))
    assert {"marconi@adaptive", "marconi"} < {row.name for row in found.rows()}
    assert "\nmarconi (rebuilt) " in found.table() and "\nmarconi@adaptive " in found.table()
    assert found.rebuilt == {"marconi"}
    of_policy = run_job(Trace("", 1, tuple), Job(split, SHORT, 0, "marconi", None))
    by_name = {run.system: run for run in found.runs}
    assert of_policy.replay == by_name["marconi@adaptive"].replay != by_name["marconi"].replay
    assert not of_policy.is_rebuilt


def test_closed_loops_decide_the_order(tiny: Board) -> None:
    split = replace(TINY, cells=(replace(SHORT, loops=((0.5, 4.0), (0.3, 8.0))),))
    served = board((), split, built_in=tiny.split.policies)
    rows = {row.name: row for row in served.rows()}
    assert {row.hit_rate for row in tiny.rows()} == {row.hit_rate for row in rows.values()}
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
    [[_, own]] = [one.loops for one in served.runs if (one.system, one.seed) == ("lru", 2)]
    assert own["token_hit_rate"] == run.token_hit_rate and own["ttft_mean_s"] == run.ttft_mean_s
    first = rows[served.split.reference]
    assert first.ttft_ratio == (1, 1, 1) and first.served_difference == (0, 0, 0)
    both = (served.loops(name, "ttft_mean_s") for name in ("lru", first.name))
    ratios = np.exp(np.log(np.divide(*both)).mean(axis=1))
    assert rows["lru"].ttft_ratio.mean == pytest.approx(np.mean(ratios))
    assert "2 closed loops and 2 replayed cells of 1 trace, 5 seeds each" in served.table()


def test_custom_policy_is_scored_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "from hybridcache.policies.eviction.lru import LRU\nclass Mine(LRU):\n    pass\n"
    (tmp_path / "mine_board.py").write_text(text)
    text = 'model = "qwen3-next"\nseeds = [1, 2]\n[cells]\n'
    (tmp_path / "split.toml").write_text(
        f'{text}"short?head=20" = {{sizes = [0.5], loops = [[0.5, 4]]}}'
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["leaderboard", "mine_board:Mine,lru@backoff", "--built-in", "lru"]
    arguments += ["--split", "split.toml", "--output", "kept.jsonl"]
    assert main([*arguments, "--json", "all.json"]) == 0
    assert "2 seeds each" in capsys.readouterr().out
    rows = {row.name: row for row in Board.read("all.json").rows()}
    assert {"mine_board:Mine", "lru@backoff", "lru"} < set(rows)
    assert rows["mine_board:Mine"].hit_rate == pytest.approx(rows["lru"].hit_rate, nan_ok=True)
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 8
    for name in ("run_cell", "simulate_closed_loop", "optimum"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a run was repeated"))
    assert main(arguments) == 0


def test_changed_trace_file_is_scored_again(tmp_path: Path) -> None:
    path, rates = tmp_path / "t.jsonl", []
    for count in (2, 3, 3):
        path.write_text(f'{{"tokens": {[*range(200)]}}}\n' * count)
        split = Split("file", "qwen3-next", (1,), (Cell(str(path), (1.0,)),))
        found = board("lru", split, built_in=(), resume_from=tmp_path / "kept")
        rates.append(found.replays("lru").item())
    assert rates[0] < rates[1] == rates[2] and (tmp_path / "kept").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 1", "unexpected keyword argument 'modle'"),
        ("model = 3", "model must be a name, a path or a ModelGeometry (got 3)"),
        ("seeds = 3", "seeds must be a list (got 3)"),
        ("seeds = [1.5]", "seeds must be whole numbers of at least 0 (got (1.5,))"),
        ("seeds = []", "there are no seeds"),
        ("cells = {}", "or no cells"),
        ("cells = 3", "'int' object has no attribute 'items'"),
        ("cells = {short = {}}", "'sizes' is missing"),
        ('cells = {short = {sizes = ["a"]}}', "gib ('a',): GiB above 0"),
        ("cells = {short = {sizes = [1, 1]}}", "gib (1, 1): one is given twice"),
        ("cells = {short = {sizes = [1], loop = 1}}", "unexpected keyword argument 'loop'"),
        ("cells = {short = {sizes = [1], loops = [1]}}", "cannot unpack non-iterable int object"),
        ("cells = {short = {sizes = [1], loops = [[1, -2]]}}", "rate -2: sessions a second above"),
        ('ranked_by = "luck"', "ranked_by must be closed loop or replay (got 'luck')"),
        ("#cells", "'cells' is missing"),
        ("x", "Expected"),
    ],
)
def test_wrong_splits_are_refused(tmp_path: Path, text: str, message: str) -> None:
    good = {"model": '"qwen3-next"', "seeds": "[1]", "cells": "{short = {sizes = [1]}}"}
    good.pop(text.split(" ")[0].lstrip("#"), None)
    path = tmp_path / "split.toml"
    path.write_text("\n".join([*(f"{name} = {own}" for name, own in good.items()), text]))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        board(split=str(path))
    assert str(caught.value).startswith(f"{path}: ")


class Newest(LRU):
    """A policy of a user."""


@pytest.mark.parametrize("has_guard", [True, False])
def test_a_script_with_an_own_policy_needs_the_main_guard(has_guard: bool, tmp_path: Path) -> None:
    """The script of the page; without its guard, one sentence says so."""
    page = Path(__file__).parents[3] / "docs" / "how-to" / "leaderboard.md"
    [script] = [one.text for one in blocks(page) if one.text.startswith("# compare.py")]
    if not has_guard:
        script = script.replace('if __name__ == "__main__":', "if True:")
    (tmp_path / "compare.py").write_text(script)
    (tmp_path / "mine.py").write_text(
        "from hybridcache.policies.eviction.lru import LRU\nclass Policy(LRU): pass\n"
    )
    (tmp_path / "my.toml").write_text(
        'model = "qwen3-next"\nseeds = [1]\n[cells]\n"short?head=9" = { sizes = [0.3] }\n'
    )
    done = subprocess.run(
        [sys.executable, "compare.py"], cwd=tmp_path, capture_output=True, text=True
    )
    if has_guard:
        assert done.returncode == 0, done.stderr
        assert "mine:Policy" in done.stdout
    else:
        assert "put its calls below \"if __name__ == '__main__':\"" in done.stderr.splitlines()[-1]
        assert done.stderr.count("Traceback") == 1, "only the script may print a traceback"


def test_policies_may_be_classes_and_a_split_its_path(tmp_path: Path) -> None:
    path = tmp_path / "split.toml"
    path.write_text('model = "qwen3-next"\nseeds = [1]\n[cells]\n"short?head=20" = {sizes = [1]}\n')
    found = board(Newest, str(path), built_in="lru")
    assert {f"{__name__}:Newest", "lru"} < {row.name for row in found.rows()}
    assert board("lru", Split.load(str(path)), built_in=()).split.reference == "lru"
    refused("no written form", board, [lambda: LRU()], path)
    refused("nothing to compare", board, (), path, built_in=())


def test_a_policy_that_fails_ends_the_board_and_one_run_of_a_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing.py").write_text(
        "from hybridcache.policies.eviction.lru import LRU\n\n\n"
        "class Bad(LRU):\n    def victim(self, *_):\n        return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    refused("ZeroDivisionError", board, ["failing:Bad"], TINY, built_in=["lru"], seeds=1)
    with pytest.raises(ValueError, match="no module 'absent' can be imported"):
        board(["absent:Bad"], TINY, built_in=["lru"], seeds=1)
    command = ["simulate", "--trace=short?head=20", "--gib=0.1,9", "--policy=lru,failing:Bad"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "failing:Bad at 0.1 GiB failed: " in out and "lru" in out
    assert main(["simulate", "--trace=short?head=20", "--gib=0.001,4", "--closed-loop"]) == 1
    assert "survival at 0.001 GiB failed: short: no request fits" in capsys.readouterr().out
