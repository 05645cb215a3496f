"""Custom policies and exchange rules that raise in the middle of an operation.

The cache stays consistent and nothing leaks. The failure is raised at the end of the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hybridcache import Lease, LeaseRequest
from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.placement import Adaptive, Placement
from hybridcache.policies.user import factory_of
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.protocol import EvictionPolicy, PlacementPolicy, PolicyError
from tests.radix.serving import hybrid

EVICTION = ("add", "discard", "touch", "victim", "on_ghost_hit", "on_ghost_hit_above")
PLACEMENT = ("on_prefill", "on_hit", "on_ghost_hit", "on_saved", "on_dropped", "plan")
ITEM_BYTES = {"kv_bytes_per_token": 1, "state_bytes": 8}


BOOM = RuntimeError("boom")


def failing(base: type, method: str, calls: int, error: Exception = BOOM) -> type:
    """Return a subclass of ``base`` that raises at the n-th call of ``method``."""

    class Failing(base):  # type: ignore[misc]
        left = calls

    def fail(self: Any, *arguments: Any) -> Any:
        Failing.left -= 1
        if Failing.left == 0:
            raise error
        return getattr(base, method)(self, *arguments)

    setattr(Failing, method, fail)
    return Failing


class Loads:
    """Exchange rule that loads whatever it can."""

    def seconds_saved(self, *_: Any) -> float:
        return 1.0


def serve(cache: HybridRadixCache, placement: PlacementPolicy, seed: int) -> int:
    """Serve random overlapping requests and return the number of policy failures.

    After each failure the request is aborted.
    """
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 50, 60, dtype=np.int32) for _ in range(4)]
    num_failed, running = 0, []
    for number in range(120):
        lease = None
        try:
            if len(running) < 3:
                tokens = texts[rng.integers(4)][: rng.integers(1, 60)]
                request = LeaseRequest(tokens.copy(), own_slot=number if number % 4 else None)
                lease = Lease.begin(cache, placement, request, Loads() if cache.offload else None)
                if lease is None:
                    continue
                running.append((lease, tokens))
                if lease.extend(len(tokens)):
                    lease.take_checkpoint_slots(lease.cached_len, len(tokens))
                    cache.take_step().done()
                    lease.publish(tokens, len(tokens))
            else:
                lease, tokens = running.pop(int(rng.integers(3)))
                end = len(tokens) if lease.extended_len >= len(tokens) else lease.published_len
                (lease.preempt if rng.integers(4) == 0 else lease.finish)(tokens, end)
        except PolicyError as error:
            assert "raised RuntimeError: boom" in str(error)
            num_failed += 1
            if lease is not None and not repr(lease).endswith("(ended)"):
                running = [entry for entry in running if entry[0] is not lease]
                lease.abort()
    for lease, _ in running:
        lease.abort()
    return num_failed


def check_serving(
    eviction: Callable[[], EvictionPolicy], placement: PlacementPolicy, **tiers: int
) -> int:
    cache = hybrid(100, 5, **ITEM_BYTES, grid=4, eviction=eviction, **tiers)
    num_failed = serve(cache, placement, 0)
    cache.check(held_tokens=0, held_slots=0)
    try:
        cache.match(np.ones(1, np.int32))  # It raises a failure of the last request.
    except PolicyError:
        num_failed += 1
    return num_failed


@example(method="on_ghost_hit", calls=1, host_bytes=60)  # a load for a request with its own slot
@given(
    method=st.sampled_from(EVICTION), calls=st.integers(1, 60), host_bytes=st.sampled_from((0, 60))
)
def test_a_failing_eviction_leaves_the_cache_consistent(
    method: str, calls: int, host_bytes: int
) -> None:
    kind = failing(LRU, method, calls)
    num_failed = check_serving(kind, Placement((Adaptive(),)), host_bytes=host_bytes)
    assert (num_failed > 0) == (kind.left <= 0)  # type: ignore[attr-defined]


@example(method="on_dropped", calls=4)  # It reads what is above an item of LRU.
@given(method=st.sampled_from(PLACEMENT), calls=st.integers(1, 40))
def test_a_failing_placement_leaves_the_cache_consistent(method: str, calls: int) -> None:
    kind = failing(Adaptive, method, calls)
    num_failed = check_serving(LRU, Placement((factory_of(kind, PlacementPolicy)(),)))
    has_failed = kind.left <= 0  # type: ignore[attr-defined]
    assert has_failed or not num_failed
    # A failure in a notification after the last plan is not raised.
    assert num_failed or not has_failed or method != "plan"


@pytest.mark.parametrize("method", ["touch", "add", "discard", "victim", "on_prefill", "plan"])
def test_a_lack_of_memory_is_not_a_failure_of_the_policy(method: str) -> None:
    base, protocol = (LRU, EvictionPolicy) if method in EVICTION else (Adaptive, PlacementPolicy)
    policy = factory_of(failing(base, method, 3, MemoryError()), protocol)
    eviction, placements = (policy, (Adaptive(),)) if base is LRU else (LRU, (policy(),))
    with pytest.raises(MemoryError):
        check_serving(eviction, Placement(placements))


class FailingExchange:
    """Exchange rule that raises, or returns no number."""

    def __init__(self, raises: bool) -> None:
        self.raises = raises

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> Any:
        if self.raises:
            raise RuntimeError("boom")


@pytest.mark.parametrize("raises", [True, False])
def test_a_failing_exchange_rule_leaks_nothing(raises: bool) -> None:
    cache, tokens = (
        hybrid(40, 3, **ITEM_BYTES, grid=4, host_bytes=60),
        np.arange(20, dtype=np.int32),
    )
    slot = cache.allocate_slot()
    assert slot is not None
    cache.insert(tokens, cache.allocate_kv(20), [(16, slot)])
    cache.evict(num_tokens=20)
    assert cache.match(tokens).loadable
    with pytest.raises((RuntimeError, TypeError), match=r"boom|must return a number"):
        Lease.begin(cache, Placement((Adaptive(),)), LeaseRequest(tokens), FailingExchange(raises))
    cache.check(held_tokens=0, held_slots=0)


def test_the_failure_of_a_policy_without_a_file_is_one_sentence() -> None:
    """A class that is typed into an interpreter or a notebook has no module with a file."""
    text = "class Own(Adaptive):\n    def plan(self, prefill):\n        raise KeyError('own')\n"
    names: dict[str, Any] = {"Adaptive": Adaptive, "__name__": "__main__ of an interpreter"}
    exec(compile(text, "<cell 1>", "exec"), names)
    placement = factory_of(names["Own"], PlacementPolicy)()
    cache = hybrid(40, 3, grid=4)
    lease = Lease.begin(cache, placement, LeaseRequest(np.arange(20, dtype=np.int32)))
    assert lease is not None
    assert placement.state_dict() == Adaptive().state_dict()
    with pytest.raises(PolicyError, match=r"plan raised KeyError: 'own' \(<cell 1>, line 3\)$"):
        lease.extend(20)
    lease.abort()
    cache.check(held_tokens=0, held_slots=0)
