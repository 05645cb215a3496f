"""Routers that receive no cache events: by sent prompts, and by load."""

from __future__ import annotations

from hybridcache.routing.protocol import Choice, ReplicaId, ReplicaSpec, Router, RouteRequest
from hybridcache.routing.text_tree import TextTree

CHARACTERS_PER_TOKEN = 4


class CacheAware(Router):
    """Rule ``cache_aware`` of SGLang's gateway, with its defaults.

    It estimates the contents of caches from the prompts that it sent. The gateway counts
    characters; this counts tokens.

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
        super().__init__(spec)
        max_tokens = max_tree_characters // CHARACTERS_PER_TOKEN
        self.tree = TextTree(max(1, max_tokens // spec.unit))
        self._threshold = cache_threshold
        self._balance_abs, self._balance_rel = balance_abs, balance_rel

    def left(self, replica: ReplicaId, now: float) -> tuple[object, ...]:
        self.tree.forget(replica)
        return super().left(replica, now)

    def smallest(self) -> ReplicaId:
        """Return the replica with the fewest recorded tokens."""
        return min(self.loads, key=lambda replica: self.tree.num_tokens.get(replica, 0))

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

    def check(self) -> None:
        super().check()
        self.tree.check()
        assert self.tree.num_tokens.keys() <= self.loads.keys()


class LeastLoaded(Router):
    """Choose the replica with the fewest running requests."""

    def choose(self, request: RouteRequest, now: float) -> Choice:
        return Choice(self.least_loaded())
