"""Tests of ``AsyncEngine``: concurrent callers, slow readers, aborts, failures and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter

import numpy as np
import pytest

from engine import AsyncEngine, Engine, EngineConfig, QueueFull, RequestOutput, SamplingParams
from engine.errors import DuplicateId, EngineStopped, StepFailed
from engine.front.async_engine import RequestStream, ThreadChannel
from engine.messages import Alive, Ask
from engine.requests.request import RequestSpec
from engine.schedule.scheduler import Batch
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.scheduling.planner import StepPlanner
from tests.engine.schedule.test_scheduler_machine import answer
from tests.oracle import Fingerprints, OracleRunner, OracleSampler
from tests.watchdog import PATIENCE, Watchdog

ONE = SamplingParams(max_tokens=1)
ENDLESS = SamplingParams(max_tokens=4000)


class GatedRunner(OracleRunner):
    """Runner that computes one step per permit, or all steps once ``is_open`` is set."""

    step_s = 0.0
    """Pause in each step."""

    def __init__(self) -> None:
        super().__init__(8192, 16)
        self.permits = threading.Semaphore(0)
        self.is_open = False

    def allow(self, steps: int = 0) -> None:
        self.is_open |= not steps
        self.permits.release(max(steps, 1))

    def forward(self, batch: Batch, drawn: Sequence[int] = ()) -> object:
        if not self.is_open:
            self.permits.acquire()
        time.sleep(self.step_s)
        return super().forward(batch, drawn)


def serve(
    scenario: Callable[[AsyncEngine, GatedRunner], Awaitable[None]],
    *,
    gated: bool = False,
    **settings: object,
) -> Engine:
    """Run ``scenario`` with a started engine, and check that it holds no memory afterwards."""
    runner = GatedRunner()
    runner.is_open = not gated
    engine = Engine(EngineConfig(check=True, **settings), runner=runner, sampler=OracleSampler())
    async_engine = AsyncEngine(engine)

    async def main() -> None:
        async_engine.start()
        try:
            await asyncio.wait_for(scenario(async_engine, runner), 300)
        finally:
            runner.allow()
            await asyncio.to_thread(async_engine.stop)

    asyncio.run(main())
    engine.check()
    report = engine.report()
    assert report.kv.held == report.slots.held == report.num_running == report.num_waiting == 0
    return engine


async def read(stream: object) -> list[RequestOutput]:
    return [output async for output in stream]


def test_an_abort_during_a_step_takes_effect_when_it_ends() -> None:
    async def scenario(engine: AsyncEngine, runner: GatedRunner) -> None:
        stream = engine.submit([1, 2, 3], ENDLESS)
        runner.allow(3)
        first = await anext(stream)
        assert len(first.new_token_ids) == 1
        reader = asyncio.create_task(read(stream))
        stream.abort()
        stream.abort()
        runner.allow()
        outputs = await reader
        assert outputs[-1].finish_reason == "abort"
        assert (await engine.report()).kv.held == 0

    serve(scenario, gated=True)


def test_one_stream_has_the_outputs_of_several_requests() -> None:
    async def scenario(engine: AsyncEngine, runner: GatedRunner) -> None:
        stream = RequestStream(engine.abort)
        for name, params in (("a", ENDLESS), ("b", ONE)):
            spec = RequestSpec(np.array([1, 2, 3], np.int32), params, request_id=name)
            engine.submit_valid(spec, stream)
        with pytest.raises(DuplicateId):
            engine.submit_valid(spec, stream)
        stream.abort("stop", "a")
        outputs = await read(stream)
        ends = {one.request_id: one.finish_reason for one in outputs if one.is_finished}
        assert ends == {"a": "stop", "b": "length"}
        assert list(stream.answers) == ["a", "b"]
        assert isinstance(engine.channel, ThreadChannel)
        ended = engine.channel.host.engine.recent.listed()
        assert [one.answer for _, one in ended] == [None, None], "only the reader adds up"
        assert await read(stream) == await read(RequestStream(engine.abort)) == []

    serve(scenario)


def test_an_output_that_its_reader_waits_for_can_be_handled_at_once() -> None:
    """An exception ends the reader. The last output is never handled."""

    async def scenario(engine: AsyncEngine, runner: GatedRunner) -> None:
        handled = list[int]()

        def handle(output: RequestOutput) -> bool:
            handled.append(output.num_tokens)
            return bool(1 / (9 - output.num_tokens))

        stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=4))
        stream.handle = handle
        assert [output.num_tokens for output in await read(stream)] == [4]
        assert handled == [1, 2, 3]
        stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=30))
        stream.handle = handle
        with pytest.raises(ZeroDivisionError):
            await read(stream)
        stream.abort()

    serve(scenario)


@pytest.mark.parametrize("method", ["abort", "reset_prefix_cache", "run_idle_tasks"])
def test_a_lack_of_memory_between_two_steps_ends_the_command_alone(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other request, which starts again with the cache, gets its answer."""
    places = {
        "abort": (StepPlanner, "leave"),
        "reset_prefix_cache": (HybridRadixCache, "reset"),
        "run_idle_tasks": (Engine, "run_idle_tasks"),
    }
    owner, name = places[method]
    original, num_failures = getattr(owner, name), 0

    def failing(*arguments: object, **options: object) -> object:
        nonlocal num_failures
        num_failures += 1
        monkeypatch.setattr(owner, name, original)
        raise MemoryError

    async def scenario(engine: AsyncEngine, runner: GatedRunner) -> None:
        streams = [engine.submit([number, 2, 3], ENDLESS) for number in range(2)]
        for stream in streams:
            await anext(stream)
        monkeypatch.setattr(owner, name, failing)
        if method == "reset_prefix_cache":
            with pytest.raises(StepFailed):
                await engine.ask(Ask("reset_cache"))
        streams[0].abort()
        assert (await read(streams[0]))[-1].finish_reason == "abort"
        streams[1].abort("stop")
        outputs = await read(streams[1])
        tokens, _, _ = answer([1, 2, 3], ENDLESS, exact=False)
        assert list(outputs[-1].token_ids) == tokens[: outputs[-1].num_tokens]
        assert await read(engine.submit([1, 2, 3], ONE))
        while not num_failures:
            await asyncio.sleep(0.001)

    serve(scenario)


def test_an_idle_engine_drains() -> None:
    async def scenario(engine: AsyncEngine, runner: GatedRunner) -> None:
        await read(engine.submit([1], ONE))
        while engine.channel.host.engine.has_work():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        engine._numbers = (engine.closed(None) or 0 for _ in range(1))  # Ends during the call.
        with pytest.raises(EngineStopped):
            await engine.ask(Ask("cache_view"))
        await engine.drain()
        assert not engine.is_alive

    serve(scenario)


class FailingRunner(OracleRunner):
    """Runner in which a share of the steps fails. Collects reads of a wrong prefix, which the
    engine reports as failed steps."""

    def __init__(self, seed: int, *sizes: int) -> None:
        super().__init__(*sizes, max_model_len=400)
        self._draw, self._share = random.Random(seed), 0.05 * (seed % 3 == 0)
        self.wrong_reads: list[AssertionError] = []

    def forward(self, batch: Batch, drawn: Sequence[int] = ()) -> Fingerprints:
        if self._draw.random() < self._share:
            raise MemoryError("no memory for this step")
        try:
            return super().forward(batch, drawn)
        except AssertionError as error:
            self.wrong_reads.append(error)
            raise


async def act(engine: AsyncEngine, draw: random.Random) -> None:
    """Send a request and read all of its answer, or leave it in one of several ways."""
    way = draw.choice(("whole", "whole", "abort", "drop", "cancel", "reset"))
    if way == "reset":
        await engine.ask(Ask("reset_cache"))
    prompt = [draw.randrange(3)] * draw.choice((5, 64, 130)) + [draw.randrange(9)] * 40
    params = SamplingParams(max_tokens=draw.randrange(1, 40))
    stream = engine.submit(prompt, params, namespace=draw.choice((None, "a")))
    if way == "cancel":
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(read(stream), draw.random() * 0.01)
    elif way == "abort":
        await anext(stream)
    elif way != "drop":
        tokens = [token for output in await read(stream) for token in output.new_token_ids]
        assert tokens == answer(prompt, params, exact=False)[0]
        return
    stream.abort()


@pytest.mark.full("0", "1", "5")
@pytest.mark.parametrize("seed", range(40))
def test_random_clients_get_right_answers_or_errors(seed: int) -> None:
    """A hundred clients at once, with failing steps, aborts and resets. Nothing stays held."""
    draw = random.Random(seed)
    runner = FailingRunner(seed, draw.choice((512, 2048, 8192)), draw.choice((4, 8, 24)))
    config = EngineConfig(
        max_running=draw.choice((1, 3, 8)),
        token_budget=draw.choice((64, 128, 1024)),
        max_queue=draw.choice((4, 512)),
        overlap=draw.choice(("on", "off")),
        eviction=draw.choice(("lru", "survival", "gdsf")),
        checkpoints=draw.choice((("none",), ("every:64", "end"), ("backoff", "end"))),
    )
    engine = Engine(config, runner=runner, sampler=OracleSampler())
    running = AsyncEngine(engine)

    async def main() -> list[object]:
        running.start()
        acts = (act(running, random.Random(100 * seed + number)) for number in range(100))
        ends = await asyncio.wait_for(asyncio.gather(*acts, return_exceptions=True), 300)
        await running.drain()
        return ends

    ends = asyncio.run(main())
    assert not runner.wrong_reads
    allowed = QueueFull, StepFailed, EngineStopped, type(None)
    assert [end for end in ends if not isinstance(end, allowed)] == []
    if running.failure is None:
        engine.check()
        assert engine.report().kv.held == engine.report().slots.held == 0


# --- Losses ---------------------------------------------------------------------------------------


def fail_once(
    patch: pytest.MonkeyPatch, owner: object, name: str, number: int, after: bool
) -> None:
    """Let call number ``number`` of a method fail for lack of memory, at its end with ``after``."""
    original, calls = getattr(owner, name), itertools.count(1)

    def failing(*arguments: object, **options: object) -> object:
        is_due = Alive not in map(type, arguments) and next(calls) == number
        if is_due and not after:
            raise MemoryError
        found = original(*arguments, **options)
        if is_due:
            raise MemoryError
        return found

    patch.setattr(owner, name, failing)


LOSSES: dict[str, tuple[str, str, int, str, int]] = {
    "no memory to send": ("channel.host", "_deliver", 3, "whole", 0),
    "no memory to queue in the loop": ("_loop", "call_soon_threadsafe", 3, "whole", 0),
    "sent twice": ("channel.host", "_send", -3, "whole", 0),
    "no memory to read": ("stream", "put", 3, "failed", 1),
    "no memory for the last output": ("stream", "_on_end", 1, "failed", 1),
    "no memory to queue a request": ("channel.host.engine", "start_request", -1, "failed", 0),
    "lost by the engine": ("channel.host.engine", "", 0, "failed", 1),
}
"""Ways to lose an output or a request -> (owner and name of a method without memory, number of its
call, negative at its end, the end of the request, number of requests that count as lost)."""


@pytest.mark.parametrize("way", LOSSES)
def test_an_output_is_not_lost_or_its_request_ends_with_an_error(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends within five seconds, on both sides."""
    owner, name, number, end, num_lost = LOSSES[way]
    params = SamplingParams(max_tokens=30)
    lost = list[int]()

    async def scenario(engine: AsyncEngine, runner: GatedRunner) -> None:
        engine.on_lost, stream = lost.append, RequestStream(engine.abort)
        host, now_s = engine.channel.host, asyncio.get_running_loop().time
        spec = RequestSpec(np.array([1, 2, 3], np.int32), params, request_id="a")
        if name:
            failing = stream if owner == "stream" else attrgetter(owner)(engine)
            fail_once(monkeypatch, failing, name, abs(number), number < 0)
        engine.submit_valid(spec, stream)
        runner.allow(2)
        reading, began_s = asyncio.create_task(read(stream)), now_s()
        while name != "start_request" and runner.num_steps < 2:
            await asyncio.sleep(0.001)
        if not name:
            host.call_soon(lambda: host.engine.abort("a") and host._mailbox.clear())
        runner.allow()
        if end == "whole":
            tokens = [token for output in await reading for token in output.new_token_ids]
            assert tokens == answer([1, 2, 3], params, exact=False)[0]
        else:
            with pytest.raises(StepFailed):
                await reading
        while engine._streams or host.engine.requests or sum(lost) < num_lost:
            await asyncio.sleep(0.001)
        assert sum(lost) == num_lost and (now_s() - began_s < 5 or end == "whole")

    serve(scenario, gated=True)


@pytest.mark.parametrize("way", ["lost by the server", "no memory to abort"])
def test_a_request_that_nobody_reads_is_ended_by_a_heartbeat(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer would take twenty seconds or more."""
    lost = list[int]()

    async def scenario(engine: AsyncEngine, runner: GatedRunner) -> None:
        runner.step_s, engine.on_lost = 0.005, lost.append
        served, stream = engine.channel.host.engine, engine.submit([1, 2, 3], ENDLESS)
        await anext(stream)
        if way == "lost by the server":
            engine._streams.clear()
        else:
            fail_once(monkeypatch, engine.channel, "send", 1, after=False)
            with pytest.raises(MemoryError):
                stream.abort()
            with pytest.raises(StepFailed):
                await read(stream)
        while served.requests:
            await asyncio.sleep(0.001)
        await engine.ask(Ask("cache_view"))  # Its reply follows that to the heartbeat.
        ((_, ended),) = served.recent.listed()
        assert (ended.finish_reason, lost) == ("abort", [1])

    serve(scenario)


def test_the_watchdog_of_all_tests_finds_a_request_that_the_engine_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without heartbeats its reader would wait for ever."""
    monkeypatch.setattr(AsyncEngine, "_beat_on", lambda engine: None)
    watchdog = Watchdog(tick_s=0.001)

    async def scenario(engine: AsyncEngine, runner: GatedRunner) -> None:
        host, stream = engine.channel.host, engine.submit([1, 2, 3], ENDLESS)
        watchdog.fronts.add(engine)
        watchdog.start()
        runner.allow(1)
        await anext(stream)
        await asyncio.sleep(0.1)
        assert not watchdog.found, "the engine is in a step"
        (name,) = engine._streams
        host.call_soon(lambda: host.engine.abort(name) and host._mailbox.clear())
        runner.allow()
        with pytest.raises(AssertionError, match="lost"):
            await read(stream)
        watchdog.stopped.set()

    served = serve(scenario, gated=True)
    watchdog.engines.add(served)
    served.submit([1, 2, 3], ONE)
    for is_lost in (False, True):
        watchdog.found.clear()
        for _ in range(PATIENCE):
            watchdog.look()
        assert len(watchdog.found) == is_lost
        served._scheduler.waiting.clear()
