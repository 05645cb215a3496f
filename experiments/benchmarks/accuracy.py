"""Compare answers and scores over caches, drafts and number formats: lm-eval against the server.

    python -m experiments.benchmarks.accuracy                     # generated word problems
    python -m experiments.benchmarks.accuracy --tasks gsm8k --limit 100 --model DIR

Starts `engine serve --exact` on a free loopback port for each setting, and runs lm-eval against it
with its local-completions. With the same formats of weights, states and checkpoints, neither cache
nor drafts may change an answer. The exit code is 1 if one does.

For the built-in model, the results include bits per byte of held-out code by weight format. Needs
the package lm-eval (`pip install 'lm-eval[api]'`).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import BUILTIN_NAME, EngineConfig
from engine.engine import Engine
from engine.plugins.speculation import DRAFT_LENS
from engine.requests.spec import SamplingParams
from engine.text.tokenizer import ByteTokenizer
from experiments.provenance import RESULTS, write_json_lines
from experiments.system.flood import server_port
from experiments.training import corpus
from experiments.training.harness import PROBLEMS, write_problems
from hybridcache.command.parser import Parser

WEIGHTS = {
    "float32": ("--dtype", "float32"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "bfloat16", "--quantization", "int8"),
    "fp8": ("--dtype", "bfloat16", "--quantization", "fp8"),
}
STATES = ("float32", "bfloat16")
CHECKPOINTS = ("auto", "int8")
"""Checkpoint formats.

A running state has no 8-bit format, because it would be rounded with every token and the errors
would add up. A checkpoint is rounded once.
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """Flags of one server. Settings with equal ``weights``, ``states`` and ``checkpoints`` must
    give equal answers."""

    weights: str = "bfloat16"
    states: str = "float32"
    cache: str = "hybrid"
    draft: str = "none"
    checkpoints: str = "auto"

    def flags(self) -> list[str]:
        return [
            *WEIGHTS[self.weights],
            *("--state-dtype", self.states, "--prefix-cache", self.cache, "--draft", self.draft),
            *("--checkpoint-dtype", self.checkpoints),
        ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of lm-eval for one setting."""

    scores: Mapping[str, float]
    """Share of correct answers, by task."""
    answers: Mapping[str, Sequence[str]]
    """Texts in the order of the questions, by task."""


def settings(quick: bool) -> list[Setting]:
    """Return the settings, with "no cache" first for formats with exact hits.

    ``quick`` limits them to the first format.
    """
    drafts = ["none", *DRAFT_LENS, ",".join(DRAFT_LENS)]
    found = []
    for states in STATES[: 1 if quick else None]:
        found.append(Setting(states=states, cache="none"))
        found += [Setting(states=states, draft=draft) for draft in drafts]
    if not quick:
        for checkpoints in CHECKPOINTS[1:]:
            found += [Setting(checkpoints=checkpoints, draft=draft) for draft in drafts]
        for weights in WEIGHTS:
            if weights != Setting.weights:
                found += [Setting(weights, cache=cache) for cache in ("none", "hybrid")]
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def serving(flags: Sequence[str]) -> Iterator[int]:
    """Yield the port of an ``engine serve`` with these flags. Ends the server with the block."""
    command = [sys.executable, "-u", "-m", "engine", "serve", "--port", "0", "--exact", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server_port(server)
        finally:
            server.terminate()


def ask(
    port: int, model: str, tasks: Sequence[str], folder: Path, limit: int | None, clients: int
) -> Outcome:
    """Run lm-eval against the server's ``model`` with ``clients`` concurrent questions.

    ``folder`` contains the generated tasks.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": model,
            "base_url": f"http://127.0.0.1:{port}/v1/completions",
            "tokenizer_backend": None,
            "tokenized_requests": False,
            "num_concurrent": clients,
            "max_retries": 1,
        },
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder)),
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = found["samples"]
    return Outcome(
        {task: round(_score(found["results"][task]), 4) for task in samples},
        {task: [_answer(sample) for sample in _in_order(samples[task])] for task in samples},
    )


def _score(result: Mapping[str, Any]) -> float:
    """Return the first metric that is a number and not an error."""
    return next(
        float(value)
        for name, value in result.items()
        if isinstance(value, float) and "stderr" not in name
    )


def _in_order(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return one sample per question. lm-eval lists each question once per filter."""
    return [by_id for _, by_id in sorted({sample["doc_id"]: sample for sample in samples}.items())]


def _answer(sample: Mapping[str, Any]) -> str:
    return str(sample["resps"][0][0])


def differences(
    outcomes: Mapping[Setting, Outcome],
) -> list[tuple[Setting, str, int]]:
    """Return (setting, task, number) of changed answers, compared with the first setting of the
    same weights, states and checkpoints."""
    firsts: dict[tuple[str, ...], Outcome] = {}
    found = []
    for setting, outcome in outcomes.items():
        formats = setting.weights, setting.states, setting.checkpoints
        first = firsts.setdefault(formats, outcome)
        for task, answers in outcome.answers.items():
            pairs = zip(first.answers[task], answers, strict=True)
            count = sum(expected != answer for expected, answer in pairs)
            if count:
                found.append((setting, task, count))
    return found


def num_moved(outcomes: Mapping[Setting, Outcome], setting: Setting) -> int:
    """Return the number of answers that differ from those of the first setting with the same
    weights.

    State and checkpoint formats cause these differences.
    """
    first = next(outcome for other, outcome in outcomes.items() if other.weights == setting.weights)
    return sum(
        expected != answer
        for task, answers in outcomes[setting].answers.items()
        for expected, answer in zip(first.answers[task], answers, strict=True)
    )


def bits_per_byte(weights: str, num_rows: int, length: int) -> float:
    """Return the bits per byte of held-out modules, with the built-in model in this weight
    format."""
    flags = dict(zip(WEIGHTS[weights][::2], WEIGHTS[weights][1::2], strict=True))
    config = EngineConfig(
        device="cpu",
        dtype=flags["--dtype"],  # type: ignore[arg-type]
        quantization=flags.get("--quantization"),  # type: ignore[arg-type]
        cache_gib=0.1,
    )
    code = ByteTokenizer().encode("".join(corpus.sources(held_out=True)))
    starts = np.linspace(0, len(code) - length, num_rows).astype(int)
    prompts = [code[start : start + length] for start in starts]
    outputs = Engine(config).generate(prompts, SamplingParams(max_tokens=0), prompt_logprobs=0)
    scores = [token.logprob for output in outputs for token in output.prompt_logprobs[1:]]
    return float(-np.mean(scores) / math.log(2))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m experiments.benchmarks.accuracy",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument(
        "--tasks", nargs="+", help="names of lm-eval's tasks (default: word problems)"
    )
    parser.add_argument("--model", help="model directory (default: the built-in model)")
    parser.add_argument("--limit", type=int, help="questions per task (default: all)")
    parser.add_argument("--problems", type=int, default=200, help="word problems of each length")
    parser.add_argument("--rows", type=int, default=32, help="rows of 1,024 held-out bytes")
    parser.add_argument("--clients", type=int, default=4, help="concurrent questions")
    parser.add_argument("--quick", action="store_true", help="one format of weights and states")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.jsonl")
    options = parser.parse_args(arguments)
    try:
        outcomes = _evaluate(options)
    except ModuleNotFoundError as error:
        print(f"accuracy: {error.name} is missing: pip install 'lm-eval[api]'.", file=sys.stderr)
        return 2
    bits = {}
    if options.model is None:
        formats = dict.fromkeys(setting.weights for setting in outcomes)
        bits = {weights: bits_per_byte(weights, options.rows, 1024) for weights in formats}
    wrong = differences(outcomes)
    records: list[dict[str, Any]] = [
        asdict(setting)
        | {"scores": dict(outcome.scores), "other_than_first": num_moved(outcomes, setting)}
        for setting, outcome in outcomes.items()
    ]
    records += [{"weights": w, "bits_per_byte": round(b, 4)} for w, b in bits.items()]
    write_json_lines(
        options.out,
        [*records, {"changed": [[asdict(s), task, count] for s, task, count in wrong]}],
        vars(options) | {"out": options.out.name},
    )
    for record in records:
        print(record)
    for setting, task, count in wrong:
        print(f"{count} answers of {task} changed: {setting}", file=sys.stderr)
    print("no answer changed" if not wrong else "answers changed")
    return 1 if wrong else 0


def _evaluate(options: argparse.Namespace) -> dict[Setting, Outcome]:
    import lm_eval  # noqa: F401  # Fail before a server starts.

    model = ["--model", options.model] if options.model else []
    name = Path(options.model).resolve().name if options.model else BUILTIN_NAME
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_problems(folder, options.problems)
        outcomes = {}
        for setting in settings(options.quick):
            with serving([*model, *setting.flags()]) as port:
                outcomes[setting] = ask(
                    port, name, options.tasks or PROBLEMS, folder, options.limit, options.clients
                )
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
