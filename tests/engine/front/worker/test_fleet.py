"""Tests of replicas behind one front: real engines, routers and events, with a stand-in for Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine import EngineConfig, SamplingParams
from engine.errors import EngineStopped, QueueFull, RequestError
from engine.front.async_engine import AsyncEngine
from engine.front.worker.replicas import EngineReplica, FleetChannel
from engine.messages import Ask, AskView, Compile, OpenView
from engine.requests.request import RequestSpec
from engine.text.grammar import Grammar
from hybridcache.adapters.routing.registry import find_router
from tests.refused import refused

CONFIG = EngineConfig(cache_gib=0.02, max_model_len=1024, check=True)
PROMPT = np.arange(300, dtype=np.int32) % 200


class Died(Exception):
    """Error that a call raises when its replica dies."""


class Actor:
    """Stand-in for an actor of Ray, with a replica in this process. A dead one sends nothing."""

    def __init__(self, fleet: LocalFleet, name: str) -> None:
        self.fleet, self.name = fleet, name
        self.replica = EngineReplica(fleet.config)
        self.dead = asyncio.Event()
        self.generate, self.events, self.tell = (
            SimpleNamespace(remote=partial(self._call, method))
            for method in ("generate", "events", "tell")
        )

    def _call(self, method: str, *arguments: object):
        called = getattr(self.replica, method)(*arguments)
        if method == "generate":
            self.fleet.chosen.append(self.name)
        return self._alive(called) if method == "tell" else self._items(called)

    async def _alive(self, called):
        dead, following = asyncio.ensure_future(self.dead.wait()), asyncio.ensure_future(called)
        try:
            await asyncio.wait((dead, following), return_when=asyncio.FIRST_COMPLETED)
            if following.done() and not dead.done():
                return self.fleet.copy(following.result())
            raise Died(self.name)
        finally:
            dead.cancel()
            following.cancel()
            await asyncio.wait((following,))

    async def _items(self, items):
        if self.name not in ("replica-0", "replica-1"):
            await self.fleet.may_join.wait()
        try:
            with suppress(StopAsyncIteration):
                while True:
                    yield asyncio.sleep(0, await self._alive(anext(items)))
        finally:
            await items.aclose()


class LocalFleet:
    """Stand-in for a cluster. Replicas that replace others join once ``may_join`` is set."""

    copy = staticmethod(lambda result: result)
    """Passes a result on to the server."""

    def __init__(self, config: EngineConfig = CONFIG) -> None:
        self.config = config
        self.replicas: dict[str, Actor] = {}
        self.may_join = asyncio.Event()
        self.chosen: list[str] = []

    def start(self, name: str) -> Actor:
        self.replicas[name] = Actor(self, name)
        return self.replicas[name]

    def end(self, replica: Actor) -> None:
        replica.dead.set()

    def cancel(self, outputs: Any) -> None:
        """End a call that is not waited for, as Ray does."""
        self.closing = asyncio.ensure_future(outputs.aclose())

    def is_death(self, error: Exception) -> bool:
        return isinstance(error, Died)

    def close(self) -> None:
        for each in self.replicas.values():
            each.replica._async.stop()


async def serve(fleet: LocalFleet, count: int, router: str = "checkpoint") -> AsyncEngine:
    """Return a started engine with ``count`` replicas."""
    replicas = {name: fleet.start(name) for name in map("replica-{}".format, range(count))}
    facts, spec, _ = await replicas["replica-0"].replica.facts("127.0.0.1")
    made = find_router(router)(spec)
    engine = AsyncEngine(FleetChannel(fleet.config, fleet, made, facts, replicas))
    engine.start()
    return engine


def make_spec(*more: int, max_tokens: int = 3, **options: object) -> RequestSpec:
    prompt = np.concatenate((PROMPT, np.array(more, np.int32)))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return RequestSpec(prompt, sampling, **options)


async def answer(engine: AsyncEngine, spec: RequestSpec):
    return [output async for output in engine.submit(spec)]


async def wait_until(is_true) -> None:
    async with asyncio.timeout(120):
        while not is_true():
            await asyncio.sleep(0.01)


async def check_views(engine: AsyncEngine, fleet: LocalFleet) -> None:
    """Check that each replica can be viewed, with the nodes of its own tree."""
    for number, name in enumerate(engine.channel.members, 1):
        view = await engine.ask(OpenView(number))
        state = await engine.ask(AskView(view, "whole"))
        meta = state["meta"]
        assert (meta["replica"], meta["num_replicas"]) == (number, 2)
        own = fleet.replicas[name].replica._engine
        nodes = [record[1] for record in state["records"] if record[0] == "kv"]
        assert bool(nodes) == (own.report().kv.cached > 0)
        for id_ in nodes:
            assert (await engine.ask(AskView(view, "node", id_)))["id"] == id_
        await engine.ask(AskView(view, "close"))
    assert not engine.channel._views
    for number in (0, 3):
        with pytest.raises(RequestError, match=f"Replica {number} is not up: there are 2"):
            await engine.ask(OpenView(number))


def test_two_replicas_share_load_and_survive_a_death(caplog: pytest.LogCaptureFixture) -> None:
    """Check routing by shared prefixes, answers, summed reports, a replica's death and a new
    replica.

    A death is invisible to the client: the answer is computed again, and its stream goes on.
    """

    async def live() -> None:
        fleet = LocalFleet()
        engine = await serve(fleet, 2)
        router = engine.channel.router
        first = (await answer(engine, make_spec(1, 2)))[-1]
        assert (first.cached_len, first.finish_reason, len(first.output)) == (0, "length", 3)
        assert first.prompt_token_ids.tolist() == [*PROMPT, 1, 2]
        home = fleet.chosen[0]
        await wait_until(lambda: len(router.in_flight[home]) == 0)
        assert router.mirrors[home].num_checkpoints > 0
        again = await answer(engine, make_spec(1, 2))
        assert again[-1].cached_len >= 256 and fleet.chosen[1] == home
        assert again[-1].output.tolist() == first.output.tolist()
        assert [t for output in again for t in output.new_token_ids] == first.output.tolist()
        assert "".join(output.new_text for output in again) == again[-1].text
        report = await engine.report()
        assert report.usage["requests"] == 2 and report.token_hit_rate > 0.4
        view = await engine.ask(Ask("cache_view"))
        assert (
            set(view["replicas"]) == {"replica-0", "replica-1"}
            and view["kv"]["total"] == report.kv.total
        )
        router.check()

        # The replica with the longest hit dies in the middle of an answer.
        stream = engine.submit(make_spec(1, 2, max_tokens=400))
        begun = await anext(stream)
        fleet.replicas[home].dead.set()
        whole = [begun, *[output async for output in stream]]
        tokens = [token for output in whole for token in output.new_token_ids]
        assert tokens == whole[-1].output.tolist() and len(tokens) == 400
        assert "".join(output.new_text for output in whole) == whole[-1].text
        assert fleet.chosen[-1] != home
        assert set(engine.channel.members) == {"replica-0", "replica-1"} - {home}
        late = (await answer(engine, make_spec(1, 2)))[-1]
        assert late.output.tolist() == first.output.tolist()
        fleet.may_join.set()
        await wait_until(lambda: "replica-2" in engine.channel.members)
        changes = [line for line in caplog.messages if line.startswith("A replica")]
        assert ["ended" in line for line in changes] == [True, False], changes
        await check_views(engine, fleet)
        await engine.ask(Ask("reset_cache"))
        assert (await engine.report()).kv.cached == 0
        await wait_until(lambda: all(mirror.num_tokens == 0 for mirror in router.mirrors.values()))
        await engine.drain()
        assert not engine.is_alive
        with pytest.raises(EngineStopped):
            engine.submit(make_spec())

    asyncio.run(live())


def test_a_death_before_the_first_token_moves_the_request() -> None:
    async def live() -> None:
        fleet = LocalFleet()
        engine = await serve(fleet, 2, "least_loaded")
        stream = engine.submit(make_spec(7, max_tokens=2))
        while not fleet.chosen:  # Without a pause in which the answer could begin.
            await asyncio.sleep(0)
        fleet.replicas[fleet.chosen[0]].dead.set()
        outputs = [output async for output in stream]
        assert outputs[-1].finish_reason == "length" and len(fleet.chosen) == 2
        assert fleet.chosen[0] != fleet.chosen[1] and not engine.channel._requests
        engine.channel.router.check()
        await engine.drain()

    asyncio.run(live())


@pytest.mark.parametrize("is_placed", [False, True])
def test_an_early_end_is_the_reason_of_the_last_output(is_placed: bool) -> None:
    async def live() -> None:
        fleet = LocalFleet()
        engine = await serve(fleet, 1)
        stream = engine.submit(make_spec(max_tokens=600))
        if is_placed:
            await anext(stream)
        stream.abort("stop")
        assert [output.finish_reason async for output in stream][-1] == "stop"
        engine.channel.router.check()
        await engine.drain()

    asyncio.run(live())


def test_one_grammar_is_compiled_at_a_time() -> None:
    async def live() -> None:
        engine = await serve(LocalFleet(), 1)
        running: list[Grammar] = []
        most = 0

        def compile(grammar: Grammar, namespace: object) -> None:
            nonlocal most
            running.append(grammar)
            most = max(most, len(running))
            time.sleep(0.02)
            running.pop()

        engine.channel._compile = compile
        await asyncio.gather(*(engine.ask(Compile(Grammar.of_regex("a+"))) for _ in range(4)))
        assert most == 1
        await engine.drain()

    asyncio.run(live())


def test_the_first_report_of_a_fleet_does_not_wait_for_a_step() -> None:
    async def live() -> None:
        fleet, goes_on = LocalFleet(), threading.Event()
        engine, replica = await serve(fleet, 2), fleet.replicas["replica-1"].replica
        await wait_until(lambda: replica._async.seen)  # By its first heartbeat.
        replica._host.call_soon(lambda: goes_on.wait(120))  # As long as a step.
        async with asyncio.timeout(60):
            assert (await engine.report()).age_s > 0
            goes_on.set()
            while (await engine.report()).age_s > 0:
                pass
        await engine.drain()

    asyncio.run(live())


def test_aborts_limits_and_the_end_of_a_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    async def live() -> None:
        fleet = LocalFleet()
        engine = await serve(fleet, 1)
        stream = engine.submit(make_spec(max_tokens=600))
        await anext(stream)
        stream.abort()
        await wait_until(lambda: not engine.channel._requests)
        [actor] = fleet.replicas.values()
        async with asyncio.timeout(120):
            while (await actor.tell.remote(Ask("report"))).num_running:
                await asyncio.sleep(0.01)
        refused("maximum context length", engine.submit, make_spec(max_tokens=100_000))
        waiting = [engine.submit(make_spec(max_tokens=700)) for _ in range(2)]
        with monkeypatch.context() as patch, pytest.raises(QueueFull):
            patch.setattr(engine, "config", replace(CONFIG, max_running=1, max_queue=1))
            engine.submit(make_spec())
        engine.stop()
        for each in waiting:
            with pytest.raises(EngineStopped):
                async for _ in each:
                    pass
        await engine.drain()

    asyncio.run(live())
