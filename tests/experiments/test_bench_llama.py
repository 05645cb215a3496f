"""Tests of the comparison with llama.cpp that need no llama.cpp: the missing-build message and the
conversion of weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from experiments.benchmarks import llama_cpp as llama

CONFIG = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 3,
    "linear_value_head_dim": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("layer", [0, 11])
def test_tensors_are_converted_to_the_layout_of_llama_cpp(tmp_path, layer) -> None:
    """Value heads 0 1 | 2 3 of two key heads become 0 2 1 3 in every tensor."""
    prefix = f"model.layers.{layer}.linear_attn"
    save_file(
        {
            f"{prefix}.A_log": torch.arange(4.0),
            f"{prefix}.in_proj_z.weight": torch.arange(8.0)[:, None].repeat(1, 2),
            f"{prefix}.conv1d.weight": torch.arange(20.0)[:, None, None].repeat(1, 1, 4),
            f"{prefix}.out_proj.weight": torch.arange(8.0)[None].repeat(2, 1),
            f"{prefix}.norm.weight": torch.ones(2),
            "model.norm.weight": torch.zeros(3),
            "lm_head.weight": torch.ones(2, 2),
        },
        tmp_path / "model.safetensors",
    )
    found = dict(llama._tensors(tmp_path, CONFIG))
    heads = [0.0, 1, 4, 5, 2, 3, 6, 7]
    assert set(found) == {
        *(f"blk.{layer}.{name}" for name in ("ssm_a", "attn_gate.weight", "ssm_conv1d.weight")),
        *(f"blk.{layer}.{name}" for name in ("ssm_out.weight", "ssm_norm.weight")),
        "output_norm.weight",
    }
    assert torch.equal(found[f"blk.{layer}.ssm_a"], -torch.tensor([0.0, 2, 1, 3]).exp())
    assert found[f"blk.{layer}.attn_gate.weight"][:, 0].tolist() == heads
    assert found[f"blk.{layer}.ssm_out.weight"][0].tolist() == heads
    assert found[f"blk.{layer}.ssm_conv1d.weight"][:, 0].tolist() == [
        *range(12),
        *(12 + head for head in heads),
    ]
    assert torch.equal(found["output_norm.weight"], torch.ones(3))
    assert torch.equal(found[f"blk.{layer}.ssm_norm.weight"], torch.ones(2))
