"""Replicas behind one front: the real engines, routers and events, on a handle that does what Ray
Serve's does."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, SamplingParams, engine_config, server_config
from engine.async_engine import AsyncEngine, NoSingleEngine
from engine.errors import EngineStopped, QueueFull, StepFailed
from engine.plugins.replicas.fleet import Fleet
from engine.plugins.replicas.replica import EngineReplica, ReplicaGone
from engine.plugins.replicas.replica_output import Order
from engine.plugins.replicas.replicas_client import FleetEngine, summed
from engine.plugins.replicas.start_replicas import spec_of, start_replicas
from engine.requests.spec import RequestSpec
from engine.text.outputs import RequestOutput
from hybridcache.routing.registry import find_router

CONFIG = EngineConfig(cache_gib=0.02, max_model_len=1024, check=True)
PROMPT = np.arange(300, dtype=np.int32) % 200


class Died(Exception):
    """What a handle raises where a replica goes."""


class Handle:
    """Calls methods of replicas in this process, each where the fleet's router says; a replica that
    is killed answers nothing more."""

    def __init__(self) -> None:
        self.replicas: dict[str, EngineReplica] = {}
        self.dead: dict[str, asyncio.Event] = {}
        self.fleet: Fleet | None = None
        self.method, self.streams = "", False
        self.chosen: list[str] = []

    def add(self, name: str) -> None:
        self.replicas[name] = EngineReplica(CONFIG, name)
        self.dead[name] = asyncio.Event()

    def options(self, method_name: str, stream: bool = False) -> Handle:
        bound = Handle()
        bound.__dict__.update(self.__dict__ | {"method": method_name, "streams": stream})
        return bound

    def remote(self, order: Order):
        return Stream(self, order) if self.streams else self._call(order)

    def _where(self, order: Order) -> str:
        name = self.fleet.place(order, [n for n in self.replicas if not self.dead[n].is_set()])
        if order.route is not None:
            self.chosen.append(name)
        return name

    async def _call(self, order: Order):
        return await getattr(self.replicas[self._where(order)], self.method)(order)


class Stream:
    def __init__(self, handle: Handle, order: Order) -> None:
        self._handle, self._order = handle, order
        self._outputs = self._name = None

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._outputs is None:
            self._name = self._handle._where(self._order)
            replica = self._handle.replicas[self._name]
            self._outputs = getattr(replica, self._handle.method)(self._order)
        dead = asyncio.ensure_future(self._handle.dead[self._name].wait())
        following = asyncio.ensure_future(self._outputs.__anext__())
        try:
            await asyncio.wait((dead, following), return_when=asyncio.FIRST_COMPLETED)
            if following.done() and not dead.done():
                return following.result()
            raise Died(self._name)
        finally:
            dead.cancel()
            following.cancel()

    def cancel(self) -> None:
        pass


async def fleet_of(count: int, router: str = "checkpoint") -> tuple[FleetEngine, Handle]:
    handle = Handle()
    for number in range(count):
        handle.add(f"r{number}")
    facts = await handle.replicas["r0"].facts(Order())
    found: list[FleetEngine] = []
    fleet = handle.fleet = Fleet(
        lambda: find_router(router)(spec_of(facts, CONFIG)),
        lambda: found[0].members_changed() if found else None,
    )
    fleet.set_members(handle.replicas)
    fleet.begin()

    def shut_down() -> None:
        for replica in handle.replicas.values():
            replica._async.stop()

    is_death = lambda error: isinstance(error, Died)  # noqa: E731
    found.append(FleetEngine(CONFIG, handle, fleet, facts, "builtin", shut_down, is_death))
    found[0].start()
    return found[0], handle


def kill(handle: Handle, name: str) -> None:
    handle.dead[name].set()
    handle.fleet.left(name)


def asked(*more: int, max_tokens: int = 3, **options: object) -> RequestSpec:
    prompt = np.concatenate((PROMPT, np.array(more, np.int32)))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return RequestSpec(prompt, sampling, **options)


async def answer(engine: FleetEngine, spec: RequestSpec):
    return [output async for output in engine.submit(spec)]


async def until(true) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come true in ten seconds")


def test_a_life_of_two_replicas() -> None:
    """Prompts that share a beginning meet; the answers are those of one engine; reports add up; a
    death before the first token costs a client nothing, and after it is told; a new one joins."""

    async def live() -> None:
        engine, handle = await fleet_of(2)
        router = engine._fleet._router
        first = (await answer(engine, asked(1, 2)))[-1]
        assert (first.cached_len, first.finish_reason, len(first.output)) == (0, "length", 3)
        assert first.prompt_token_ids.tolist() == [*PROMPT, 1, 2]
        home = handle.chosen[0]
        await until(lambda: len(router.in_flight[home]) == 0)
        assert router.mirrors[home].num_checkpoints > 0
        again = await answer(engine, asked(1, 2))
        assert again[-1].cached_len >= 256 and handle.chosen[1] == home
        assert again[-1].output.tolist() == first.output.tolist()
        assert [t for output in again for t in output.new_token_ids] == first.output.tolist()
        assert "".join(output.new_text for output in again) == again[-1].text
        report = await engine.report()
        assert report.usage["requests"] == 2 and report.token_hit_rate > 0.4
        view = await engine.cache_view()
        assert set(view["replicas"]) == {"r0", "r1"} and view["kv"]["total"] == report.kv.total
        router.check()

        # The one that would have answered best dies in the middle of an answer.
        stream = engine.submit(asked(1, 2, max_tokens=400))
        output = await anext(stream)
        kill(handle, home)
        with pytest.raises(StepFailed, match=r"died after \d+ tokens? of the answer; send"):
            async for output in stream:
                assert output.new_token_ids
        assert engine._fleet.members == tuple({"r0", "r1"} - {home})
        late = (await answer(engine, asked(1, 2)))[-1]
        assert late.output.tolist() == first.output.tolist()
        handle.add("r2")
        engine._fleet.set_members(each for each in handle.replicas if each != home)
        await until(lambda: "r2" in engine._followers)
        with pytest.raises(NoSingleEngine, match="With replicas it shows only sums"):
            await engine.watch()
        await engine.reset_prefix_cache()
        assert (await engine.report()).kv.cached == 0
        await until(lambda: all(mirror.num_tokens == 0 for mirror in router.mirrors.values()))
        with pytest.raises(ReplicaGone):
            await handle.replicas["r2"].report(Order(replica=home))
        await engine.drain()
        assert not engine.is_alive and not engine._followers
        with pytest.raises(EngineStopped):
            engine.submit(asked())

    asyncio.run(live())


def test_before_the_first_token_it_fails_over() -> None:
    async def live() -> None:
        engine, handle = await fleet_of(2, "round_robin")
        stream = engine.submit(asked(7, max_tokens=2))
        await until(lambda: handle.chosen)
        kill(handle, handle.chosen[0])
        outputs = [output async for output in stream]
        assert outputs[-1].finish_reason == "length" and len(handle.chosen) == 2
        await until(lambda: not engine._tasks)
        assert handle.chosen[0] != handle.chosen[1] and engine._fleet._placed == {}
        engine._fleet._router.check()
        await engine.drain()

    asyncio.run(live())


def test_aborts_limits_and_bad_requests() -> None:
    async def live() -> None:
        engine, handle = await fleet_of(1)
        stream = engine.submit(asked(max_tokens=600))
        await anext(stream)
        stream.abort()
        await until(lambda: not engine._tasks)
        [replica] = handle.replicas.values()
        for _ in range(200):
            if not (await replica.report(Order())).num_running:
                break
            await asyncio.sleep(0.02)
        assert (await replica.report(Order())).num_running == 0
        with pytest.raises(ValueError, match="maximum context length"):
            engine.submit(asked(max_tokens=100_000))
        waiting = [engine.submit(asked(max_tokens=700)) for _ in range(2)]
        engine._waiting.update(map(str, range(CONFIG.max_queue)))
        with pytest.raises(QueueFull):
            engine.submit(asked())
        engine.stop()
        for each in waiting:
            with pytest.raises(EngineStopped):
                async for _ in each:
                    pass
        await engine.drain()

    asyncio.run(live())


@pytest.mark.parametrize("reason", ["stop", "abort"])
def test_an_answer_that_is_ended_early_has_the_reason_that_one_engine_gives(reason: Any) -> None:
    async def last(engine: Any) -> RequestOutput:
        stream = engine.submit(asked(max_tokens=600))
        await anext(stream)
        stream.abort(reason)
        return [output async for output in stream][-1]

    async def live() -> None:
        single = AsyncEngine(Engine(CONFIG))
        single.start()
        engine, handle = await fleet_of(2)
        outputs = [await last(single), await last(engine)]
        assert [output.finish_reason for output in outputs] == [reason, reason]
        assert all(output.new_token_ids == () for output in outputs)
        replica = handle.replicas[handle.chosen[0]]
        while (await replica.report(Order())).num_running:
            await asyncio.sleep(0.02)
        assert engine._fleet._placed == {}
        for each in (single, engine):
            await each.drain()

    asyncio.run(live())


def test_an_answer_that_cannot_be_ended_by_its_replica_is_aborted() -> None:
    async def live() -> None:
        engine, handle = await fleet_of(1)

        async def end(order: Order) -> None:
            raise RuntimeError("the replica does not answer")

        handle.replicas["r0"].end = end
        stream = engine.submit(asked(max_tokens=600))
        await anext(stream)
        stream.abort("stop")
        assert [output async for output in stream][-1].finish_reason == "abort"
        await engine.drain()

    asyncio.run(live())


def test_a_request_that_is_placed_after_its_end_leaves_no_load() -> None:
    """Ray Serve asks for a place in a thread of its own, also for what was cancelled meanwhile."""

    async def live() -> None:
        engine, handle = await fleet_of(2)
        asks: list[Order] = []
        place = handle.fleet.place

        def noting(order: Order, candidates: list[str]) -> str | None:
            asks.append(order)
            return place(order, candidates)

        handle.fleet.place = noting
        stream = engine.submit(asked(max_tokens=600))
        await anext(stream)
        stream.abort()
        await until(lambda: not engine._tasks)
        [order] = [order for order in asks if order.route is not None]
        assert place(order, handle.replicas) in handle.replicas
        router = engine._fleet._router
        assert all(load.num_running == load.num_waiting == 0 for load in router.loads.values())
        assert engine._fleet._placed == {}
        router.check()
        assert (await answer(engine, asked(1)))[-1].finish_reason == "length"
        await engine.drain()

    asyncio.run(live())


def test_no_report_is_no_sum() -> None:
    with pytest.raises(ValueError, match="no replica is up"):
        summed([], {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trace": "trace.json"}, "--trace writes the steps of one engine: remove --replicas"),
        (
            {"role": "decode", "prefill": ("127.0.0.1:7000",)},
            "--replicas 2 and --role cannot be combined",
        ),
    ],
)
def test_replicas_refuse_settings_of_one_engine(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_replicas(engine_config(**settings), server_config(replicas=2), "here")
