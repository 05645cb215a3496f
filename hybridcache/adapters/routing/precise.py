"""Router that mirrors each replica's cache from its events and compares expected seconds."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from hashlib import blake2b
from typing import ClassVar

from hybridcache.adapters.events import CheckpointStored, Event, KVRemoved, Mirror
from hybridcache.adapters.routing.protocol import (
    Choice,
    ReplicaId,
    ReplicaSpec,
    Router,
    RouteRequest,
)
from hybridcache.policies.placement import Rule
from hybridcache.radix.protocol import Placed, Prefill
from hybridcache.radix.tokens import common_prefix_len

MOST_BUSY = 0.95
"""Upper bound of the estimated utilisation. Above it queues grow without limit."""
EVIDENCE = 4.0
"""Checkpoints per rule that are assumed saved before any event arrives."""
RECENT = 64.0
"""Planned checkpoints per rule after which the counts are halved."""
REUSE_WEIGHT = 2.0
"""Weight of the share of evicted tokens that are asked for again. Chosen on chats, agents and
conversations; without it, chats lose up to 4 points of hits."""
LIFETIMES = 2.0
"""Age in lifetimes of cached tokens up to which a request for evicted tokens counts as their
reuse."""


class SavedShares:
    """Fraction of planned checkpoints that replicas save, by rule, learned from their events.

    The router's copy of a learning placement policy sees no requests, so it plans every position
    the policy could save. Events show which rules the replicas follow at present.
    """

    def __init__(self) -> None:
        self._planned: defaultdict[Rule, float] = defaultdict(float)
        self._saved: defaultdict[Rule, float] = defaultdict(float)

    def plan(self, rule: Rule) -> None:
        """Count a planned checkpoint of a request that events now cover."""
        self._planned[rule] += 1.0
        if self._planned[rule] > RECENT:
            self._planned[rule] *= 0.5
            self._saved[rule] *= 0.5

    def save(self, rule: Rule) -> None:
        """Count a saved checkpoint."""
        self._saved[rule] += 1.0

    def is_saved(self, rule: Rule) -> bool:
        """Return whether at least half of the planned checkpoints of ``rule`` are saved."""
        return 2 * (self._saved[rule] + EVIDENCE) >= self._planned[rule] + EVIDENCE


class Reuse:
    """Value of cached tokens that are evicted, from the share that prompts ask for again."""

    def __init__(self, grid: int) -> None:
        self._grid = grid
        self._seen: dict[int, float] = {}
        """Number of tokens that all replicas had evicted when a prefix was last asked for, by the
        hash of the prefix, the longest unused first."""
        self._missed = 0.0
        self.evicted = 0
        """Number of tokens that replicas have evicted."""

    def value(self, held_tokens: int) -> float:
        """Return 0 if evicted tokens are never asked for again, 1 if half of them are. It is 1 at
        first: ``held_tokens`` count as evicted and half of them as asked for."""
        total = self.evicted + held_tokens
        return min((REUSE_WEIGHT * self._missed + held_tokens) / total, 1.0) if total else 1.0

    def ask(self, request: RouteRequest, known_len: int, held_tokens: int) -> None:
        """Count a prompt of which ``known_len`` tokens are cached somewhere. All replicas hold
        ``held_tokens``. O(n)."""
        tokens, step = request.tokens.tobytes(), 4 * self._grid
        oldest = self.evicted - LIFETIMES * held_tokens
        prefix, is_seen = hash(request.namespace), True
        for end in range(step, len(tokens) + 1, step):
            prefix = hash((prefix, tokens[end - step : end]))
            since = self._seen.pop(prefix, None)
            is_seen = is_seen and since is not None and since > oldest
            self._missed += self._grid * (is_seen and end > 4 * known_len)
            self._seen[prefix] = self.evicted
        while self._seen and next(iter(self._seen.values())) < oldest:
            del self._seen[next(iter(self._seen))]


class CheckpointSeconds(Router):
    """Choose the replica on which a request costs the whole fleet the least time, in seconds.

    There are no parameters. The cost has four parts:

    - Wait: time until the replica has finished its present work, estimated when that was sent.
    - Prefill from the deepest checkpoint available by then. This is a checkpoint reported by
      events, or one that a prompt in flight will save according to the replicas' placement policy.
    - Displacement: new KV and states evict others. Their prefill time counts as far as evicted
      tokens are asked for again (``Reuse``), and grows with the rate at which the replica's memory
      is overwritten (``pressures``).
    - Delay of later requests. In a queue with Poisson arrivals, work of x seconds behind w seconds
      delays arrivals / (1 - utilisation) * x * (w + x / 2) seconds of others.

    Ties, such as prompts seen by no replica, are broken by consistent hashing of the branch: the
    tokens after the resumable prefix. Prompts that share a branch then meet before any event
    arrives. O(replicas x matched nodes). Memory is O(tokens cached).
    """

    follows_events: ClassVar[bool] = True

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self.mirrors: dict[ReplicaId, Mirror] = {}
        self.in_flight: dict[ReplicaId, InFlight] = {}
        self.write_rates: dict[ReplicaId, WriteRate] = {}
        self.shares = SavedShares()
        self.reuse = Reuse(spec.grid)
        self._num_requests, self._first_s = 0, math.inf

    def joined(self, replica: ReplicaId, now: float) -> None:
        super().joined(replica, now)
        self.mirrors[replica] = self._empty_mirror()
        self.in_flight[replica] = {}
        self.write_rates[replica] = WriteRate(self.spec.capacity_bytes, now)

    def _empty_mirror(self) -> Mirror:
        return Mirror(self.spec.page_size, None if self.spec.stateful else self.spec.grid)

    def left(self, replica: ReplicaId, now: float) -> tuple[Hashable, ...]:
        lost = super().left(replica, now)
        self.mirrors.pop(replica, None)
        self.in_flight.pop(replica, None)
        self.write_rates.pop(replica, None)
        return lost

    def choose(self, request: RouteRequest, now: float) -> Choice:
        num_ids = len(request.tokens)
        known: dict[ReplicaId, tuple[int, int, int, list[int]]] = {}
        cost: dict[ReplicaId, float] = {}
        per_id = self.seconds(0, num_ids) / max(num_ids, 1)
        capacity, pressures = self.spec.capacity_bytes, self.pressures(now)
        held = sum(mirror.num_tokens for mirror in self.mirrors.values())
        matches = {
            replica: mirror.match(request.tokens, request.namespace)
            for replica, mirror in self.mirrors.items()
        }
        self.reuse.ask(request, max(one.kv_match_len for one in matches.values()), held)
        reuse, mean = self.reuse.value(held), held / len(self.mirrors)
        delays = self.arrivals(now) / (1.0 - self.utilisation(now))
        for replica, load in self.loads.items():
            cached_len, kv_match_len = matches[replica]
            depth = max(cached_len, depth_after(self.in_flight[replica], request))
            positions = self.forecast(request, depth, kv_match_len)
            new_bytes = (num_ids - max(kv_match_len, depth)) * self.spec.kv_bytes
            new_bytes += len(positions) * self.spec.state_bytes
            known[replica] = depth, kv_match_len, new_bytes, positions
            # Tokens per byte differ by replica only as far as that matters: by chance, if most
            # evicted tokens are never asked for again.
            tokens = self.mirrors[replica].num_tokens ** reuse * mean ** (1.0 - reuse)
            displaced = new_bytes * tokens / capacity if capacity else 0.0
            work = self.seconds(depth, num_ids) + per_id * reuse * pressures[replica] * displaced
            wait = load.wait_s(now)
            cost[replica] = wait + work + delays * work * (wait + work / 2)
        least = min(cost.values())
        equal = [replica for replica, seconds in cost.items() if seconds <= least]
        deepest = max(depth for depth, *_ in known.values())
        branch = tuple(request.tokens[deepest : deepest + self.spec.grid].tolist())
        chosen = rendezvous(repr((request.namespace, deepest, branch)).encode(), equal)
        depth, kv_match_len, new_bytes, positions = known[chosen]
        rules = tuple(placed[1:] for placed in self._plan(request, depth, kv_match_len))
        self.in_flight[chosen][request.id] = request, tuple(sorted(positions)), rules
        self.write_rates[chosen].sent(new_bytes, self.seconds(depth, num_ids), now)
        return Choice(chosen, depth)

    def arrivals(self, now: float) -> float:
        """Count a request. Returns the requests per second and replica since the first one."""
        self._num_requests += 1
        self._first_s = min(self._first_s, now)
        passed = max(now - self._first_s, 1e-6)
        return self._num_requests / passed / len(self.loads) if now > self._first_s else 0.0

    def pressures(self, now: float) -> dict[ReplicaId, float]:
        """Return the relative value of memory on each replica: the square root of its overwrite
        rate, 1 at the mean (Hartstein et al., "Cache miss behavior: is it sqrt(2)?", 2006)."""
        rates = {replica: own.rate(now) for replica, own in self.write_rates.items()}
        mean = sum(rates.values()) / max(len(rates), 1)
        return {replica: math.sqrt(rate / mean) if mean else 1.0 for replica, rate in rates.items()}

    def utilisation(self, now: float) -> float:
        """Return the fraction of time that the replicas spend on prefill, at most ``MOST_BUSY``,
        estimated from the requests sent to them."""
        work_s = sum(own.work_s for own in self.write_rates.values())
        seconds = sum(now - own.since_s for own in self.write_rates.values())
        return min(work_s / seconds, MOST_BUSY) if seconds > 0 else 0.0

    def forecast(self, request: RouteRequest, cached_len: int, kv_match_len: int) -> list[int]:
        """Return the positions at which computing a prompt from ``cached_len`` saves
        checkpoints."""
        if self.spec.placement is None or not self.spec.stateful:
            return [len(request.tokens)]
        planned = self._plan(request, cached_len, kv_match_len)
        return [placed.position for placed in planned if self.shares.is_saved(placed[1:])]

    def _plan(self, request: RouteRequest, cached_len: int, kv_match_len: int) -> list[Placed]:
        """Return the checkpoints that the placement policy may save."""
        placement, step = self.spec.placement, math.lcm(self.spec.grid, self.spec.page_size)
        if placement is None or not self.spec.stateful:
            return []
        known = max(cached_len, kv_match_len)
        prefill = Prefill(len(request.tokens), cached_len, known, known, request.boundaries, step)
        return prefill.on_grid(placement.plan(prefill))

    def ended(self, request: Hashable, now: float) -> None:
        where = self._where.get(request)
        if where is not None and request in self.loads[where].waiting:
            self.in_flight[where].pop(request, None)
        super().ended(request, now)

    def on_events(
        self,
        replica: ReplicaId,
        sequence: int,
        events: Iterable[Event],
        covered: Iterable[Hashable] = (),
        epoch: int = 0,
    ) -> None:
        """Apply a batch of events to the mirror of ``replica``, which batch 0 resets. Events of a
        replica that has left are ignored."""
        if replica not in self.mirrors:
            return
        events = tuple(events)
        if sequence == 0:
            self.mirrors[replica] = self._empty_mirror()
        nodes = self.mirrors[replica].nodes
        for event in events:
            if isinstance(event, KVRemoved) and event.id in nodes:
                self.reuse.evicted += nodes[event.id].end - nodes[event.id].start
        self.mirrors[replica].apply_batch(sequence, events, epoch)
        counts = sequence > 0  # Batch 0 can repeat checkpoints that were already counted.
        if counts:
            for event in events:
                if isinstance(event, CheckpointStored):
                    self.shares.save((event.label, event.distance))
        else:  # It has all contents; batches that covered requests may be lost.
            ended = [one for one in self.in_flight[replica] if one not in self._where]
            covered = [*covered, *ended]
        for request in covered:
            prompt = self.in_flight[replica].pop(request, None)
            if prompt is not None and counts:
                for rule in prompt[2]:
                    self.shares.plan(rule)

    def check(self) -> None:
        super().check()
        assert self.mirrors.keys() == self.in_flight.keys() == self.loads.keys()
        assert self.write_rates.keys() == self.loads.keys()
        for mirror in self.mirrors.values():
            nodes = mirror.nodes.values()
            assert mirror.num_tokens == sum(node.end - node.start for node in nodes)
            assert mirror.num_checkpoints == sum(node.checkpoint is not None for node in nodes)


# --- Prompts without events yet -------------------------------------------------------------------


InFlight = dict[Hashable, tuple[RouteRequest, tuple[int, ...], tuple[Rule, ...]]]
"""Prompts in flight to one replica: running requests, and those that ended since its events.

Each has the positions at which it saves a checkpoint, ascending, and the rules of all positions at
which the placement policy may save.
"""


def depth_after(prompts: InFlight, request: RouteRequest) -> int:
    """Return the number of ids of ``request`` that can be resumed after all ``prompts`` are
    computed.

    O(prompts + shared ids).

    >>> import numpy as np
    >>> long, short = np.array([1, 2, 3, 4], np.int32), np.array([1, 2, 9], np.int32)
    >>> prompts = {"a": (RouteRequest("a", long), (2, 4), (("every", 0),) * 2)}
    >>> depth_after(prompts, RouteRequest("b", short))
    2
    """
    deepest = 0
    for other, positions, _ in prompts.values():
        if other.namespace == request.namespace and positions and positions[-1] > deepest:
            shared = min(common_prefix_len(other.tokens, request.tokens), len(request.tokens) - 1)
            number = bisect_right(positions, shared)
            if number:
                deepest = max(deepest, positions[number - 1])
    return deepest


class WriteRate:
    """Log of the bytes stored on one replica and of the prefill seconds that they took.

    It covers the last ``capacity_bytes`` written: under LRU, the next victim has been unused for
    about that period.

    >>> write_rate = WriteRate(100, now=0.0)
    >>> for second in range(1, 5):
    ...     write_rate.sent(50, 0.25, now=float(second))
    >>> write_rate.rate(now=4.0), write_rate.rate(now=8.0), write_rate.work_s
    (50.0, 16.666666666666668, 0.5)
    """

    def __init__(self, capacity_bytes: int | None, now: float) -> None:
        self._capacity = capacity_bytes
        self._bytes, self._seconds = 0, 0.0
        self._log: deque[tuple[float, int, float]] = deque([(now, 0, 0.0)])
        """Entries (time, total bytes, total seconds), the oldest first. Totals are cumulative."""

    def sent(self, num_bytes: int, seconds: float, now: float) -> None:
        self._bytes += num_bytes
        self._seconds += seconds
        if self._capacity is None or not num_bytes:
            return
        self._log.append((now, self._bytes, self._seconds))
        while len(self._log) > 2 and self._log[1][1] <= self._bytes - self._capacity:
            self._log.popleft()

    @property
    def since_s(self) -> float:
        """Start of the log: one capacity ago, or the time at which the replica joined."""
        return self._log[0][0]

    @property
    def work_s(self) -> float:
        """Prefill seconds sent to the replica since ``since_s``."""
        return self._seconds - self._log[0][2]

    def rate(self, now: float) -> float:
        """Return the bytes per second since ``since_s``, or 0 if no time has passed. Periods under
        a microsecond count as one."""
        since, before, _ = self._log[0]
        return (self._bytes - before) / max(now - since, 1e-6) if now > since else 0.0


# --- Ties -----------------------------------------------------------------------------------------


def rendezvous(key: bytes, replicas: Iterable[ReplicaId]) -> ReplicaId:
    """Return the replica with the highest weight for ``key`` (Thaler and Ravishankar, 1998). When a
    replica leaves or joins, only its own keys move. O(replicas).

    >>> rendezvous(b"a", (0, 1, 2)) == rendezvous(b"a", (2, 1, 0))
    True
    """

    def weight(replica: ReplicaId) -> bytes:
        return blake2b(key, digest_size=8, key=repr(replica).encode()[:64]).digest()

    return max(replicas, key=weight)
