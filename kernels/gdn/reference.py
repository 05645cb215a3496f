"""Gated DeltaNet in plain PyTorch: the definition, and the CPU path.

A state ``S`` of ``[K, V]`` per value head; with unit keys k and queries q, decay ``a = exp(gate)``
and step size beta::

    S_t = a_t S_{t-1} + k_t (beta_t (v_t - k_t^T a_t S_{t-1}))^T          o_t = scale * q_t^T S_t

`decode_gdn` is that recurrence. `chunk_gdn` computes the same for whole prompts, by matrix products
over tiles of R tokens (``packed.tile_size``) from each sequence's start. G is the running sum of
the gate inside a tile, and ``D[i, j] = exp(G_i - G_j)`` for ``j <= i``::

    without a state:       (I + tril(beta K K^T * D, -1)) [U | W] = beta [V | exp(G) K]
    S before the tile:     N = U - W S        O = scale ((Q exp(G)) S + (Q K^T * D) N)
    S for the next tile:   S <- exp(G_R) S + (K exp(G_R - G))^T N

All arithmetic is float32. The state is rounded to its pool's dtype after every tile, even if it
stays in registers. A run resumed from a saved state therefore continues exactly as a cold run, in
any dtype. The shape of every product depends only on its tile and head, so a sequence's bits do not
depend on its batch.

Source: Gated Delta Networks (arXiv 2412.06464), section 3; the tile form is Parallelizing Linear
Transformers with the Delta Rule (arXiv 2406.06484), section 3.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F

from kernels.packed import ScanInputs, StepInputs
from kernels.tiles import Tiles, Tiling, decays_, decode, scan

L2_EPS = 1e-6


class Prompt(NamedTuple):
    """Tokens of packed sequences, and the factors of each, of Gated DeltaNet or, with HV = H and a
    gate per channel, of Kimi Delta Attention."""

    query: torch.Tensor
    """``[T, H, K]``, L2-normalised inside, as ``key``, and multiplied by `scale_of`. The heads of a
    token are contiguous, with any stride between tokens."""
    key: torch.Tensor
    value: torch.Tensor
    """``[T, HV, V]``, HV a multiple of H, in the dtype of ``query``."""
    gate: torch.Tensor
    """float32 log-decay, at most 0: ``[T, HV]`` or ``[T, HV, K]``."""
    beta: torch.Tensor
    """Step size ``[T, HV]``."""


class Step(NamedTuple):
    """Tokens, as in `Prompt`, and the inputs of their `gates`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor


def scale_of(key: torch.Tensor) -> float:
    """Return the scale of queries: ``K ** -0.5`` for keys ``[..., K]``."""
    return key.shape[-1] ** -0.5


def gates(
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    max_beta: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay ``-exp(A_log) * softplus(a + dt_bias)`` and step size ``max_beta *
    sigmoid(b)``.

    Both are float32 ``[..., HV]``. ``a``, ``b``: ``[..., HV]``. ``A_log``, ``dt_bias``: ``[HV]``.
    With ``max_beta`` above 1, a step can reverse the sign of the value stored under its key
    (negative eigenvalues, arXiv:2411.12537).
    """
    # softplus(x) = -log(sigmoid(-x)). On a CPU, torch's logsigmoid, exp and log1p give equal bits
    # at every position in a tensor. Its softplus and sigmoid compute the elements after the last
    # full vector in another way.
    gate = A_log.float().exp() * F.logsigmoid((a.float() + dt_bias.float()).neg_())
    beta = b.float().neg().exp_().add_(1).reciprocal_()
    return gate, beta if max_beta == 1.0 else beta.mul_(max_beta)


def chunk_gdn(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Apply the gated delta rule to packed sequences by tiles; store each last state in its slot.

    ``where``: see `kernels.packed.ScanInputs`. States are ``[S, HV, K, V]`` of any strides.
    Returns ``[T, HV, V]`` in value's dtype.
    """
    return scan(partial(_solve_tiles, prompt), prompt.value, **where)


def _solve_tiles(prompt: Prompt, layout: Tiling) -> Tiles:
    """Compute the factors of all tiles.

    Padding has beta 0 and gate 0, so it changes no state. Its rows are dropped, and its other
    entries are unspecified.
    """
    query, key, value, gate, beta = prompt
    count, size, heads, key_dim = layout.num_tiles, layout.tile_size, *key.shape[1:]
    value_heads, value_dim = value.shape[1:]
    grouped = (count, heads, value_heads // heads)
    queries_keys = value.new_empty(count, heads, 2 * size, key_dim, dtype=torch.float32)
    query = normalise(layout.tile(query, queries_keys[:, :, :size]), scale_of(key))[:, :, None]
    key = normalise(layout.tile(key, queries_keys[:, :, size:]), 1.0)
    products = queries_keys.new_empty(count, heads, 1, 2 * size, size)
    for each, left, right in zip(products, queries_keys, key, strict=True):
        torch.bmm(left, right.mT, out=each[:, 0])
    key = key[:, :, None]
    beta = layout.tile_factor(beta).view(*grouped, size, 1)
    total = layout.tile_factor(gate).cumsum(dim=2).view(*grouped, size, 1)  # G
    opened, closing = decays_(total.clone()), total[..., -1:, :]

    future = torch.ones(size, size, dtype=torch.bool, device=key.device).triu(1)
    pairwise = decays_((total - total.mT).masked_fill_(future, -torch.inf))  # D
    attention = products[..., :size, :] * pairwise
    system = pairwise.mul_(beta).mul_(products[..., size:, :])
    right = value.new_empty(count, value_heads, size, value_dim + key_dim, dtype=torch.float32)
    layout.tile(value, right[..., :value_dim]).mul_(beta.flatten(1, 2))
    torch.mul(key, opened * beta, out=right.view(*grouped, size, -1)[..., value_dim:])
    solved = torch.cat(
        [
            torch.linalg.solve_triangular(one, of_one, upper=False, unitriangular=True)
            for one, of_one in zip(system.flatten(1, 2), right, strict=True)
        ]
    )
    return Tiles(
        new_values=solved[..., :value_dim],
        reader=solved[..., value_dim:],
        query=(query * opened).flatten(0, 2),
        attention=attention.flatten(0, 2),
        writer=(key * decays_(closing - total)).flatten(0, 2),
        decay=opened[..., -1:, :].flatten(0, 2),
    )


def decode_gdn(token: Step, *, max_beta: float = 1.0, **where: Unpack[StepInputs]) -> torch.Tensor:
    """Compute one token of B sequences: gates, normalisation, state update and read-out.

    ``where``: states ``[S, HV, K, V]`` and their slots; see `kernels.packed.StepInputs`.
    ``max_beta``: as in `gates`.

    Returns ``[B, HV, V]``, or ``[T, HV, V]``, in value's dtype. Reads and writes every state once
    per token.
    """
    query, key, value, *inputs = token
    gate, beta = gates(*inputs, max_beta=max_beta)
    factors = prepare(query, key, value, decays_(gate)[..., None, None], beta)
    return decode(write_and_read, factors, value, **where)


def normalise(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute ``scale * x / sqrt(sum(x^2) + 1e-6)`` over the last dimension, float32, in place."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.mul_(norm.square_().add_(L2_EPS).rsqrt_().mul_(scale))


class Token(NamedTuple):
    """Factors of one token for N states, one per sequence and value head, in float32."""

    keys: torch.Tensor  # unit k above scale * unit q, [.., 2, K]
    overlap: torch.Tensor  # scale * q . k [.., 1]
    value: torch.Tensor  # [.., V]
    decay: torch.Tensor  # [.., 1, 1], or [.., K, 1] if channels decay on their own
    beta: torch.Tensor  # [.., 1]


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
) -> Token:
    """Normalise tokens ``[..., H or HV, D]`` and repeat key heads for their value heads."""
    keys = torch.stack([key, query], dim=-2).float()
    keys /= (keys * keys).sum(dim=-1, keepdim=True).add_(L2_EPS).sqrt_()
    keys[..., 1, :] *= scale_of(key)
    overlap = (keys[..., 0, :] * keys[..., 1, :]).sum(dim=-1, keepdim=True)
    group = value.shape[-2] // key.shape[-2]
    if group > 1:
        keys = keys.repeat_interleave(group, dim=-3)
        overlap = overlap.repeat_interleave(group, dim=-2)
    return Token(keys, overlap, value.float(), decay, beta[..., None])


def write_and_read(
    state: torch.Tensor,
    keys: torch.Tensor,
    overlap: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """Update states ``[N, K, V]`` in place by one ``Token``. Returns the read-outs ``[N, V]``.

    One pass over the states computes both reads, since ``q^T S_t = q^T (a S_{t-1}) + (q . k)
    delta``.
    """
    recalled, read = torch.bmm(keys, state.mul_(decay)).unbind(1)
    delta = (value - recalled).mul_(beta)
    state.baddbmm_(keys[:, :1].mT, delta[:, None])
    return read.addcmul(overlap, delta)
