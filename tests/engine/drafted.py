"""Helpers for tests of speculation: prompts, and engines with drafts on a small model.

The weights are seeded, and the memory begins as NaN.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.engine import load_runner
from engine.plugins.speculation.drafters import Drafter
from engine.requests.request import Request
from engine.runner.sampler import Sampler
from engine.schedule.drafting import Drafting
from engine.text.tokenizer_files import HFTokenizer
from tests.engine.test_hits_change_nothing import HYBRID
from tests.oracle import engine_with

MODEL = HYBRID | {"vocab_size": 320}
MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(max_tokens=40, temperature=0, logprobs=3)
SAMPLING = {
    "greedy": GREEDY,
    "penalties": SamplingParams(
        max_tokens=30, temperature=0, logprobs=2, frequency_penalty=0.7, repetition_penalty=1.3
    ),
    "sampled": SamplingParams(max_tokens=30, temperature=0.3, logprobs=2, top_p=0.9, seed=5),
    "sampled_top_k": SamplingParams(
        max_tokens=30, temperature=0.5, logprobs=0, top_k=20, presence_penalty=0.5, seed=9
    ),
}


class ScriptedDrafter(Drafter):
    """Drafter of known answers: in each step the first ``num_right`` tokens are right, the others
    wrong."""

    name = "scripted"

    def __init__(
        self,
        num_right: Callable[[int, int], int] = lambda done, most: (most, most, 0, 1)[
            done * 5 // 3 % 4
        ],
    ) -> None:
        """``num_right`` is called with the length of the answer so far and the draft length."""
        self.num_right = num_right
        self.answers: dict[bytes, list[int]] = {}

    def learn(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.answers[output.prompt_token_ids.tobytes()] = [*output.token_ids, *range(40)]

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[np.ndarray]:
        return [self._draft(request, most) for request, most in wanted]

    def _draft(self, request: Request, most: int) -> np.ndarray:
        done = len(request.output)
        answer = self.answers[request.tokens[: request.prompt_len].tobytes()]
        draft = np.array(answer[done : done + most], np.int32)
        draft[self.num_right(done, most) :] ^= 1
        return draft


def drafting_engine(
    directory: Path,
    drafter: ScriptedDrafter | None = None,
    geometry: dict[str, Any] = MODEL,
    **settings: Any,
) -> Engine:
    """Return an engine on a dummy model with the config.json ``geometry``.

    With ``drafter``, that drafter takes the place of the setting ``draft``.
    """
    (directory / "config.json").write_text(json.dumps(geometry))
    settings = {
        "model": str(directory),
        "load_format": "dummy",
        "device": "cpu",
        "cache_gib": 0.01,
        "draft": "none" if drafter is None else "tree:5",
        "check": True,
        **settings,
    }
    if settings["draft"] != "none":
        settings["draft_running"] = 64
    config = EngineConfig(**settings)
    runner = load_runner(config)
    runner.tensors.rows.fill_(255)
    hooks: dict[str, Any] = {}
    if drafter is not None:
        hooks["drafting"] = Drafting([(drafter, 5)], max_verified=config.num_step_states)
    parts = {"runner": runner, "sampler": Sampler(), "tokenizer": HFTokenizer()}
    return engine_with(lambda _: hooks, config, **parts)


def engine_with_head(
    directory: Path, draft: str = "mtp", model: dict[str, Any] | None = None, **settings: Any
) -> Engine:
    """Return an engine on a dummy model with a prediction head."""
    return drafting_engine(directory, geometry=MODEL | (model or {}), draft=draft, **settings)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    stem = rng.integers(0, 256, 130).tolist()
    return [stem, stem[:64], stem[:65], [1], [*stem[:100], 7], rng.integers(0, 256, 50).tolist()]


def assert_same(some: Sequence[RequestOutput], others: Sequence[RequestOutput]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.cached_len == other.cached_len
