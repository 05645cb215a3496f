"""Tests of the load generator: summaries of given times, and sweeps with the oracle runner, in
process and over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest

from engine.async_engine import AsyncEngine
from engine.messages import Ask
from engine.requests.request import SamplingParams
from experiments.benchmarks import overhead
from experiments.benchmarks.serving import (
    Answer,
    Load,
    Piece,
    Prompt,
    Run,
    Targets,
    conversation_jobs,
    summary,
    sweep,
)
from tests.engine.server.conftest import oracle_engine

TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)


class EngineClient:
    """Stand-in for ``HTTPClient``, of an engine in this process."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        engine.start()

    async def answer(self, prompt: Prompt) -> AsyncIterator[Piece]:
        sampling = SamplingParams(max_tokens=prompt.num_output, temperature=0.0, ignore_eos=True)
        stream = self._engine.submit(prompt.tokens.tolist(), sampling)
        try:
            async for output in stream:
                yield Piece(len(output.output), output.cached_len)
        finally:
            stream.abort()

    async def reset_cache(self) -> None:
        await self._engine.ask(Ask("reset_cache"))

    async def close(self) -> None:
        await self._engine.drain()


@contextlib.asynccontextmanager
async def in_process(cache: str) -> AsyncIterator[EngineClient]:
    client = EngineClient(AsyncEngine(oracle_engine(prefix_cache=cache)))
    yield client
    await client.close()


def test_summary_follows_the_definitions() -> None:
    """TPOT = (E2E - TTFT) / (n - 1). Goodput counts requests within both targets. The hit rate is
    one of tokens."""
    answers = [
        Answer(1.0, (1.5, 1.6, 1.9), num_prompt=300, num_output=3, cached_len=100),
        Answer(2.0, (4.0,), num_prompt=100, num_output=1, cached_len=0),
    ]
    sums = summary(Run(answers, num_cut=1, errors=(), seconds=4.0), TARGETS)
    assert answers[0].tpot_s == pytest.approx(0.2)
    assert answers[1].tpot_s is None
    assert sums["ttft_ms"] == pytest.approx({"mean": 1250, "p50": 1250, "p99": 1985})
    assert sums["itl_ms"] == pytest.approx({"mean": 200, "p50": 200, "p99": 298})
    assert sums["e2e_ms"]["mean"] == pytest.approx(1450)
    assert sums["output_tokens_per_s"] == 1.0
    assert sums["token_hit_rate"] == 0.25
    assert sums["goodput_per_s"] == 0.0
    lax = summary(Run(answers, 0, (), 4.0), Targets(2.5, 0.3))
    assert lax["goodput_per_s"] == 0.5


def test_sweep_reports_hit_rates_with_and_without_cache() -> None:
    draw = np.random.default_rng(0)
    shared = draw.integers(0, 256, 140, dtype=np.int32)
    lengths = draw.integers(150, 450, 6, endpoint=True) - 140
    unique = [draw.integers(0, 256, length, dtype=np.int32) for length in lengths]
    jobs = [[Prompt(np.concatenate((shared, tokens)), 5)] for tokens in unique]
    loads = [Load(concurrency=1), Load(concurrency=4), Load(per_s=200.0)]
    servers = {cache: in_process(cache) for cache in ("hybrid", "none")}
    works = sweep(servers, jobs, loads, TARGETS, seconds=60)
    records = [work() for _, work in works]
    assert [record["requests"] for record in records] == [6] * 6
    assert all(record["tpot_ms"]["p50"] >= 0 for record in records)
    assert all(record["token_hit_rate"] == 0 for record in records[3:])
    # The second prompt saves a state at the branch. Later ones hit 128 of the 140 shared tokens.
    total = sum(len(job[0].tokens) for job in jobs)
    assert records[0]["token_hit_rate"] == pytest.approx(4 * 128 / total)
    unused = sweep({"none": in_process("none")}, jobs, loads, TARGETS, seconds=60)
    assert [name for name, _ in unused] == [f"none, {load}" for load in loads]  # Starts no server.


def test_conversations_grow_up_to_the_longest_prompt() -> None:
    jobs = conversation_jobs(4, vocab_size=300, cap=2000, num_output=50)
    assert len(jobs) == 4
    for job in jobs:
        lengths = [len(prompt.tokens) for prompt in job]
        assert lengths == sorted(lengths) and lengths[-1] <= 2000
        assert all(prompt.tokens.max() < 300 for prompt in job)
        assert all(1 <= prompt.num_output <= 50 for prompt in job)
        assert np.array_equal(job[-1].tokens[: lengths[0]], job[0].tokens)


@pytest.mark.parametrize("admission", overhead.ADMISSIONS)
def test_each_admission_policy_is_timed(admission: str) -> None:
    timed = overhead.ordering(admission, num_waiting=12, repeats=1)
    assert (timed["admission"], timed["waiting"]) == (admission, 12)
    assert min(timed["same_ms"], timed["changed_ms"]) >= 0
