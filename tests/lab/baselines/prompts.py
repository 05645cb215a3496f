"""Prompts and a model configuration for tests of rebuilt baselines."""

from __future__ import annotations

import numpy as np

from hybridcache.lab.baselines.protocol import Baseline, BaselineConfig, replay
from hybridcache.tokens import Tokens

GIB = 1 << 30
QWEN3_NEXT = BaselineConfig(
    budget_bytes=40 * GIB, kv_bytes_per_token=24_576, state_bytes=36 * (49_152 + 2_097_152)
)


def text(seed: int, length: int) -> Tokens:
    """Return random tokens."""
    return np.random.default_rng(seed).integers(0, 150_000, length, dtype=np.int32)


def repeated_hits(peer: Baseline, prefix: Tokens, count: int = 6) -> list[int]:
    """Return the tokens reused by each of ``count`` prompts: a shared prefix and 700 random
    tokens."""
    return [
        replay(peer, np.concatenate((prefix, text(100 + n, 700))), text(200 + n, 8))
        for n in range(count)
    ]
