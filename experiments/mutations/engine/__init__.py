"""Ways to break the engine, part by part."""

from __future__ import annotations

from experiments.mutations import Mutations
from experiments.mutations.engine.answers import BREAKS_OF_ANSWERS
from experiments.mutations.engine.graphs import BREAKS_OF_GRAPHS
from experiments.mutations.engine.grid import BREAKS_OF_THE_GRID
from experiments.mutations.engine.guided import BREAKS_OF_GUIDED
from experiments.mutations.engine.layers import BREAKS_OF_LAYERS
from experiments.mutations.engine.memory import BREAKS_OF_MEMORY
from experiments.mutations.engine.plan import BREAKS_OF_PLAN
from experiments.mutations.engine.prediction import BREAKS_OF_PREDICTION
from experiments.mutations.engine.schedule import BREAKS_OF_SCHEDULE
from experiments.mutations.engine.served import BREAKS_OF_SERVED
from experiments.mutations.engine.tests import (
    ARENA_TESTS,
    BITS_TESTS,
    BUDGET_TESTS,
    COUNTS,
    DRAFT_STEP_TESTS,
    DRAFTERS,
    DRAWS,
    FAIRNESS_TESTS,
    GRAPHS,
    GRID_TESTS,
    GUIDED,
    HEADS,
    HEAP,
    LEASE_TESTS,
    LIVING,
    LOWER_ROWS_TESTS,
    MACHINES,
    MEMORY,
    OPTIONS,
    PAGE,
    POOL,
    REMEMBERED,
    SEEN,
    STORE,
    THOUGHTS,
    THREAD,
    TIERS_TESTS,
    TILE_TESTS,
    VERIFIED,
)
from experiments.mutations.engine.thoughts import BREAKS_OF_THOUGHTS
from experiments.mutations.engine.thread import BREAKS_OF_THREAD

ENGINE = Mutations(
    breakages=(
        *BREAKS_OF_SCHEDULE,
        *BREAKS_OF_PLAN,
        *BREAKS_OF_MEMORY,
        *BREAKS_OF_LAYERS,
        *BREAKS_OF_GRAPHS,
        *BREAKS_OF_THE_GRID,
        *BREAKS_OF_PREDICTION,
        *BREAKS_OF_ANSWERS,
        *BREAKS_OF_THREAD,
        *BREAKS_OF_SERVED,
        *BREAKS_OF_GUIDED,
        *BREAKS_OF_THOUGHTS,
    ),
    tests=(
        *MEMORY,
        BUDGET_TESTS,
        FAIRNESS_TESTS,
        ARENA_TESTS,
        BITS_TESTS,
        *DRAWS,
        *COUNTS,
        *THREAD,
        *POOL,
        *VERIFIED,
        DRAFT_STEP_TESTS,
        *GRAPHS,
        *DRAFTERS,
        *HEADS,
        *HEAP,
        *PAGE,
        *GUIDED,
        *THOUGHTS,
        *OPTIONS,
        *LIVING,
        *SEEN,
        TIERS_TESTS,
        LOWER_ROWS_TESTS,
        *STORE,
        *REMEMBERED,
        LEASE_TESTS,
        GRID_TESTS,
        TILE_TESTS,
    ),
    machines=MACHINES,
    copied=(
        "hybridcache",
        "kernels",
        "engine",
        "experiments/agents",
        "experiments/gpu_models.py",
        "experiments/interpreter.py",
        "experiments/served.py",
        "tests",
        "pyproject.toml",
    ),
)
