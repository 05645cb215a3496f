"""Ways to break the cache, part by part."""

from __future__ import annotations

from experiments.mutations import Mutations
from experiments.mutations.cache.core import BREAKS_OF_CORE
from experiments.mutations.cache.front import BREAKS_OF_FRONT
from experiments.mutations.cache.parts import BREAKS_OF_PARTS

TESTS = (
    "tests/cache/test_eviction.py",
    "tests/cache/test_room.py",
    "tests/cache/test_ghosts.py",
    "tests/cache/test_operations.py",
    "tests/cache/test_scenarios.py",
    "tests/cache/test_controls.py",
    "tests/cache/test_refusals.py",
    "tests/cache/test_check.py",
    "tests/cache/test_gathers.py",
    "tests/cache/test_losses.py",
    "tests/allocators",
    "tests/radix",
    "tests/export/test_events.py",
    "tests/export/test_snapshot.py",
    "tests/cache/test_churn.py",
    "tests/policies/test_ghosts_above.py",
    "tests/policies/test_regret.py",
    "tests/cache/test_machine.py",
)
MACHINES = ("tests/cache/test_machine.py", "tests/cache/test_radix_machine.py")

CACHE = Mutations(
    breakages=(*BREAKS_OF_CORE, *BREAKS_OF_FRONT, *BREAKS_OF_PARTS),
    tests=TESTS,
    machines=MACHINES,
    copied=("hybridcache", "tests", "pyproject.toml"),
)
