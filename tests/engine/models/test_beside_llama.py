"""Next-token distributions beside llama.cpp's on the same GGUF files, if `make llama` built it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import BUILTIN_DIR
from experiments.benchmarks import llama_cpp as rival
from tests.engine.small_models import Driver, load, random_tokens
from tests.gguf_files import write_gguf

POSITIONS = 512
MOST_DIVERGENCE = 1e-3
"""Mean KL divergence, in nats."""
HEADS = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"attention_bias": False},
    "qwen3_next": HEADS | {"mlp_only_layers": []},
    "qwen3_5": HEADS,
    "qwen3_5_moe": HEADS,
    "lfm2": {},
    "lfm2_moe": {},
    "granite_moe_hybrid": {},
    "nemotron_h": {},
    "nemotron_h_dense": {"use_bias": False},
    "falcon_h1": {},
    "jamba": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "kimi_linear_with_four_heads": {},
}
"""Small models of each architecture, with the changes of their sizes that llama.cpp requires."""
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (rival.FOLDER / "llama_cpp").is_dir(), reason=rival.ABSENT),
]


def divergence(model: Path, tokens: np.ndarray) -> float:
    """Return the mean divergence of our distribution from llama.cpp's."""
    theirs = rival.RemoteModel(model, streams=1, room=POSITIONS + 16, threads=1)
    theirs.forward([(0, 0, tokens.tolist())], True)
    expected = torch.from_numpy(theirs.logits(len(tokens))).double().log_softmax(-1)
    theirs.close()
    own = Driver(load(model, cache_gib=0.2)).cold(tokens, all_logits=True)
    found = own.double().log_softmax(-1)[:, : expected.shape[1]]
    each = (expected.exp() * (expected - found)).sum(-1)
    print(f"{model.stem}: KL {float(each.mean()):.1e} in the mean, {float(each.max()):.1e} at most")
    return float(each.mean())


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_distributions_of_each_architecture(kind, name, oracles, tmp_path) -> None:
    path, changes = oracles(name).path, MODELS[name]
    if changes:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **changes))
        path = tmp_path / "model"
        model.save_pretrained(path)
    file = tmp_path / f"{name}-{kind}.gguf"
    write_gguf(gguf, path, file, kind, {"tokenizer.ggml.model": "none"})
    assert divergence(file, np.asarray(random_tokens(POSITIONS, seed=5))) < MOST_DIVERGENCE


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_distributions_of_the_built_in_model(kind, tmp_path) -> None:
    file = tmp_path / f"builtin-{kind}.gguf"
    write_gguf(gguf, BUILTIN_DIR, file, kind, {"tokenizer.ggml.model": "none"})
    text = (BUILTIN_DIR / "chat_template.jinja").read_bytes()[:POSITIONS]
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    assert divergence(file, tokens) < MOST_DIVERGENCE
