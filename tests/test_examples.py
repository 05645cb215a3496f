"""Tests of the scripts in ``examples/``: they run, verify themselves and print the documented
output."""

from __future__ import annotations

import json
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hybridcache import CacheConfig, simulate

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

MINIMAL_ENGINE = """\
two pools
  0 of 20 tokens reused, answer [12, 39, 5, 37, 11]
  16 of 20 tokens reused, answer [18, 13, 7, 41, 17]
  six prompts at the same time reused [0, 16, 16, 16, 16, 16] tokens
  the first prompt again: 16 of 20 tokens reused
  every KV row and state was the right one; {'preemptions': 60}
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Make the examples importable, and unload them afterwards."""
    before = set(sys.modules)
    for name in ("policies", "."):
        monkeypatch.syspath_prepend(EXAMPLES / name)
    yield monkeypatch
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_minimal_engine_prints_the_output_on_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "04_minimal_engine.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert output.startswith(MINIMAL_ENGINE)
    _, arena, tiers = (part.split("\n")[0] for part in output.split("every KV row and ")[1:])
    assert "'moves': " in arena and "'preemptions': " in arena, "no move or no preemption occurred"
    assert "'loads': " in tiers and "'offloads': " in tiers
    *_, admission = output.splitlines()
    assert admission == "preemptions of 120 requests: 1974, with `fits` 0"


@pytest.fixture(scope="module")
def minimal() -> SimpleNamespace:
    """Return the names of the minimal engine's script."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "04_minimal_engine.py")))


def end_all(engine: Any) -> None:
    """Serve all requests to their ends, and check the memory after each step."""
    while engine.waiting or engine.running:
        engine.step()
        held = [one.lease for one in engine.running]
        engine.cache.check(sum(x.held_tokens for x in held), sum(x.held_slots for x in held))


@pytest.mark.parametrize(("num_kv_tokens", "fits"), [(133, False), (134, True)])
def test_minimal_engine_reserves_the_history_of_an_idle_conversation(
    minimal: SimpleNamespace, num_kv_tokens: int, fits: bool
) -> None:
    """Rows of a prefix count although no running request locks them yet: 48 + 86 rows in all."""
    config = CacheConfig(num_kv_tokens=num_kv_tokens, num_slots=20, **minimal.SIZES)
    engine = minimal.MinimalEngine(config, reserves=True)
    history = engine.submit(list(range(1000, 1062)), 2)
    end_all(engine)
    engine.submit([1, 2, 3, 4], 44)
    engine.step()
    last = engine.submit([*history.tokens, 7, 8], 20)
    assert engine.cache.match(last.ids).cached_len == 64
    assert engine.fits(last) is fits
    end_all(engine)
    assert engine.counts["preemptions"] == 0


@pytest.mark.parametrize(
    "memory",
    [
        {"num_kv_tokens": 100, "num_slots": 20},
        {"num_kv_tokens": 100, "num_slots": 20, "page_size": 4},
        {"num_kv_tokens": 100, "num_slots": 5, "page_size": 8},
        {"memory": "arena", "total_bytes": 8 * 192},
        {"memory": "arena", "total_bytes": 8 * 192, "page_size": 4, "host_bytes": 8 * 400},
    ],
    ids=["pools", "pages", "few slots", "arena", "host tier"],
)
def test_minimal_engine_that_reserves_never_preempts(
    minimal: SimpleNamespace, memory: dict[str, Any]
) -> None:
    """Four conversations with pauses, in a memory for two or three running requests."""
    num_together = num_reused = 0
    for seed in range(8):
        rng = random.Random(seed)
        config = CacheConfig(**memory, **minimal.SIZES)
        engine = minimal.MinimalEngine(config, reserves=True)
        texts = [[rng.randrange(50) for _ in range(rng.randrange(8, 40))] for _ in range(4)]
        turns: dict[int, Any] = {}
        for _ in range(100):
            number = rng.randrange(8)
            if number < 4 and number not in turns:
                prompt = texts[number][:64] + [rng.randrange(50) for _ in range(4)]
                turns[number] = engine.submit(prompt, rng.randrange(1, 30))
            engine.step()
            num_together += len(engine.running) > 1
            for number, turn in tuple(turns.items()):
                if turn not in engine.waiting and turn not in engine.running:
                    num_reused += turn.cached_len
                    texts[number] = turns.pop(number).tokens
        end_all(engine)
        assert engine.counts["preemptions"] == 0
    assert num_together > 100, "too few requests ran at the same time"
    assert num_reused > 20, "too little was reused"


@pytest.mark.parametrize("name", ["02_own_policy:TokensPerByte", "second_chance:SecondChance"])
def test_example_eviction_policies_keep_the_invariants(
    folder: pytest.MonkeyPatch, name: str
) -> None:
    result = simulate("short?head=150", gib=0.4, policy=["lru", name], bound=False)
    assert [run.label for run in result.runs] == ["lru", name]
    assert all(run.losses.checkpoint_evicted for run in result.runs)
    assert len({run.cached_tokens for run in result.runs}) == 2, "same evictions as LRU"


def test_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(matplotlib, "rcParams", matplotlib.rcParams.copy())
    matplotlib.use("Agg")
    cells = json.loads((EXAMPLES / "01_first_simulation.ipynb").read_text())["cells"]
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    assert not any(cell.get("outputs") for cell in cells), "remove outputs: the site generates them"
    namespace: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    import matplotlib.pyplot as pyplot

    pyplot.close("all")
    rates = {
        label: runs[-1].token_hit_rate for label, runs in namespace["result"].by_label().items()
    }
    assert set(rates) == {"lru", "gdsf", "survival"}
    assert all(plan.reached >= min(rates.values()) for plan in namespace["plans"][-1:])
    assert "one draw of the trace" in namespace["result"].verdict()


def test_custom_policy_example_prints_a_comparison_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run_example("02_own_policy.py", str(tmp_path / "f.pdf"))
    output = capsys.readouterr().out
    assert "TokensPerByte" in output and "best at 1 GiB: " in output
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")


def test_custom_trace_example_reads_and_makes_traces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("03_own_trace.py")
    output = capsys.readouterr().out
    assert "prompts, " in output and "3 requests, 160 prompt tokens" in output
    assert "database, " in output and "lru                        42.1" in output
    path = tmp_path / "mine.csv"
    path.write_text("prompt\nhello\nhello you\n")
    run_example("03_own_trace.py", str(path))
    assert "mine, Qwen3-Next-80B-A3B: 2 requests, 14 prompt tokens" in capsys.readouterr().out


def test_agent_example_explains_the_misses_of_the_second_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from engine import Engine, EngineConfig
    from tests import served

    with served.serving(Engine(EngineConfig(cache_gib=0.125))) as (_, port):
        run_example("05_serve_an_agent.py", f"http://127.0.0.1:{port}")
    lines = capsys.readouterr().out.splitlines()
    turns = [line for line in lines if line.endswith(" reused")]
    assert len(turns) == 6
    reused = [int(line.rsplit(": ", 1)[1].split(" of ")[0]) for line in turns]
    assert reused[0] == 0 and reused[2] > reused[1] > 0, "reuse must grow from turn to turn"
    assert reused[3] < reused[1], "a changed system message must not be reused whole"
    assert any("messages[0].content" in line for line in lines)


def test_sglang_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import documents

    monkeypatch.chdir(tmp_path)
    page = EXAMPLES / "06_sglang.md"
    assert documents.run(page, tmp_path) == 2
    assert documents.broken_links(page) == []


def test_a_weight_format_is_added_in_two_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the page, and compare hits with a cold run in the format that it adds."""
    from engine import Engine, EngineConfig, SamplingParams
    from engine.weights.forms import readers
    from tests import documents

    page = EXAMPLES.parent / "docs" / "how-to" / "weight-format.md"
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(readers(), "toy", None)  # Removed again after the test.
        assert documents.run(page, tmp_path) == 5
        engine = Engine(EngineConfig(model="toy-model", cache_gib=0.02))
        prompt, greedy = list(range(97, 257)), SamplingParams(max_tokens=8, temperature=0.0)
        cold, hit = (engine.generate([prompt], greedy)[0] for _ in range(2))
        engine.close()
    assert hit.cached_len >= 128 and hit.token_ids == cold.token_ids
    assert documents.broken_links(page) == []


def run_example(name: str, *arguments: str) -> None:
    """Run the main function of an example."""
    runpy.run_path(str(EXAMPLES / name))["main"]([*arguments])
