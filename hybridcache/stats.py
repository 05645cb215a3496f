"""Counters: every prompt token is a hit or a loss with a cause, per namespace; and what came and
went."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridcache.results import PrefixMatch

MAX_NAMESPACES = 1024
"""Namespaces counted apart; beyond that, those that did not come again are folded into
``CacheStats.folded``."""


class Usage:
    """What the requests of one namespace asked for and got. Tokens, but for ``requests``, ``hits``
    and ``missed``."""

    __slots__ = (
        "below_grid",
        "cached_tokens",
        "checkpoint_evicted",
        "hits",
        "kv_evicted",
        "missed",
        "missed_tokens",
        "never_checkpointed",
        "never_seen",
        "not_fetched",
        "prompt_tokens",
        "refused",
        "requests",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.hits = 0
        """Requests that reused anything."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.never_seen = 0
        self.kv_evicted = 0
        self.checkpoint_evicted = 0
        self.never_checkpointed = 0
        self.below_grid = 0
        self.refused = 0
        self.not_fetched = 0
        self.missed = 0
        """Requests that would have resumed deeper from a checkpoint that was evicted."""
        self.missed_tokens = 0
        """Tokens that those checkpoints would have saved."""

    def record(self, match: PrefixMatch) -> None:
        cached_len = match.cached_len
        self.requests += 1
        self.prompt_tokens += match.num_tokens
        if cached_len:
            self.hits += 1
            self.cached_tokens += cached_len
        losses = match.losses
        self.never_seen += losses[0]
        self.kv_evicted += losses[1]
        self.checkpoint_evicted += losses[2]
        self.never_checkpointed += losses[3]
        self.below_grid += losses[4]
        self.refused += losses[5]
        self.not_fetched += losses[6]
        if match.missed is not None:
            self.missed += 1
            self.missed_tokens += match.missed_tokens

    def merge(self, other: Usage) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def token_hit_rate(self) -> float:
        """Reused share of the prompt tokens; 0 before the first."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def request_hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in sorted(self.__slots__)}


class CacheStats:
    """What one cache has seen since it was made.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
    >>> cache.touch(cache.match(np.arange(10, dtype=np.int32), namespace="tenant"))
    >>> cache.stats.by_namespace["tenant"].never_seen, cache.stats.token_hit_rate
    (10, 0.0)
    """

    def __init__(self) -> None:
        self.by_namespace: OrderedDict[Hashable, Usage] = OrderedDict()
        self._known_requests: dict[Hashable, int] = {}
        self.folded = Usage()
        """Usage of namespaces that are no longer counted apart."""
        self.inserted_tokens = 0
        """KV rows that entered the cache."""
        self.inserted_slots = 0
        self.evicted_tokens = 0
        self.evicted_slots = 0
        self.evictions = 0
        """Times an item was chosen to go; its node's KV and checkpoint may both go with it."""
        self.refusals = 0
        """Allocations that could not be met."""

    @property
    def num_changes(self) -> int:
        """Grows whenever entries came or went, so that the result of a match may differ."""
        inserted = self.inserted_tokens + self.inserted_slots
        return inserted + self.evicted_tokens + self.evicted_slots

    def record(self, match: PrefixMatch) -> None:
        """Count one request. O(1)."""
        usage = self.by_namespace.get(match.namespace)
        if usage is None:
            usage = self._open(match.namespace)
        usage.record(match)

    def _open(self, namespace: Hashable) -> Usage:
        """Amortised O(1)."""
        # A second chance for each that came again since it was looked at, as in CLOCK: a use costs
        # nothing for it.
        while len(self.by_namespace) >= MAX_NAMESPACES:
            oldest, usage = self.by_namespace.popitem(last=False)
            if usage.requests > self._known_requests.pop(oldest, 1):
                self._known_requests[oldest] = usage.requests
                self.by_namespace[oldest] = usage
            else:
                self.folded.merge(usage)
        usage = self.by_namespace[namespace] = Usage()
        return usage

    @property
    def total(self) -> Usage:
        """All namespaces together. O(namespaces)."""
        total = Usage()
        for usage in (self.folded, *self.by_namespace.values()):
            total.merge(usage)
        return total

    @property
    def token_hit_rate(self) -> float:
        return self.total.token_hit_rate

    def clear(self) -> None:
        """Count from here on."""
        vars(self).update(vars(CacheStats()))

    def as_dict(self) -> dict[str, int]:
        """All counters, namespaces added up."""
        return self.total.as_dict() | {
            name: value for name, value in sorted(vars(self).items()) if isinstance(value, int)
        }
