"""State machine of a cache with tiers: the contents of all tiers match the tree."""

from __future__ import annotations

import numpy as np
from hypothesis import assume
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
from hybridcache.radix.cache import LockHandle
from tests.radix.test_machine import at_least, draw_prompt
from tests.radix.tiers import TieredMemory

NAMESPACES = st.sampled_from([None, "tenant"])


@st.composite
def configs(draw: st.DrawFn) -> CacheConfig:
    """Draw configurations with a device and tiers of a few pages."""
    page_size, grid = draw(st.sampled_from([(1, 1), (1, 4), (2, 4), (4, 2)]))
    unit = max(page_size, grid)
    state_bytes = draw(st.sampled_from([2, 5, 16])) * unit
    if draw(st.booleans()):
        pools = {
            "total_bytes": unit * 2 * draw(st.integers(4, 16)) + 3 * state_bytes,
            "memory": draw(st.sampled_from(["arena", "budget"])),
        }
    else:
        pools = {
            "num_kv_tokens": unit * draw(st.integers(4, 16)),
            "num_slots": draw(st.integers(1, 4)),
        }
    sizes = st.integers(1, 12).map(lambda units: units * 2 * unit + 2 * state_bytes)
    host_bytes = draw(st.just(0) | sizes)
    return CacheConfig(
        page_size=page_size,
        grid=grid,
        kv_bytes_per_token=2,
        state_bytes=state_bytes,
        eviction=draw(st.sampled_from(["lru", "survival", "fifo"])),
        ghost_bytes=draw(st.sampled_from([0, 2000, 1 << 20])),
        host_bytes=host_bytes,
        disk_bytes=draw(sizes if not host_bytes else st.just(0) | sizes),
        **pools,
    )


class TieredMachine(RuleBasedStateMachine):
    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        config = data.draw(configs())
        self.memory = TieredMemory(config)
        self.step = self.memory.cache.checkpoint_grid
        self.seen = [np.empty(0, np.int32)]
        self.locks: list[LockHandle] = []

    def draw_prompt(self, data: st.DataObject) -> np.ndarray:
        return draw_prompt(data, self.seen, [1, self.step], longest=8 * self.step)

    @rule(data=st.data(), namespace=NAMESPACES, fetch=st.integers(0, 2))
    def serve(self, data: st.DataObject, namespace: object, fetch: int) -> None:
        prompt = self.draw_prompt(data)
        steps = st.integers(1, max(len(prompt) // self.step, 1))
        wanted = data.draw(st.sets(steps, max_size=2))
        self.memory.serve(prompt, namespace, sorted(self.step * at for at in wanted), fetch)

    @rule(data=st.data(), namespace=NAMESPACES)
    def come_back(self, data: st.DataObject, namespace: object) -> None:
        """Serve a prompt, evict it, and serve it again with a load. Else loads are rare."""
        prompt = np.append(self.draw_prompt(data), np.repeat(np.int32(1), self.step))
        self.seen.append(prompt)
        self.memory.serve(prompt, namespace, [(len(prompt) - 1) // self.step * self.step], 0)
        self.memory.cache.evict(1000, 100)
        self.memory.apply_transfers()
        self.memory.serve(prompt, namespace, [], data.draw(st.integers(0, 1)))

    @rule(data=st.data(), namespace=NAMESPACES)
    def lock_kv(self, data: st.DataObject, namespace: object) -> None:
        if len(self.locks) < 3:
            self.locks.append(self.memory.cache.lock_kv(self.draw_prompt(data), namespace))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.locks) - 1))
        self.memory.cache.unlock(self.locks.pop(number))

    @rule(tokens=st.integers(0, 40), slots=st.integers(0, 2))
    def evict(self, tokens: int, slots: int) -> None:
        self.memory.cache.evict(tokens, slots)

    @rule(data=st.data(), namespace=NAMESPACES)
    def adopt(self, data: st.DataObject, namespace: object) -> None:
        prompt = self.draw_prompt(data)
        whole = prompt[: len(prompt) // self.step * self.step]
        assume(len(whole))
        tier = data.draw(st.sampled_from(self.memory.cache.offload.names))
        self.memory.adopt(whole, namespace, tier)

    @rule(data=st.data(), every=st.integers(1, 5))
    def lose(self, data: st.DataObject, every: int) -> None:
        """Lose some rows of a tier, as if they cannot be read."""
        self.memory.apply_transfers()
        tier = data.draw(st.sampled_from(self.memory.cache.offload.names))
        self.memory.lose(tier, every)

    @rule()
    def reset(self) -> None:
        self.memory.cache.reset()

    @invariant()
    def invariants_hold(self) -> None:
        if hasattr(self, "memory"):
            self.memory.check()

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            while self.locks:
                self.memory.cache.unlock(self.locks.pop())
            self.memory.cache.reset()
            self.memory.check()
            assert self.memory.cache.num_nodes == 0


def test_the_contents_of_all_tiers_match_the_tree():
    run_state_machine_as_test(TieredMachine, settings=at_least(60))
