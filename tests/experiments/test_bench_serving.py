"""Tests of the load generator: summaries of given times, and sweeps with the oracle runner, in
process and over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import httpx
import numpy as np
import pytest

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.text.tokenizer import ByteTokenizer
from experiments.benchmarks import overhead
from experiments.benchmarks import serving as bench_serving
from experiments.benchmarks.serving import random_jobs, sweep, table
from experiments.benchmarks.serving_load import (
    Answer,
    EngineClient,
    HTTPClient,
    Load,
    Piece,
    Prompt,
    Run,
    Targets,
    drive,
    summary,
)
from tests.oracle import OracleRunner, OracleSampler
from tests.served import serving

TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)


def oracle_engine(cache: str) -> Engine:
    config = EngineConfig(prefix_cache=cache)
    runner = OracleRunner(8192, 16, max_model_len=4096)
    return Engine(config, runner=runner, sampler=OracleSampler(), tokenizer=ByteTokenizer())


@contextlib.asynccontextmanager
async def in_process(cache: str) -> AsyncIterator[EngineClient]:
    client = EngineClient(AsyncEngine(oracle_engine(cache)))
    yield client
    await client.close()


@pytest.fixture
def url() -> Iterator[str]:
    with serving(oracle_engine("hybrid")) as (_, port):
        yield f"http://127.0.0.1:{port}"


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
    jobs = random_jobs(6, 300, 5, shared=140)
    loads = [Load(concurrency=1), Load(concurrency=4), Load(per_s=200.0)]
    servers = {cache: in_process(cache) for cache in ("hybrid", "none")}
    records = asyncio.run(sweep(servers, jobs, loads, TARGETS, seconds=60))
    assert [record["requests"] for record in records] == [6] * 6
    assert all(record["tpot_ms"]["p50"] >= 0 for record in records)
    assert all(record["token_hit_rate"] == 0 for record in records[3:])
    # The second prompt saves a state at the branch. Later ones hit 128 of the 140 shared tokens.
    total = sum(len(job[0].tokens) for job in jobs)
    assert records[0]["token_hit_rate"] == pytest.approx(4 * 128 / total)
    assert len(table(records).splitlines()) == 7


def test_http_client_reports_times_and_hits(url: str) -> None:
    async def run(client: HTTPClient) -> Run:
        await client.wait_until_ready(20)
        await client.reset_cache()
        result = await drive(
            client, random_jobs(4, 200, 6, shared=80), Load(concurrency=2), seconds=60
        )
        await client.close()
        return result

    answers = asyncio.run(run(HTTPClient(url))).answers
    assert [answer.num_output for answer in answers] == [6] * 4
    assert all(0 < answer.ttft_s <= answer.e2e_s for answer in answers)
    assert sum(answer.cached_len for answer in answers) >= 64


def test_turns_of_a_job_are_sequential() -> None:
    """The next prompt of a job is sent after the answer to the previous one. Jobs run in
    parallel."""

    class Slow:
        def __init__(self) -> None:
            self.log: list[tuple[str, int]] = []

        async def answer(self, prompt: Prompt) -> AsyncIterator[Piece]:
            self.log.append(("begin", prompt.num_output))
            await asyncio.sleep(0.01)
            yield Piece(1, 0)
            self.log.append(("end", prompt.num_output))

    client = Slow()
    prompt = np.zeros(4, np.int32)
    jobs = [[Prompt(prompt, 10 * job + turn) for turn in range(3)] for job in range(3)]
    run = asyncio.run(drive(client, jobs, Load(concurrency=2), seconds=10))
    assert len(run.answers) == 9
    for job in range(3):
        entries = [entry for entry in client.log if entry[1] // 10 == job]
        assert entries == [
            (event, 10 * job + turn) for turn in range(3) for event in ("begin", "end")
        ]
    begun_in_parallel = client.log[:2]
    assert {event for event, _ in begun_in_parallel} == {"begin"}


def test_time_limit_and_errors_are_reported() -> None:
    class Stuck:
        async def answer(self, prompt: Prompt) -> AsyncIterator[Piece]:
            if prompt.num_output == 2:
                raise httpx.ConnectError("refused")
            await asyncio.sleep(3600)
            yield Piece(1, 0)

    prompt = np.zeros(4, np.int32)
    jobs = [[Prompt(prompt, 2)], [Prompt(prompt, 1)]]
    run = asyncio.run(drive(Stuck(), jobs, Load(concurrency=2), seconds=0.2))
    assert run.num_cut == 1
    assert run.errors == ["ConnectError: refused"]


def test_http_client_rejects_remote_addresses() -> None:
    with pytest.raises(ValueError, match="loopback"):
        HTTPClient("http://example.org:8000")


def test_invalid_settings_give_an_error_message(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "random", "--input", "100", "--shared", "90", "--in-process"]
    assert bench_serving.main(arguments) == 2
    assert capsys.readouterr().err.startswith("bench_serving: --shared must be less than half")


@pytest.mark.parametrize("admission", overhead.ADMISSIONS)
def test_each_admission_policy_is_timed(admission: str) -> None:
    timed = overhead.ordering(admission, num_waiting=12, repeats=1)
    assert (timed["admission"], timed["waiting"]) == (admission, 12)
    assert min(timed["same_ms"], timed["changed_ms"]) >= 0
