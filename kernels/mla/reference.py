"""Multi-head latent attention over a pool of latents, in plain PyTorch.

A token leaves one row for all heads: a latent c of R numbers, from which the keys and values of
every head could be expanded by matrices ``W_k`` and ``W_v`` of its own, and behind it a key r of P
numbers that heads share, often a rotated one. Nothing is expanded here. Since ``q . (W_k c)`` is
``(W_k^T q) . c`` and a sum of ``W_v c`` is ``W_v`` times a sum of c, queries come multiplied by
``W_k^T``, outputs leave to be multiplied by ``W_v``, both with `multiply_heads`, and in between
stands attention of H query heads of R + P numbers over one head, whose values are the first R of
its keys::

    out[t, h] = sum_j softmax_j(scale * q[t, h] . [c_j, r_j]) c_j          j <= position of t

Prompts and decoding share this form. Expanding a prompt's keys would take fewer operations when
there are more new tokens than about 170 (at R = 512 and heads of 128), and far more when there are
few: a hit would expand every cached row anew. And a form chosen by the number of new tokens would
give a hit other bits than a cold run.

Cut on the absolute grid of `kernels.attention.reference`, which does the work.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.attention import reference as attention
from kernels.attention.sequences import Sequences
from kernels.linear.reference import ROWS
from kernels.packed import Packed


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
    """Attention of new tokens to themselves and to everything before them, whose rows are in the
    pool already.

    Args:
        query: ``[T, H, R + P]``, the packed new tokens; sequence b's are the last
        ``packed.lengths[b]`` of its ``sequences.kv_lens[b]`` tokens.
        pool: ``[N, R + P]``, of which the first ``rank`` = R are the latent.
        table: int32 ``[S, M]``, the request table: rows of the pool by request and position.
        scale: factor of the scores.

    Returns:
        ``[T, H, R]`` in the query's dtype. O(T * length * H * (R + P)).
    """
    rows = pool[:, None]
    where = {"table": table, "sequences": sequences, "packed": packed, "scale": scale}
    return attention.prefill_attention(query, rows, rows, **where)[..., :rank]


def decode_mla(
    query: torch.Tensor,
    pool: torch.Tensor,
    *,
    table: torch.Tensor,
    sequences: Sequences,
    scale: float,
    rank: int,
) -> torch.Tensor:
    """Attention of one token per sequence, ``query [B, H, R + P]``, the last of its
    ``sequences.kv_lens[b]`` tokens. Returns ``[B, H, R]``.
    """
    rows = pool[:, None]
    where = {"table": table, "sequences": sequences, "scale": scale}
    return attention.decode_attention(query, rows, rows, **where)[..., :rank]


def multiply_heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out[t, h] = x[t, h] @ weight[h]``: x ``[T, H, M]``, weight ``[H, M, N]``; ``[T, H, N]``.

    Rows are padded to a multiple of 4, as in `kernels.linear.reference`, so that a token's bits do
    not depend on how many there are (measured).
    """
    num_rows = len(x)
    x = F.pad(x, (0, 0, 0, 0, 0, -num_rows % ROWS)).transpose(0, 1)
    return torch.bmm(x, weight)[:, :num_rows].transpose(0, 1)
