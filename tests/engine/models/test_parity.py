"""Models compared with transformers in float32, with equal random weights: logits within 1e-4 and
equal greedy tokens."""

from __future__ import annotations

import json

import pytest
import torch

from tests.engine.small_models import Driver, load, random_tokens

LENGTHS = (1, 63, 64, 65, 777)
TOLERANCES = {"atol": 1e-4, "rtol": 1e-4}


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, **TOLERANCES)


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_logits_equal_transformers(family, length, drivers, oracles):
    tokens = random_tokens(length, seed=length)
    ours = drivers(family).cold(tokens, all_logits=True)
    assert_close(ours, oracles(family).logits(tokens))


def test_batched_prefill_and_decode_equal_transformers(family, drivers, oracles):
    driver = drivers(family)
    prompts = [random_tokens(length, seed=100 + length) for length in (*LENGTHS, 128)]
    sequences, logits = driver.start(prompts)
    for _ in range(6):
        chosen = logits.argmax(-1).tolist()
        for sequence, row in zip(sequences, logits, strict=True):
            expected = oracles(family).logits(sequence.tokens)[-1]
            assert_close(row, expected)
            assert row.argmax() == expected.argmax()
        logits = driver.decode(sequences, chosen)


SCALINGS = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_as_deepseek": {
        "rope_type": "yarn",
        "factor": 8,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"factor": 2.5},
}
ROTARY: dict[str, dict[str, float]] = {
    "falcon_h1": {"key_multiplier": 20.0},
    "granite_moe_hybrid_dense": {"attention_multiplier": 4.0},
    **{kind: {} for kind in ("lfm2", "lfm2_moe", "olmo_hybrid", "qwen3", "qwen3_5")},
    **{kind: {} for kind in ("qwen3_5_moe", "qwen3_next")},
}
"""Config changes by model, which make its attention sensitive to positions."""


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [*((kind, "yarn") for kind in ROTARY), *(("qwen3_next", name) for name in SCALINGS)],
)
def test_scaled_rope_equals_transformers(kind, scaling, oracles, tmp_path):
    """``rope_scaling`` overrides the ``rope_parameters`` that transformers writes."""
    oracle, tokens, path = oracles(kind), random_tokens(300, seed=9), tmp_path / kind
    oracle.model.save_pretrained(path)
    file = path / "config.json"
    plain = json.loads(file.read_text()) | ROTARY[kind]

    def reference(config):
        file.write_text(json.dumps(config))
        model = type(oracle.model).from_pretrained(path, dtype=torch.float32)
        with torch.inference_mode():
            return model(torch.tensor([tokens]), use_cache=False).logits[0]

    unscaled = reference(plain)
    scaled = reference(plain | {"rope_scaling": {"rope_type": scaling} | SCALINGS[scaling]})
    assert (scaled - unscaled).abs().max() > 0.01
    assert_close(Driver(load(path)).cold(tokens, all_logits=True), scaled)
