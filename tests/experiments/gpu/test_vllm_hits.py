"""experiments.gpu.vllm_hits with a stand-in for vLLM: its engines, its table and its verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.selection import ROOT

STAND_IN = '''
"""LLM whose logits depend on the prefix alone, with the error of FAULT after a hit of ours."""

import json
import os
import random
from types import SimpleNamespace


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, **settings):
        self.settings, self.seen = settings, []
        self.is_ours = "scheduler_cls" in settings
        model = SimpleNamespace(get_vocab_size=lambda: 1000)
        config = SimpleNamespace(model_config=model)
        self.llm_engine = SimpleNamespace(vllm_config=config)
        with open(os.environ["SETTINGS"], "a") as file:
            file.write(json.dumps(settings) + "\\n")

    def generate(self, asks, sampling, use_tqdm):
        assert sampling.temperature == 0 and not use_tqdm
        return [self.answer(ask["prompt_token_ids"], sampling) for ask in asks]

    def answer(self, prompt, sampling):
        cached = max((shared(prompt, one) for one in self.seen), default=0)
        if not self.settings["enable_prefix_caching"] or os.environ.get("HITS") == "none":
            cached = 0
        text, logprobs = list(prompt), []
        for _ in range(sampling.max_tokens):
            draw = random.Random(repr(text))
            found = draw.sample(range(10, 990), sampling.logprobs)
            row = {token: draw.uniform(5.0, 20.0) for token in found}
            text.append(max(row, key=row.get))
            # Another chunk rounds otherwise. A wrong state changes every logit after a hit.
            error = 0.004 * (self.settings["max_num_batched_tokens"] != 64)
            if self.is_ours and cached:
                error += float(os.environ.get("FAULT", "0"))
            scale = 1.0 - error
            logprobs.append({one: SimpleNamespace(logprob=row[one] * scale) for one in row})
        self.seen.append(text)
        answer = SimpleNamespace(token_ids=text[len(prompt) :], logprobs=logprobs)
        return SimpleNamespace(
            prompt_token_ids=prompt, num_cached_tokens=cached or None, outputs=[answer]
        )


def shared(one, other):
    """Return the number of equal tokens at the beginning, without the last one of ``one``."""
    pairs = zip(one[:-1], other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one) - 1, len(other)))
'''


def check(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the check in the folder that has the stand-in, if any."""
    command = [sys.executable, "-m", "experiments.gpu.vllm_hits", "--model", "a/model"]
    command += ["--out", str(folder), *flags]
    paths = os.pathsep.join([str(folder), str(ROOT)])
    given = {"PYTHONPATH": paths, "SETTINGS": str(folder / "settings")} | environment
    return subprocess.run(
        command, env=os.environ | given, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


SMALL = ("--scale", "20", "--tokens", "3", "--conversations", "2", "--chunk", "64")


def record_of(folder: Path) -> dict[str, Any]:
    """Return the only record in the file of results."""
    [line] = (folder / "vllm_hits.jsonl").read_text().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vllm.py").write_text(STAND_IN)
    return tmp_path


def test_equal_logits_pass_and_each_engine_has_its_settings(folder: Path) -> None:
    done = check(folder, *SMALL, "--unit", "16", "--engine", '{"tensor_parallel_size": 2}')
    assert done.returncode == 0, done.stderr
    record = record_of(folder)
    assert record["passed"] and record["model"] == "a/model" and record["unit"] == 16
    ours, chunked = record["hybridcache"], record["chunked"]
    assert ours["largest_error"] == 0.0 == chunked["cached_tokens"]
    assert chunked["mean_error"] == pytest.approx(0.004)
    assert record["allowed"] == pytest.approx(1.5 * 0.004)
    # Three turns of two conversations, three prompts at a fork, and two edited prompts twice.
    assert ours["answers"] == ours["answers_alike"] == 3 * 2 + 3 + 2 * 2
    assert ours["prompt_tokens"] / 2 < ours["cached_tokens"] == record["vllm"]["cached_tokens"]
    engines = [json.loads(line) for line in (folder / "settings").read_text().splitlines()]
    assert [one["enable_prefix_caching"] for one in engines] == [False, False, True, True]
    assert [one["max_num_batched_tokens"] for one in engines] == [64, 32, 64, 64]
    assert all(one["tensor_parallel_size"] == 2 for one in engines)
    named = [(one.get("scheduler_cls"), one.get("prefix_match_unit")) for one in engines]
    assert named == [(None, None)] * 3 + [("hybridcache.vllm.HybridScheduler", 16)]


def test_other_logits_after_a_hit_fail(folder: Path) -> None:
    done = check(folder, *SMALL, FAULT="0.02")
    assert done.returncode == 1, done.stderr
    record = record_of(folder)
    assert not record["passed"]
    assert record["hybridcache"]["mean_error"] > record["allowed"] > 0.0


def test_a_run_without_hits_fails(folder: Path) -> None:
    """Equal logits say nothing about hits if there are none."""
    done = check(folder, *SMALL, HITS="none")
    assert done.returncode == 1, done.stderr
    record = record_of(folder)
    assert record["hybridcache"]["mean_error"] == 0.0 and not record["passed"]


def test_a_failed_engine_is_no_result(folder: Path) -> None:
    (folder / "vllm.py").write_text("raise RuntimeError('no device')")
    done = check(folder, *SMALL)
    assert done.returncode == 1 and "no device" in done.stderr
    assert not (folder / "vllm_hits.jsonl").exists()


def test_without_vllm_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    # A module of this value counts as absent, also if vLLM is installed.
    blocker = "import sys\nsys.modules['vllm'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    done = check(tmp_path, *SMALL)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("vLLM is not installed in this environment.")
