"""Few-shot word problems as tasks of lm-eval: YAML files, each with a file of generated questions.

All questions of a task follow the same solved problems, so a prefix cache can reuse them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from experiments.training.tasks import word_problem

SHOTS = 4
PROBLEMS = tuple(f"problems_{steps}" for steps in (1, 2, 3))
"""Task names, by the number of steps of their problems."""

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 100
  do_sample: false
  temperature: 0.0
filter_list:
  - name: answer
    filter:
      - function: regex
        regex_pattern: "#### (-?[0-9]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_problems(folder: Path, count: int, seed: int = 0) -> None:
    """Write one task for each of ``PROBLEMS``, with ``count`` questions."""
    for num_steps, name in enumerate(PROBLEMS, start=1):
        rng = random.Random(f"{seed} {name}")
        solved = [word_problem(rng, num_steps) for _ in range(SHOTS)]
        shots = "".join(f"Question: {p.question}\nAnswer: {p.working}\n\n" for p in solved)
        problems = [word_problem(rng, num_steps) for _ in range(count)]
        data = folder / f"{name}.jsonl"
        data.write_text(
            "".join(
                json.dumps(
                    {
                        "prompt": f"{shots}Question: {problem.question}\nAnswer:",
                        "answer": str(problem.answer),
                    }
                )
                + "\n"
                for problem in problems
            ),
            encoding="utf-8",
        )
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, data=data), encoding="utf-8")
