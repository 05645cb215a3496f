"""Tests of ``--grid 16`` and ``32``: the whole engine with kernels that compute tiles of that
size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine import Engine, SamplingParams, engine_config
from engine.plugins.tiers.fingerprint import StoreError
from tests.engine.test_hits_change_nothing import (
    HYBRID,
    REPORT,
    SIDE_BY_SIDE,
    MakeEngine,
    always_loads,  # noqa: F401
    assert_same,
    make_engine,  # noqa: F401
    prompts,
)

GRIDS = pytest.mark.parametrize("grid", [16, 32])


@GRIDS
@pytest.mark.parametrize("model", [HYBRID, SIDE_BY_SIDE], ids=["hybrid", "side-by-side"])
@pytest.mark.parametrize(
    "numbers",
    [{"dtype": "float32"}, {"dtype": "bfloat16", "state_dtype": "bfloat16"}],
    ids=["float32", "bfloat16-states16"],
)
def test_hits_equal_cold_runs_bit_for_bit(
    make_engine: MakeEngine,  # noqa: F811
    model: dict[str, object],
    numbers: dict[str, str],
    grid: int,
) -> None:
    expected = make_engine(model, **numbers, grid=grid, prefix_cache="none").generate(
        prompts(), REPORT
    )
    settings: dict[str, object]
    for settings in (
        {"token_budget": 64, "max_running": 3},
        {"draft": "tree:5", "exact": True, "checkpoints": ("every:16",)},
        {"kv_tokens": 448, "slots": 3, "exact": True, "page_size": 16},
    ):
        engine = make_engine(model, **numbers, **settings, grid=grid)
        assert_same(engine.generate(prompts(), REPORT), expected)
        again = engine.generate(prompts(), REPORT)
        assert_same(again, expected)
        assert all(output.cached_len % grid == 0 for output in again)
        assert any(output.cached_len % 64 for output in again)


@pytest.mark.full("16")
@GRIDS
def test_short_prompts_hit_on_a_fine_grid(make_engine: MakeEngine, grid: int) -> None:  # noqa: F811
    prompt = prompts()[0][:1] * 47
    for size, cached_len in ((grid, 46 // grid * grid), (64, 0)):
        engine = make_engine(grid=size)
        engine.generate([prompt], REPORT)
        assert engine.generate([prompt], REPORT)[0].cached_len == cached_len


def test_every_checkpoint_of_a_step_has_a_staging_place(make_engine: MakeEngine) -> None:  # noqa: F811
    """Check narrow checkpoints, which need one staging place for every tile of a step."""
    numbers = {"state_dtype": "bfloat16", "grid": 16, "dtype": "bfloat16"}
    expected = make_engine(**numbers, prefix_cache="none").generate(prompts(), REPORT)
    engine = make_engine(
        **numbers, checkpoint_dtype="bfloat16", checkpoints=("every:16",), slots=200, exact=True
    )
    assert len(engine.runner.tensors.checkpoints.staging) == 1024 // 16 + 16
    for _ in range(2):
        outputs = engine.generate(prompts(), REPORT)
        assert_same(outputs, expected)
    assert any(output.cached_len % 64 for output in outputs)


@pytest.mark.full
@pytest.mark.usefixtures("always_loads")
def test_a_state_folder_refuses_another_grid(make_engine: MakeEngine, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "state"
    expected = make_engine(prefix_cache="none", grid=16).generate(prompts(), REPORT)
    for is_reopened in (False, True):
        engine = make_engine(exact=True, grid=16, state_dir=str(folder))
        outputs = [engine.generate([prompt], REPORT)[0] for prompt in prompts()]
        assert_same(outputs, expected)
        assert any(output.cached_len % 64 for output in outputs)
        if is_reopened:
            assert engine.cache.offload is not None
            assert engine.cache.offload.copied_rows["disk", "device"] > 0
        engine.close()
    for grid in (32, 128):
        differs = rf"differs in tile .*, checkpoint grid \(16 there, {grid} here: --grid\): use"
        with pytest.raises(StoreError, match=differs):
            make_engine(state_dir=str(folder), exact=True, grid=grid)
    shutil.rmtree(folder)
    make_engine(exact=True, state_dir=str(folder)).close()
    with pytest.raises(StoreError, match=r"differs in checkpoint grid \(64 there, 128 here"):
        make_engine(state_dir=str(folder), exact=True, grid=128)


@pytest.mark.full
def test_two_ranks_use_the_same_grid() -> None:
    settings = {"device": "cpu", "dtype": "float32", "cache_gib": 0.02, "grid": 16, "check": True}
    prompt = "A short prompt, once and again."
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=2)
    one_rank, two_ranks = (Engine(engine_config(**settings, tp=tp)) for tp in (1, 2))
    try:
        runs = [
            [engine.generate([prompt], params)[0] for _ in range(2)]
            for engine in (one_rank, two_ranks)
        ]
    finally:
        two_ranks.runner.close()
    for cold, hit in runs:
        assert (cold.cached_len, hit.cached_len) == (0, (len(cold.prompt_token_ids) - 1) // 16 * 16)
        assert cold.logprobs == hit.logprobs
    assert runs[0][0].token_ids == runs[1][0].token_ids
    pairs = zip(runs[0][0].logprobs, runs[1][0].logprobs, strict=True)
    assert all(abs(one.logprob - two.logprob) < 1e-4 for one, two in pairs)
