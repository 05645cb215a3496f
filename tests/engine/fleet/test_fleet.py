"""Tests of replicas behind one front: real engines, routers and events, with a stand-in for Ray
Serve's handle."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from engine import EngineConfig, SamplingParams
from engine.async_engine import AsyncEngine
from engine.errors import EngineStopped, QueueFull, RequestError
from engine.messages import AskReport
from engine.plugins.replicas.fleet import Fleet, Order
from engine.plugins.replicas.replica import EngineReplica, ReplicaGone
from engine.plugins.replicas.replicas_client import FleetChannel
from engine.requests.grammar import Grammar
from engine.requests.request import RequestSpec
from hybridcache.routing.registry import find_router

CONFIG = EngineConfig(cache_gib=0.02, max_model_len=1024, check=True)
PROMPT = np.arange(300, dtype=np.int32) % 200


class Died(Exception):
    """Error that a handle raises when its replica dies."""


class Handle:
    """Stand-in for Ray Serve's handle, which calls replicas in this process as the fleet's router
    chooses.

    A killed replica sends nothing more.
    """

    def __init__(self, config: EngineConfig = CONFIG) -> None:
        self.config = config
        self.replicas: dict[str, EngineReplica] = {}
        self.dead: dict[str, asyncio.Event] = {}
        self.fleet: Fleet | None = None
        self.method, self.streams = "", False
        self.chosen: list[str] = []

    def add(self, name: str) -> None:
        self.replicas[name] = EngineReplica(self.config, name)
        self.dead[name] = asyncio.Event()

    def options(self, method_name: str, stream: bool = False) -> Handle:
        copy = type(self)()
        copy.__dict__.update(self.__dict__ | {"method": method_name, "streams": stream})
        return copy

    def remote(self, order: Order):
        return Stream(self, order) if self.streams else self._call(order)

    def _place(self, order: Order) -> str:
        name = self.fleet.place(order, [n for n in self.replicas if not self.dead[n].is_set()])
        if order.spec is not None:
            self.chosen.append(name)
        return name

    async def _call(self, order: Order):
        return await getattr(self.replicas[self._place(order)], self.method)(order)


class Stream:
    def __init__(self, handle: Handle, order: Order) -> None:
        self._handle, self._order = handle, order
        self._outputs = self._name = None

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._outputs is None:
            self._name = self._handle._place(self._order)
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


async def serve(handle: Handle, count: int, router: str = "checkpoint") -> AsyncEngine:
    """Return a started engine with ``count`` replicas behind ``handle``."""
    for number in range(count):
        handle.add(f"r{number}")
    facts = await handle.replicas["r0"].facts(Order(address="127.0.0.1"))
    fleet = handle.fleet = Fleet()
    fleet.set_members(handle.replicas)
    fleet.begin(find_router(router)(facts.spec))

    def shut_down() -> None:
        for replica in handle.replicas.values():
            replica._async.stop()

    is_death = lambda error: isinstance(error, Died)  # noqa: E731
    engine = AsyncEngine(FleetChannel(handle.config, handle, fleet, facts, shut_down, is_death))
    engine.start()
    return engine


def kill(handle: Handle, name: str) -> None:
    handle.dead[name].set()
    handle.fleet.left(name)


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


async def check_views(engine: AsyncEngine, handle: Handle) -> None:
    """Check that each replica can be viewed, with the nodes of its own tree."""
    for number, name in enumerate(engine.channel._fleet.members, 1):
        view = await engine.watch(number)
        state = await view.whole()
        meta = state["meta"]
        assert (meta["replica"], meta["num_replicas"]) == (number, 2)
        own = handle.replicas[name]._engine
        nodes = [record[1] for record in state["records"] if record[0] == "kv"]
        assert bool(nodes) == (own.report().kv.cached > 0)
        for id_ in nodes:
            assert (await view.node(id_))["id"] == id_
        await view.close()
    assert not engine.channel._views
    for number in (0, 3):
        with pytest.raises(RequestError, match=f"Replica {number} is not up: there are 2"):
            await engine.watch(number)


def test_two_replicas_share_load_and_survive_a_death(caplog: pytest.LogCaptureFixture) -> None:
    """Check routing by shared prefixes, answers, summed reports, a replica's death and a new
    replica.

    A death is invisible to the client: the answer is computed again, and its stream goes on.
    """

    async def live() -> None:
        handle = Handle()
        engine = await serve(handle, 2)
        router = engine.channel._fleet._router
        first = (await answer(engine, make_spec(1, 2)))[-1]
        assert (first.cached_len, first.finish_reason, len(first.output)) == (0, "length", 3)
        assert first.prompt_token_ids.tolist() == [*PROMPT, 1, 2]
        home = handle.chosen[0]
        await wait_until(lambda: len(router.in_flight[home]) == 0)
        assert router.mirrors[home].num_checkpoints > 0
        again = await answer(engine, make_spec(1, 2))
        assert again[-1].cached_len >= 256 and handle.chosen[1] == home
        assert again[-1].output.tolist() == first.output.tolist()
        assert [t for output in again for t in output.new_token_ids] == first.output.tolist()
        assert "".join(output.new_text for output in again) == again[-1].text
        report = await engine.report()
        assert report.usage["requests"] == 2 and report.token_hit_rate > 0.4
        view = await engine.cache_view()
        assert set(view["replicas"]) == {"r0", "r1"} and view["kv"]["total"] == report.kv.total
        router.check()

        # The replica with the longest hit dies in the middle of an answer.
        stream = engine.submit(make_spec(1, 2, max_tokens=400))
        begun = await anext(stream)
        kill(handle, home)
        whole = [begun, *[output async for output in stream]]
        tokens = [token for output in whole for token in output.new_token_ids]
        assert tokens == whole[-1].output.tolist() and len(tokens) == 400
        assert "".join(output.new_text for output in whole) == whole[-1].text
        assert handle.chosen[-1] != home
        assert engine.channel._fleet.members == tuple({"r0", "r1"} - {home})
        late = (await answer(engine, make_spec(1, 2)))[-1]
        assert late.output.tolist() == first.output.tolist()
        handle.add("r2")
        engine.channel._fleet.set_members(each for each in handle.replicas if each != home)
        await wait_until(lambda: "r2" in engine.channel._followers)
        changes = [line for line in caplog.messages if line.startswith("A replica")]
        assert ["ended" in line for line in changes] == [True, False], changes
        await check_views(engine, handle)
        await engine.reset_prefix_cache()
        assert (await engine.report()).kv.cached == 0
        await wait_until(lambda: all(mirror.num_tokens == 0 for mirror in router.mirrors.values()))
        with pytest.raises(ReplicaGone):
            await handle.replicas["r2"].tell(Order(replica=home, message=AskReport()))
        await engine.drain()
        assert not engine.is_alive and not engine.channel._followers
        with pytest.raises(EngineStopped):
            engine.submit(make_spec())

    asyncio.run(live())


def test_a_death_before_the_first_token_moves_the_request() -> None:
    async def live() -> None:
        handle = Handle()
        engine = await serve(handle, 2, "least_loaded")
        stream = engine.submit(make_spec(7, max_tokens=2))
        while not handle.chosen:  # Without a pause in which the answer could begin.
            await asyncio.sleep(0)
        kill(handle, handle.chosen[0])
        outputs = [output async for output in stream]
        assert outputs[-1].finish_reason == "length" and len(handle.chosen) == 2
        await wait_until(lambda: not engine.channel._orders)
        assert handle.chosen[0] != handle.chosen[1] and engine.channel._fleet._placed == {}
        engine.channel._fleet._router.check()
        await engine.drain()

    asyncio.run(live())


def test_an_early_end_reaches_the_replica_on_which_its_request_is_placed_later() -> None:
    """A request that starts again may be ended before Ray asks for its replica."""

    async def live() -> None:
        handle = Handle()
        engine = await serve(handle, 2, "least_loaded")
        handle.fleet.expect("busy")
        assert handle.fleet.place(Order("busy", make_spec()), handle.replicas) == "r0"
        engine.submit_valid(make_spec(request_id="a"))
        [(order, _)] = engine.channel._orders.values()
        told: list[Order] = []
        engine.channel._tell = lambda order: told.append(order) or asyncio.sleep(0)
        engine.abort("a", "stop")
        handle.fleet.expect(order.request_id)
        places = [handle.fleet.place(each, handle.replicas) for each in (*told, order)]
        assert places == ["r1", "r1"]
        engine.stop()
        await engine.drain()

    asyncio.run(live())


def test_one_grammar_is_compiled_at_a_time() -> None:
    async def live() -> None:
        engine = await serve(Handle(), 1)
        running: list[Grammar] = []
        most = 0

        def compile(grammar: Grammar) -> None:
            nonlocal most
            running.append(grammar)
            most = max(most, len(running))
            time.sleep(0.02)
            running.pop()

        engine.channel._compile = compile
        await asyncio.gather(*(engine.compile(Grammar.of_regex("a+")) for _ in range(4)))
        assert most == 1
        await engine.drain()

    asyncio.run(live())


def test_aborts_limits_and_the_end_of_a_fleet() -> None:
    async def live() -> None:
        handle = Handle()
        engine = await serve(handle, 1)
        stream = engine.submit(make_spec(max_tokens=600))
        await anext(stream)
        stream.abort()
        await wait_until(lambda: not engine.channel._orders)
        [replica] = handle.replicas.values()
        async with asyncio.timeout(120):
            while (await replica.tell(Order(message=AskReport()))).num_running:
                await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match="maximum context length"):
            engine.submit(make_spec(max_tokens=100_000))
        waiting = [engine.submit(make_spec(max_tokens=700)) for _ in range(2)]
        engine.channel._waiting.update(map(str, range(CONFIG.max_queue)))
        with pytest.raises(QueueFull):
            engine.submit(make_spec())
        engine.stop()
        for each in waiting:
            with pytest.raises(EngineStopped):
                async for _ in each:
                    pass
        await engine.drain()

    asyncio.run(live())
