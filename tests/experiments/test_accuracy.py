"""Tests of the accuracy benchmark: comparison of answers, task files and questions."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest

from experiments.benchmarks import accuracy
from experiments.benchmarks.accuracy import Outcome, Setting, differences, num_moved
from experiments.training.evaluation import KINDS, TEMPLATE, called, questions
from experiments.training.harness import PROBLEMS, write_problems
from experiments.training.tasks import TOOLS, tool_chat


def test_only_answers_of_the_same_formats_are_compared() -> None:
    def outcome(*answers: str) -> Outcome:
        return Outcome({"t": 1.0}, {"t": answers})

    plain, cached = Setting(cache="none"), Setting()
    small, small_cached = Setting(cache="none", states="bfloat16"), Setting(states="bfloat16")
    same = {plain: outcome("a", "b"), cached: outcome("a", "b"), small: outcome("x", "b")}
    assert differences(same) == []
    assert differences(same | {small_cached: outcome("x", "y")}) == [(small_cached, "t", 1)]
    assert [num_moved(same, setting) for setting in same] == [0, 0, 1]


def test_each_format_first_runs_without_a_cache() -> None:
    seen = set()
    for setting in accuracy.settings(quick=False):
        if (setting.weights, setting.states) not in seen:
            assert (setting.cache, setting.draft) == ("none", "none")
        seen.add((setting.weights, setting.states))
    assert {weights for weights, _ in seen} == set(accuracy.WEIGHTS)
    assert {states for _, states in seen} == set(accuracy.STATES)
    checkpoints = {setting.checkpoints for setting in accuracy.settings(quick=False)}
    assert checkpoints == set(accuracy.CHECKPOINTS)


def test_task_files_have_distinct_prompts_with_the_same_examples(tmp_path: Path) -> None:
    write_problems(tmp_path, 5)
    for name in PROBLEMS:
        text = (tmp_path / f"{name}.yaml").read_text()
        [pattern] = re.findall(r'regex_pattern: "(.*)"', text)
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        assert len({row["prompt"] for row in rows}) == 5
        shots = {row["prompt"].rpartition("Question:")[0] for row in rows}
        assert len(shots) == 1 and len(re.findall(pattern, shots.pop())) == 4
        assert all(row["prompt"].endswith("\nAnswer:") and int(row["answer"]) >= 0 for row in rows)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_missing_lm_eval_gives_an_install_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--quick"]) == 2
    assert "pip install 'lm-eval[api]'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_seeded_and_reject_wrong_answers(kind: str) -> None:
    prompts = [question.prompt for question in questions(kind, 4)]
    assert prompts == [question.prompt for question in questions(kind, 4)]
    assert len(set(prompts)) == 4
    assert not any(question.is_correct("no") for question in questions(kind, 4))


def test_correct_look_up_and_tool_call_are_accepted() -> None:
    [question] = questions("look-ups in 8 rows", 1)
    key = question.prompt.rpartition("Look up: ")[2]
    [value] = re.findall(rf"^{key} (\d+)$", question.prompt, re.M)
    assert question.is_correct(f" {value}\n") and not question.is_correct(f" {value}0")
    call = {"name": "get_count", "arguments": {"person": "Ada", "thing": "pens"}}
    assert called(f"<tool_call>\n{json.dumps(call)}\n</tool_call>") == call
    assert called("<tool_call>\n{}") is None


def test_tool_call_prompt_has_the_format_of_the_training() -> None:
    messages = tool_chat(random.Random(1))
    prompt = TEMPLATE.render(messages[:2], tools=TOOLS, add_generation_prompt=True)
    assert TEMPLATE.render(messages, tools=TOOLS).startswith(prompt + "<tool_call>")
