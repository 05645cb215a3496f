"""Router by the prompts sent to each replica, without cache events.

Only its limit of memory evicts, so it can report matches that a replica has evicted.
"""

from __future__ import annotations

from collections.abc import Hashable

from hybridcache.adapters.routing.protocol import (
    Choice,
    ReplicaId,
    ReplicaSpec,
    Router,
    RouteRequest,
)
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.registry import parse_placement
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.tokens import Tokens

MAX_SENT_TOKENS = 1 << 24
"""Limit of the gateway, 2**26 characters, at four characters per token."""
CACHE_THRESHOLD = 0.3
BALANCE_ABS, BALANCE_REL = 64, 1.5


class CacheAware(Router):
    """Rule ``cache_aware`` of SGLang's gateway, with its defaults, but counting tokens in place of
    characters. It estimates the contents of caches from the prompts that it sent.

    - While one replica has over ``BALANCE_ABS`` requests more than another, and over
      ``BALANCE_REL`` times as many, choose the least loaded replica.
    - Otherwise choose the longest match, if it exceeds ``CACHE_THRESHOLD`` of the prompt.
    - Otherwise choose the replica with the fewest recorded tokens.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        num_tokens = max(1, MAX_SENT_TOKENS // spec.unit)
        self._config = CacheConfig(
            prefix_cache="radix", num_kv_tokens=num_tokens, grid=1, eviction="lru", ghost_bytes=0
        )
        self._placement = parse_placement("none")
        self.sent: dict[ReplicaId, HybridRadixCache] = {}
        """Prompts sent to each replica, as an attention-only cache without rows."""

    def joined(self, replica: ReplicaId, now: float) -> None:
        super().joined(replica, now)
        self.sent[replica] = build_prefix_cache(self._config)

    def left(self, replica: ReplicaId, now: float) -> tuple[Hashable, ...]:
        self.sent.pop(replica, None)
        return super().left(replica, now)

    def choose(self, request: RouteRequest, now: float) -> Choice:
        tokens, space = request.tokens, request.namespace
        counts = [load.num_running for load in self.loads.values()]
        most, fewest = max(counts), min(counts)
        expected = 0
        if most - fewest > BALANCE_ABS and most > BALANCE_REL * fewest:
            chosen = self.least_loaded()
        else:
            known = {one: sent.match(tokens, space).kv_match_len for one, sent in self.sent.items()}
            chosen = max(known, key=known.__getitem__)
            expected = known[chosen]
            if expected <= CACHE_THRESHOLD * len(tokens):
                chosen = min(self.sent, key=lambda one: self.sent[one].cached_tokens)
                expected = 0
        self.record(chosen, tokens, space)
        return Choice(chosen, expected)

    def record(self, replica: ReplicaId, tokens: Tokens, namespace: Hashable) -> None:
        """Note that a replica got a prompt."""
        request = LeaseRequest(tokens, namespace, stateful=False)
        sent = self.sent[replica]
        lease = Lease.begin(sent, self._placement, request)
        assert lease is not None, "no slot is needed"
        with lease:
            if lease.extend(len(tokens)):  # Else it is longer than the limit.
                sent.take_step().done()
                lease.finish(tokens, len(tokens))

    def check(self) -> None:
        super().check()
        assert self.sent.keys() == self.loads.keys()
