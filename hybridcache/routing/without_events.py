"""Routers that receive no cache events: some estimate cache contents from the prompts they sent.

These implement the published rules of SGLang's gateway and of Ray Serve. Those count characters;
these count tokens.
"""

from __future__ import annotations

import random

from hybridcache.routing.hashing import rendezvous
from hybridcache.routing.protocol import Choice, ReplicaId, ReplicaSpec, Router, RouteRequest
from hybridcache.routing.text_tree import TextTree

CHARACTERS_PER_TOKEN = 4


class _Guessing(Router):
    """Base of routers that record the prompts they sent in a ``TextTree``."""

    def __init__(self, spec: ReplicaSpec, max_tokens: int) -> None:
        super().__init__(spec)
        self.tree = TextTree(max(1, max_tokens // spec.unit))

    def left(self, replica: ReplicaId, now: float) -> tuple[object, ...]:
        self.tree.forget(replica)
        return super().left(replica, now)

    def smallest(self) -> ReplicaId:
        """Return the replica with the fewest recorded tokens."""
        return min(self.loads, key=lambda replica: self.tree.num_tokens.get(replica, 0))

    def check(self) -> None:
        super().check()
        self.tree.check()
        assert self.tree.num_tokens.keys() <= self.loads.keys()


class CacheAware(_Guessing):
    """Rule ``cache_aware`` of SGLang's gateway, with its defaults.

    - While one replica has more than ``balance_abs`` requests and more than ``balance_rel`` times
      the requests of another, choose the least loaded replica.
    - Otherwise choose the longest match, if it exceeds ``cache_threshold`` of the prompt.
    - Otherwise choose the replica with the fewest recorded tokens.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        *,
        cache_threshold: float = 0.3,
        balance_abs: int = 64,
        balance_rel: float = 1.5,
        max_tree_characters: int = 1 << 26,
    ) -> None:
        super().__init__(spec, max_tree_characters // CHARACTERS_PER_TOKEN)
        self._threshold = cache_threshold
        self._balance_abs, self._balance_rel = balance_abs, balance_rel

    def choose(self, request: RouteRequest, now: float) -> Choice:
        counts = [load.num_running for load in self.loads.values()]
        most, fewest = max(counts), min(counts)
        expected = 0
        if most - fewest > self._balance_abs and most > self._balance_rel * fewest:
            chosen = self.least_loaded()
        else:
            _, reached = self.tree.match(request.tokens, request.namespace)
            chosen = max(reached, key=lambda each: reached[each], default=self.smallest())
            expected = reached.get(chosen, 0)
            if expected <= self._threshold * len(request.tokens):
                chosen, expected = self.smallest(), 0
        self.tree.insert(request.tokens, chosen, request.namespace)
        return Choice(chosen, expected)


class PrefixAffinity(_Guessing):
    """Rule of Ray Serve's ``PrefixCacheAffinityRouter``, with its defaults.

    The candidates are:

    - all replicas, if queue lengths differ by ``imbalanced`` or more;
    - otherwise the best matches, if they cover at least ``threshold`` of the prompt;
    - otherwise the replicas with the fewest recorded tokens.

    Two candidates are drawn at random, and the less loaded one is chosen.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        *,
        threshold: float = 0.1,
        imbalanced: int = 10,
        max_characters: int = 400_000,
    ) -> None:
        super().__init__(spec, max_characters // CHARACTERS_PER_TOKEN)
        self._threshold, self._imbalanced = threshold, imbalanced
        self._lots = random.Random(spec.seed)

    def choose(self, request: RouteRequest, now: float) -> Choice:
        counts = [load.num_running for load in self.loads.values()]
        candidates = list(self.loads)
        reached: dict[ReplicaId, int] = {}
        if max(counts) - min(counts) < self._imbalanced:
            _, reached = self.tree.match(request.tokens, request.namespace)
            best = max(reached.values(), default=0)
            if best >= max(1, self._threshold * len(request.tokens)):
                candidates = [each for each, length in reached.items() if length == best]
            else:
                held = self.tree.num_tokens
                fewest = min(held.get(each, 0) for each in self.loads)
                candidates = [each for each in self.loads if held.get(each, 0) == fewest]
        drawn = self._lots.sample(candidates, min(2, len(candidates)))
        chosen = min(drawn, key=lambda each: self.loads[each].num_running)
        self.tree.insert(request.tokens, chosen, request.namespace)
        return Choice(chosen, reached.get(chosen, 0))


# --- Routers that ignore caches -------------------------------------------------------------------


class RoundRobin(Router):
    """Choose each replica in turn."""

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self._turn = 0

    def choose(self, request: RouteRequest, now: float) -> Choice:
        replicas: list[ReplicaId] = list(self.loads)
        self._turn += 1
        return Choice(replicas[self._turn % len(replicas)])


class LeastLoaded(Router):
    """Choose the replica with the fewest running requests."""

    def choose(self, request: RouteRequest, now: float) -> Choice:
        return Choice(self.least_loaded())


class Sticky(Router):
    """Choose a session's replica by consistent hashing, regardless of load.

    A request without a session is treated as a session by itself.
    """

    def choose(self, request: RouteRequest, now: float) -> Choice:
        session = request.id if request.session is None else request.session
        return Choice(rendezvous(repr((request.namespace, session)).encode(), self.loads))
