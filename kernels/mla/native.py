"""Multi-head latent attention in C++; see ``reference``.

The attention is that of `kernels.attention.native`, with the latents as keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch

from kernels.attention import native as attention
from kernels.attention.sequences import PackedKVInputs
from kernels.linear import native as linear
from kernels.mla import reference
from kernels.mla.reference import decode_mla, multiply_heads

__all__ = ["decode_mla", "multiply_heads", "prefill_mla", "prepare_heads"]


def prefill_mla(
    query: torch.Tensor,
    pool: torch.Tensor,
    *,
    rank: int,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute ``reference.prefill_mla``."""
    rows = pool[:, None]
    out = attention.prefill(query, rows, rows, rank, **where)
    return reference.prefill_mla(query, pool, rank=rank, **where) if out is None else out


def prepare_heads(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``multiply_heads`` with this weight ``[H, M, N]``: one linear layer per head."""
    products = [linear.prepare(head.mT.contiguous()) for head in weight]

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([product(x[:, head]) for head, product in enumerate(products)], dim=1)

    return multiply
