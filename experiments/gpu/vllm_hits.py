"""Compare vLLM's logits after hits of our scheduler with those without a cache, on any device.

    python -m experiments.gpu.vllm_hits --model Qwen/Qwen3.5-4B [--out DIR] [--engine JSON]

Needs vLLM, not the engine of this project. A wrong state is silent: answers only get worse. So the
same prompts are computed in four engines, one after another, each in a process:

- none: without a prefix cache
- chunked: without a prefix cache, and with half of the tokens per step. Its difference from
  ``none`` is the rounding that another chunk causes.
- vllm: with vLLM's own cache
- hybridcache: with our scheduler and ``--prefix-match-unit``

The prompts are conversations, branches and edits, with the answers of ``none`` in them. The check
passes if our logits differ from those of ``none`` at most ``MORE`` times as much as the larger of
``chunked`` and ``vllm`` does, and more than half of the tokens come from the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RUNS = ("none", "chunked", "vllm", "hybridcache")
MORE = 1.5
"""Allowed error of ``hybridcache``, relative to the larger one of ``chunked`` and ``vllm``."""
NUM_LOGITS = 20
"""Largest logits that are compared at each token."""
ROUNDING = 2.0**-8
"""Error that is always allowed: one place of bfloat16, relative to the logit's size."""


def engine_of(run: str, options: argparse.Namespace) -> Any:
    """Build the engine of a run."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "model": options.model,
        "max_model_len": options.max_len,
        "max_num_batched_tokens": options.chunk // (2 if run == "chunked" else 1),
        "enable_prefix_caching": run in ("vllm", "hybridcache"),
        "max_logprobs": NUM_LOGITS,
        "logprobs_mode": "raw_logits",
        "seed": 0,
    }
    if run == "hybridcache":
        settings |= {
            "scheduler_cls": "hybridcache.vllm.HybridScheduler",
            "prefix_match_unit": options.unit,
        }
    return LLM(**(settings | options.engine))


def answer(llm: Any, prompts: list[list[int]], num_tokens: int) -> list[dict[str, Any]]:
    """Answer all prompts at once, greedily."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=NUM_LOGITS, detokenize=False
    )
    asks = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = []
    for output in llm.generate(asks, sampling, use_tqdm=False):
        end = output.outputs[0]
        logits = [{str(i): one.logprob for i, one in row.items()} for row in end.logprobs]
        found.append(
            {
                "prompt_len": len(output.prompt_token_ids),
                "cached_len": output.num_cached_tokens or 0,
                "tokens": list(end.token_ids),
                "logits": logits,
            }
        )
    return found


def prompts_of(llm: Any, options: argparse.Namespace) -> Rounds:
    """Return the prompts of each round, with the answers of this engine in them."""
    draw = random.Random(1)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def words(num_tokens: int) -> list[int]:
        return [draw.randrange(10, vocabulary - 10) for _ in range(num_tokens)]

    system, scale = words(options.scale * 3), options.scale
    histories = [[*system, *words(scale)] for _ in range(options.conversations)]
    rounds = []
    for turn in range(3):
        rounds.append([[*one] for one in histories])
        for history, found in zip(histories, answer(llm, histories, options.tokens), strict=True):
            history += [*found["tokens"], *words(scale + 17 * turn)]
    rounds.append([[*histories[0], *words(scale)] for _ in range(3)])
    rounds.append([[*one[: 4 * scale], *words(33), *one[4 * scale + 33 :]] for one in histories])
    rounds.append(rounds[-1])
    return rounds


Rounds = list[list[list[int]]]


def compute(run: str, options: argparse.Namespace, rounds: Rounds) -> tuple[Rounds, list[Any]]:
    """Compute a run, and the prompts if ``rounds`` is empty. Returns them and their answers."""
    llm = engine_of(run, options)
    rounds = rounds or prompts_of(llm, options)
    return rounds, [one for prompts in rounds for one in answer(llm, prompts, options.tokens)]


def compare(mine: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the difference of a run from that without a cache, up to the first other token."""
    largest, squares, count, same = 0.0, 0.0, 0, 0
    for ours, theirs in zip(mine, plain, strict=True):
        same += ours["tokens"] == theirs["tokens"]
        for step, (row, other) in enumerate(zip(ours["logits"], theirs["logits"], strict=True)):
            for token in row.keys() & other.keys():
                error = abs(row[token] - other[token]) / max(abs(other[token]), 1.0)
                largest = max(largest, error)
                squares, count = squares + error * error, count + 1
            if ours["tokens"][step] != theirs["tokens"][step]:
                break
    return {
        "largest_error": largest,
        "mean_error": math.sqrt(squares / max(count, 1)),
        "answers_alike": same,
        "answers": len(mine),
        "prompt_tokens": sum(one["prompt_len"] for one in mine),
        "cached_tokens": sum(one["cached_len"] for one in mine),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name or folder")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the result")
    parser.add_argument("--unit", type=int, default=32, help="--prefix-match-unit")
    parser.add_argument("--chunk", type=int, default=8192, help="--max-num-batched-tokens")
    parser.add_argument("--max-len", type=int, default=16384, help="--max-model-len")
    parser.add_argument("--scale", type=int, default=500, help="tokens of a message")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of LLM")
    options = parser.parse_args()
    if find_spec("vllm") is None:
        parser.error("vLLM is not installed in this environment.")
    found: dict[str, Any] = {"check": "hits in vLLM", "model": options.model, "unit": options.unit}
    answers, rounds = dict[str, list[Any]](), Rounds()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for run in RUNS:
            print(f"{run} ...", flush=True)
            rounds, answers[run] = processes.submit(compute, run, options, rounds).result()
    found |= {run: compare(answers[run], answers["none"]) for run in RUNS[1:]}
    ours = found["hybridcache"]
    allowed = MORE * max(found["chunked"]["mean_error"], found["vllm"]["mean_error"], ROUNDING)
    is_cached = ours["cached_tokens"] > ours["prompt_tokens"] / 2
    found |= {"allowed": allowed, "passed": ours["mean_error"] <= allowed and is_cached}
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "vllm_hits.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
