"""Tests of the engine in its own process: the same outputs as in a thread, and the death of either
side."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import numpy as np
import pytest

from engine import Engine, EngineConfig, RequestOutput, RequestSpec, SamplingParams
from engine.errors import EngineStopped, StepFailed
from engine.front.async_engine import AsyncEngine
from engine.front.worker.process_channel import ProcessChannel, start_engine
from engine.front.worker.spawn import spawn
from engine.messages import Ask
from engine.text.tokenizer_files import HFTokenizer
from hybridcache.radix.protocol import PromptBoundaries
from tests.engine.front.test_async_engine import read
from tests.engine.schedule.test_scheduler_machine import answer
from tests.oracle import OracleRunner, OracleSampler
from tests.refused import refused
from tests.watchdog import Watchdog

BOOT = """
import json, sys, time
sys.path[:] = json.loads(sys.argv[1])
import engine.front.worker.process_channel as worker
from tests.oracle import OracleRunner
from tests.oracle import OracleSampler
from engine.text.tokenizer_files import HFTokenizer

class Runner(OracleRunner):
    num_steps = 0
    def forward(self, *given):
        self.num_steps += 1
        {step}
        return super().forward(*given)

Made = worker.Engine
def make(config):
    runner = Runner({kv_tokens}, 16, max_model_len=4096)
    return Made(config, runner=runner, sampler=OracleSampler(), tokenizer=HFTokenizer())
worker.Engine = make
worker.screen_rows = lambda made, address: [("oracle", address)]
worker.leave(worker.main(*sys.argv[2:]))
"""
"""Code that starts a process with an oracle in place of a model, which is fast."""
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=3000, ignore_eos=True)


def run(
    scenario: Callable[[AsyncEngine], Awaitable[None]],
    step: str = "pass",
    kv_tokens: int = 8192,
    **settings: object,
) -> AsyncEngine:
    """Run ``scenario`` with a started engine, and stop it afterwards.

    ``step`` is code that runs before every step.
    """
    boot = BOOT.format(step=step, kv_tokens=kv_tokens)
    config = EngineConfig(**{"check": True} | settings)
    engine, screen = start_engine(config, spawn(config, "here", boot))
    assert screen.split() == ["oracle", "here"]

    async def main() -> None:
        engine.start()
        try:
            await asyncio.wait_for(scenario(engine), 300)
        finally:
            await asyncio.to_thread(engine.stop)
            await engine.drain()

    asyncio.run(main())
    assert not engine.is_alive
    with pytest.raises(ProcessLookupError):
        os.kill(engine.channel.pid, 0)
    return engine


async def assert_nothing_held(engine: AsyncEngine) -> None:
    report = await engine.report()
    assert report.num_running == report.num_waiting == report.kv.held == report.slots.held == 0
    for pool in (report.kv, report.slots, report.bytes):
        assert pool.free + pool.cached + pool.held == pool.total


KNOWN = PromptBoundaries((np.int64(64),), False)
SPECS = (
    RequestSpec([*range(200)], LONG),
    RequestSpec([*range(200), 7], SamplingParams(max_tokens=9, logprobs=2), namespace="tenant"),
    RequestSpec([5] * 70, SamplingParams(max_tokens=4), prompt_logprobs=1, boundaries=KNOWN),
    RequestSpec("text", SamplingParams(max_tokens=60, stop=("x", "\n"), seed=2**63 - 1)),
    RequestSpec([9] * 90, SamplingParams(max_tokens=5, logit_bias={3: 1.0})),
)


UNCOMPARED = ("request_id", "timings", "answer")


def test_a_process_gives_the_outputs_of_a_thread_until_it_is_killed() -> None:
    """Compare every field of every output except its times, drafts included. Its death fails all
    waiting callers."""
    runner = OracleRunner(8192, 16, max_model_len=4096)
    settings = {"draft": "tree:4"}
    alone = Engine(
        EngineConfig(**settings), runner=runner, sampler=OracleSampler(), tokenizer=HFTokenizer()
    )

    async def scenario(engine: AsyncEngine) -> None:
        for spec in (*SPECS, SPECS[0]):
            expected = [*alone.stream(spec)]
            for ours, theirs in zip(await read(engine.submit(spec)), expected, strict=True):
                for name in RequestOutput.__struct_fields__:
                    if name not in UNCOMPARED:
                        assert getattr(ours, name) == getattr(theirs, name), name
                for name in ("text", "logprobs", "prompt_logprobs", "token_ids"):
                    assert getattr(ours, name) == getattr(theirs, name), name
                assert np.array_equal(ours.prompt_token_ids, theirs.prompt_token_ids)
            assert 0 <= ours.timings.queue_s <= ours.timings.ttft_s <= ours.timings.e2e_s < 300
        assert ours.drafts is not None and sum(ours.drafts.accepted.values()) > 100
        views = await engine.ask(Ask("cache_view")), alone.cache_view()
        figures = [view.pop("queue")["figures"] for view in views]  # They contain times.
        assert figures[0].keys() == figures[1].keys()
        assert json.dumps(views[0]) == json.dumps(views[1])
        await engine.ask(Ask("reset_cache"))
        assert (await engine.report()).kv.cached == 0
        await assert_nothing_held(engine)

        await check_death(engine)

    slow = "if any(one.start > 450 for one in given[0].segments): time.sleep(0.02)"  # of ENDLESS
    assert "ended by SIGKILL" in str(run(scenario, step=slow, **settings).failure)


async def check_death(engine: AsyncEngine) -> None:
    reason = "ended by SIGKILL"
    stream = engine.submit(RequestSpec([1], ENDLESS))
    await anext(stream)
    report = asyncio.ensure_future(engine.report())
    await asyncio.sleep(0)
    os.kill(engine.channel.pid, signal.SIGKILL)
    with pytest.raises(EngineStopped, match=reason):
        await read(stream)
    await asyncio.gather(report, return_exceptions=True)
    refused(reason, engine.submit, [1], kind=EngineStopped)
    with pytest.raises(EngineStopped, match=reason):
        await engine.report()
    await engine.drain()


def test_one_failed_step_fails_its_requests_and_two_end_the_engine() -> None:
    step = "if self.num_steps in (5, 20, 21): raise RuntimeError('a broken kernel')"

    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(StepFailed, match="the step that computed it failed"):
            await read(engine.submit(RequestSpec([1], LONG)))
        few = SamplingParams(max_tokens=3, ignore_eos=True)
        assert (await read(engine.submit(RequestSpec([1], few))))[-1].finish_reason == "length"
        await assert_nothing_held(engine)
        streams = [engine.submit(RequestSpec([i], LONG)) for i in range(2)]
        ends = await asyncio.gather(*map(read, streams), return_exceptions=True)
        assert isinstance(ends[0], StepFailed | EngineStopped)
        with pytest.raises(EngineStopped, match="has failed; see its log"):
            for _ in range(100):
                await read(engine.submit(RequestSpec([1], few)))
        while engine.failure is None:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineStopped):
            await engine.report()

    assert "has failed" in str(run(scenario, step=step, max_running=2).failure)


def test_a_shortage_is_waited_for_before_requests_and_then_the_engine_end() -> None:
    """Steps of the engine and messages that the server cannot decode for lack of memory are
    repeated, and no token is lost. If it lasts, requests fail with the reason."""
    step = "if self.num_steps in (5, 20, 21, 22, 23) or self.num_steps > 480: raise MemoryError"

    async def scenario(engine: AsyncEngine) -> None:
        assert isinstance(engine.channel, ProcessChannel)
        decoder, numbers = engine.channel._sockets._decoder, itertools.count()

        def decode(data: bytes) -> object:
            if next(numbers) % 50 == 3:
                raise MemoryError
            return decoder.decode(data)

        engine.channel._sockets._decoder = SimpleNamespace(decode=decode)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        outputs = await read(engine.submit(RequestSpec([1], LONG)))
        tokens, _, _ = answer([1], LONG, exact=False)
        assert [token for one in outputs for token in one.new_token_ids] == tokens
        with pytest.raises(EngineStopped, match="has no memory for the request now"):
            await read(engine.submit(RequestSpec([1], LONG)))
        with pytest.raises(EngineStopped, match="has failed; see its log"):
            await read(engine.submit(RequestSpec([1], LONG)))

    run(scenario, step=step)


def test_the_watchdog_of_all_tests_finds_an_output_that_no_process_has() -> None:
    """Also the replies to heartbeats are lost. Nothing is found while a step is computed."""
    watchdog = Watchdog(tick_s=0.05)

    async def scenario(engine: AsyncEngine) -> None:
        watchdog.fronts.add(engine)
        watchdog.start()
        await read(engine.submit([*range(200)], LONG))
        assert not watchdog.found
        engine.receive = lambda message: None
        with pytest.raises(AssertionError, match="lost"):
            await read(engine.submit([1, 2, 3], LONG))
        watchdog.stopped.set()
        del engine.receive

    run(
        scenario,
        step="end = time.process_time() + 0.02\n        while time.process_time() < end: pass",
    )
