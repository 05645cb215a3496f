"""Multi-head latent attention in C++; see ``reference``.

The attention is that of `kernels.attention.native`, with the latents as keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.attention import native as attention
from kernels.attention.sequences import Sequences
from kernels.linear import native as linear
from kernels.mla import reference
from kernels.mla.reference import decode_mla, multiply_heads
from kernels.packed import Packed

__all__ = ["decode_mla", "multiply_heads", "prefill_mla", "prepare_heads"]


def prefill_mla(
    query: torch.Tensor,
    pool: torch.Tensor,
    *,
    table: torch.Tensor,
    sequences: Sequences,
    packed: Packed,
    scale: float,
    rank: int,
) -> torch.Tensor:
    """Compute ``reference.prefill_mla``."""
    rows = pool[:, None]
    out = attention.prefill(query, rows, rows, table, sequences, packed, scale, rank)
    if out is None:
        where = {"table": table, "sequences": sequences, "packed": packed, "scale": scale}
        return reference.prefill_mla(query, pool, rank=rank, **where)
    return out


def prepare_heads(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``multiply_heads`` with this weight ``[H, M, N]``: one linear layer per head."""
    products = [linear.prepare(head.mT.contiguous()) for head in weight]

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([product(x[:, head]) for head, product in enumerate(products)], dim=1)

    return multiply
