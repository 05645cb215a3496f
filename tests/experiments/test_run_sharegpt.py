"""Tests of the study of conversations, through the engine and without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import provenance, run_sharegpt
from experiments.provenance import read_json_lines

SECRET = "the private word of somebody"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File of texts in ShareGPT's format."""
    monkeypatch.setattr(provenance, "WRITTEN", tmp_path)
    turns = [
        {"from": role, "value": f"{SECRET} {turn} " * 4}
        for turn in range(3)
        for role in ("human", "gpt")
    ]
    records = [{"id": f"chat{number}_0", "conversations": turns} for number in range(3)]
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(records))
    return path


def run(data: object, *arguments: str) -> list[dict[str, Any]]:
    given = ["--data", str(data), "--gib", "0.05", *arguments]
    assert run_sharegpt.main(given) == 0
    _, records = read_json_lines(provenance.WRITTEN / "sharegpt.jsonl")
    for record in records:
        assert record["hit_tokens"] + sum(record["lost_tokens"].values()) == record["prompt_tokens"]
        assert 0 < record["ttft_p50_s"] <= record["ttft_p95_s"]
    return records


def test_engine_and_simulation_agree_on_conversations(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(data)
    assert [record["cache"] for record in found] == ["none", "radix", "hybrid"]
    none, radix, hybrid = found
    assert hybrid["requests"] == 9 and hybrid["hit_tokens"] > none["hit_tokens"] == 0
    assert radix["hit_tokens"] == 0 < radix["lost_tokens"]["never_checkpointed"]
    printed = capsys.readouterr().out
    assert "never_checkpointed" in printed and "TTFT" in printed and SECRET not in printed
    assert SECRET not in (data.parent / "sharegpt.jsonl").read_text()
    assert (
        "the first 9 requests of conversations in order of time (--requests)\nTTFT: meas" in printed
    )
    assert "--seeds" not in printed
    dry = run(data, "--simulate", "--model", "builtin")
    shown = capsys.readouterr()
    assert "TTFT: computed, not measured (" in shown.out
    assert f"{data.parent / 'sharegpt.jsonl'} will be replaced" in shown.err
    assert "hybrid survival @ adaptive, 0.05 GiB: done" in shown.err
    assert [record["hit_tokens"] for record in dry] == [record["hit_tokens"] for record in found]
    assert {record["mode"] for record in dry} == {"simulation"}


def test_texts_are_counted_by_the_model_and_the_table_says_so(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    [one, _] = run(data.name, "--simulate", "--caches", "hybrid", "radix", "--model", "builtin")
    shown = capsys.readouterr()
    assert one["counted_by"] == "bytes" and "tokens counted by: bytes" in shown.out
    assert "radix: KV alone resumes no prompt of a hybrid model" in shown.out
    assert "no such file" not in shown.err
    assert f"model: {one['model']} (" in shown.out and one["model"] != "Qwen3-Next-80B-A3B"
    [other] = run(data.name, "--simulate", "--caches", "hybrid")
    shown = capsys.readouterr().out
    assert other["model"] == "Qwen3-Next-80B-A3B" and f"model: {other['model']} (" in shown
    assert other["counted_by"] == "qwen3.5" and "tokens counted by: qwen3.5" in shown
    assert 3 * other["prompt_tokens"] < one["prompt_tokens"] and "radix:" not in shown
    [named] = run(
        f"{data}?tokenizer=bytes", "--simulate", "--caches", "hybrid", "--model", "qwen3-next"
    )
    assert named["counted_by"] == "bytes" and named["prompt_tokens"] == one["prompt_tokens"]
    (data.parent / "folder").mkdir()
    (data.parent / "folder" / "tokenizer.json").write_text("{}")
    assert run_sharegpt.tokenizer_of("folder") == "folder/tokenizer.json"
    given = ["--simulate", "--data", str(data), "--model", "jamba"]
    assert run_sharegpt.main(given) == 2
    assert "jamba has no tokenizer.json" in capsys.readouterr().err
    assert run_sharegpt.main(["--simulate", "--data", "absent.json"]) == 2
    assert "left out" not in capsys.readouterr().err


def test_lengths_and_generated_conversations_are_simulated(data: Path) -> None:
    lengths = data.with_name("lengths.jsonl")
    turns = [["u", 300], ["a", 50], ["u", 20], ["a", 9]]
    lengths.write_text(json.dumps({"id": "x", "turns": turns, "first_msg_blocks16": [1]}))
    for source in (lengths, run_sharegpt.GENERATED):
        policies = ("--simulate", "--policy", "lru", "survival", "--caches", "hybrid")
        records = run(source, *policies, "--gib", "0.05,1", "--model", "qwen3-next")
        cells = [(record["policy"], record["gib"]) for record in records]
        assert cells == [("lru", 0.05), ("lru", 1), ("survival", 0.05), ("survival", 1)]
        assert records[1]["hit_tokens"] > 0


def test_default_sizes_differ_in_a_simulation(data: Path) -> None:
    """Conversations of the default model do not fit the smaller sizes."""
    given = ["--simulate", "--caches", "hybrid", "--requests", "200", "--data", "chat"]
    assert run_sharegpt.main(given) == 0
    _, records = read_json_lines(provenance.WRITTEN / "sharegpt.jsonl")
    hits = [record["hit_tokens"] for record in records]
    assert hits == sorted(set(hits)) and len(hits) == 3


def test_warnings_and_a_missing_engine_are_one_line(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"timestamp": 0, "session": n, "tokens": [1, 2, 3], "more": 1} for n in range(3)]
    path = data.with_name("own.jsonl")
    path.write_text("\n".join(map(json.dumps, lines)))
    run(path, "--simulate", "--caches", "hybrid")
    warned = [line for line in capsys.readouterr().err.splitlines() if "more" in line]
    assert len(warned) == 1 and warned[0].startswith("run_sharegpt: ")
    monkeypatch.setitem(sys.modules, "engine", None)
    assert run_sharegpt.main(["--data", str(data)]) == 2
    [line] = [one for one in capsys.readouterr().err.splitlines() if "engine" in one]
    assert line.startswith("run_sharegpt: ") and "(pip install . ./engine)" in line


def test_the_script_runs_by_its_path_from_any_folder(tmp_path: Path) -> None:
    """Without the checkout in PYTHONPATH; the folder of the script has packages such as sglang.
    Nothing of the engine is needed."""
    environment = os.environ | {"HYBRIDCACHE_RESULTS": str(tmp_path / "out")}
    environment.pop("PYTHONPATH", None)
    script = Path(run_sharegpt.__file__).resolve()
    few = ["--simulate", "--requests", "4", "--caches", "hybrid", "--gib", "0.05"]
    for module in ("msgspec", "torch"):  # packages of the engine alone
        (tmp_path / "absent" / module).mkdir(parents=True)
        fails = f"raise ModuleNotFoundError('No module named {module!r}', name={module!r})"
        (tmp_path / "absent" / module / "__init__.py").write_text(fails)
    environment["PYTHONPATH"] = str(tmp_path / "absent")
    command = [sys.executable, script, *few]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, records = read_json_lines(tmp_path / "out" / "results" / "sharegpt.jsonl")
    assert first["command"].startswith("python -m experiments.run_sharegpt --simulate")
    assert [record["cache"] for record in records] == ["hybrid"]
