"""Rules of other routers, rebuilt for simulated fleets: ``hybridcache.lab.rivals.routers:RULE``."""

from __future__ import annotations

import random

import numpy as np

from hybridcache.adapters.events import Units, root_hash, unit_hashes
from hybridcache.adapters.routing.precise import CheckpointSeconds
from hybridcache.adapters.routing.protocol import Choice, ReplicaSpec, Router, RouteRequest
from hybridcache.adapters.routing.text import CacheAware


class TwoChoices(Router):
    """Ray Serve's default: the replica with fewer running requests of two drawn ones."""

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self._random = random.Random(0)

    def choose(self, request: RouteRequest, now: float) -> Choice:
        drawn = self._random.sample(list(self.loads), min(2, len(self.loads)))
        return Choice(min(drawn, key=lambda one: self.loads[one].num_running))


class PrefixAffinity(CacheAware):
    """Ray Serve LLM's ``PrefixCacheAffinityRouter`` with its defaults, but counting tokens in place
    of characters: loads are never unequal, and nothing is evicted.

    The replicas with the longest match with earlier prompts if that is at least 10 % of the prompt,
    else those with the fewest recorded tokens; of them the one with the fewest running requests.
    """

    MATCH_RATE = 0.1

    def choose(self, request: RouteRequest, now: float) -> Choice:
        tokens, space = request.tokens, request.namespace
        known = {one: sent.match(tokens, space).kv_match_len for one, sent in self.sent.items()}
        most = max(known.values())
        if most < self.MATCH_RATE * len(tokens):
            most, known = 0, {one: -sent.cached_tokens for one, sent in self.sent.items()}
        near = [one for one in known if known[one] == max(known.values())]
        chosen = min(near, key=lambda one: self.loads[one].num_running)
        self.record(chosen, tokens, space)
        return Choice(chosen, most)


class StatesAndWait(CheckpointSeconds):
    """Least prefill from the deepest reported checkpoint plus waiting prefills."""

    row = 0
    """Row of ``UnitTree.match`` that counts as a hit."""

    def choose(self, request: RouteRequest, now: float) -> Choice:
        num_ids = len(request.tokens)
        ids = unit_hashes(request.tokens.tobytes(), self.unit, root_hash(request.namespace))
        most = (num_ids - 1) // self.unit
        units = np.minimum(self.tree.match(ids, most, len(self._ids))[self.row], most)
        known = {one: int(units[number]) * self.unit for one, number in self._numbers.items()}
        cost = {
            one: (self.seconds(known[one], num_ids) + load.wait_s(now), load.num_running)
            for one, load in self.loads.items()
        }
        chosen = min(cost, key=cost.__getitem__)
        return Choice(chosen, known[chosen])


class BlocksAndWait(StatesAndWait):
    """The same by KV alone, as llm-d-router and Dynamo count it."""

    row = 1


class Blind(CheckpointSeconds):
    """Router ``checkpoint`` that takes all matching KV for a hit."""

    def lengths(self, ids: bytes, hashes: Units, num_ids: int) -> tuple[Units, Units]:
        _, matched = super().lengths(ids, hashes, num_ids)
        return np.minimum(matched, (num_ids - 1) // self.unit), matched
