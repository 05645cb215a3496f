"""Mamba-1's selective scan in plain PyTorch: the definition, and what serves on any device.

A state ``S`` of ``[K, V]`` per sequence (K the state size, V the channels), time steps dt and
inputs x per channel, B and C shared by all channels, A ``[K, V]`` negative::

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T                   o_t = S_t^T C_t + D x_t

Every entry of S has a decay of its own, so there is no form of matrix products. Decays and inputs
of some rows are computed at once, and the rows then follow each other in two elementwise operations
each, all sequences abreast: a token has the same bits in a prompt and in decoding, alone and in
company. The state is rounded to its pool's dtype after every tile of tokens, in decoding after
every token.

Source: Mamba (arXiv 2312.00752), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.packed import Exports, Packed
from kernels.tiles import lay_out, saves_by_tile

BLOCK = 2**19
"""Numbers of decays that are worked on at a time: what stays in the processor's cache."""


def time_steps(dt: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """``softplus(dt + dt_bias)``, float32 ``[..., V]``. ``dt``: ``[..., V]``. ``dt_bias``:
    ``[V]``."""
    # By logsigmoid, whose bits do not depend on where an element stands in the tensor.
    return F.logsigmoid((dt.float() + dt_bias.float()).neg_()).neg_()


def chunk_mamba1(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    *,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    resumed: torch.Tensor,
    exports: Exports | None,
) -> torch.Tensor:
    """The selective scan over packed sequences; leaves each sequence's last state in its slot.

    - ``x``: ``[T, V]``. ``B``, ``C``: ``[T, K]``. ``step``: float32 ``[T, V]``, see `time_steps`.
    - ``A``: float32 ``[K, V]``, ``-exp(A_log)`` transposed. ``D``: ``[V]``.
    - ``states``: ``[S, K, V]`` of any strides, one layer's; changed in place at ``slots`` and at
      the exports' slots.
    - ``slots``: int32[B]. ``resumed``: bool[B]; False starts from zeros, whatever the slot holds. A
      sequence of no tokens leaves its slot as it is.

    Returns ``[T, V]`` in x's dtype. O(T K V).
    """
    layout = lay_out(packed.lengths, packed.tile_size, x.device)
    if not layout.active:
        return torch.empty_like(x)
    order = [b for b in layout.order if packed.lengths[b]]
    index = slots.long()[order]
    carried = states[index].float()
    carried[~resumed[order]] = 0.0
    saves = saves_by_tile(packed, exports)

    # [num_tiles, tile_size, V or K]; padding has step 0: it changes no state
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
        if states.dtype != torch.float32:
            state.copy_(state.to(states.dtype))
        for position, sequence in enumerate(order[:num_active]):
            for slot in saves.get((sequence, number), ()):
                states[slot].copy_(state[position])
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
    *,
    states: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """One token of B sequences: time step, update of the state in each slot, read-out.

    - ``x``, ``dt``: ``[B, V]``. ``B``, ``C``: ``[B, K]``. ``A``, ``D``: as in `chunk_mamba1`.
    - ``states``: ``[S, K, V]``, changed in place at ``slots`` int32[B].

    Returns ``[B, V]`` in x's dtype.
    """
    index, values = slots.long(), x.float()
    state = states[index].float()
    tokens = (values, B.float(), C.float(), time_steps(dt, dt_bias))
    out = _advance(state, *(part[:, None] for part in tokens), A)[:, 0]
    states[index] = state.to(states.dtype)
    return out.add_(values * D.float()).to(x.dtype)


def _advance(
    state: torch.Tensor,
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
) -> torch.Tensor:
    """Read-outs ``[N, R, V]`` of R tokens of N sequences, whose states ``[N, K, V]`` move on in
    place; ``x`` and ``step`` ``[N, R, V]``, ``B`` and ``C`` ``[N, R, K]``."""
    decays = (step[:, :, None] * A).exp_()  # [N, R, K, V]
    path = (step * x)[:, :, None] * B[..., None]
    before = state
    # Not addcmul: whether that rounds once or twice depends on where an element stands.
    for decay, after in zip(decays.unbind(1), path.unbind(1), strict=True):
        after.add_(decay.mul_(before))
        before = after
    state.copy_(before)
    # Half onto half, one order of sums, which a product of a row and a matrix would not promise.
    parts = path.mul_(C[..., None])
    while (count := parts.shape[2]) > 1:
        half = count // 2
        folded = parts[:, :, :half] + parts[:, :, half : 2 * half]
        if count % 2:
            folded[:, :, 0] += parts[:, :, -1]
        parts = folded
    return parts[:, :, 0]
