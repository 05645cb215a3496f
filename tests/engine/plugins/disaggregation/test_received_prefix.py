"""ReceivedPrefix of a prefix from another engine: held rows, publication, abort and moves."""

from __future__ import annotations

import numpy as np
import pytest

from engine.plugins.disaggregation.prefix_load import ReceivedPrefix
from hybridcache.policies.registry import EVICTION_NAMES
from tests.radix.serving import hybrid
from tests.radix.test_lease import begin, prefill, tokens


@pytest.mark.parametrize("kind", ["hybrid", "radix"])
@pytest.mark.parametrize("eviction", sorted(EVICTION_NAMES))
def test_an_aborted_arrival_does_not_change_the_eviction_order(kind: str, eviction: str) -> None:
    def survivors(aborted_len: int) -> list[list[int]]:
        stateful = kind == "hybrid"
        sizes = {"kv_bytes_per_token": 1, "state_bytes": 20, "grid": 10}
        policy = {"eviction": eviction, "priority_classes": False}
        cache = hybrid(600, 8, prefix_cache=kind, **policy, **sizes)
        prompts = [tokens(100, 1000 * number) for number in range(3)]
        for prompt in prompts:
            lease = begin(cache, prompt, "every:100", stateful=stateful)
            prefill(lease, prompt)
            lease.finish(prompt, 100)
        if aborted_len:
            arrival = ReceivedPrefix.begin(cache, prompts[0][:aborted_len], stateful=stateful)
            assert arrival is not None
            arrival.abort()
        cache.check(0, 0)
        found = []
        while cache.cached_tokens:
            cache.evict(num_tokens=1)
            found.append(
                [cache.match(np.append(p, 9).astype(np.int32)).kv_match_len for p in prompts]
            )
        return found

    untouched = survivors(0)
    assert len(untouched) == 3 and survivors(100) == untouched
    if kind == "hybrid":  # without states, a part of an edge is a separate item
        assert survivors(50) == untouched
