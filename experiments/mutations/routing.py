"""Ways to break the rule that chooses among replicas."""

from __future__ import annotations

from experiments.mutations import Mutation, Mutations

PRECISE, TURNOVER = "hybridcache/routing/precise.py", "hybridcache/routing/turnover.py"

BREAKAGES = (
    Mutation(
        "a place costs alike however fast memory is written over",
        PRECISE,
        "math.sqrt(rate / mean) if mean else 1.0",
        "1.0",
    ),
    Mutation(
        "states take no place",
        PRECISE,
        "num_ids * self.spec.kv_bytes + num_states * self.spec.state_bytes",
        "num_ids * self.spec.kv_bytes",
    ),
    Mutation(
        "work costs alike however busy the fleet is",
        PRECISE,
        "1.0 / (1.0 - self.utilisation(now))",
        "1.0",
    ),
    Mutation(
        "a turnover reaches back to the beginning",
        TURNOVER,
        "            self._log.popleft()\n",
        "            break\n",
    ),
)

TESTS = ("tests/routing/test_turnover.py", "tests/routing/test_routers_machine.py")
ROUTING = Mutations(
    BREAKAGES,
    TESTS,
    TESTS[1:],
    ("hybridcache", "experiments", "tests", "pyproject.toml"),
)
