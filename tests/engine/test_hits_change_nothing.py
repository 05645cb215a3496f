"""Tests of the whole engine on small real models: tokens and logits do not depend on the cache or
on other requests, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine import Engine, RequestOutput, SamplingParams

ATTENTION_ONLY = {
    "model_type": "qwen3",
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
HYBRID = ATTENTION_ONLY | {
    "model_type": "qwen3_next",
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "mlp_only_layers": [0, 1, 2],  # experts are expensive on a CPU: one layer has them
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
SIDE_BY_SIDE = ATTENTION_ONLY | {
    "model_type": "falcon_h1",
    "mamba_d_ssm": 48,
    "mamba_n_heads": 3,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
}
REPORT = SamplingParams(max_tokens=16, temperature=0, logprobs=5)
MakeEngine = Callable[..., Engine]
formats = pytest.mark.parametrize(
    "numbers",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float32", "state_dtype": "bfloat16"},
        {"dtype": "bfloat16", "state_dtype": "bfloat16"},
    ],
    ids=["float32", "bfloat16", "float32-states16", "bfloat16-states16"],
)


def prompts(count: int = 10) -> list[list[int]]:
    """Return equal, forked and short prompts, in mixed order."""
    rng = np.random.default_rng(11)
    stems = [rng.integers(0, 160, 300).tolist() for _ in range(2)]
    made = []
    for i in range(count):
        cut = int(rng.choice([1, 63, 64, 130, 200, 300]))
        suffix = rng.integers(0, 160, int(rng.integers(0, 90))).tolist()
        made.append(stems[i % 2][:cut] + (suffix if i % 3 else []))
    return made


def assert_same(some: list[RequestOutput], others: list[RequestOutput]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs


@pytest.mark.full(
    "64-hybrid-float32",
    "64-side-by-side-float32-states16",
    "64-attention-only-bfloat16",
    "16-hybrid-bfloat16-states16",
    "32-side-by-side-float32",
)
@formats
@pytest.mark.parametrize(
    "model",
    [HYBRID, ATTENTION_ONLY, SIDE_BY_SIDE],
    ids=["hybrid", "attention-only", "side-by-side"],
)
@pytest.mark.parametrize("grid", [64, 32, 16])
def test_hits_equal_cold_runs_bit_for_bit(
    make_engine: MakeEngine, grid: int, model: dict[str, object], numbers: dict[str, str]
) -> None:
    """With any chunks, batches, pages, memory, drafts and preemptions, and with checkpoints that
    are copied into another format without rounding."""
    cold = make_engine(model, **numbers, grid=grid, prefix_cache="none", max_running=1)
    expected = cold.generate(prompts(), REPORT)
    assert len({tuple(output.token_ids) for output in expected}) > 4
    some: list[dict[str, object]] = [
        {"token_budget": 64},
        {"step_s": 0.003},
        {"max_running": 3, "overlap": "on"},
        {"page_size": 16},
        {"draft": "tree:5", "exact": True, "checkpoints": (f"every:{grid}",)},
        {"kv_tokens": 448, "slots": 3, "exact": True},
    ]
    if numbers.get("state_dtype") == "bfloat16" and model is not ATTENTION_ONLY:
        some += [{"checkpoint_dtype": "bfloat16", "exact": True, "slots": 100}]
    for settings in some:
        engine = make_engine(model, **numbers, **settings, grid=grid)
        first, second = engine.generate(prompts(), REPORT), engine.generate(prompts(), REPORT)
        assert_same(first, expected)
        assert_same(second, expected)
        assert all(output.cached_len % grid == 0 for output in second)
        assert sum(output.cached_len for output in second) > (
            1000 if "slots" not in settings else 0
        )


@pytest.mark.full("bfloat16-states16")
@formats
def test_exact_mode_covers_next_turns_and_preemptions(
    make_engine: MakeEngine, numbers: dict[str, str]
) -> None:
    cold = make_engine(**numbers, prefix_cache="none", max_running=1)
    first = cold.generate(prompts(), REPORT)
    turns = [
        [*prompt, *output.token_ids, 7, 8, 9]
        for prompt, output in zip(prompts(), first, strict=True)
    ]
    second = cold.generate(turns, REPORT)
    engine = make_engine(
        **numbers, exact=True, kv_tokens=440, slots=3, token_budget=256, max_running=5
    )
    again = engine.generate(prompts(), REPORT)
    assert_same(again, first)
    next_turns = engine.generate(turns, REPORT)
    assert_same(next_turns, second)
    assert any(output.num_preemptions for output in again + next_turns)
    assert engine.cache.arena.num_moved_rows > 0
    assert any(output.cached_len for output in next_turns)
