"""Config fields that families with state space layers read and refuse."""

from __future__ import annotations

import math

import pytest

from engine.models import read_model
from engine.weights.model_config import ModelError
from tests.engine.numerics.families import falcon_h1, granite_moe_hybrid, jamba, nemotron_h

CONFIGS = {
    "nemotron_h": nemotron_h.CONFIG,
    "granitemoehybrid": granite_moe_hybrid.CONFIG,
    "falcon_h1": falcon_h1.CONFIG,
    "jamba": jamba.CONFIG,
}


@pytest.mark.parametrize(
    ("model_type", "field", "message"),
    [
        ("nemotron_h", {"mlp_hidden_act": "gelu"}, "mlp_hidden_act 'gelu' .* 'relu2' is"),
        ("nemotron_h", {"n_group": 4}, "n_group 4 is not supported; 1 is"),
        ("nemotron_h", {"sliding_window": 64}, "sliding_window 64 is not supported; None is"),
        (
            "nemotron_h",
            {"layers_block_type": ["mamba", "rnn"]},
            "layers_block_type has unknown types: rnn",
        ),
        ("nemotron_h", {"layers_block_type": ["mamba"]}, "without a layer of attention"),
        ("nemotron_h", {"n_routed_experts": 0}, "n_routed_experts must be at least 1"),
        ("nemotron_h", {"conv_kernel": 1}, "convolutions of one tap"),
        (
            "granitemoehybrid",
            {"layer_types": ["mamba"] * 3},
            r"without a layer of attention .*layer_types",
        ),
        ("granitemoehybrid", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("granitemoehybrid", {"logits_scaling": 0}, "logits_scaling must not be 0"),
        ("granitemoehybrid", {"time_step_limit": [0.1]}, "time_step_limit must be two numbers"),
        ("falcon_h1", {"mlp_multipliers": [1.0]}, "mlp_multipliers must be 2 numbers"),
        ("falcon_h1", {"ssm_multipliers": [1.0] * 4}, "ssm_multipliers must be 5 numbers"),
        ("falcon_h1", {"mamba_d_head": "auto", "mamba_d_ssm": 95}, "a multiple of mamba_n_heads"),
        ("jamba", {"mamba_dt_rank": "few"}, "mamba_dt_rank must be auto or 1 or more"),
        ("jamba", {"num_experts_per_tok": 5}, "must be from 1 to num_experts"),
    ],
)
def test_unsupported_config_is_named(model_type, field, message) -> None:
    with pytest.raises(ModelError, match=message):
        read_model({"model_type": model_type, **CONFIGS[model_type], **field})


def test_time_step_limits_in_every_notation() -> None:
    def limits(**field) -> tuple[float, float]:
        config = {name: CONFIGS["falcon_h1"][name] for name in CONFIGS["falcon_h1"]}
        del config["time_step_limit"]
        return read_model({"model_type": "falcon_h1", **config, **field})[1].time_limits

    unlimited = 0.0, math.inf
    assert limits() == limits(time_step_limit=[0.0, math.inf]) == unlimited
    assert limits(time_step_limit=[0.0, {"__float__": "Infinity"}]) == unlimited
    assert limits(time_step_limit=[0.1, 2]) == (0.1, 2.0)


def test_layer_letters_equal_layer_names() -> None:
    letter_of = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
    config = {"model_type": "nemotron_h", **nemotron_h.CONFIG}
    letters = "".join(letter_of[name] for name in config["layers_block_type"])
    by_letter = config | {"layers_block_type": None, "hybrid_override_pattern": letters}
    assert read_model(by_letter) == read_model(config)
