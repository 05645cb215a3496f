"""Multi-head latent attention over a pool of latents, in plain PyTorch.

A token has one row for all heads: a latent c of R numbers and a key r of P numbers, often rotated,
that heads share. Each head could expand its keys and values from c, with matrices ``W_k`` and
``W_v``, but nothing is expanded here. ``q . (W_k c)`` equals ``(W_k^T q) . c``, and a sum of
``W_v c`` equals ``W_v`` times a sum of c. Queries are therefore multiplied by ``W_k^T`` before, and
outputs by ``W_v`` after, both with `multiply_heads`. In between is attention of H query heads of
R + P numbers over one key head, with the first R numbers of the keys as values::

    out[t, h] = sum_j softmax_j(scale * q[t, h] . [c_j, r_j]) c_j          j <= position of t

Prompts and decoding share this form. Expanding a prompt's keys takes fewer operations for more than
about 170 new tokens (at R = 512 and heads of 128). For few new tokens it takes far more, because a
hit would expand every cached row again. A form chosen by the number of new tokens would also give a
hit different bits from a cold run.

`kernels.attention.reference` does the computation, on its absolute grid.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch

from kernels.attention import reference as attention
from kernels.attention.sequences import KVInputs, PackedKVInputs
from kernels.linear.prepacked import by_blocks, has_products


def prefill_mla(
    query: torch.Tensor,
    pool: torch.Tensor,
    *,
    rank: int,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute attention of new tokens to themselves and to all earlier tokens.

    The rows of the new tokens must be in the pool.

    Args:
        query: ``[T, H, R + P]``, the packed new tokens.
        pool: ``[N, R + P]``; the first ``rank`` = R numbers are the latent.
        where: see `kernels.attention.sequences.PackedKVInputs`.

    Returns:
        ``[T, H, R]`` in the query's dtype. O(T * length * H * (R + P)).
    """
    rows = pool[:, None]
    return attention.prefill_attention(query, rows, rows, **where)[..., :rank]


def decode_mla(
    query: torch.Tensor,
    pool: torch.Tensor,
    *,
    rank: int,
    **where: Unpack[KVInputs],
) -> torch.Tensor:
    """Compute attention of the last token of each sequence, ``query [B, H, R + P]``.

    Returns ``[B, H, R]``.
    """
    rows = pool[:, None]
    return attention.decode_attention(query, rows, rows, **where)[..., :rank]


def multiply_heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute ``out[t, h] = x[t, h] @ weight[h]``: x ``[T, H, M]``, weight ``[H, M, N]``.

    Returns ``[T, H, N]``. Tokens are multiplied in blocks of one size, so the shape of a call does
    not depend on their number. Where PyTorch's products of the dtype are slow, they are computed in
    float32 and rounded once.
    """
    weight = weight if has_products(weight) else weight.float()

    def product(rows: torch.Tensor) -> torch.Tensor:
        return torch.bmm(rows.transpose(0, 1).to(weight.dtype), weight).transpose(0, 1).to(x.dtype)

    return by_blocks(product, x)


def prepare_heads(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `multiply_heads` with this weight in the fastest form."""
    return partial(multiply_heads, weight=weight.contiguous())
