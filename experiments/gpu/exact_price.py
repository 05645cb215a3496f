"""Measure the cost of `--exact` in hit rate and TTFT.

Conversations grow turn by turn and reuse all computed tokens, or with `--exact` only those of
prefills. With `--exact`, the states and KV of an answer are computed again as part of the next
prompt. No kernel is slower, so the cost consists of these tokens, in every turn but the first. A
part of ``serve`` and ``big`` of `make gpu`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.engine import Engine
from engine.requests.spec import SamplingParams
from engine.runner.model_runner import ModelRunner
from engine.runner.sampler import Sampler
from engine.text.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class Talk:
    """Size of the conversations. Lengths in tokens."""

    num_conversations: int
    """Number of concurrent conversations."""
    num_turns: int
    num_question: int
    num_answer: int
    num_repeats: int


def price(runner: ModelRunner, config: EngineConfig, talk: Talk) -> Iterator[dict[str, Any]]:
    """Yield one record per mode, with medians over runs and over all turns but the first.

    The runs of both modes alternate.
    """
    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for repeat in range(talk.num_repeats):
        for exact in (False, True) if repeat % 2 else (True, False):
            engine = Engine(
                replace(config, exact=exact), runner=runner, sampler=Sampler(runner.vocab_size)
            )
            runs[exact].append(converse(engine, talk, seed=repeat))
    for exact, found in runs.items():
        medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
        yield {"measure": "exact", "exact": exact, "repeats": talk.num_repeats} | medians
    pairs = zip(runs[True], runs[False], strict=True)
    ratios = [exact["ttft_ms"] / fast["ttft_ms"] for exact, fast in pairs]
    yield {
        "measure": "exact",
        "ttft_ratio_median": statistics.median(ratios),
        "ttft_ratios": [min(ratios), max(ratios)],
    }


def converse(engine: Engine, talk: Talk, seed: int) -> dict[str, float]:
    """Run all conversations, one turn of each at once. Returns the figures of all turns but the
    first."""
    draw = np.random.default_rng(seed)

    def random_tokens(count: int) -> list[int]:
        return draw.integers(0, 256, count).tolist()

    histories = [random_tokens(talk.num_question) for _ in range(talk.num_conversations)]
    sampling = SamplingParams(max_tokens=talk.num_answer, temperature=0.0, ignore_eos=True)
    later: list[RequestOutput] = []
    begin = time.perf_counter()
    for turn in range(talk.num_turns):
        outputs = engine.generate(histories, sampling)
        later += outputs if turn else []
        for history, output in zip(histories, outputs, strict=True):
            history += [*output.token_ids, *random_tokens(talk.num_question)]
    num_prompt = sum(len(output.prompt_token_ids) for output in later)
    num_cached = sum(output.cached_len for output in later)
    return {
        "token_hit_rate": num_cached / num_prompt,
        "computed_per_turn": (num_prompt - num_cached) / len(later),
        "ttft_ms": 1e3 * statistics.median(output.timings.ttft_s or 0.0 for output in later),
        "tpot_ms": 1e3 * statistics.median(o.timings.tpot_s(len(o.output)) or 0.0 for o in later),
        "seconds": time.perf_counter() - begin,
    }
