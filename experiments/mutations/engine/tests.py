"""The tests that must notice what is broken in the engine."""

from __future__ import annotations

ENGINE_TESTS = "tests/engine/test_engine.py"
REFUSAL_TESTS = "tests/engine/test_refusals.py"
SCHEDULE_TESTS = "tests/engine/test_schedule.py"
SHORT_MEMORY = "tests/engine/test_short_memory.py"
MANAGER_TESTS = "tests/engine/test_cache_manager.py"
SAMPLER_TESTS = "tests/engine/test_sampler.py"
COUNTS_TESTS = "tests/engine/test_token_counts.py"
BUDGET_TESTS = "tests/engine/test_budget.py"
FAIRNESS_TESTS = "tests/engine/test_fairness.py"
ARENA_TESTS = "tests/engine/test_arena.py"
BITS_TESTS = "tests/engine/test_hits_change_nothing.py"
ASYNC_TESTS = "tests/engine/test_async_engine.py"
LAYER_TESTS = "tests/engine/numerics/test_layers.py"
POOLS_TESTS = "tests/engine/numerics/test_memory.py"
DRAFT_TESTS = "tests/engine/test_drafts.py"
VERIFY_TESTS = "tests/engine/numerics/test_verify.py"
GRAPHS_TESTS = "tests/engine/numerics/test_graphs.py"
PLACES_TESTS = "tests/engine/test_running_states.py"
DRAFTER_TESTS = "tests/engine/test_drafters.py"
HEAD_TESTS = "tests/engine/test_head_drafts.py"
HEAD_LOADING_TESTS = "tests/engine/test_head_loading.py"
DRAFT_STEP_TESTS = "tests/engine/test_draft_steps.py"
PREDICTION_TESTS = "tests/engine/numerics/test_prediction.py"
TIERS_TESTS = "tests/engine/test_tiers.py"
REMEMBERING_TESTS = "tests/engine/test_remembering.py"
STORE_TESTS = (
    "tests/engine/store/test_store.py",
    "tests/engine/store/test_disk.py",
    "tests/engine/store/test_pointers.py",
)
LOWER_ROWS_TESTS = "tests/engine/test_lower_rows.py"
LEASE_TESTS = "tests/cache/test_lease.py"
GRID_TESTS = "tests/engine/test_grid.py"
TILE_TESTS = "tests/kernels/test_packed.py"
MACHINES = ("tests/engine/test_scheduler_machine.py",)

GUIDED_TESTS = "tests/engine/test_guided.py"
THOUGHT_TESTS = "tests/engine/test_thoughts.py"
OPTIONS_TESTS = "tests/engine/server/test_options.py"
LIVING_TESTS = "tests/engine/server/test_living.py"
HEAP_TESTS = "tests/engine/server/test_heap.py"
PAGE_TESTS = "tests/engine/server/test_page.py"
LABELLED_TESTS = "tests/engine/history/test_labelled.py"
EXPLAINED_TESTS = "tests/engine/server/test_explanations.py"

STEPS = (SCHEDULE_TESTS, ENGINE_TESTS, REFUSAL_TESTS, SHORT_MEMORY, *MACHINES)
MEMORY = (MANAGER_TESTS, *STEPS)
FAIR = (BUDGET_TESTS, SCHEDULE_TESTS, FAIRNESS_TESTS)
ARENA = (ARENA_TESTS, *MACHINES)
MOVES = (MANAGER_TESTS, *ARENA)
BITS = (BITS_TESTS,)
DRAWS = (SAMPLER_TESTS,)
COUNTS = (COUNTS_TESTS,)
THREAD = (ASYNC_TESTS,)
LAYERS = (LAYER_TESTS,)
POOL = (POOLS_TESTS, LAYER_TESTS)
DRAFTS = (DRAFT_TESTS, DRAFT_STEP_TESTS, *MACHINES)
VERIFIED = (PLACES_TESTS, VERIFY_TESTS, DRAFT_TESTS)
GRAPHS = (GRAPHS_TESTS,)
GUIDED = (GUIDED_TESTS,)
THOUGHTS = (THOUGHT_TESTS,)
OPTIONS = (OPTIONS_TESTS,)
LIVING = (LIVING_TESTS,)
HEAP = (HEAP_TESTS,)
PAGE = (PAGE_TESTS,)
SEEN = (LABELLED_TESTS, EXPLAINED_TESTS)
DRAFTERS = (DRAFTER_TESTS,)
HEADS = (HEAD_TESTS, HEAD_LOADING_TESTS, PREDICTION_TESTS)
TIERS = (TIERS_TESTS, *MACHINES)
LOWER_ROWS = (LOWER_ROWS_TESTS,)
STORE = STORE_TESTS
REMEMBERED = (REMEMBERING_TESTS,)
