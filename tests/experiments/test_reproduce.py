"""Tests of `make reproduce` in a small clone, of the declared parts, and of the results page."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments import page, provenance, reproduce
from experiments.studies import ablation
from tests.refused import refused

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = "results/bench_simulate_default.jsonl"
TINY = """
import json, os
from pathlib import Path
path = os.environ["HYBRIDCACHE_RESULTS"] + "/OUTPUT"
with Path(path).open("w") as file:
    print(json.dumps({"provenance": {"commit": "abc", "date": "2026-01-01T00:00:00"}}), file=file)
    for record in {"trace": "chat", "gib": 6, "default_token_hit_rate": 0.5,
                   "lru_token_hit_rate": 0.4, "ratio": 2}, :
        print(json.dumps(record), file=file)
with Path(path + ".runs").open("a") as file:
    print("run", file=file)
""".replace("OUTPUT", OUTPUT)


class Tree:
    """Small clone with one commit, in which parts run."""

    def __init__(self, root: Path) -> None:
        self.root, self.results = root, root / "experiments" / "results"
        self.results.mkdir(parents=True)
        (root / "docs").mkdir()
        (root / "experiments" / "tiny_part.py").write_text(TINY)
        (root / ".gitignore").write_text("*.runs\n__pycache__\n")
        self.template = root / "experiments" / "page.md"
        self.template.write_text("Hits:\n\n<!-- result: default speed -->\n")
        self.git("init", "-q")
        self.commit()

    def git(self, *arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
        subprocess.run(["git", "-C", self.root, *identity, *arguments], check=True)

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "all")

    @property
    def runs(self) -> int:
        file = Path(f"{self.root / 'experiments' / OUTPUT}.runs")
        return len(file.read_text().splitlines()) if file.exists() else 0

    def part(self, **more: object) -> reproduce.Rebuilt:
        tiny = reproduce.Rebuilt("tiny", "experiments.tiny_part", (OUTPUT,), 1, "a figure")
        return replace(tiny, **more)  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    made = Tree(tmp_path / "clone")
    monkeypatch.setattr(provenance, "ROOT", made.root)
    monkeypatch.setattr(provenance, "RESULTS", made.results)
    monkeypatch.setattr(provenance, "FIGURES", made.root / "experiments" / "figures")
    monkeypatch.setattr(reproduce, "ROOT", made.root)
    monkeypatch.setattr(page, "TEMPLATE", made.template)
    monkeypatch.setattr(reproduce, "PAGES", made.root / "docs")
    return made


def test_part_runs_again_only_after_a_change_of_code_or_outputs(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [tree.part()]
    assert reproduce.run(parts) == 0 and tree.runs == 1
    assert "| chat | 6 | 50.0 | 40.0 | 2.00 |" in (tree.root / "docs/results.md").read_text()
    record = json.loads((tree.results / "reproduce.json").read_text())["tiny"]
    assert record["commit"] and "+" not in record["commit"] and record["versions"]["numpy"]
    assert "about 1 min" in capsys.readouterr().out
    tree.commit()
    assert reproduce.run(parts) == 0 and tree.runs == 1, "a commit of results is not a change"
    assert " done " in reproduce.listing(parts) and "due: no" in reproduce.listing(parts)
    (tree.root / "experiments" / OUTPUT).unlink()
    assert reproduce.run(parts) == 0 and tree.runs == 2, "an output was deleted"
    (tree.root / "experiments" / "splits.toml").write_text("seeds = [1, 2]\n")
    tree.commit()
    assert reproduce.run(parts) == 0 and tree.runs == 3, "seeds have changed"
    (tree.root / "engine").mkdir()
    (tree.root / "engine" / "step.py").write_text("SECONDS = 1\n")
    tree.commit()
    study = tree.part(name="study", scope="simulation")
    assert reproduce.run([study]) == 0 and tree.runs == 4
    (tree.root / "engine" / "step.py").write_text("SECONDS = 2\n")
    tree.commit()
    (tree.root / "experiments" / "another.py").write_text("SEEDS = (1, 2, 3)\n")
    tree.commit()
    assert reproduce.run([study]) == 0 and tree.runs == 4, "simulations do not depend on the engine"
    assert reproduce.run(parts) == 0 and tree.runs == 5, "the engine has changed"
    (tree.root / "docs/results.md").write_text("as after other parts\n")
    assert reproduce.run(parts, again=True) == 0 and tree.runs == 6
    record = json.loads((tree.results / "reproduce.json").read_text())["tiny"]
    assert "+" not in record["commit"], "the page is an output too"


@pytest.mark.full
def test_simulations_import_no_other_code_than_their_hash_covers() -> None:
    modules = {part.command.split()[0] for part in reproduce.read_parts() if part.scope != "engine"}
    code = f"""
import importlib, sys
for name in {sorted(modules)}: importlib.import_module(name)
print(*(module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = {
        path.relative_to(ROOT).as_posix()
        for path in map(Path, done.stdout.split())
        if path.is_relative_to(ROOT) and ".venv" not in path.parts
    }
    covered = {path for module in modules for path in provenance.simulation_code(module)}
    others = {name for name in own if not name.startswith("hybridcache/")} - covered
    assert len(own) > 100 and not others


@pytest.mark.parametrize("name", ["experiments/tiny_part.py", "experiments/new.py"])
def test_dirty_tree_is_rejected(name: str, tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    with (tree.root / name).open("a") as file:
        file.write("# changed\n")
    assert reproduce.run([tree.part()]) == 2 and tree.runs == 0
    assert f"the tree is dirty; commit or remove: {name}" in capsys.readouterr().err


def test_failed_part_does_not_stop_the_others_and_is_not_recorded(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = tree.part(name="fails", command="experiments.no_such_part")
    absent = tree.part(name="absent", needs="out/nowhere", how="make nowhere")
    silent = tree.part(name="silent", outputs=("results/never.jsonl",))
    (tree.results / "old.jsonl").write_text("{}\n")
    old = tree.part(name="old", outputs=("results/old.jsonl",))
    assert reproduce.run([fails, absent, tree.part(), silent, old]) == 1
    assert "old" not in json.loads((tree.results / "reproduce.json").read_text())
    printed = capsys.readouterr()
    assert "fails failed: exit code 1" in printed.err
    assert "failed: fails, silent, old;" in printed.err
    assert "silent failed: it did not write results/never.jsonl" in printed.err
    assert "absent: skipped, needs out/nowhere (make nowhere)" in printed.out
    assert list(reproduce.read_record()) == ["tiny"]


def test_missing_published_files_are_named(
    tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce.common, "DATA", (tree.root / "data",))
    data = "traces/one.jsonl.gz", "traces/two.jsonl.gz"
    some, only = tree.part(data=data), tree.part(name="only", data=data[:1], only_data=True)
    listed = reproduce.listing([some, only])
    assert "due, without traces/one.jsonl.gz, traces/two.jsonl.gz (docs/results-so" in listed
    assert "needs traces/one.jsonl.gz in data/ (docs/results-sources.md)" in listed
    assert reproduce.run([only]) == 0 and tree.runs == 0
    assert "only: skipped, needs traces/one.jsonl.gz" in capsys.readouterr().out
    (tree.root / "data" / "traces").mkdir(parents=True)
    (tree.root / "data" / data[0]).write_text("")
    listed = reproduce.listing([some, only])
    assert "due, without traces/two.jsonl.gz (" in listed and "needs" not in listed
    page = (ROOT / "docs" / "results-sources.md").read_text()
    parts = reproduce.read_parts()
    assert all(f"| `{name}` |" in page for part in parts for name in part.data)
    assert any(part.only_data for part in parts)


class Listed(NamedTuple):
    """Results pages, their figures, and what each part lacks."""

    texts: dict[str, str]
    figures: dict[str, str]
    missing: dict[str, str]


@pytest.fixture(scope="module")
def without_engine() -> Listed:
    """The output of a process without the engine's packages. A module that is None in
    ``sys.modules`` is not found."""
    code = """
import gc, json, sys; gc.disable()
sys.modules.update(dict.fromkeys(("torch", "triton", "msgspec")))
from experiments import reproduce
texts, figures = reproduce.whole_pages()
missing = {part.name: part.missing for part in reproduce.read_parts()}
print(json.dumps([texts, {str(path): figure for path, figure in figures.items()}, missing]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Listed(*json.loads(done.stdout))


def test_simulations_and_pages_need_no_engine(without_engine: Listed) -> None:
    """Parts that need it say so."""
    missing = without_engine.missing
    needs = {name for name in missing if missing[name].startswith("needs torch (pip inst")}
    assert {"overhead", "closed-loop", "checkpoint-dtype", "sharegpt"} <= needs
    assert not needs & {part.name for part in reproduce.read_parts() if part.scope != "engine"}


def test_rows_of_the_ablation_are_explained() -> None:
    page = (ROOT / "docs" / "reference" / "policies.md").read_text()
    _, records = provenance.read_json_lines(provenance.RESULTS / f"{ablation.NAME}.jsonl")
    rows = {*ablation.PAIRS, *(f"`{name}`" for name in ablation.CONSTANTS)}
    rows |= {record["variant"] for record in records if "variant" in record}
    for row in rows - {"all", "`survival` with LRU's placement"}:
        [(rule, constant)] = re.findall(r"\*(.+)\*|`(\w+)`", row)
        start = f"| `{constant}` = " if constant else f"| *{rule.capitalize()}* |"
        assert start in page, row


NO_PART = {
    "results/reproduce.json",
    "results/kernel_code.jsonl",  # kernels/README.md
    *(f"results/gpu_{name}.jsonl" for name in ("big", "http", "kernels", "parity")),  # `make gpu`
    "figures/page_dark.png",  # `python -m tests.adapters.watch.picture`
    "figures/page_light.png",
    *(f"figures/results_{name.replace(' ', '_')}.svg" for name in page.SECTIONS),
}
"""Published files that no part writes."""


def test_each_committed_or_published_result_is_the_output_of_one_part() -> None:
    made = [name for part in reproduce.read_parts() for name in part.outputs]
    assert len(made) == len(set(made)), "two parts must not write the same file"
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"experiments/((?:results|figures)/[\w.]+\w)", text))
    folder = ROOT / "experiments"
    stored = {
        f"{name}/{file.name}"
        for name in ("results", "figures")
        for file in (folder / name).iterdir()
    }
    assert len(named) > 10 and (named | stored) - set(made) <= NO_PART


def test_results_pages_and_figures_are_up_to_date(without_engine: Listed) -> None:
    """Update them by ``python -m experiments.reproduce --page``. Another release of matplotlib
    writes the same figure in other words."""
    texts = without_engine.texts
    written = {path.name: path.read_text() for path in (ROOT / "docs").glob("re[ps]*t*.md")}
    assert written == texts
    assert max(len(text.split()) for text in texts.values()) <= 3_000
    is_pinned = f"matplotlib=={version('matplotlib')}" in (ROOT / "constraints.txt").read_text()
    assert without_engine.figures
    for name, drawing in without_engine.figures.items():
        assert Path(name).read_text() == drawing if is_pinned else Path(name).is_file(), name


@pytest.mark.parametrize("text", ["", '{"provenance": {}}\n', '{"provenance": {}}\n{"ga'])
def test_a_result_without_rows_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    (tmp_path / "study_vllm.jsonl").write_text(text)
    refused(r"study_vllm\.jsonl", page.render, "vllm", page.SECTIONS["vllm"], {}, "")


def test_a_result_that_is_being_written_is_named(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tree.part()
    monkeypatch.setattr(reproduce, "read_parts", lambda: (part,))
    monkeypatch.setattr(reproduce, "whole_pages", lambda: {}[512])
    assert reproduce.main(["--page"]) == 2
    assert capsys.readouterr().err == "reproduce: a result lacks the cell 512: run its part again\n"
    (tree.results / "bench_simulate_default.jsonl").write_text('{"provenance": {}}\n{"gib": 1}\n')
    assert reproduce.main(["--page"]) == 2
    assert f"cut, edited or being written: {OUTPUT}\n" in capsys.readouterr().err
    reproduce.write_record(part, part.code, 1.0)
    assert reproduce.main(["--page"]) == 2
    assert "written" not in capsys.readouterr().err, "it is that of a finished run"


def test_finished_part_says_so_and_can_be_compared(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A comparison leaves the results as they are, and so does a command without ``reproduce``."""
    assert provenance.WRITTEN == ROOT / "out" / "results"
    part = tree.part()
    results, folder = tree.results / "bench_simulate_default.jsonl", tmp_path / "out"
    (folder / "results").mkdir(parents=True)
    results.write_text('{"provenance": {}}\n{"trace": "chat", "gib": 5}\n')
    assert reproduce.compare([part], folder) == 1
    said = capsys.readouterr().out
    assert f"{OUTPUT}, trace chat, gib: 5, now 6" in said and "0 of 1 common cells agree" in said
    assert '"gib": 5' in results.read_text()
    results.write_text((folder / OUTPUT).read_text())
    assert reproduce.compare([part], folder) == 0
    silent = replace(part, command="this")  # Writes nothing: an earlier comparison does not count.
    assert reproduce.compare([silent], folder) == 1
    assert f"{folder / OUTPUT} not found" in capsys.readouterr().out
    reproduce.write_record(part, part.code, 1.0)
    assert reproduce.run([part]) == 0
    assert "tiny: finished, " in capsys.readouterr().out


def test_largest_differences_come_first(tree: Tree, tmp_path: Path) -> None:
    part, folder = tree.part(), tmp_path / "out"
    for place, gibs, rates in (
        (tree.results, (100, 6, 5), [[0.5, 0.5]] * 3),
        (folder / "results", (101, 6, 5), [[0.5, 0.5], [0.5, 0.25], [0.5]]),
    ):
        place.mkdir(parents=True, exist_ok=True)
        records = [
            {"trace": "chat", "seed": seed, "gib": gib, "rates": rate}
            for seed, (gib, rate) in enumerate(zip(gibs, rates, strict=True))
        ]
        provenance.write_json_lines(place / "bench_simulate_default.jsonl", records)
    lines, agrees = reproduce.differences(part, folder, most=2)
    assert not agrees
    assert lines == [
        f"{OUTPUT}: 0 of 3 common cells agree",
        f"{OUTPUT}, trace chat, seed 2, rates: [0.5, 0.5], now [0.5]",
        f"{OUTPUT}, trace chat, seed 1, rates: [0.5, 0.5], now [0.5, 0.25]",
        "and 1 more that differ less",
    ]


def test_cells_are_paired_by_their_settings(tree: Tree, tmp_path: Path) -> None:
    part, folder, name = tree.part(), tmp_path / "out/results", "bench_simulate_default.jsonl"
    cells = [{"trace": "chat", "seed": seed, "rate": seed / 7} for seed in range(4)]
    folder.mkdir(parents=True)
    provenance.write_json_lines(tree.results / name, cells[:3])
    for kept, data, agrees, said in (
        ([2, 0, 1], (), True, "3 of 3 common cells agree"),
        ([0, 2], ("x/absent.jsonl",), True, "2 of 2 common cells agree; 1 were not run: x/absent"),
        ([0, 2], (), False, "2 of 2 common cells agree; 1 were not run: not known why"),
        ([0, 1, 2, 3], (), True, "3 common cells agree; 1 are new (seed 3), so that"),
        ([3], ("x/absent.jsonl",), False, "0 of 0 common cells agree; 3 were not run: x/absent"),
    ):
        provenance.write_json_lines(folder / name, [cells[number] for number in kept])
        [line], found = reproduce.differences(replace(part, data=data), folder.parent)
        assert found == agrees and said in line


def test_each_module_can_be_imported() -> None:
    """A name that the library removed shows here, and not in the middle of a long run."""
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name == "sglang", f"{name}: {error}"


def test_a_report_has_author_commits_and_numbered_figures() -> None:
    marks = "authors", "figure: tiers", "figure: headroom", "parts", "citation"
    template = "# T\n\n" + "\n\n".join(f"<!-- {mark} -->" for mark in marks)
    text = page.report(template, lambda part: f"of {part}, 2030-01-02")
    assert "\nThe hybridcache authors, version 0.4.0, results until 2030-01-02.\n" in text
    assert "*Figure 1. " in text and "*Figure 2. " in text
    sizes = "`live-agents` 2; `chat` 2. One draw of each trace."
    assert (
        "10 cells of 5 traces (memory in GiB): `toolbench-dfs` 0.25, 0.5, 1;" in text
        and sizes in text
    )
    assert "| `tiers` | of tiers, 2030-01-02 |" in text and page.CITATION.read_text() in text


def test_the_best_rebuilt_system_is_not_counted_among_the_rules_near_lru() -> None:
    section = page.SECTIONS["leaderboard"]
    table = section.table()
    rows = {name for name, *_ in section.figure.rows(table)}
    assert "best rebuilt system" in rows and "lru and 6 more" in rows
    assert "and 6 rules are within a point of `lru`" in section.finding(table)
