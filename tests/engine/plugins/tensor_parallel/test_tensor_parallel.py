"""Tests of ``--tp 2``: two processes and the whole engine. The parts of each family are tested in
``tests/engine/weights/test_ranks.py``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import Engine, EngineConfig, SamplingParams
from engine.errors import RunnerLost
from engine.plugins.tensor_parallel import coordinator
from engine.plugins.tensor_parallel.coordinator import LeadingRunner
from tests.endurance.faults import is_gone
from tests.waiting import wait_until

PARAMS = SamplingParams(max_tokens=6, temperature=0, logprobs=2)
BEGINNING = "The same beginning, again and again. " * 8


def make_engine(tp: int, **settings: object) -> Engine:
    config = {"device": "cpu", "dtype": "float32", "cache_gib": 0.02, "check": True}
    return Engine(EngineConfig(**(config | settings), tp=tp))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = make_engine(2, overlap="on")  # so that tokens go from rank to rank
    yield made
    made.runner.followers.close()


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


KILLED = """
from engine import Engine, SamplingParams, EngineConfig
engine = Engine(EngineConfig(device="cpu", cache_gib=0.02, tp=2))
print(engine.runner.followers._all[0].process.pid, flush=True)
while True:
    engine.generate(["again"], SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
"""


@pytest.mark.full
def test_a_killed_engine_leaves_no_rank(tmp_path: Path) -> None:
    command, env = [sys.executable, "-c", KILLED], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        follower = int(process.stdout.readline())
        time.sleep(0.5)  # Steps are under way.
        process.kill()
    wait_until(lambda: is_gone(follower))
    assert not [*tmp_path.iterdir()]


@pytest.mark.full
def test_drafts_change_no_token_and_a_stopped_rank_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinator, "TIMEOUT_S", 20.0)
    monkeypatch.setattr(coordinator, "LAST_WORDS_S", 0.5)
    engine = make_engine(2, draft="tree:4")
    runner = engine.runner
    assert isinstance(runner, LeadingRunner)
    params = SamplingParams(max_tokens=24, temperature=0)
    (drafted,) = engine.generate([BEGINNING], params)
    assert drafted.drafts is not None and sum(drafted.drafts.accepted.values()) > 0
    assert drafted.token_ids == make_engine(1).generate([BEGINNING], params)[0].token_ids
    process = runner.followers._all[0].process.pid
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(RunnerLost, match=r"^rank 1 of 2 did not answer in time .* again\.$"):
        engine.generate([BEGINNING], params)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
