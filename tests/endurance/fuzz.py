"""State machines with new random operations, each compared with an independent model.

The cache is compared with the cache without a tree, leases with what was written for their tokens,
tiers with the bytes that they must contain, and the engine with the oracle's answers. A failure is
shrunk, and names the machine and the seed that repeat it.
"""

from __future__ import annotations

import time
from collections import Counter

import hypothesis
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.allocators.test_arena import ArenaMachine
from tests.engine.schedule.test_scheduler_machine import SchedulerMachine
from tests.radix.test_lease_machine import LeaseMachine
from tests.radix.test_machine import CacheMachine
from tests.radix.test_tiers_machine import TieredMachine

MACHINES: tuple[type[RuleBasedStateMachine], ...] = (
    CacheMachine,
    LeaseMachine,
    TieredMachine,
    SchedulerMachine,
    ArenaMachine,
)
NUM_EXAMPLES, STEPS = 20, 50
"""Runs of a machine with one seed, and the most operations of a run."""


def play(machine: type[RuleBasedStateMachine], seed: int) -> None:
    """Run ``machine`` with ``seed``. Raises AssertionError, with the shrunk operations."""
    seeded = hypothesis.seed(seed)(type(machine.__name__, (machine,), {}))
    settings = hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        run_state_machine_as_test(seeded, settings=settings)
    except Exception as error:
        shrunk = "\n".join(getattr(error, "__notes__", ()))
        raise AssertionError(f"{machine.__name__}, seed {seed}: {error!r}\n{shrunk}") from error


def run(seed: int, seconds: int) -> dict[str, int]:
    """Run the machines in turn for that many ``seconds``, each with the next seed. Returns the
    number of runs of each."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = counts.total() // NUM_EXAMPLES
        machine = MACHINES[number % len(MACHINES)]
        play(machine, seed + number)
        counts[machine.__name__] += NUM_EXAMPLES
    return dict(counts)
