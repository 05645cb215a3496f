"""Gated DeltaNet in plain PyTorch: the definition, and the CPU path.

A state ``S`` of ``[K, V]`` per value head; with unit keys k and queries q, decay ``a = exp(gate)`` and step size beta::

    S_t = a_t S_{t-1} + k_t (beta_t (v_t - k_t^T a_t S_{t-1}))^T          o_t = scale * q_t^T S_t

`decode_gdn` and `verify_gdn` are that recurrence. `chunk_gdn` computes the same for whole prompts from matrix products
over tiles of 64 tokens counted from each sequence's start. With G the running sum of the gate inside a tile and
``D[i, j] = exp(G_i - G_j)`` for ``j <= i``::

    (I + tril(beta K K^T * D, -1)) [U | W] = beta [V | exp(G) K]           within each tile: no state needed
    N = U - W S            O = scale ((Q exp(G)) S + (Q K^T * D) N)        with the state S before the tile
    S <- exp(G_64) S + (K exp(G_64 - G))^T N                               and on to the next tile

All arithmetic is float32. The state is rounded to its pool's dtype after every tile, also where it stays in registers:
so a run resumed from a saved state continues from exactly what a cold run carries, in any dtype. Every product has a
shape of its own tile and head alone, so a sequence's bits do not depend on what else is packed along.

Source: Gated Delta Networks (arXiv 2412.06464), section 3; the tile form is Parallelizing Linear Transformers with the
Delta Rule (arXiv 2406.06484), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.packed import TILE, Exports, Packed, num_tiles, running_sum

L2_EPS = 1e-6


def gates(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-decay ``-exp(A_log) * softplus(a + dt_bias)`` and step size ``sigmoid(b)``, both float32 ``[..., HV]``.

    ``a``, ``b``: ``[..., HV]``. ``A_log``, ``dt_bias``: ``[HV]``.
    """
    x = a.float() + dt_bias.float()
    # exp and log1p give an element the same bits wherever it stands in a tensor; on a CPU, the softplus and sigmoid of
    # torch do not: the few elements behind the last full vector take another path.
    softplus = x.clamp(min=0) + x.abs().neg().exp().log1p()
    return -A_log.float().exp() * softplus, 1 / (1 + b.float().neg().exp())


def chunk_gdn(
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
    """Gated delta rule over packed sequences, tile by tile; leaves each sequence's last state in its slot.

    - ``query``, ``key``: ``[T, H, K]``, L2-normalised inside. ``value``: ``[T, HV, V]``, HV a multiple of H.
    - ``gate``: ``[T, HV]`` float32 log-decay, at most 0. ``beta``: ``[T, HV]``.
    - ``states``: ``[S, HV, K, V]``, one layer's; changed in place at ``slots`` and at the exports' slots.
    - ``slots``: int32[B]. ``resumed``: bool[B]; False starts from zeros, whatever the slot holds. A sequence of no tokens
      leaves its slot as it is.
    - ``scale``: of the query; ``K ** -0.5`` if None.

    Returns ``[T, HV, V]`` in value's dtype.
    """
    tiles = _solve_tiles(query, key, value, gate, beta, packed, scale or key.shape[-1] ** -0.5)
    new_values, read_out = _scan(tiles, states, packed, slots, resumed, exports)
    out = torch.baddbmm(
        read_out.flatten(0, 1), tiles.attention.flatten(0, 1), new_values.flatten(0, 1)
    ).view_as(read_out)
    return out.transpose(1, 2).flatten(0, 1)[_token_rows(packed)].to(value.dtype)


class _Tiles(NamedTuple):
    """What each of N tiles contributes, independent of any state; padding tokens are zeros."""

    new_values: torch.Tensor  # U [N, HV, 64, V]
    readers: (
        torch.Tensor
    )  # W above scale * exp(G) Q, [N, HV, 128, K]: what multiplies the state before the tile
    attention: torch.Tensor  # scale * (Q K^T * D) [N, HV, 64, 64]
    writers: torch.Tensor  # (exp(G_64 - G) K)^T [N, HV, K, 64]
    decay: torch.Tensor  # exp(G_64) [N, HV, 1, 1]


def _solve_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    packed: Packed,
    scale: float,
) -> _Tiles:
    group = value.shape[1] // key.shape[1]
    query = _tiled(l2_normalise(query) * scale, packed)  # [N, H, 64, K]
    key = _tiled(l2_normalise(key), packed)
    value = _tiled(value.float(), packed)  # [N, HV, 64, V]
    beta = _tiled(beta.float()[..., None], packed)  # [N, HV, 64, 1]
    total = _tiled(gate.float()[..., None], packed).cumsum(dim=2)  # G [N, HV, 64, 1]

    products = torch.cat([query, key], dim=2) @ key.mT  # [N, H, 128, 64]
    products = products.repeat_interleave(group, dim=1)
    query = query.repeat_interleave(group, dim=1)
    key = key.repeat_interleave(group, dim=1)

    future = torch.ones(TILE, TILE, dtype=torch.bool, device=key.device).triu(1)
    pairwise = (total - total.mT).masked_fill(future, -torch.inf).exp()  # D
    attention = products[:, :, :TILE] * pairwise
    system = products[:, :, TILE:] * (pairwise * beta)
    opened = total.exp()
    right = torch.cat([value, key * opened], dim=3) * beta
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_values, reader = solved.split([value.shape[3], key.shape[3]], dim=3)
    closing = total[:, :, -1:]
    return _Tiles(
        new_values=new_values,
        readers=torch.cat([reader, query * opened], dim=2),
        attention=attention,
        writers=(key * (closing - total).exp()).mT,
        decay=closing.exp(),
    )


def _scan(
    tiles: _Tiles,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    resumed: torch.Tensor,
    exports: Exports | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry every sequence's state through its tiles, all sequences abreast: N and ``scale exp(G) Q S`` of each tile."""
    counts = [num_tiles(length) for length in packed.lengths]
    first_tiles = running_sum(counts)
    # The longest first: those that still have a tile to go are a prefix, and leave from its end.
    order = sorted((b for b in range(len(counts)) if counts[b]), key=lambda b: -counts[b])
    index = slots.long()[order]
    carried = states[index].float() * resumed[order][:, None, None, None]
    saves = _saves_by_tile(packed, exports)

    new_values = torch.empty_like(tiles.new_values)
    read_out = torch.empty_like(tiles.new_values)
    for step in range(max(counts, default=0)):
        active = [b for b in order if counts[b] > step]
        rows = torch.tensor([first_tiles[b] + step for b in active])
        state = carried[: len(active)]
        read = tiles.readers[rows] @ state
        new = tiles.new_values[rows] - read[:, :, :TILE]
        new_values[rows] = new
        read_out[rows] = read[:, :, TILE:]
        state.mul_(tiles.decay[rows]).add_(tiles.writers[rows] @ new)
        if states.dtype != torch.float32:
            state.copy_(state.to(states.dtype))
        for position, sequence in enumerate(active):
            for slot in saves.get((sequence, step), ()):
                states[slot].copy_(state[position])
    states[index] = carried.to(states.dtype)
    return new_values, read_out


def _saves_by_tile(packed: Packed, exports: Exports | None) -> dict[tuple[int, int], list[int]]:
    saves: dict[tuple[int, int], list[int]] = {}
    if exports is not None:
        for sequence, end, slot in zip(exports.sequences, exports.ends, exports.slots, strict=True):
            saves.setdefault((sequence, num_tiles(end) - 1), []).append(slot)
    return saves


def decode_gdn(
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
    """One token of B sequences: gates, normalisation, update of the state in each slot, read-out.

    - ``query``, ``key``: ``[B, H, K]``. ``value``: ``[B, HV, V]``. ``a``, ``b``: ``[B, HV]``, see `gates`.
    - ``states``: ``[S, HV, K, V]``, changed in place at ``slots`` int32[B]. ``scale``: ``K ** -0.5`` if None.

    Returns ``[B, HV, V]`` in value's dtype. Reads and writes every state once.
    """
    index = slots.long()
    gate, beta = gates(a, b, A_log, dt_bias)
    state, out = _step(states[index].float(), query, key, value, gate, beta, scale)
    states[index] = state.to(states.dtype)
    return out


def verify_gdn(
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
    step_states: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Several tokens of B sequences, the state after each of them kept: what speculative verification needs.

    As `decode_gdn`, called once per step and with the same bits, but tokens are ``[B, steps, ...]``, ``states`` is only
    read, and ``step_states`` ``[B, steps, HV, K, V]`` receives the states. `commit_states` takes the accepted ones over.
    """
    gate, beta = gates(a, b, A_log, dt_bias)
    state = states[slots.long()].float()
    outs = []
    for step in range(query.shape[1]):
        state, out = _step(
            state, query[:, step], key[:, step], value[:, step], gate[:, step], beta[:, step], scale
        )
        step_states[:, step] = state.to(step_states.dtype)
        state = step_states[:, step].to(torch.float32, copy=True)
        outs.append(out)
    return torch.stack(outs, dim=1) if outs else torch.empty_like(value)


def commit_states(
    step_states: torch.Tensor, states: torch.Tensor, slots: torch.Tensor, accepted: torch.Tensor
) -> None:
    """Make the state after each sequence's last accepted step its own, in all layers.

    - ``step_states``: ``[L, B, steps, ...]`` as verification left them. ``states``: ``[L, S, ...]`` of the same dtype.
    - ``slots``: int32[B]. ``accepted``: int32[B], how many steps were accepted; 0 leaves the slot as it is.
    """
    for sequence, (slot, count) in enumerate(zip(slots.tolist(), accepted.tolist(), strict=True)):
        if count:
            states[:, slot].copy_(step_states[:, sequence, count - 1])


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + L2_EPS)


def _step(
    state: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state ``[B, HV, K, V]`` after one token, in place, and its read-out ``[B, HV, V]``."""
    group = value.shape[1] // key.shape[1]
    query = l2_normalise(query) * (scale or key.shape[-1] ** -0.5)
    key = l2_normalise(key).repeat_interleave(group, dim=1)  # [B, HV, K]
    query = query.repeat_interleave(group, dim=1)
    decay = gate.exp()[..., None]  # [B, HV, 1]
    # One pass over the state answers both reads: q^T S_t = a q^T S_{t-1} + (q . k) delta.
    recalled, read = (torch.stack([key, query], dim=2) @ state).mul_(decay[..., None]).unbind(2)
    delta = (value.float() - recalled) * beta[..., None]
    out = read + (query * key).sum(dim=-1, keepdim=True) * delta
    state.mul_(decay[..., None]).addcmul_(key[..., None], delta[..., None, :])
    return state, out.to(value.dtype)


def _tiled(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """``[T, H, D]`` to ``[num_tiles, H, 64, D]``; the last tile of a sequence is filled up with zeros."""
    count = sum(num_tiles(length) for length in packed.lengths)
    padded = x.new_zeros(count * TILE, *x.shape[1:])
    padded[_token_rows(packed)] = x
    return padded.unflatten(0, (count, TILE)).transpose(1, 2).contiguous()


def _token_rows(packed: Packed) -> torch.Tensor:
    """int64[T]: where each token stands once every sequence begins at a tile of its own."""
    starts = running_sum([num_tiles(length) * TILE for length in packed.lengths])
    rows = [torch.arange(s, s + n) for s, n in zip(starts, packed.lengths, strict=False)]
    return torch.cat([torch.arange(0), *rows])
