"""``engine convert``: same weights as 8-bit loading, files that other programs read, and no
partial output after errors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.front.command.cli import main
from engine.front.command.convert import SCHEMES, convert
from engine.weights.forms import read_quantization
from engine.weights.scheme import EightBitScheme
from tests.engine.small_models import Driver, load, random_tokens
from tests.engine.weights import checkpoints

BLOCKS = EightBitScheme("fp8", (4, 4), "weight_scale_inv")
"""Scheme with blocks that fit the layers of small models."""


def dequantise(path):
    """Return the weights of a directory in float32."""
    tensors = load_file(path / "model.safetensors")
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    scale_name = "weight_scale" if section["quant_method"] != "fp8" else "weight_scale_inv"
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith(scale_name):
            continue
        scale = tensors.get(name.removesuffix("weight") + scale_name)
        if scale is not None:
            for axis in (0, 1):
                scale = scale.repeat_interleave(tensor.shape[axis] // scale.shape[axis], dim=axis)
            tensor = tensor.float() * scale
        plain[name] = tensor
    return plain


def test_int8_files_equal_int8_loading(model, oracles, tmp_path):
    """Bits equal ``--quantization int8`` of the full-precision directory, in each family; stacked
    experts are written separately."""
    source, tokens = tmp_path / "source", random_tokens(70, seed=1)
    shutil.copytree(oracles(model).path, source)
    if model == "qwen3_5_moe":
        tensors = checkpoints.stack_experts(load_file(source / "model.safetensors"))
        save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "out", "int8")
    expected = Driver(load(source, quantization="int8")).cold(tokens, all_logits=True)
    assert torch.equal(Driver(load(tmp_path / "out")).cold(tokens, all_logits=True), expected)
    assert not any("gate_up_proj" in name for name in load_file(tmp_path / "out/model.safetensors"))


def test_convert_command(oracles, tmp_path, capsys):
    source, out = str(oracles("qwen3_5").path), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    out.symlink_to("empty")
    assert main(["convert", source, str(out), "--to", "int8", "--ignore", "out_proj"]) == 0
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1  # Also safetensors' own.
    output = capsys.readouterr().out
    assert "int8 with a scale per output channel: " in output and "in 1 file" in output
    assert "model.layers.*.mlp.up_proj" in output and "out_proj" in output
    assert main(["convert", source, str(out), "--to", "int8"]) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    assert read_quantization(config).describe() == "int8 with a scale per output channel"
    assert config["tie_word_embeddings"] and "lm_head" in config["quantization_config"]["ignore"]
    assert main(["convert", str(out), str(tmp_path / "again"), "--to", "fp8"]) == 2
    assert "is already int8 with a scale per output channel" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "fp8"), "--to", "fp8"]) == 2
    assert "no linear layer to convert: all are " in capsys.readouterr().err


def test_transformers_reads_fp8_files(oracles, tmp_path, monkeypatch):
    """It widens the weights without a GPU."""
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read fp8")
    from transformers import Qwen3_5ForCausalLM

    monkeypatch.setitem(SCHEMES, "fp8", BLOCKS)
    convert(oracles("qwen3_5").path, tmp_path / "out", "fp8")
    theirs = Qwen3_5ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    state = theirs.state_dict()
    for name, weight in dequantise(tmp_path / "out").items():
        assert torch.equal(state[name].bfloat16(), weight.bfloat16()), name


def test_compressed_tensors_reads_int8_files(oracles, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import CompressedTensorsConfig, Qwen3_5ForCausalLM

    convert(oracles("qwen3_5").path, tmp_path / "out", "int8")
    theirs = Qwen3_5ForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    state = theirs.state_dict()
    for name, weight in dequantise(tmp_path / "out").items():
        torch.testing.assert_close(state[name], weight, rtol=1e-6, atol=0)
