"""Tests of the frozen benchmark: its data, a run by the command, and rankings of several files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab import benchmark as module
from hybridcache.lab.benchmark import HINDSIGHT, Benchmark, Measured, Ranking, benchmark, drawn
from hybridcache.lab.cli import main
from hybridcache.lab.simulation.sizes import shares, working_set_bytes
from hybridcache.lab.traces import SHIPPED

FROZEN = Benchmark.load()
WITHIN = [cell for cell in FROZEN.cells if not cell.source]


@pytest.mark.full("chat", "oasst-trees")
@pytest.mark.parametrize("cell", WITHIN, ids=[cell.name for cell in WITHIN])
def test_data_of_version_1_are_those_of_the_hashes(cell: module.Cell) -> None:
    """A generator that draws other bytes breaks every published comparison: add an option."""
    for place, seed in list(enumerate(FROZEN.seeds))[: len(cell.sha256)]:
        assert len(list(drawn(cell, place, seed, None))) > 100


def test_sizes_grow_with_the_load_to_hundreds_of_states() -> None:
    [cell] = [cell for cell in FROZEN.cells if cell.name == "many-conversations"]
    geometry = ModelGeometry.load(FROZEN.model)
    whole_bytes = working_set_bytes(drawn(cell, 0, FROZEN.seeds[0], None), geometry)
    largest = shares(FROZEN.sizes, whole_bytes)[-1]
    assert largest * GIB / geometry.state_bytes > 800


def test_other_data_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    [cell] = [cell for cell in FROZEN.cells if cell.name == "toolbench-dfs"]
    with pytest.raises(ValueError, match="toolbench-dfs, seed 1: its data have the hash 6e55"):
        drawn(replace(cell, sha256=("0",)), 0, 1, None)
    with pytest.raises(ValueError, match=r"data: there is no folder .*absent"):
        benchmark(quick=True, data=tmp_path / "absent")
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
def small(monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    cells = tuple(replace(cell, rate=7.0) for cell in WITHIN if cell.name == "short")
    away = replace(cells[0], name="away", trace="away.jsonl", source="https://nowhere")
    found = replace(
        FROZEN, cells=(*cells, away), quick=("short", "away"), sizes="5%,20%", rebuilt=("vllm",),
        policies=("lru@adaptive",),
    )  # fmt: skip
    monkeypatch.setattr(Benchmark, "load", lambda: found)
    return found


def test_a_policy_of_a_stranger_is_ranked_by_one_command(
    small: Benchmark,
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
    assert record["benchmark"] == "v2" and list(record["left_out"]) == ["away"]
    runs = {run["system"]: run for run in record["runs"]}
    mine, lru, peer = (runs[name] for name in ("mine_frozen:Mine@adaptive", "lru@adaptive", "vllm"))
    assert {**mine, "system": ""} == {**lru, "system": ""} and mine["pools"] and not peer["pools"]
    assert 0 < mine["loop"]["in_time"] <= 1 and mine["loop"]["goodput"] > 0
    assert record["facts"]["cells"][0]["arrivals"] == "drawn by the generator"
    assert next(iter(record["scores"])) == "(upper bound)"
    # A second file adds its systems; other cells are refused.
    fifo = benchmark(["fifo", "lru"], quick=True, progress=False)
    assert fifo.systems.count("lru@adaptive") == 1 and "lru" not in fifo.systems
    fifo.write(tmp_path / "b.json")
    assert main(["leaderboard", "--results", "a.json", "b.json"]) == 0
    table = capsys.readouterr().out
    assert table.count("lru@adaptive  ") == 1 and "\nfifo" in table and "mine_frozen:Mine" in table
    # So does another policy of the same name; built-in ones are listed once.
    other = json.loads((tmp_path / "a.json").read_text())
    for run in other["runs"]:
        run["replay"] = [rate / 2 for rate in run["replay"]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    both = Ranking.read(tmp_path / "a.json", tmp_path / "other.json")
    added = f"mine_frozen:Mine@adaptive ({tmp_path / 'other.json'})"
    assert both.systems == [*Ranking.read(tmp_path / "a.json").systems, added]
    assert both.hits(added).mean() == both.hits("mine_frozen:Mine@adaptive").mean() / 2
    with pytest.raises(ValueError, match=r"c.json: its cells, seeds or data are not those of a"):
        record["facts"]["seeds"] = [7]
        (tmp_path / "c.json").write_text(json.dumps(record))
        Ranking.read("a.json", "c.json")
    with pytest.raises(ValueError, match=r"a\.jsonl: not a result of hybridcache"):
        Ranking.read("a.jsonl")
    assert main([*command, "--json", "a.json"]) == 2


def test_rows_are_means_over_cells_with_the_best_rebuilt_system_of_each() -> None:
    facts = {
        "version": "v2", "quick": False, "seeds": [1, 2, 3, 4, 5], "cells": [{}, {}],
        "sizes": "5%", "loop_size": "5%", "ttft_limit_s": 1.0, "model": "m",
    }  # fmt: skip
    rates = {
        "lru@adaptive": (0.5, 0.5),
        "vllm": (0.6, 0.1),
        "sglang": (0.2, 0.4),
        HINDSIGHT: (0.6, 0.7),
    }
    runs = [
        Measured(
            cell, seed, name, [1.0], [9.0], [rate + seed / 100], bound=[0.9] * (name == HINDSIGHT)
        )
        for name, both in rates.items()
        for seed in facts["seeds"]
        for cell, rate in zip("ab", both, strict=True)
    ]
    rows = {row[0]: row[1:] for row in Ranking(facts, {}, tuple(runs)).rows()}
    assert list(rows)[:2] == ["(upper bound)", HINDSIGHT]
    assert rows["lru@adaptive"][0].startswith("53.0 [") and rows["lru@adaptive"][2] == "58.9"
    assert rows["(best rebuilt of each cell)"][:2] == ["53.0 [51.2, 54.6]", "0.0 [0.0, 0.0]"]
    assert rows["vllm (rebuilt)"][1].startswith("-15.0") and rows["vllm (rebuilt)"][3] == "-"


def test_numbers_of_seeds_that_do_not_exist_are_refused() -> None:
    assert FROZEN.subset(False, 2).seeds == FROZEN.seeds[:2]
    assert len(FROZEN.subset(True, None).cells) == 3
    with pytest.raises(ValueError, match=r"seeds must be from 1 to 5 \(got 6\)"):
        benchmark(seeds=6)
