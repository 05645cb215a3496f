"""Multi-head latent attention with native products of the heads; see ``reference``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.linear import native as linear
from kernels.mla.reference import decode_mla, multiply_heads, prefill_mla

__all__ = ["decode_mla", "multiply_heads", "prefill_mla", "prepare_heads"]


def prepare_heads(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``multiply_heads`` with this weight ``[H, M, N]``: one linear layer per head."""
    products = [linear.prepare(head.mT.contiguous()) for head in weight]

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([product(x[:, head]) for head, product in enumerate(products)], dim=1)

    return multiply
