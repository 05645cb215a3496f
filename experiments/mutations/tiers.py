"""Ways to break the tiers below the device."""

from __future__ import annotations

from experiments.mutations import Mutation, Mutations

LOWER, FETCH = "hybridcache/core/lower.py", "hybridcache/core/fetch.py"
STORED, TIERED = "hybridcache/radix/stored.py", "hybridcache/tiered.py"
RESIDENCY, FETCHING = "hybridcache/core/residency.py", "hybridcache/fetching.py"
RESULTS, EXCHANGE = "hybridcache/results.py", "hybridcache/geometry/exchange.py"

BREAKAGES = (
    Mutation(
        "what is kept below is mourned as if it were gone",
        "hybridcache/policies/eviction/regret.py",
        "is_gone = evicted and self._is_last and",
        "is_gone = evicted and",
        ("tests/policies/test_regret.py",),
    ),
    Mutation(
        "no state is spilled",
        RESIDENCY,
        "            self.lower.spill_state(node, checkpoint)\n",
        "            pass\n",
    ),
    Mutation(
        "what is computed anew stays in its tier",
        RESIDENCY,
        "        if node.below is not None and self.lower is not None:\n"
        "            self.lower.drop_state(node)\n",
        "",
    ),
    Mutation(
        "a split ghost keeps all its rows",
        LOWER,
        "below.kv = below.kv[cut:].copy()",
        "below.kv = below.kv.copy()",
    ),
    Mutation(
        "KV does not follow the last state that needs it",
        LOWER,
        "        self._sink(node, number)\n\n    def _sink",
        "\n    def _sink",
    ),
    Mutation(
        "KV sinks below what needs it",
        LOWER,
        "if nearest is not None and nearest <= number:",
        "if nearest is not None and nearest < number:",
    ),
    Mutation(
        "what could not be fetched is lost",
        LOWER,
        "            self.hold_kv(node, number, rows)\n        self.hold_state(taken.state)",
        "            self.hold_kv(node, number, rows)",
    ),
    Mutation(
        "rows are handed out again before they were fetched",
        FETCH,
        "        lower.give(taken, rows, slot)\n",
        "        for _number, _rows in taken.pieces:\n"
        "            lower.tiers[_number].pages.release(_rows)\n"
        "        lower.give(taken, rows, slot)\n",
    ),
    Mutation(
        "a use through a tier is counted on both sides",
        LOWER,
        "        state.uses -= 1\n",
        "        pass\n",
    ),
    Mutation(
        "the path of a fetch is not locked",
        FETCH,
        "    is_locked = base.parent is not None",
        "    is_locked = False",
    ),
    Mutation(
        "a fork in a tier supersedes",
        STORED,
        "if len(resident) + num_stored != 1:",
        "if len(resident) + num_stored == 0:",
    ),
    Mutation(
        "what was superseded once is so for ever",
        LOWER,
        "        if superseded == state.superseded:",
        "        if state.superseded or superseded == state.superseded:",
    ),
    Mutation(
        "all of a prompt is resumed",
        TIERED,
        "below.state is not None and node.end < num_tokens:",
        "below.state is not None:",
    ),
    Mutation(
        "what is adopted is counted as a ghost",
        FETCH,
        "        residency.ghosts.discard(node)\n",
        "",
    ),
    Mutation(
        "the shallowest is fetched",
        FETCHING,
        "        if saved > most:",
        "        if saved > most and best is None:",
    ),
    Mutation(
        "what was not fetched has another cause too",
        RESULTS,
        "            found[cause] -= less\n",
        "",
    ),
    Mutation(
        "a copy costs nothing",
        EXCHANGE,
        "prompt_len * unit) - self.copy_seconds(num_bytes)",
        "prompt_len * unit)",
    ),
)

TESTS = (
    "tests/cache/test_tiers.py",
    "tests/cache/test_tiers_machine.py",
    "tests/policies/test_regret.py",
)
TIERS = Mutations(
    BREAKAGES,
    TESTS,
    TESTS[1:2],
    ("hybridcache", "experiments", "tests", "pyproject.toml"),
)
