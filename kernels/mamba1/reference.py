"""Mamba-1's selective scan in plain PyTorch: the definition, for any device.

A sequence has a state ``S`` of ``[K, V]``, for state size K and V channels. Time steps dt and
inputs x are per channel, B and C are shared by all channels, and A ``[K, V]`` is negative::

    state:   S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T
    output:  o_t = S_t^T C_t + D x_t

Every entry of S decays at its own rate, so there is no form with matrix products. Decays and inputs
of several rows are computed at once. The rows then follow in order, with two elementwise operations
each, for all sequences in parallel. A token has the same bits in a prompt and in decoding, for any
batch. The state is rounded to its pool's dtype after every tile of tokens, and in decoding after
every token.

Source: Mamba (arXiv 2312.00752), section 3.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F

from kernels.packed import ScanInputs, StepInputs
from kernels.tiles import carry, decays_, lay_out, save, steps

BLOCK = 2**19
"""Number of decays computed at once, so that they fit into the processor's cache."""


def time_steps(dt: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Compute ``softplus(dt + dt_bias)``, float32 ``[..., V]``. ``dt``: ``[..., V]``.

    ``dt_bias``: ``[V]``.
    """
    # logsigmoid gives equal bits at every position in a tensor, softplus does not.
    return F.logsigmoid((dt.float() + dt_bias.float()).neg_()).neg_()


def chunk_mamba1(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    **where: Unpack[ScanInputs],
) -> torch.Tensor:
    """Scan packed sequences, and store each sequence's last state in its slot.

    - ``x``: ``[T, V]``. ``B``, ``C``: ``[T, K]``. ``step``: float32 ``[T, V]``, see `time_steps`.
    - ``A``: float32 ``[K, V]``, ``-exp(A_log)`` transposed. ``D``: ``[V]``.
    - ``where``: see `kernels.packed.ScanInputs`. States are ``[S, K, V]`` of any strides.

    Returns ``[T, V]`` in x's dtype. O(T K V).
    """
    packed, states = where["packed"], where["states"]
    layout = lay_out(packed.lengths, packed.tile_size, x.device)
    if not layout.active:
        return torch.empty_like(x)
    order, index, carried, saves = carry(layout, **where)
    # [num_tiles, tile_size, V or K]; padding has step 0, so it changes no state
    inputs = [layout.tile_factor(part[:, None])[:, 0] for part in (x, B, C, step)]
    out = torch.empty_like(inputs[0])
    first = 0
    for number, num_active in enumerate(layout.active):
        tiles = slice(first, first + num_active)
        first += num_active
        state = carried[:num_active]
        num_rows = max(BLOCK // state.numel(), 1)
        for begin in range(0, packed.tile_size, num_rows):
            rows = slice(begin, begin + num_rows)
            out[tiles, rows] = _advance(state, *(part[tiles, rows] for part in inputs), A)
        save(states, state, [saves.get((one, number), ()) for one in order[:num_active]])
    states[index] = carried.to(states.dtype)
    out.add_(inputs[0] * D.float())
    return layout.untile(out[:, None], x.dtype)[:, 0]


def decode_mamba1(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    dt_bias: torch.Tensor,
    D: torch.Tensor,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Compute one token of B sequences: time step, update of the state in each slot, read-out.

    - ``x``, ``dt``: ``[B, V]``. ``B``, ``C``: ``[B, K]``. ``A``, ``D``: as in `chunk_mamba1`.
    - ``where``: states ``[S, K, V]`` and their slots; see `kernels.packed.StepInputs`.

    Returns ``[B, V]``, or ``[T, V]``, in x's dtype.
    """
    values = x.float()
    tokens = [part[:, None] for part in (values, B.float(), C.float(), time_steps(dt, dt_bias))]
    states, slots, packed = where["states"], where["slots"], where.get("packed")
    if packed is None:
        index = slots.long()
        state = states[index].float()
        out = _advance(state, *tokens, A)[:, 0]
        states[index] = state.to(states.dtype)
    else:
        step_slots = where.get("step_slots")
        assert step_slots is not None, "several tokens per sequence need slots for their states"
        out = torch.empty_like(values)
        for rows, state in steps(states, packed, slots, step_slots):
            out[rows] = _advance(state, *(part[rows] for part in tokens), A)[:, 0]
    return out.add_(values * D.float()).to(x.dtype)


def _advance(
    state: torch.Tensor,
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
) -> torch.Tensor:
    """Advance N states ``[N, K, V]`` in place by R tokens. Returns the read-outs ``[N, R, V]``.

    ``x`` and ``step``: ``[N, R, V]``. ``B`` and ``C``: ``[N, R, K]``.
    """
    decays = decays_(step[:, :, None] * A)  # [N, R, K, V]
    path = (step * x)[:, :, None] * B[..., None]
    before = state
    # Not addcmul: its number of roundings depends on the position of an element.
    for decay, after in zip(decays.unbind(1), path.unbind(1), strict=True):
        after.add_(decay.mul_(before))
        before = after
    state.copy_(before)
    # Summed by halves in a fixed order, which a product of a row and a matrix does not guarantee.
    parts = path.mul_(C[..., None])
    while (count := parts.shape[2]) > 1:
        half = count // 2
        folded = parts[:, :, :half] + parts[:, :, half : 2 * half]
        if count % 2:
            folded[:, :, 0] += parts[:, :, -1]
        parts = folded
    return parts[:, :, 0]
