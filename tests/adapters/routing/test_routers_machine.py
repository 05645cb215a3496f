"""Routers: a state machine with real caches, replicas that join and leave, and late events.

The choices of ``checkpoint`` are compared with a plain version of its rule.
"""

from __future__ import annotations

import random
from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybridcache.adapters.events import EventsLost, EventStream, root_hash, unit_hashes
from hybridcache.adapters.routing.precise import CheckpointSeconds, Reuse, WriteRate
from hybridcache.adapters.routing.protocol import (
    Choice,
    NoReplica,
    ReplicaSpec,
    Router,
    RouteRequest,
)
from hybridcache.adapters.routing.registry import ROUTERS, find_router
from hybridcache.policies.registry import parse_placement
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import PromptBoundaries
from hybridcache.radix.tokens import common_prefix_len
from tests.adapters.segments import PlainMirror
from tests.radix.serving import PerToken, hybrid
from tests.refused import refused

GRID, KV_BYTES, STATE_BYTES = 4, 10, 50
PLACEMENT = "branch,boundary,backoff"


def spec(placement=PLACEMENT, **changes):
    fields = {"times": PerToken(), "grid": GRID, "kv_bytes": KV_BYTES, "state_bytes": STATE_BYTES}
    fields |= {"capacity_bytes": 96 * KV_BYTES + 8 * STATE_BYTES}
    return ReplicaSpec(placement=parse_placement(placement), **fields | changes)


def asked(name, tokens):
    return RouteRequest(name, np.array(tokens, np.int32))


class Replica:
    """Cache that publishes its changes as event batches."""

    def __init__(self, placement=PLACEMENT, **sizes):
        self.cache = hybrid(**{"num_kv_tokens": 96, "num_slots": 8, "grid": GRID} | sizes)
        self.placement = parse_placement(placement)
        self.events, self.covered, self.batches, self.num_batches = [], [], [], 0
        self.epoch = id(self)
        self.cache.subscribe(EventStream(self.events.append, GRID))
        self.known, self.in_flight = PlainMirror(GRID), {}
        """What the router knows: applied batches, and the requests that they do not cover with the
        positions of their checkpoints."""

    def compute(self, request):
        """Prefill a prompt, end the request and record a batch of events."""
        tokens = request.tokens
        lease_request = LeaseRequest(
            tokens, request.namespace, PromptBoundaries(request.boundaries)
        )
        lease = Lease.begin(self.cache, self.placement, lease_request)
        if lease is not None and lease.extend(len(tokens)):
            lease.take_checkpoint_slots(lease.cached_len, len(tokens))
            self.cache.take_step().done()
            lease.finish(tokens, len(tokens))
        elif lease is not None:
            lease.abort()
        self.covered.append(request.id)
        self.batches.append((self.num_batches, tuple(self.events), tuple(self.covered), self.epoch))
        self.num_batches += 1
        self.events.clear()
        self.covered.clear()


class RoutersMachine(RuleBasedStateMachine):
    @initialize(
        name=st.just("checkpoint") | st.sampled_from(sorted(ROUTERS)), replicas=st.integers(1, 3)
    )
    def make(self, name, replicas):
        self.router, self.reuse = find_router(name)(spec()), Reuse(GRID)
        self.replicas, self.requests, self.prompts, self.now = {}, {}, [()], 0.0
        self.num_replicas = self.num_requests = 0
        for _ in range(replicas):
            self.join()

    @rule()
    def join(self):
        self.replicas[self.num_replicas] = Replica()
        writes = WriteRate(self.router.spec.capacity_bytes, self.now)
        self.replicas[self.num_replicas].writes = writes
        self.router.joined(self.num_replicas, self.now)
        self.num_replicas += 1

    @precondition(lambda self: self.replicas)
    @rule(number=st.integers(0, 9))
    def leave(self, number):
        replica = sorted(self.replicas)[number % len(self.replicas)]
        del self.replicas[replica]
        lost = set(self.router.left(replica, self.now))
        assert lost == {id_ for id_, (_, at, _) in self.requests.items() if at == replica}
        self.requests = {id_: it for id_, it in self.requests.items() if it[1] != replica}

    @rule(
        number=st.integers(0, 99),
        prefix_len=st.integers(0, 20),
        new=st.lists(st.integers(0, 2), max_size=9),
    )
    def route(self, number, prefix_len, new):
        tokens = (*self.prompts[number % len(self.prompts)][:prefix_len], *new) or (0,)
        self.num_requests += 1
        request = asked(self.num_requests, tokens)
        if not self.replicas:
            with pytest.raises(NoReplica):
                self.router.route(request, self.now)
            return
        expected = plain_choice(self.router, self.replicas, self.reuse, request, self.now)
        choice = self.router.route(request, self.now)
        assert choice.replica in self.replicas
        if expected is not None:
            least = min(cost for cost, *_ in expected.values())
            cost, depth, saved, new = expected[choice.replica]
            assert cost <= least + 1e-9 and choice.expected_len == depth
            seconds = (len(tokens) - depth) / 4
            self.replicas[choice.replica].writes.sent(new, seconds, self.now)
            self.replicas[choice.replica].in_flight[request.id] = request, saved
        self.prompts.append(tokens)
        self.requests[request.id] = request, choice.replica, False

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 99), is_computed=st.booleans())
    def advance(self, number, is_computed):
        """Compute the prompt of a request, or end the request."""
        id_ = sorted(self.requests)[number % len(self.requests)]
        request, at, is_prefilled = self.requests[id_]
        if is_prefilled or not is_computed:
            self.router.ended(id_, self.now)
            if not is_prefilled:
                self.replicas[at].in_flight.pop(id_, None)
            del self.requests[id_]
        else:
            self.replicas[at].compute(request)
            self.router.prefilled(id_, self.now)
            self.requests[id_] = request, at, True

    @precondition(lambda self: self.replicas)
    @rule(number=st.integers(0, 9))
    def deliver(self, number):
        """Deliver the oldest batch of a replica."""
        replica = sorted(self.replicas)[number % len(self.replicas)]
        if self.replicas[replica].batches:
            batch = self.replicas[replica].batches.pop(0)
            self.router.on_events(replica, *batch)
            for event in batch[1]:
                self.replicas[replica].known.apply(event)
            for request in batch[2]:
                self.replicas[replica].in_flight.pop(request, None)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def counts_agree(self):
        if hasattr(self, "router"):
            self.router.check()
            assert self.router.loads.keys() == self.replicas.keys()
            running = sum(load.num_running for load in self.router.loads.values())
            assert running == len(self.requests)

    @invariant()
    def mirrors_equal_caches_without_pending_batches(self):
        if not hasattr(self, "router") or not isinstance(self.router, CheckpointSeconds):
            return
        for name, replica in self.replicas.items():
            if not replica.batches:
                assert self.router.mirrors[name].num_tokens == replica.cache.cached_tokens
                assert self.router.mirrors[name].num_checkpoints == replica.cache.num_checkpoints

    def teardown(self):
        """End all requests and deliver all batches; then nothing is in flight."""
        if not hasattr(self, "router") or not isinstance(self.router, CheckpointSeconds):
            return
        for number in tuple(self.requests):
            self.router.ended(number, self.now)
        for name, replica in self.replicas.items():
            for batch in replica.batches:
                self.router.on_events(name, *batch)
                for event in batch[1]:
                    replica.known.apply(event)
            assert len(self.router.in_flight[name]) == 0
        for prompt in self.prompts:
            for end in range(1, len(prompt) + 1):
                request = asked(0, prompt[:end])
                hashes = hashes_of(request)
                found = GRID * np.array(self.router.lengths(hashes.tobytes(), hashes, end))
                for name, replica in self.replicas.items():
                    number = self.router._numbers[name]
                    assert tuple(found[:, number]) == replica.known.match(request.tokens)


def plain_choice(router, replicas, reuse, request, now):
    """Return (cost, depth, positions of checkpoints, bytes) of each replica by a plain version of
    the rule of ``checkpoint``, or None for other routers."""
    if type(router) is not CheckpointSeconds:
        return None
    num_ids, costs = len(request.tokens), {}
    writes = {name: one.writes.totals() for name, one in replicas.items()}
    rates = {
        name: num_bytes / max(now - since, 1e-6) if now > since else 0.0
        for name, (num_bytes, since, _) in writes.items()
    }
    mean = sum(rates.values()) / len(rates)
    passed = sum(now - since for _, since, _ in writes.values())
    idle = max(1 - sum(work for _, _, work in writes.values()) / passed, 0.05) if passed else 1.0
    num_held = {
        name: sum(len(node.tokens) for node in one.known.nodes.values())
        for name, one in replicas.items()
    }
    held = sum(num_held.values())
    found = {name: lengths(one, router.loads[name], request) for name, one in replicas.items()}
    reuse.evicted = router.reuse.evicted
    reuse.ask(hashes_of(request), max(kv_len for _, kv_len in found.values()), held)
    value, since = reuse.value(held), min(router._first_s, now)
    arrivals = (router._num_requests + 1) / max(now - since, 1e-6) / len(rates) * (now > since)
    for name, load in router.loads.items():
        depth, kv_len = found[name]
        end = (num_ids - 1) // GRID * GRID  # No prompt is resumed at its own end.
        fork = min(kv_len // GRID * GRID, end)
        saved = sorted({at for at in (fork, end) if at > depth})
        new = (num_ids - max(depth, kv_len)) * KV_BYTES + STATE_BYTES
        prefix = max(fork - depth, 0) if kv_len > depth else 0
        pressure = (rates[name] / mean) ** 0.5 if mean else 1.0
        tokens = num_held[name] ** value * (held / len(rates)) ** (1 - value)
        lost = value * pressure * new * tokens / router.spec.capacity_bytes
        own, wait = (num_ids - depth + lost) / 4, load.wait_s(now)
        delay = arrivals * own * (wait + own / 2) / idle
        costs[name] = wait + own - prefix / 4 + delay, depth, saved, new
    return costs


def lengths(replica, load, request):
    """Return the numbers of ids that can be resumed, and that have KV, after all prompts in flight
    are computed. KV of those with a first token is known by events only."""
    depth, kv_len = replica.known.match(request.tokens)
    for name, (other, positions) in replica.in_flight.items():
        shared = common_prefix_len(other.tokens, request.tokens)
        kv_len = max(kv_len, shared // GRID * GRID * (name in load.waiting))
        most = min(shared, len(request.tokens) - 1)
        depth = max(depth, *[0, *positions][: bisect_right(positions, most) + 1])
    return depth, kv_len


def hashes_of(request):
    ids = request.tokens.tobytes()
    return np.frombuffer(unit_hashes(ids, GRID, root_hash(request.namespace)), np.int64)


TestRouters = RoutersMachine.TestCase


def test_checkpoint_chooses_the_cheapest_replica_in_a_long_run() -> None:
    """Most tokens are new, so few of those evicted are asked for again. Replicas leave and
    others join."""
    draw, machine = random.Random(1), RoutersMachine()
    machine.make("checkpoint", 3)
    for step in range(500):
        new = [draw.randrange(30) for _ in range(draw.randrange(10))]
        machine.route(draw.randrange(99), draw.randrange(24), new)
        while draw.random() < 0.6 and machine.requests:
            machine.advance(draw.randrange(99), draw.random() < 0.8)
        machine.deliver(draw.randrange(9))
        machine.wait((3000 if step > 250 else 3) * draw.random() ** 3 * (step % 20 > 5))
        if step % 100 == 50:
            machine.leave(1)
        if step % 100 == 80:
            machine.join()
    machine.teardown()


def test_reuse_counts_prompts_whose_tokens_were_evicted_within_two_lifetimes() -> None:
    """Compared with all earlier prompts, one by one."""
    draw, reuse, earlier, evicted, missed = random.Random(1), Reuse(GRID), [((), 0)], 0, 0
    for number in range(300):
        new = [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
        tokens, known = (*draw.choice(earlier)[0][: draw.randrange(20)], *new), draw.randrange(12)
        for end in range(GRID, len(tokens) + 1, GRID):
            uses = [at for prompt, at in earlier if prompt[:end] == tokens[:end]]
            if not uses or uses[-1] <= evicted - 2 * 60:
                break
            missed += GRID * (end > known)
        reuse.ask(hashes_of(asked(number, tokens)), known, 60)
        earlier.append((tokens, evicted))
        assert reuse.value(60) == min((2 * missed + 60) / (evicted + 60), 1.0)
        reuse.evicted = evicted = evicted + draw.randrange(40) * draw.randrange(2)


def fleet(name: str, count: int = 3, **changes: object) -> Router:
    """Return a router with ``count`` joined replicas."""
    router = find_router(name)(spec(**changes))
    for replica in range(count):
        router.joined(replica, 0.0)
    return router


def test_prompts_with_a_common_prefix_meet_before_any_event() -> None:
    router = fleet("checkpoint", 8)
    chosen = set()
    for number in range(6):
        request = asked(number, (*range(40), *range(100 * number, 100 * number + 8)))
        chosen.add(router.route(request, 10.0 * number).replica)
        router.ended(number, 10.0 * number)
    assert len(chosen) == 1


def test_replicas_with_equal_costs_share_branches_and_namespaces() -> None:
    for requests in (
        [asked(0, range(100 * number, 100 * number + 20)) for number in range(20)],
        [RouteRequest(0, np.arange(20, dtype=np.int32), number) for number in range(20)],
    ):
        assert len({fleet("checkpoint", 8).route(one, 0.0).replica for one in requests}) > 4


def test_prompts_in_flight_are_those_of_their_namespace() -> None:
    router = fleet("checkpoint", 1)
    for number, (namespace, expected) in enumerate((("a", 0), ("a", 16), ("b", 0), (None, 0))):
        request = RouteRequest(number, np.arange(18, dtype=np.int32), namespace)
        assert router.route(request, 0.0).expected_len == expected


def test_forecasts_do_not_train_the_placement_policy() -> None:
    """The copy of each replica's policy learns only from requests that the replica computed."""
    for placement in ("branch,boundary,backoff", "adaptive"):
        router = fleet("checkpoint", 4, placement=placement)
        assert isinstance(router, CheckpointSeconds)
        found = []
        for number in range(300):
            request = asked(number, tuple(range(number * 100, number * 100 + 90)))
            found.append(router.forecast(request, 0, 0))
            replica = router.route(request, float(number)).replica
            assert len(router.in_flight[replica][number]) == len(found[-1].saves) + 90 // GRID
            router.prefilled(number, number + 0.2)
            router.ended(number, number + 0.5)
        assert found[0].saves and all(plan == found[0] for plan in found)


def test_text_router_applies_the_thresholds_of_sglang() -> None:
    router = fleet("text", 2)
    assert router.route(asked(1, tuple(range(10))), 0).replica == 0
    assert router.route(asked(2, (0, 1, 2, *range(50, 57))), 0) == (1, 0)  # 30 %: not above
    assert router.route(asked(3, (0, 1, 2, 3, *range(60, 66))), 0) == (0, 4)
    for number in range(4, 4 + 64):
        router.route(asked(number, (*range(10), number)), 0)
    assert router.loads[0].num_running - router.loads[1].num_running == 65
    assert router.route(asked("last", (*range(10), 5)), 0).replica == 1


def test_a_lost_batch_raises_and_batch_0_starts_over() -> None:
    replica = Replica()
    for number in range(3):
        replica.compute(asked(number, (number,) * 9))
    router = fleet("checkpoint", 1)
    router.on_events(0, *replica.batches[0])
    with pytest.raises(EventsLost):
        router.on_events(0, *replica.batches[2])
    with pytest.raises(EventsLost, match="of epoch"):
        router.on_events(0, *replica.batches[1][:3], replica.epoch + 1)
    router.on_events(0, *replica.batches[1])
    all_events = []
    replica.cache.subscribe(EventStream(all_events.append, GRID))
    router.on_events(0, 0, all_events)
    assert router.mirrors[0].num_tokens == replica.cache.cached_tokens
    router.check()


def test_a_prompt_is_not_resumed_at_its_own_end() -> None:
    replica, router = Replica(), fleet("checkpoint", 1)
    replica.compute(asked("long", tuple(range(9))))
    router.on_events(0, *replica.batches[0])
    for length, expected in ((8, 0), (9, 8), (12, 8)):
        assert router.route(asked(length, tuple(range(length))), 0.0).expected_len == expected
        router.ended(length, 0.0)


class NewestReplica(Router):
    """Router that always chooses the newest replica, and one that is not up if it is alone."""

    def choose(self, request, now):
        return Choice(max(self.loads) if len(self.loads) > 1 else "away")


class NotARouter:
    choose = NewestReplica.choose


def test_a_custom_router_is_found_by_its_path() -> None:
    here = "tests.adapters.routing.test_routers_machine"
    assert find_router(NewestReplica) is NewestReplica
    router = find_router(f"{here}:NewestReplica")(spec())
    router.joined(-1, 0)
    refused("must return a Choice of a replica", router.route, asked(1, (1,)), 0)
    router.joined(0, 0)
    router.joined(1, 0)
    assert router.route(asked(1, (1,)), 0).replica == 1
    refused(r"router must be one of checkpoint, .* \(got 'best'\)", find_router, "best")
    refused("Router: give a name, or a class derived from", find_router, f"{here}:NotARouter")
