"""Router that mirrors each replica's cache from its events and compares expected seconds."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from hashlib import blake2b
from itertools import chain
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from hybridcache.adapters.events import Event, Mirror, Units, UnitTree, root_hash, unit_hashes
from hybridcache.adapters.routing.protocol import (
    Choice,
    ReplicaId,
    ReplicaSpec,
    Router,
    RouteRequest,
)
from hybridcache.radix.protocol import Prefill

MOST_BUSY = 0.95
"""Upper bound of the estimated utilisation. Above it queues grow without limit."""
REUSE_WEIGHT = 2.0
"""Weight of the share of evicted tokens that are asked for again. Chosen on chats, agents and
conversations; without it, chats lose up to 4 points of hits."""
LIFETIMES = 2.0
"""Age in lifetimes of cached tokens up to which a request for evicted tokens counts as their
reuse."""
MOST_SEEN = 1 << 20
"""Number of prefixes that ``Reuse`` remembers, in about 150 bytes each."""


class Reuse:
    """Value of cached tokens that are evicted, from the share that prompts ask for again."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._seen: dict[int, float] = {}
        """Number of tokens that all replicas had evicted when a prefix was last asked for, by the
        hash of the prefix, the longest unused first."""
        self._step = 1
        """One prefix in ``_step`` is counted, by its hash, so that ``MOST_SEEN`` are enough."""
        self._missed = 0.0
        self.evicted = 0
        """Number of tokens that replicas have evicted."""

    def value(self, held_tokens: float) -> float:
        """Return 0 if evicted tokens are never asked for again, 1 if half of them are. It is 1 at
        first: ``held_tokens`` count as evicted and half of them as asked for."""
        total = self.evicted + held_tokens
        return min((REUSE_WEIGHT * self._missed + held_tokens) / total, 1.0) if total else 1.0

    def ask(self, hashes: Units, known_len: int, held_tokens: float) -> None:
        """Count a prompt, by the hashes of its units, of which ``known_len`` tokens are cached
        somewhere. All replicas hold ``held_tokens``. O(n)."""
        seen, oldest = self._seen, self.evicted - LIFETIMES * held_tokens
        known = known_len // self._unit
        missed = 0
        for number in np.flatnonzero(hashes % self._step == 0).tolist():
            prefix = int(hashes[number])
            since = seen.pop(prefix, None)
            missed += number >= known and since is not None and since > oldest
            seen[prefix] = self.evicted
        self._missed += missed * self._unit * self._step
        while seen and next(iter(seen.values())) < oldest:
            del seen[next(iter(seen))]
        while len(seen) > MOST_SEEN:
            self._step *= 2
            self._seen = seen = {one: at for one, at in seen.items() if one % self._step == 0}


STATE, KV = 0, 1
InFlight = dict[Hashable, list[tuple[int, int]]]
"""Prompts in flight to one replica: running requests, and those that ended since its events. Each
has (STATE, hash) of the prefixes at which the placement policy may save a checkpoint, and (KV,
hash) of all prefixes until its first token."""
FACTS = ("up", "tokens", "waiting", "head", "head since", "written", "written since", "work")
"""Rows of the numbers of replicas."""


class Plan(NamedTuple):
    """Prefill of a prompt on a replica."""

    saves: list[int]
    """Positions at which the placement policy may save checkpoints."""
    seconds: float
    saved_s: float
    """Seconds that the next prompt with the same KV saves by its checkpoints."""
    new_bytes: int


class CheckpointSeconds(Router):
    """Choose the replica on which a request costs the whole fleet the least time, in seconds.

    There are no parameters. The cost has these parts:

    - Wait: time until the replica has finished its present work, estimated when that was sent.
    - Prefill from the deepest checkpoint available by then. This is a checkpoint reported by
      events, or one that a prompt in flight will save according to the replicas' placement policy.
      If matching KV has no checkpoint at its end, other prompts went there before. This one saves
      one, and the prefill time that the next one saves by it is subtracted. KV that waiting
      prompts will compute counts as matching.
    - Displacement: new KV and the state at its end evict others. Their prefill time counts as far
      as evicted tokens are asked for again (``Reuse``), and grows with the rate at which the
      replica's memory is overwritten.
    - Delay of later requests. In a queue with Poisson arrivals, work of x seconds behind w seconds
      delays arrivals / (1 - utilisation) * x * (w + x / 2) seconds of others.

    Ties, such as prompts seen by no replica, are broken by consistent hashing of the branch: the
    tokens after the resumable prefix. Prompts that share a branch then meet before any event
    arrives. O(prompt + matched nodes), and arithmetic on arrays of replicas. Memory is O(units
    cached).
    """

    follows_events: ClassVar[bool] = True

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self.unit = math.lcm(spec.grid, spec.page_size)
        self.tree = UnitTree()
        self.mirrors: dict[ReplicaId, Mirror] = {}
        self.in_flight: dict[ReplicaId, InFlight] = {}
        self.write_rates: dict[ReplicaId, WriteRate] = {}
        self.reuse = Reuse(self.unit)
        self._planned: dict[tuple[int, int], dict[int, int]] = {}
        """Number of prompts in flight to each replica that leave a checkpoint or KV, by prefix."""
        self._numbers: dict[ReplicaId, int] = {}
        self._ids: list[ReplicaId | None] = []
        """Replicas by their numbers. The number of one that has left is given again."""
        self._facts = np.zeros((len(FACTS), 0))
        self._salts = np.zeros(0, np.uint64)
        self._num_requests, self._first_s = 0, math.inf

    def joined(self, replica: ReplicaId, now: float) -> None:
        super().joined(replica, now)
        if None not in self._ids:
            self._ids.append(None)
            self._facts = np.pad(self._facts, ((0, 0), (0, 1)))
            self._salts = np.pad(self._salts, (0, 1))
        number = self._numbers[replica] = self._ids.index(None)
        self._ids[number], self._salts[number] = replica, hash64(repr(replica).encode())
        self.mirrors[replica] = Mirror(self.unit, self.spec.stateful, self.tree, number)
        self.in_flight[replica] = {}
        self.write_rates[replica] = WriteRate(self.spec.capacity_bytes, now)
        self._note(replica)

    def left(self, replica: ReplicaId, now: float) -> tuple[Hashable, ...]:
        lost = super().left(replica, now)
        if replica in self.mirrors:
            self.mirrors.pop(replica).clear()
            for request in tuple(self.in_flight[replica]):
                self._forget(replica, request)
            del self.in_flight[replica], self.write_rates[replica]
            number = self._numbers.pop(replica)
            self._ids[number], self._facts[:, number] = None, 0.0
        return lost

    def _note(self, replica: ReplicaId) -> None:
        """Write the column of a replica, after any change. O(waiting)."""
        load, writes = self.loads[replica], self.write_rates[replica]
        facts = 1.0, self.mirrors[replica].num_tokens, *load.work(), *writes.totals()
        self._facts[:, self._numbers[replica]] = facts

    def _forget(self, replica: ReplicaId, request: Hashable, first: int = STATE) -> None:
        """Remove a prompt in flight, if there is one, or only its KV."""
        number, keys = self._numbers[replica], self.in_flight[replica].get(request, [])
        while keys and keys[-1][0] >= first:
            counts = self._planned[key := keys.pop()]
            counts[number] -= 1
            if not counts[number]:
                del counts[number]
            if not counts:
                del self._planned[key]
        if first == STATE:
            self.in_flight[replica].pop(request, None)

    def choose(self, request: RouteRequest, now: float) -> Choice:
        num_ids, unit = len(request.tokens), self.unit
        ids = unit_hashes(request.tokens.tobytes(), unit, root_hash(request.namespace))
        hashes = np.frombuffer(ids, np.int64)
        depths, matched = self.lengths(ids, hashes, num_ids)
        is_up, tokens, waiting, head, since, written, logged, work = self._facts
        held = float(tokens.sum())
        self.reuse.ask(hashes, int(matched.max()) * unit, held)
        reuse, mean = self.reuse.value(held), held / len(self.mirrors)
        wait = np.maximum(waiting - np.clip(now - since, 0.0, head), 0.0)
        passed = (now - logged) * is_up
        rates = np.where(passed > 0, written / np.maximum(passed, 1e-6), 0.0)
        # The square root: Hartstein et al., "Cache miss behavior: is it sqrt(2)?", 2006.
        mean_rate = rates.sum() / len(self.mirrors)
        pressures = np.sqrt(rates / mean_rate) if mean_rate else np.ones(len(rates))
        busy = min(work.sum() / passed.sum(), MOST_BUSY) if passed.any() else 0.0
        delays = self.arrivals(now) / (1.0 - busy)

        # Replicas with equal lengths compute and store the same.
        codes, kinds = np.unique(depths * (len(hashes) + 1) + matched, return_inverse=True)
        pairs = [divmod(code, len(hashes) + 1) for code in codes.tolist()]
        plans = [self.forecast(request, depth * unit, length * unit) for depth, length in pairs]
        own, saved, new_bytes = np.array([one[1:] for one in plans], float).T[:, kinds]
        # Tokens per byte differ by replica only as far as that matters: by chance, if most
        # evicted tokens are never asked for again.
        displaced = new_bytes * tokens**reuse * mean ** (1.0 - reuse)
        per_token = self.seconds(0, num_ids) / max(num_ids, 1)
        lost = per_token / (self.spec.capacity_bytes or math.inf) * reuse * pressures * displaced
        total = own + lost
        cost = wait + total - saved + delays * total * (wait + total / 2)
        cost[is_up == 0.0] = math.inf
        equal = np.flatnonzero(cost <= cost.min())
        deepest = int(depths.max()) * unit
        branch = request.tokens[deepest : deepest + unit].tobytes()
        tie = repr((request.namespace, deepest)).encode() + branch
        number = int(equal[rendezvous(tie, self._salts[equal])])
        chosen, plan = self._ids[number], plans[kinds[number]]
        assert chosen is not None
        keys = [(STATE, int(hashes[at // unit - 1])) for at in plan.saves if at >= unit]
        self.in_flight[chosen][request.id] = keys = keys + [(KV, one) for one in hashes.tolist()]
        for key in keys:
            counts = self._planned.setdefault(key, {})
            counts[number] = counts.get(number, 0) + 1
        self.write_rates[chosen].sent(plan.new_bytes, plan.seconds, now)
        return Choice(chosen, int(depths[number]) * unit)

    def lengths(self, ids: bytes, hashes: Units, num_ids: int) -> tuple[Units, Units]:
        """Return (units that can be resumed, units of matching KV) of each numbered replica, from
        its events and its prompts in flight. O(prompt + matched nodes)."""
        most = (num_ids - 1) // self.unit
        found = self.tree.match(ids, most, len(self._ids))
        units, known = hashes.tolist() if self._planned else [], (set[int](), set[int]())
        for at in range(len(units), 0, -1):
            for row in (STATE, KV)[at > most :]:
                counts = self._planned.get((row, units[at - 1]), {})
                # A prompt with the KV of a longer prefix has this one's too.
                if len(counts) > (len(known[KV]) if row == KV else 0):
                    new = [*(counts.keys() - known[row])]
                    found[row, new] = np.maximum(found[row, new], at)
                    known[row].update(new)
        depths, matched = found
        if not self.spec.stateful:
            depths = np.maximum(depths, np.minimum(matched, most))
        return depths, matched

    def arrivals(self, now: float) -> float:
        """Count a request. Returns the requests per second and replica since the first one."""
        self._num_requests += 1
        self._first_s = min(self._first_s, now)
        passed = max(now - self._first_s, 1e-6)
        return self._num_requests / passed / len(self.loads) if now > self._first_s else 0.0

    def forecast(self, request: RouteRequest, cached_len: int, kv_match_len: int) -> Plan:
        """Return what a replica does that computes a prompt from ``cached_len``. A state at a fork
        has no price, because prompts share it."""
        spec, num_ids = self.spec, len(request.tokens)
        known, saves = max(cached_len, kv_match_len), [num_ids]
        if spec.placement is not None and spec.stateful:
            boundaries = request.boundaries
            prefill = Prefill(num_ids, cached_len, known, known, boundaries, self.unit)
            saves = [one.position for one in prefill.on_grid(spec.placement.plan(prefill))]
        seconds = self.seconds(cached_len, num_ids)
        shared = max((at for at in saves if at <= known), default=cached_len)
        saved_s = seconds - self.seconds(shared, num_ids) if shared > cached_len else 0.0
        new_bytes = (num_ids - known) * spec.kv_bytes + spec.state_bytes
        return Plan(saves, seconds, saved_s, new_bytes)

    def route(self, request: RouteRequest, now: float) -> Choice:
        choice = super().route(request, now)
        self._note(choice.replica)
        return choice

    def prefilled(self, request: Hashable, now: float) -> None:
        super().prefilled(request, now)
        if (where := self._where.get(request)) is not None:
            self._forget(where, request, KV)
            self._note(where)

    def ended(self, request: Hashable, now: float) -> None:
        where = self._where.get(request)
        if where is not None and request in self.loads[where].waiting:
            self._forget(where, request)
        super().ended(request, now)
        if where is not None:
            self._note(where)

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
        mirror = self.mirrors.get(replica)
        if mirror is None:
            return
        if sequence == 0:
            mirror.clear()
        before = mirror.num_evicted
        mirror.apply_batch(sequence, events, epoch)
        self.reuse.evicted += mirror.num_evicted - before
        if sequence == 0:  # It has all contents; batches that covered requests may be lost.
            ended = [one for one in self.in_flight[replica] if one not in self._where]
            covered = [*covered, *ended]
        for request in covered:
            self._forget(replica, request)
        self._note(replica)

    def check(self) -> None:
        super().check()
        assert self.mirrors.keys() == self.in_flight.keys() == self.loads.keys()
        assert self.write_rates.keys() == self._numbers.keys() == self.loads.keys()
        prompts = chain(*(one.values() for one in self.in_flight.values()))
        totals = {prefix: sum(counts.values()) for prefix, counts in self._planned.items()}
        assert Counter(chain(*prompts)) == totals
        before = self._facts.copy()
        for replica, mirror in self.mirrors.items():
            mirror.check()
            self._note(replica)
        assert (self._facts == before).all()


class WriteRate:
    """Log of the bytes stored on one replica and of the prefill seconds that they took.

    It covers the last ``capacity_bytes`` written: under LRU, the next victim has been unused for
    about that period.

    >>> write_rate = WriteRate(100, now=0.0)
    >>> for second in range(1, 5):
    ...     write_rate.sent(50, 0.25, now=float(second))
    >>> write_rate.totals()
    (100, 2.0, 0.5)
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

    def totals(self) -> tuple[int, float, float]:
        """Return (bytes, start, prefill seconds) of the log. It starts one capacity ago, or at the
        time at which the replica joined."""
        since, num_bytes, seconds = self._log[0]
        return self._bytes - num_bytes, since, self._seconds - seconds


# --- Ties -----------------------------------------------------------------------------------------


def hash64(key: bytes) -> int:
    """Return a 64-bit hash, equal in all processes."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def rendezvous(key: bytes, salts: npt.NDArray[np.uint64]) -> int:
    """Return the index of the highest weight for ``key`` (Thaler and Ravishankar, 1998), by
    ``salts``, uint64[n]. If a replica leaves or joins, only its own keys move. O(n).

    >>> salts = np.array([3, 5, 8], np.uint64)
    >>> rendezvous(b"a", salts) == 2 - rendezvous(b"a", salts[::-1])
    True
    """
    mixed = salts ^ np.uint64(hash64(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return int(np.argmax(mixed ^ (mixed >> np.uint64(31))))
