"""Models from GGUF files: logits of each architecture, and exact hits in each format."""

from __future__ import annotations

import re

import gguf
import pytest
import torch

from engine.weights.model_config import read_config
from tests.engine.runner.test_exactness import threads
from tests.engine.small_models import Driver, load, random_tokens
from tests.gguf_files import ARCHITECTURES, write_gguf

ABSENT = ("qwen3_next", "qwen3_next_no_renormalise", "falcon_h1_norm_before_gate")
"""Small models with layers that the format does not have; ``test_gguf`` has one without them."""


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_logits_and_hits_of_each_architecture(kind, family, oracles, tmp_path) -> None:
    """Formats of few bits differ by their rounding, files in full precision by that of the
    converter's arithmetic. Hits are exact in all."""
    path = oracles(family).path
    if family in ABSENT or read_config(path)["model_type"] not in ARCHITECTURES:
        pytest.skip("GGUF has no such model")
    write_gguf(gguf, path, tmp_path / "model.gguf", kind)
    tokens = random_tokens(90, seed=5)
    runner = load(tmp_path / "model.gguf")
    assert re.search(rf"; GGUF of [\w-]+: .*{kind} \d+ %[,;]", runner.loaded.weights_note)
    cold, hit = Driver(runner).cold_and_mixed(tokens)
    expected, _ = Driver(load(path)).cold_and_mixed(tokens)
    most = {"F32": 2e-3, "Q8_0": 0.2, "Q4_0": 1.2}[kind]
    assert (cold - expected).norm() < most * expected.norm()
    assert torch.equal(hit[1:], cold[64:])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_hits_are_exact_in_each_format_with_any_threads(kind, model, oracles, tmp_path) -> None:
    path = oracles(model).path
    if model in ABSENT or read_config(path)["model_type"] not in ARCHITECTURES:
        pytest.skip("GGUF has no such model")
    write_gguf(gguf, path, tmp_path / "model.gguf", kind)
    digests = set()
    for num_threads in (1, 2):
        with threads(num_threads):
            exactness = load(tmp_path / "model.gguf").exactness
        assert exactness.different == ()
        digests.add(exactness.digest)
    assert len(digests) == 1
