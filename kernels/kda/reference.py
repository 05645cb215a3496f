"""Kimi Delta Attention in plain PyTorch: the definition, and the CPU path.

Gated DeltaNet with a decay vector: each of the K channels of a key decays at its own rate. With a
state ``S`` of ``[K, V]`` per head, unit keys k and queries q, decays ``a = exp(gate)`` in ``[0,
1]^K`` and step size beta::

    S_t = diag(a_t) S_{t-1} + k_t (beta_t (v_t - k_t^T diag(a_t) S_{t-1}))^T
    o_t = scale * q_t^T S_t

`decode_kda` is that recurrence. `chunk_kda` computes the same for whole prompts, by matrix products
over tiles of R tokens (``packed.tile_size``) from each sequence's start. ``F_i`` is the product of
a tile's decays up to token i, and ``B_i`` that of the decays after token i. ``<x, y>_ij`` for
``j <= i`` is the sum over channels of ``x_i y_j`` times the decays of the tokens after j up to i::

    without a state:       (I + tril(beta <K, K>, -1)) [U | W] = beta [V | F K]
    S before the tile:     N = U - W S            O = scale ((F Q) S + <Q, K> N)
    S for the next tile:   S <- F_R S + (B K)^T N

``<Q, K>`` is not a product of two matrices: as a product of ``exp(G_i) q_i`` and ``exp(-G_j) k_j``,
with the running sum G of the gate, its right factor would overflow. It is computed in log2(R)
levels instead. For two adjacent blocks of s tokens, s = 1, 2, ... R / 2, the later block's rows are
multiplied by the decays since its start, and the earlier block's by those to its end.

All factors are products of decays and at most 1. F and B double their reach from level to level.
The only exponentials are therefore the decays themselves, and the error of a product of n decays is
that of log2(n) roundings.

All arithmetic is float32. The remarks on tiles, rounding and batches in `kernels.gdn.reference`
apply here.

Source: Kimi Linear (arXiv 2510.26692), section 3.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import torch
import torch.nn.functional as F

from kernels.gdn.reference import Prompt, Step, normalise, prepare, scale_of, write_and_read
from kernels.packed import ScanInputs, StepInputs
from kernels.tiles import Tiles, Tiling, decays_, decode, groups, scan


def gates(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay and step size.

    The log-decay ``-exp(A_log) * softplus(a + dt_bias)`` is float32 ``[..., H, K]``. The step size
    ``sigmoid(b)`` is float32 ``[..., H]``.

    ``a``: ``[..., H, K]``. ``b``: ``[..., H]``. ``A_log``: ``[H]``. ``dt_bias``: ``[H, K]``.
    """
    # As in `kernels.gdn.reference.gates`: these functions give equal bits at every position in a
    # tensor.
    gate = F.logsigmoid((a.float() + dt_bias.float()).neg_())
    return gate.mul_(A_log.float().exp()[:, None]), b.float().neg().exp_().add_(1).reciprocal_()


def chunk_kda(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Compute Kimi Delta Attention over packed sequences by tiles; store each last state in its
    slot.

    ``gate`` is ``[T, H, K]``. ``where``: see `kernels.packed.ScanInputs`. States are ``[S, H, K,
    V]`` of any strides. Returns ``[T, H, V]`` in value's dtype.
    """
    return scan(partial(_solve_tiles, prompt), prompt.value, **where)


def _solve_tiles(prompt: Prompt, layout: Tiling) -> Tiles:
    """Compute the factors of all tiles.

    Padding has beta 0 and decay 1, so it changes no state. Its rows are dropped, and its other
    entries are unspecified.
    """
    query, key, value, gate, beta = prompt
    heads, key_dim, value_dim = *key.shape[1:], value.shape[2]
    tile_size = layout.tile_size
    shape = (layout.num_tiles, heads, tile_size)
    query = normalise(layout.tile(query, _new(query, *shape, key_dim)), scale_of(key)).flatten(0, 1)
    key = normalise(layout.tile(key, _new(key, *shape, key_dim)), 1.0).flatten(0, 1)
    decay = decays_(layout.tile_factor(gate)).flatten(0, 1)
    beta = layout.tile_factor(beta).flatten(0, 1)
    right = _new(value, *shape, value_dim + key_dim)
    layout.tile(value, right[..., :value_dim])
    right = right.flatten(0, 1)
    attention, system = torch.zeros(2, len(key), tile_size, tile_size, device=key.device)
    last = _new(key, len(key), key_dim, 1)

    for part in groups(len(key), heads):
        opened, closing = decay[part], torch.ones_like(decay[part])
        _multiply_pairs(query[part], key[part], opened, closing, attention[part], system[part])
        torch.mul(key[part], opened, out=right[part, :, value_dim:])
        right[part].mul_(beta[part])
        system[part].mul_(beta[part])
        query[part].mul_(opened)
        key[part].mul_(closing)
        last[part, :, 0] = opened[:, -1]
    solved = right
    for part in groups(len(key), heads):
        solved[part] = torch.linalg.solve_triangular(
            system[part], right[part], upper=False, unitriangular=True
        )
    return Tiles(
        new_values=solved[..., :value_dim],
        reader=solved[..., value_dim:],
        query=query,
        attention=attention,
        writer=key,
        decay=last,
    )


def _multiply_pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    opened: torch.Tensor,
    closing: torch.Tensor,
    attention: torch.Tensor,
    system: torch.Tensor,
) -> None:
    """Compute ``<Q, K>`` into ``attention`` and, below the diagonal, ``<K, K>`` into ``system``.

    Both are ``[N, R, R]`` and zero before. ``opened`` has the decays and becomes F; ``closing`` is
    one and becomes B. Both are ``[N, R, K]``.
    """
    count, tile_size, key_dim = key.shape
    attention.diagonal(dim1=1, dim2=2).copy_((query * key).sum(dim=-1))
    size = 1
    while size < tile_size:
        pairs = tile_size // (2 * size)
        halves = (count, pairs, 2, size, key_dim)
        q, k, f, b = (x.view(halves) for x in (query, key, opened, closing))
        later = _new(key, *halves)
        torch.mul(q[:, :, 1], f[:, :, 1], out=later[:, :, 0])
        torch.mul(k[:, :, 1], f[:, :, 1], out=later[:, :, 1])
        earlier = k[:, :, 0] * b[:, :, 0]
        products = torch.bmm(later.view(-1, 2 * size, key_dim), earlier.flatten(0, 1).mT)
        products = products.view(count, pairs, 2, size, size)
        # Lower left quarter of every block of 2 size rows on the diagonal.
        where = (count, pairs, size, size), (tile_size**2, 2 * size * (tile_size + 1), tile_size, 1)
        for i, matrix in enumerate((attention, system)):
            offset = matrix.storage_offset() + size * tile_size
            matrix.as_strided(*where, offset).copy_(products[:, :, i])
        since, until = f[:, :, 0, -1:].clone(), f[:, :, 1, -1:].clone()
        f[:, :, 1].mul_(since)
        b[:, :, 0].mul_(until)
        size *= 2


def decode_kda(token: Step, **where: Unpack[StepInputs]) -> torch.Tensor:
    """Compute one token of B sequences: gates, normalisation, state update and read-out.

    ``where``: states ``[S, H, K, V]`` and their slots; see `kernels.packed.StepInputs`.

    Returns ``[B, H, V]``, or ``[T, H, V]``, in value's dtype. Reads and writes every state once per
    token.
    """
    query, key, value, *inputs = token
    gate, beta = gates(*inputs)
    factors = prepare(query, key, value, decays_(gate)[..., None], beta)
    return decode(write_and_read, factors, value, **where)


def _new(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)
