"""Tests of requests that wait for a prefix from another engine: others run on, and answers are
right whether the load succeeds or fails."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.plugins.disaggregation.prefix_load import ReceivedPrefix
from engine.requests.request import Request
from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.tokens import common_prefix_len
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.loading import Loader, PrefixLoad
from tests.engine.schedule.test_scheduler_machine import answer, pattern
from tests.oracle import (
    OracleRunner,
    OracleSampler,
    OracleState,
    engine_with,
    fingerprint,
    ticking_clock,
)

GREEDY = SamplingParams(max_tokens=5)


class SlowLoad(PrefixLoad):
    """Load that arrives after some steps, or never."""

    def __init__(self, loader: SlowLoader, arrival: ReceivedPrefix, request: Request) -> None:
        self.loader, self.arrival, self.request = loader, arrival, request
        super().__init__(arrival.end)
        self.steps_left = loader.delay

    def settle(self, is_whole: bool) -> None:
        self.num_loaded = len(self.arrival.rows) if is_whole else 0
        manager = self.loader.engine._manager
        del manager.other_holders[self.arrival]
        if is_whole:
            self.arrival.publish()
        else:
            self.arrival.abort()
        self.loader.pending.remove(self)
        self.has_ended = True

    def cancel(self) -> None:
        if not self.has_ended:
            self.settle(False)


class SlowLoader(Loader[Request]):
    """Loader that finds every prefix, after ``delay`` steps."""

    def __init__(self, delay: int, most: int) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.delay, self.max_loads = delay, most
        self.engine: Engine = None  # type: ignore[assignment]
        self.pending: list[SlowLoad] = []

    def wants(self, request: Request, match: PrefixMatch) -> bool:
        return (request.num_tokens - 1) // 64 * 64 - match.cached_len >= 64

    def begin(self, request: Request, match: PrefixMatch) -> SlowLoad | None:
        assert len(self.pending) < self.max_loads and self.wants(request, match)
        end = (request.num_tokens - 1) // 64 * 64
        manager, tokens = self.engine._manager, request.tokens[:end]
        arrival = ReceivedPrefix.begin(
            manager.cache, tokens, request.namespace, stateful=manager.stateful
        )
        if arrival is None:
            return None
        manager.other_holders[arrival] = None
        self.pending.append(SlowLoad(self, arrival, request))
        return self.pending[-1]

    def advance(self) -> None:
        assert not self.engine._manager.has_moves
        for load in tuple(self.pending):
            load.steps_left -= 1
            if not load.steps_left:
                write(self.engine.runner, load.arrival, load.request)
                load.settle(True)

    def wait_for_data(self) -> None:
        pass


def write(runner: OracleRunner, arrival: ReceivedPrefix, request: Request) -> None:
    before, prints = 0, []
    for token in request.tokens[: arrival.end].tolist():
        before = fingerprint(before, token)
        prints.append(before)
    rows = arrival.rows
    runner._fingerprints[rows] = prints[arrival.start :]
    runner._tokens[rows, 0] = request.tokens[arrival.start : arrival.end]
    runner._tokens[rows, 1] = 0
    runner._writers[rows] = runner._writer(request.namespace)
    runner._forget_states(rows)
    if arrival.slot is not None:
        runner._write_state(arrival.slot, OracleState(arrival.end, before, request.namespace))


def make(loader: SlowLoader, kv: int, slots: int, max_running: int) -> Engine:
    runner, sampler = OracleRunner(kv, slots, exact=True), OracleSampler(320)
    parts = {"runner": runner, "sampler": sampler, "clock": ticking_clock()}
    config = EngineConfig(check=True, exact=True, max_running=max_running, host_gib=0)

    def hooks(manager: CacheManager) -> dict[str, Loader[Request]]:
        loader.manager = manager
        return {"loader": loader}

    loader.engine = engine = engine_with(hooks, config, **parts)
    return engine


NEVER = 10**9


@pytest.mark.full("4-12")
@pytest.mark.parametrize(("most", "num_long"), [(1, 1), (4, 4), (4, 12), (2, 300)])
def test_full_load_slots_do_not_delay_requests_without_loads(most: int, num_long: int) -> None:
    """Check that short prompts behind long ones with endless loads finish in the same steps as
    without them."""

    def finished_in(num_long: int) -> list[int]:
        engine = make(SlowLoader(delay=NEVER, most=most), kv=65536, slots=400, max_running=4)
        for k in range(num_long):
            engine.submit(pattern(10 + k, 300), GREEDY)
        order: dict[str, int] = {}
        short = []
        for step in range(60):
            if step % 3 == 0 and len(short) < 8:
                short.append(engine.submit(pattern(1, 20 + len(short)), GREEDY))
            for output in engine.step():
                if output.is_finished:
                    order[output.request_id] = step
        assert len(engine.requests) == num_long
        return [order[name] for name in short]

    # With many new requests in front, a step examines at most eight times as many as may run.
    delay = num_long // (8 * 4)
    assert all(
        late <= alone + delay
        for late, alone in zip(finished_in(num_long), finished_in(0), strict=True)
    )


class LoadMachine(RuleBasedStateMachine):
    """State machine of loads and admission: requests, steps, loads that end or fail, and aborts, in
    any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = SlowLoader(delay=NEVER, most=2)
        self.engine = make(self.loader, kv=2048, slots=12, max_running=3)
        self.prompts: dict[str, list[int]] = {}
        self.finals: dict[str, RequestOutput] = {}

    @rule(kind=st.integers(0, 2), shared=st.integers(0, 200), suffix=st.integers(1, 120))
    def submit(self, kind: int, shared: int, suffix: int) -> None:
        prompt = pattern(kind, shared) + pattern(20 + suffix % 3, suffix)
        self.prompts[self.engine.submit(prompt, GREEDY)] = prompt

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            outputs = self.engine.step()
            self.finals |= {o.request_id: o for o in outputs if o.is_finished}

    @precondition(lambda self: self.loader.pending)
    @rule(place=st.integers(0, 1), is_whole=st.booleans())
    def load_ends(self, place: int, is_whole: bool) -> None:
        if self.engine._manager.has_moves:
            self.step(1)
        load = self.loader.pending[place % len(self.loader.pending)]
        if is_whole:
            write(self.engine.runner, load.arrival, load.request)
        load.settle(is_whole)

    @precondition(lambda self: self.engine.requests)
    @rule(place=st.integers(0, 100))
    def abort(self, place: int) -> None:
        names = sorted(request.request_id for request in self.engine.requests)
        name = names[place % len(names)]
        self.engine.abort(name)
        del self.prompts[name]

    @rule()
    def requests_without_loads_finish(self) -> None:
        """Check that only requests with a load, or behind one, are left; no load ends meanwhile."""
        for _ in range(400):
            self.step(1)
            if not self.engine._scheduler.running:
                break
        waiting = [r for r in self.engine.requests if r.lease is None]
        loading = [load.request for load in self.loader.pending]
        for request in waiting:
            match = self.engine.cache.match(request.tokens, request.namespace)
            is_behind = any(
                common_prefix_len(request.tokens, other.tokens) > match.kv_match_len
                for other in loading
            )
            assert request in loading or is_behind or self.loader.wants(request, match)
        assert not waiting or len(loading) > 0

    @invariant()
    def check_engine(self) -> None:
        self.engine.check()
        assert len(self.loader.pending) <= self.loader.max_loads

    def teardown(self) -> None:
        self.loader.delay = 2
        for load in self.loader.pending:
            load.steps_left = 1
        self.step(1)
        open_ = {request.request_id for request in self.engine.requests}
        for _ in range(2000):
            outputs = self.engine.step() if open_ - self.finals.keys() else ()
            self.finals |= {output.request_id: output for output in outputs if output.is_finished}
        assert open_ <= self.finals.keys(), "some requests never finish"
        self.engine.check()
        assert not self.loader.pending
        for name, prompt in self.prompts.items():
            assert self.finals[name].output.tolist() == answer(prompt, GREEDY, True)[0]


TestLoadMachine = LoadMachine.TestCase
TestLoadMachine.settings = settings(
    max_examples=settings.default.max_examples // 2,
    stateful_step_count=settings.default.stateful_step_count // 2,
)
