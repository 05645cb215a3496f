"""State machines: the hybrid cache agrees with its plain twin under any order of operations."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hybridcache.config import CacheConfig
from hybridcache.policies.registry import EVICTION_NAMES
from tests import selection
from tests.radix.twins import Twins

NAMESPACES = st.sampled_from([None] * 5 + ["tenant", 7, ("model", "adapter")])
TOP_ID = 2**31 - 1


@st.composite
def configs(draw: st.DrawFn, evictions: tuple[str, ...]) -> CacheConfig:
    """Draw configurations of small caches, so that evictions are frequent."""
    page_size = draw(st.sampled_from([1, 16, 64, 256]))
    grid = draw(st.sampled_from([1, 16, 64, 256]))
    unit = max(page_size, grid)
    if draw(st.booleans()):
        state_bytes = draw(st.sampled_from([1, 8, 64])) * unit
        pools = {
            "total_bytes": unit * 2 * draw(st.integers(4, 24)) + 4 * state_bytes,
            "kv_bytes_per_token": 2,
            "state_bytes": state_bytes,
            "memory": draw(st.sampled_from(("arena", "budget"))),
        }
    else:
        pools = {
            "num_kv_tokens": unit * draw(st.integers(4, 24)),
            "num_slots": draw(st.integers(1, 6)),
            "state_bytes": 2,
        }
    return CacheConfig(
        page_size=page_size,
        grid=grid,
        eviction=draw(st.sampled_from(evictions)),
        priority_classes=draw(st.booleans()),
        ghost_bytes=draw(st.sampled_from([0, 2000, 1 << 20])),
        **pools,
    )


def draw_prompt(
    data: st.DataObject, seen: list[np.ndarray], sizes: list[int], longest: int
) -> np.ndarray:
    """Draw a prefix of a prompt in ``seen`` followed by blocks of equal ids, so that prompts share
    long prefixes, and append it to ``seen``."""
    before = seen[data.draw(st.integers(0, len(seen) - 1))]
    prefix = before[: data.draw(st.integers(0, len(before)))]
    blocks = data.draw(st.lists(st.sampled_from([0, 1, TOP_ID]), max_size=4))
    after = np.repeat(np.array(blocks, np.int32), data.draw(st.sampled_from(sizes)))
    prompt = np.concatenate([prefix, after])
    assume(0 < len(prompt) <= longest)
    seen.append(prompt)
    return prompt


class CacheMachine(RuleBasedStateMachine):
    """One rule for each operation of a request, of a caller that holds memory, and of eviction."""

    evictions: tuple[str, ...] = ("lru",)

    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        self.twins = Twins(data.draw(configs(self.evictions)))
        config = self.twins.config
        self.unit = max(config.page_size, config.grid)
        self.seen: list[np.ndarray] = [np.empty(0, np.int32)]

    def draw_prompt(self, data: st.DataObject) -> np.ndarray:
        sizes = [1, 3, self.unit, self.unit + 1]
        return draw_prompt(data, self.seen, sizes, longest=12 * self.unit)

    @rule(data=st.data(), namespace=NAMESPACES)
    def begin(self, data: st.DataObject, namespace: object) -> None:
        if len(self.twins.requests) < 4:
            self.twins.begin(self.draw_prompt(data), namespace)

    @rule(data=st.data(), namespace=NAMESPACES, saves=st.booleans())
    def serve_whole(self, data: st.DataObject, namespace: object, saves: bool) -> None:
        request = self.twins.begin(self.draw_prompt(data), namespace)
        if request is not None:
            n = len(request.tokens)
            grid = self.twins.cache.checkpoint_grid
            wanted = {n // grid * grid, (n - 1) // grid * grid, request.match.seen_len} - {0}
            self.twins.publish(request, n, sorted(wanted) * saves, data.draw(st.booleans()))
            self.twins.end(request)

    @precondition(lambda self: self.twins.requests)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.twins.requests))
        length = data.draw(st.integers(request.published_len, len(request.tokens)))
        step = self.twins.cache.checkpoint_grid
        on_grid = st.integers(0, length // step).map(lambda k: k * step)
        positions = data.draw(
            st.lists(on_grid | st.integers(0, length + 1), max_size=3, unique=True)
        )
        self.twins.publish(request, length, positions, data.draw(st.booleans()))

    @precondition(lambda self: any(one.published_len for one in self.twins.requests))
    @rule(data=st.data())
    def replace_rows(self, data: st.DataObject) -> None:
        published = [one for one in self.twins.requests if one.published_len]
        request = data.draw(st.sampled_from(published))
        page_size = self.twins.config.page_size
        num_pages = request.published_len // page_size
        first = data.draw(st.integers(0, num_pages))
        count = data.draw(st.integers(0, num_pages - first))
        self.twins.replace_rows(request, first * page_size, count * page_size)

    @precondition(lambda self: self.twins.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.twins.end(data.draw(st.sampled_from(self.twins.requests)))

    @rule(data=st.data(), namespace=NAMESPACES)
    def match(self, data: st.DataObject, namespace: object) -> None:
        self.twins.match(self.draw_prompt(data), namespace)

    @rule(tokens=st.integers(0, 200), slots=st.integers(0, 3))
    def evict(self, tokens: int, slots: int) -> None:
        self.twins.evict(tokens, slots)

    @rule(pages=st.integers(1, 8))
    def hold_rows(self, pages: int) -> None:
        rows = self.twins.allocate_kv(pages * self.twins.config.page_size)
        if rows is not None:
            self.twins.held_rows.append(rows)

    @precondition(lambda self: self.twins.held_rows)
    @rule()
    def free_rows(self) -> None:
        self.twins.free_kv(self.twins.held_rows.pop())

    @rule()
    def hold_slot(self) -> None:
        self.twins.allocate_slot()

    @precondition(lambda self: self.twins.held_slots)
    @rule()
    def free_slot(self) -> None:
        self.twins.free_slot(self.twins.held_slots[-1])

    @rule(data=st.data(), namespace=NAMESPACES)
    def lock_kv(self, data: st.DataObject, namespace: object) -> None:
        if len(self.twins.locks) < 4:
            self.twins.lock_kv(self.draw_prompt(data), namespace)

    @precondition(lambda self: self.twins.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        self.twins.unlock(data.draw(st.integers(0, len(self.twins.locks) - 1)))

    @rule()
    def protected(self) -> None:
        """Count the locked memory: changes of locks are pending until it or an eviction does."""
        self.twins.protected()

    @rule()
    def reset(self) -> None:
        self.twins.reset()

    @invariant()
    def invariants_hold(self) -> None:
        if hasattr(self, "twins"):
            self.twins.check()

    def teardown(self) -> None:
        if hasattr(self, "twins"):
            for request in list(self.twins.requests):
                self.twins.end(request)
            while self.twins.locks:
                self.twins.unlock(0)
            for rows in self.twins.held_rows:
                self.twins.free_kv(rows)
            self.twins.held_rows = []
            self.twins.reset()
            self.twins.check()
            assert self.twins.cache.num_nodes == 0


def at_least(num_examples: int) -> settings:
    """Return the profile's settings with at least that many examples (fewer in `make test`)."""
    minimum = selection.num_examples(num_examples)
    return settings(max_examples=max(minimum, settings().max_examples))


def test_the_cache_with_lru_agrees_with_its_plain_twin():
    run_state_machine_as_test(CacheMachine, settings=at_least(120))


class EveryPolicyMachine(CacheMachine):
    evictions = tuple(EVICTION_NAMES)


def test_the_cache_with_every_policy_agrees_with_its_plain_twin():
    run_state_machine_as_test(EveryPolicyMachine, settings=at_least(60))
