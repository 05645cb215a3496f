"""Random operations on small caches, each compared with a reference.

Each seed makes a cache of any memory, page size, grid and policy, which must agree with the cache
without a tree (``tests/plain_cache.py``); leases, whose rows and states must be those written for
their tokens; and a cache with tiers, whose contents must match the tree.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from tqdm import tqdm

from tests.radix.test_arena import config_of, serve_twins
from tests.radix.test_lease_machine import LeaseMachine
from tests.radix.tiers import TieredMemory
from tests.radix.twins import Twins

PLACEMENT = "branch,boundary,backoff,end"
STEPS = 300
"""Operations of one cache."""


def serve_tiers(memory: TieredMemory, rng: random.Random) -> None:
    """Serve prompts that share blocks, with loads. A single tier loses rows: of two, KV that moves
    to the second may take the room of other states."""
    step, cache = memory.cache.checkpoint_grid, memory.cache
    for _ in range(STEPS):
        blocks = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
        prompt = np.repeat(np.array(blocks, np.int32), step)
        positions = sorted({step * rng.randint(1, len(blocks)) for _ in range(rng.randrange(3))})
        memory.serve(prompt, rng.choice((None, "tenant")), positions, rng.randrange(3))
        if len(cache.offload.names) == 1 and rng.random() < 0.1:
            memory.apply_transfers()
            memory.lose(cache.offload.names[0], rng.randint(1, 5))
        memory.check()


def run(seed: int, num_operations: int) -> dict[str, int]:
    """Run at least ``num_operations``. Returns the counts of events."""
    counts: Counter[str] = Counter()
    with tqdm(total=num_operations, unit="op", unit_scale=True, leave=False) as bar:
        for number in range(seed, seed + -(-num_operations // (3 * STEPS))):
            rng = random.Random(number)
            try:
                twins = Twins(config_of(rng))
                serve_twins(twins, rng, STEPS)
                leases = LeaseMachine()
                leases.make(number, PLACEMENT, spare_rows=number % 2)
                leases.many_operations(number, STEPS)
                leases.teardown()
                memory = TieredMemory(config_of(rng, has_tiers=True))
                serve_tiers(memory, rng)
            except Exception as error:
                raise AssertionError(f"seed {number}: {error!r}") from error
            counts["caches"] += 3
            counts["operations"] += 3 * STEPS
            for cache in (twins.cache, leases.cache, memory.cache):
                counts["evictions"] += cache.stats.evictions
            counts["loads"] += memory.cache.offload.copied_rows.get(("host", "device"), 0)
            bar.update(3 * STEPS)
    return dict(counts)
