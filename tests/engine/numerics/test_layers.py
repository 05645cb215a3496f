"""Layers of all structures in one artificial model.

It has parallel mixers, layers with only a mixer or an MLP, norms before and after a block,
multipliers, and latent rows. It runs on pools and on an arena, after hits, and with graphs.
"""

from __future__ import annotations

import pytest
import torch

from engine import engine_config
from engine.layers.attention import Attention, LatentAttention
from engine.layers.linear import Part
from engine.layers.recurrent import GatedDeltaNet, ShortConv
from engine.layers.residual import FeedForwardStep, MixerStep, Parallel
from engine.models.decoder import Decoder
from engine.runner import loaded_model
from engine.runner.build import load_runner
from engine.weights.model_config import ModelConfig, Rope
from hybridcache.geometry.mixers import (
    AttentionSizes,
    DeltaSizes,
    LatentAttentionSizes,
    ShortConvSizes,
)
from hybridcache.geometry.sizes import LayerSizes, MLPSizes, ModelSizes

ATTENTION = AttentionSizes(4, 2, 16)
DELTA = DeltaSizes(2, 4, 16, 8, 4)
OTHER_DELTA = DeltaSizes(2, 2, 8, 24, 3)
LATENT = LatentAttentionSizes(2, 24, 8, 16, 20)
WINDOW = ShortConvSizes(40, 3)
MLP_SIZES = MLPSizes(40)
SIZES = ModelSizes(
    48,
    97,
    (
        LayerSizes(mlp=MLP_SIZES),
        LayerSizes((ATTENTION, DELTA), MLP_SIZES),
        LayerSizes((OTHER_DELTA,)),
        LayerSizes((LATENT,), MLP_SIZES),
        LayerSizes((WINDOW,)),
        LayerSizes(mlp=MLP_SIZES),
    ),
)
CONFIG = ModelConfig(
    sizes=SIZES,
    norm_eps=1e-6,
    rope=Rope(10_000.0, 16),
    tie_embeddings=True,
    max_position=512,
    dtype="float32",
    embedding_multiplier=3.0,
    logit_multiplier=0.25,
)


class EveryLayer(Decoder):
    """Artificial model with layers of every kind."""

    @classmethod
    def read(cls, text):
        return CONFIG

    def steps(self, name, sizes):
        steps = []
        if sizes.mixers:
            mixers = [
                self.mixer(f"{name}.{rank}", mixer) for rank, mixer in enumerate(sizes.mixers)
            ]
            block = mixers[0] if len(mixers) == 1 else Parallel(mixers)
            norms = {"before": self.norm_of(f"{name}.before")} if len(mixers) > 1 else {}
            norms["after"] = self.norm_of(f"{name}.after")
            steps.append(MixerStep(block, **norms, multiplier=0.5))
        if sizes.mlp is not None:
            before = self.norm_of(f"{name}.mlp_norm")
            steps.append(FeedForwardStep(self.mlp(name, sizes.mlp), before=before))
        return steps

    def mixer(self, name, sizes):
        if isinstance(sizes, AttentionSizes):
            norms = self.norm_of(f"{name}.q_norm", 64), self.norm_of(f"{name}.k_norm", 32)
            return Attention(name, 48, sizes, self.build, norms=norms, output_bias=True, scale=0.3)
        if isinstance(sizes, DeltaSizes):
            widths = {
                "qkv": sizes.conv_channels,
                "z": sizes.value_width,
                "b": sizes.num_value_heads,
                "a": sizes.num_value_heads,
            }
            inputs = [Part(f"{name}.{part}", width) for part, width in widths.items()]
            return GatedDeltaNet(name, 48, sizes, inputs, self.build, eps=1e-6)
        if isinstance(sizes, LatentAttentionSizes):
            norm = self.norm_of(f"{name}.norm", sizes.rank)
            return LatentAttention(name, 48, sizes, self.build, norm, bias=True)
        return ShortConv(name, 48, sizes, self.build, bias=True)


@pytest.fixture
def make(monkeypatch, driver_class):
    monkeypatch.setattr(loaded_model, "read_model", lambda raw: (EveryLayer, CONFIG))

    def driver():
        config = engine_config(device="cpu", load_format="dummy", max_model_len=256, cache_gib=0.02)
        return driver_class(load_runner(config))

    return driver


def run(driver, tokens):
    """Return the logits of a cold prompt, of a decode, and of the prompt's tail after a hit."""
    cold, mixed = driver.cold_and_mixed(tokens)
    assert torch.equal(mixed[1:], cold[64:])
    return torch.cat([cold, mixed])


def test_hits_are_exact(make, random_tokens):
    driver = make()
    logits = run(driver, random_tokens(150, seed=1, vocab_size=97))
    assert logits.isfinite().all() and logits.std() > 0
    runner = driver.runner
    assert runner.geometry.kv_bytes_per_token == runner.memory.row_bytes == 4 * (64 + 32)
    assert runner.geometry.num_full_layers == 2 and runner.geometry.num_linear_layers == 3
    keeps = [spec for step in runner.model.mixers for spec in step.block.keeps]
    assert keeps == list(SIZES.specs())


def test_graphs_of_pieces_change_no_bit(make, random_tokens):
    tokens = random_tokens(150, seed=2, vocab_size=97)
    driver = make()
    plain = run(driver, tokens)
    driver.reset()
    recorded = []

    def record(work):
        recorded.append(work)
        work()
        return work

    driver.runner.use_graphs("all", record)
    driver.runner.graphs = None, driver.runner.graphs[1]
    assert torch.equal(run(driver, tokens), plain)
    assert len(recorded) == 2 * 5  # Two buckets, four mixers.
