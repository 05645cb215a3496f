"""Next-token distributions beside llama.cpp's on the same GGUF files, if `make llama` built it."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from engine.config import BUILTIN_DIR
from experiments.benchmarks import llama_cpp as rival
from experiments.benchmarks.gguf_files import ARCHITECTURES, write_gguf
from tests.engine.numerics.conftest import Driver, load, random_tokens
from tests.engine.numerics.test_gguf_models import ABSENT

POSITIONS = 512
MOST_DIVERGENCE = 1e-3
"""Mean KL divergence, in nats."""
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (rival.FOLDER / "llama_cpp").is_dir(), reason=rival.ABSENT),
]


def divergence(model, tokens) -> tuple[float, float]:
    """Return the mean and the largest divergence of our distribution from llama.cpp's."""
    theirs = rival.Remote(model, streams=1, room=POSITIONS + 16, threads=1)
    theirs.forward([(0, 0, tokens.tolist())], True)
    expected = torch.from_numpy(theirs.logits(len(tokens))).double().log_softmax(-1)
    theirs.close()
    own = Driver(load(model, cache_gib=0.2)).cold(tokens, all_logits=True)
    found = own.double().log_softmax(-1)[:, : expected.shape[1]]
    each = (expected.exp() * (expected - found)).sum(-1)
    return float(each.mean()), float(each.max())


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_distributions_of_each_architecture(kind, family, oracles, tmp_path) -> None:
    path = oracles(family).path
    kind_of_model = json.loads((path / "config.json").read_text())["model_type"]
    if family in ABSENT or kind_of_model not in ARCHITECTURES:
        pytest.skip("GGUF has no such model")
    write_gguf(gguf, path, tmp_path / "m.gguf", kind, {"tokenizer.ggml.model": "none"})
    mean, _ = divergence(tmp_path / "m.gguf", np.asarray(random_tokens(POSITIONS, seed=5)))
    assert mean < MOST_DIVERGENCE


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_distributions_of_the_built_in_model(kind, tmp_path) -> None:
    write_gguf(gguf, BUILTIN_DIR, tmp_path / "m.gguf", kind, {"tokenizer.ggml.model": "none"})
    text = (BUILTIN_DIR / "chat_template.jinja").read_bytes()[:POSITIONS]
    mean, _ = divergence(tmp_path / "m.gguf", np.frombuffer(text, np.uint8).astype(np.int32))
    assert mean < MOST_DIVERGENCE
