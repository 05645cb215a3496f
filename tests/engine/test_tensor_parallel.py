"""Tests of ``--tp 2``: two processes and the whole engine. The parts of each family are tested in
``tests/engine/numerics/test_ranks.py``."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import AsyncEngine, ConfigError, Engine, SamplingParams, engine_config
from engine.async_engine import EngineStopped
from engine.interfaces import RunnerLost
from engine.plugins.tensor_parallel import worker_pool
from engine.plugins.tensor_parallel.coordinator import LeadingRunner
from engine.plugins.tensor_parallel.group import TorchGroup
from engine.plugins.tensor_parallel.shared_memory import SharedGroup
from engine.weights.model_config import ModelError
from kernels import exchange

PARAMS = SamplingParams(max_tokens=6, temperature=0, logprobs=2)
BEGINNING = "The same beginning, again and again. " * 8


def make_engine(tp: int, **settings: object) -> Engine:
    config = {"device": "cpu", "dtype": "float32", "cache_gib": 0.02, "check": True}
    return Engine(engine_config(**(config | settings), tp=tp))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = make_engine(2, overlap="on")  # so that tokens go from rank to rank
    yield made
    made.runner.close()


def test_hits_change_no_bit_and_ranks_no_token(engine: Engine) -> None:
    prompts = [BEGINNING + word for word in ("one", "two")]
    together = engine.generate(prompts, PARAMS)
    assert [output.cached_len for output in together] == [0, 256]
    hits = engine.generate(prompts, PARAMS)
    assert [output.cached_len for output in hits] == [256, 256]
    engine.reset_prefix_cache()
    cold = [engine.generate([prompt], PARAMS)[0] for prompt in prompts[:1]]
    assert [output.logprobs for output in together] == [output.logprobs for output in hits]
    assert cold[0].logprobs == hits[0].logprobs
    single = make_engine(1).generate(prompts[:1], PARAMS)[0]
    assert single.token_ids == cold[0].token_ids
    pairs = zip(single.logprobs, cold[0].logprobs, strict=True)
    assert all(abs(one.logprob - two.logprob) < 1e-4 for one, two in pairs)


def test_two_ranks_have_the_capacity_of_one(engine: Engine) -> None:
    memory, single = engine.runner.memory, make_engine(1).runner.memory
    assert (memory.num_kv_tokens, memory.num_slots) == (single.num_kv_tokens, single.num_slots)
    assert 2 * memory.state_bytes == single.state_bytes


@pytest.mark.full
def test_gloo_computes_the_same_bits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the fallback for systems without a compiler."""
    assert isinstance(engine.runner, LeadingRunner)
    assert isinstance(engine.runner.group, SharedGroup)
    monkeypatch.setattr(exchange, "is_available", lambda: False)
    other = make_engine(2, overlap="on")
    assert isinstance(other.runner, LeadingRunner)
    assert isinstance(other.runner.group, TorchGroup)
    prompts = [BEGINNING + word for word in ("one", "two")]
    engine.reset_prefix_cache()
    ours, theirs = (each.generate(prompts, PARAMS) for each in (engine, other))
    assert [output.logprobs for output in ours] == [output.logprobs for output in theirs]
    other.runner.close()


KILLED = """
import os
from engine import Engine, SamplingParams, engine_config
engine = Engine(engine_config(device="cpu", cache_gib=0.02, tp=2))
print(engine.runner.processes[0], flush=True)
while True:
    engine.generate(["again"], SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
"""


@pytest.mark.full
def test_a_killed_engine_leaves_no_rank_and_no_shared_memory() -> None:
    """Check that the ranks end, and that their shared memory has no name."""
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        follower = int(process.stdout.readline())
        time.sleep(0.5)  # Steps are under way.
        maps = Path(f"/proc/{follower}/maps")
        if maps.exists():
            assert "/memfd:hybridcache-ranks (deleted)" in maps.read_text()
        process.kill()
    deadline = time.monotonic() + 60
    while is_running(follower) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(follower)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.full
def test_a_rank_killed_during_a_step_ends_the_engine(engine: Engine) -> None:
    assert isinstance(engine.runner, LeadingRunner)
    (process,) = engine.runner.processes
    os.kill(process, signal.SIGSTOP)  # so that the step is under way
    killer = threading.Timer(0.5, os.kill, (process, signal.SIGKILL))
    killer.start()
    with pytest.raises(RunnerLost, match=r"^rank 1 of 2 was ended by SIGKILL.*; start .* again\.$"):
        engine.generate([BEGINNING], PARAMS)
    with pytest.raises(RunnerLost, match="rank 1 of 2 was ended by SIGKILL"):
        engine.generate([BEGINNING], PARAMS)


@pytest.mark.full
def test_drafts_change_no_token_and_a_stopped_rank_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(2, draft="tree:4")
    runner = engine.runner
    assert isinstance(runner, LeadingRunner)
    params = SamplingParams(max_tokens=24, temperature=0)
    (drafted,) = engine.generate([BEGINNING], params)
    assert drafted.drafts is not None and drafted.drafts.accepted.total() > 0
    assert drafted.token_ids == make_engine(1).generate([BEGINNING], params)[0].token_ids
    (process,) = runner.processes
    os.kill(process, signal.SIGSTOP)
    runner.group.set_timeout(1.0)
    monkeypatch.setattr(worker_pool, "LAST_WORDS_S", 0.5)
    with pytest.raises(RunnerLost, match=r"^rank 1 of 2 did not answer in time .* again\.$"):
        engine.generate([BEGINNING], params)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.full
def test_a_rank_killed_while_idle_ends_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = make_engine(2)
    runner, engine = made.runner, AsyncEngine(made)
    engine.start()
    assert isinstance(runner, LeadingRunner)
    (process,) = runner.processes
    os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while engine.is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.is_alive
    assert "The engine ended: rank 1 of 2 was ended by SIGKILL" in caplog.text
    with pytest.raises(EngineStopped):
        asyncio.run(_submit(engine))


async def _submit(engine: AsyncEngine) -> None:
    engine.submit([1, 2, 3])


@pytest.mark.parametrize(
    "settings, error, sentence",
    [
        ({"tp": 0}, ConfigError, "tp must be an integer of 1 or more"),
        ({"tp": 2, "draft": "mtp"}, ConfigError, "--tp does not support the multi-token head"),
        ({"tp": 2, "graphs": "all"}, ConfigError, "--tp does not support graphs"),
        ({"tp": 2, "device": "cuda:0"}, ConfigError, "remove the number of cuda:0"),
        (
            {"tp": 3},
            ModelError,
            r"^--tp 3 is not possible for this model: 3 ranks cannot divide 4 key .* evenly\.$",
        ),
    ],
)
def test_unsupported_settings_are_refused(
    settings: dict[str, object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        Engine(engine_config(**settings))
