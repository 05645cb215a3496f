"""Helpers for tests of transfers: a prefill engine, and decode engines connected to it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine import AsyncEngine, Engine, EngineConfig, RequestSpec, SamplingParams
from engine.engine import load_runner
from engine.runner.sampler import Sampler
from hybridcache.radix.protocol import PromptBoundaries
from tests.engine import test_hits_change_nothing as hits

ROOT = Path(__file__).resolve().parents[4]
GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=3)
SMALL = {"cache_gib": 0.05, "check": True, "device": "cpu"}
PATIENT = {"transfer_timeout_s": 120.0}
"""Time limit of a transfer that no machine exceeds."""


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(97, 122, length).tolist()


def decode_engine(port: int, **settings: object) -> Engine:
    """Return a decode engine. Its memory begins as NaNs, so reads of unwritten memory show."""
    settings = SMALL | PATIENT | {"fetch_above": 64} | settings
    config = EngineConfig(role="decode", prefill=(f"127.0.0.1:{port}",), **settings)
    runner = load_runner(config)
    runner.tensors.rows.fill_(255)
    return Engine(config, runner=runner, sampler=Sampler())


def prefix(prompt: bytes) -> RequestSpec:
    """Return the request that a decode engine sends for a prefix."""
    sampling = SamplingParams(max_tokens=1, temperature=0)
    known = PromptBoundaries(answer_survives=False)
    return RequestSpec(prompt, sampling, boundaries=known)  # type: ignore[arg-type]


def prefill_config(**settings: object) -> EngineConfig:
    settings = SMALL | PATIENT | settings
    return EngineConfig(role="prefill", transfer_at="127.0.0.1:0", **settings)


@contextlib.contextmanager
def prefill_thread(**settings: object) -> Iterator[Engine]:
    """Run a prefill engine in a thread of this process."""
    engine = Engine(prefill_config(**settings))
    running = AsyncEngine(engine)
    running.channel.start()
    try:
        yield engine
    finally:
        running.stop()


@contextlib.contextmanager
def prefill_process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a prefill engine in its own process, which sends little until it is confirmed. Yield the
    process and the port."""
    code = (
        "from tests.engine.plugins.disaggregation.pair import *\n"
        "from engine.plugins.disaggregation import prefill_server\n"
        "prefill_server.PIECE_BYTES, prefill_server.MAX_QUEUED_BYTES = 1 << 15, 1\n"
        "with prefill_thread() as engine:\n"
        "    print(engine.plugins['disaggregation'].address[1], flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def plain_engine(**settings: object) -> Engine:
    return Engine(EngineConfig(**(SMALL | settings)))


def assert_same(one: Engine, other: Engine, prompts: list[list[int]]) -> None:
    """Check that both engines give the same tokens and bits of log-probabilities."""
    hits.assert_same(one.generate(prompts, GREEDY), other.generate(prompts, GREEDY))
