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

    (I + tril(beta <K, K>, -1)) [U | W] = beta [V | F K]       within each tile: no state needed
    N = U - W S            O = scale ((F Q) S + <Q, K> N)      with the state S before the tile
    S <- F_R S + (B K)^T N                                     and on to the next tile

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

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.packed import Exports, Packed
from kernels.tiles import Layout, Tiles, lay_out, scan

L2_EPS = 1e-6
GROUP = 2**18
"""Elements of a factor ``[.., R, K]`` computed at once, so that they fit into the processor's
cache."""
LARGE_STATE = 2**15
"""Elements above which a state is updated in place, as in `kernels.gdn.reference`."""


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


def chunk_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    *,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    resumed: torch.Tensor,
    exports: Exports | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute Kimi Delta Attention over packed sequences by tiles; store each last state in its
    slot.

    - ``query``, ``key``: ``[T, H, K]``, L2-normalised inside. ``value``: ``[T, H, V]``.
    - ``gate``: ``[T, H, K]`` float32 log-decay, at most 0. ``beta``: ``[T, H]``.
    - ``states``: ``[S, H, K, V]`` of any strides, for one layer; changed in place at ``slots`` and
      at the exports' slots.
    - ``slots``: int32[B]. ``resumed``: bool[B]; False starts from zeros and ignores the slot. The
      slot of a sequence without tokens is not changed.
    - ``scale``: scale of the query; ``K ** -0.5`` if None.

    Returns ``[T, H, V]`` in value's dtype.
    """
    layout = lay_out(packed.lengths, packed.tile_size, query.device)
    if not layout.active:
        return torch.empty_like(value)
    tiles = _solve_tiles(query, key, value, gate, beta, layout, scale or key.shape[-1] ** -0.5)
    new_values, out = scan(tiles, states, packed, layout, slots, resumed, exports)
    out.baddbmm_(tiles.attention, new_values)
    return layout.untile(out.view(layout.num_tiles, -1, *out.shape[1:]), value.dtype)


def _solve_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    layout: Layout,
    scale: float,
) -> Tiles:
    """Compute the factors of all tiles.

    Padding has beta 0 and decay 1, so it changes no state. Its rows are dropped, and its other
    entries are unspecified.
    """
    heads, key_dim, value_dim = *key.shape[1:], value.shape[2]
    tile_size = layout.tile_size
    shape = (layout.num_tiles, heads, tile_size)
    query = _normalise(layout.tile(query, _new(query, *shape, key_dim)), scale).flatten(0, 1)
    key = _normalise(layout.tile(key, _new(key, *shape, key_dim)), 1.0).flatten(0, 1)
    decay = layout.tile_factor(gate).exp_().flatten(0, 1)
    beta = layout.tile_factor(beta).flatten(0, 1)
    right = _new(value, *shape, value_dim + key_dim)
    layout.tile(value, right[..., :value_dim])
    right = right.flatten(0, 1)
    attention, system = torch.zeros(2, len(key), tile_size, tile_size, device=key.device)
    last = _new(key, len(key), key_dim, 1)

    group = max(GROUP // (tile_size * key_dim), 1)
    for first in range(0, len(key), group):
        part = slice(first, first + group)
        opened, closing = decay[part], torch.ones_like(decay[part])
        _multiply_pairs(query[part], key[part], opened, closing, attention[part], system[part])
        torch.mul(key[part], opened, out=right[part, :, value_dim:])
        right[part].mul_(beta[part])
        system[part].mul_(beta[part])
        query[part].mul_(opened)
        key[part].mul_(closing)
        last[part, :, 0] = opened[:, -1]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
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


def decode_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    states: torch.Tensor,
    slots: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute one token of B sequences: gates, normalisation, state update and read-out.

    - ``query``, ``key``: ``[B, H, K]``. ``value``: ``[B, H, V]``. ``a``: ``[B, H, K]``, ``b``:
      ``[B, H]``, see `gates`.
    - ``states``: ``[S, H, K, V]``, changed in place at ``slots`` int32[B]. ``scale``: ``K ** -0.5``
      if None.

    Returns ``[B, H, V]`` in value's dtype. Reads and writes every state once.
    """
    gate, beta = gates(a, b, A_log, dt_bias)
    keys = torch.stack([key, query], dim=2).float()
    keys /= (keys * keys).sum(dim=-1, keepdim=True).add_(L2_EPS).sqrt_()
    keys[:, :, 1] *= scale or key.shape[-1] ** -0.5
    overlap = (keys[:, :, 0] * keys[:, :, 1]).sum(dim=-1, keepdim=True)
    token = _Token(keys, overlap, value.float(), gate.exp_()[..., None], beta[..., None])
    in_place = len(slots) == 1 or states[0].numel() >= LARGE_STATE
    if in_place and states.dtype == torch.float32:
        out = torch.empty_like(token.value)
        for i, slot in enumerate(slots.tolist()):
            out[i] = _step(states[slot], _Token(*(x[i] for x in token)))
        return out.to(value.dtype)
    state = states.index_select(0, slots).float()
    out = _step(state.flatten(0, 1), _Token(*(x.flatten(0, 1) for x in token))).view(value.shape)
    states.index_copy_(0, slots.long(), state.to(states.dtype))
    return out.to(value.dtype)


class _Token(NamedTuple):
    """Factors of one token for N states, one per sequence and head, in float32."""

    keys: torch.Tensor  # unit k above scale * unit q, [.., 2, K]
    overlap: torch.Tensor  # scale * q . k [.., 1]
    value: torch.Tensor  # [.., V]
    decay: torch.Tensor  # exp(g) [.., K, 1]
    beta: torch.Tensor  # [.., 1]


def _step(state: torch.Tensor, token: _Token) -> torch.Tensor:
    """Update states ``[N, K, V]`` in place. Returns the read-outs ``[N, V]``.

    One pass over the states computes both reads, since ``q^T S_t = q^T (a S_{t-1}) + (q . k)
    delta``.
    """
    recalled, read = torch.bmm(token.keys, state.mul_(token.decay)).unbind(1)
    delta = (token.value - recalled).mul_(token.beta)
    state.baddbmm_(token.keys[:, :1].mT, delta[:, None])
    return read.addcmul(token.overlap, delta)


def _normalise(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute ``scale * x / sqrt(sum(x^2) + 1e-6)`` over the last dimension, float32, in place."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.mul_(norm.square_().add_(L2_EPS).rsqrt_().mul_(scale))


def _new(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)
