"""Mamba-2 in plain PyTorch: the definition, and the CPU path.

A state ``S`` of ``[K, V]`` per head (K the state size, V the head's width); with decay ``a =
exp(gate)`` and time step ``dt``, inputs x and D per head, B and C shared by the heads of a group::

    S_t = a_t S_{t-1} + B_t (dt_t x_t)^T                    o_t = S_t^T C_t + D x_t

`decode_mamba2` is that recurrence. `chunk_mamba2` computes the same for whole prompts, by matrix
products over tiles of R tokens (``packed.tile_size``) from each sequence's start (the state space
dual). G is the running sum of the gate inside a tile, ``L[i, j] = exp(G_i - G_j)`` for ``j <= i``,
and S is the state before the tile::

    O = (C B^T * L) diag(dt) X + D X + exp(G) (C S)
    S <- exp(G_R) S + B^T (dt exp(G_R - G) X)

All arithmetic is float32. The state is rounded to its pool's dtype after every tile, even if it
stays in registers. The shape of every product depends only on its tile and head. A resumed run
therefore has the bits of a cold one, and a sequence's bits do not depend on its batch.

Source: Transformers are SSMs (arXiv 2405.21060), sections 6 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F

from kernels.packed import ScanInputs, StepInputs
from kernels.tiles import Tiling, carry, decays_, decode, groups, lay_out, save

NO_LIMITS = (0.0, float("inf"))
BLOCK = 2**18
"""Elements of ``C B^T * L`` computed at once, so that they fit into the processor's cache."""


class Prompt(NamedTuple):
    """Tokens of packed sequences, with their `gates`."""

    x: torch.Tensor
    """``[T, HV, V]``. Each token is contiguous, with any stride between tokens, as in B and C."""
    B: torch.Tensor
    """``[T, H, K]``, HV a multiple of H, in the dtype of x, as C."""
    C: torch.Tensor
    gate: torch.Tensor
    """float32 log-decay ``[T, HV]``, at most 0."""
    step: torch.Tensor
    """``[T, HV]``."""
    D: torch.Tensor
    """``[HV]``."""


class Step(NamedTuple):
    """Tokens, as in `Prompt`, and the inputs of their `gates`."""

    x: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    dt: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    D: torch.Tensor


def gates(
    dt: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    limits: tuple[float, float] = NO_LIMITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay ``-exp(A_log) * step`` and time step ``softplus(dt + dt_bias)``.

    The time step is clamped to ``limits``. Both results are float32 ``[..., HV]``.

    ``dt``: ``[..., HV]``. ``A_log``, ``dt_bias``: ``[HV]``.
    """
    # softplus(x) = -log(sigmoid(-x)). On a CPU, torch's softplus gives the elements after the last
    # full vector other bits.
    step = F.logsigmoid((dt.float() + dt_bias.float()).neg_()).neg_()
    if limits != NO_LIMITS:
        step.clamp_(*limits)
    return step * A_log.float().exp().neg_(), step


def chunk_mamba2(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Compute Mamba-2 over packed sequences by tiles; store each last state in its slot.

    ``where``: see `kernels.packed.ScanInputs`. States are ``[S, HV, K, V]`` of any strides.
    Returns ``[T, HV, V]`` in x's dtype.
    """
    *tokens, D = prompt
    x = prompt.x
    layout = lay_out(where["packed"].lengths, where["packed"].tile_size, x.device)
    if not layout.active:
        return torch.empty_like(x)
    states, (order, index, carried, saves) = where["states"], carry(layout, **where)
    inputs = _tile(tokens, layout)
    out = torch.empty_like(inputs.x)
    heads = x.shape[1]
    for block, steps in _blocks(layout, heads):
        tiles = _weigh(inputs.part(block), D)
        values, read = inputs.x[block].flatten(0, 1), out[block].flatten(0, 1)
        for group in groups(len(read), heads):
            torch.bmm(tiles.attention[group], values[group], out=read[group])
        first = 0
        for number in steps:
            num_active = layout.active[number]
            state = carried[:num_active]
            for one in state:
                span = slice(first * heads, (first + 1) * heads)
                first += 1
                read[span].baddbmm_(tiles.reader[span], one)
                one.mul_(tiles.decay[span]).baddbmm_(tiles.writer[span].mT, values[span])
            save(states, state, [saves.get((one, number), ()) for one in order[:num_active]])
    states[index] = carried.to(states.dtype)
    return layout.untile(out, x.dtype)


class _Inputs(NamedTuple):
    """Inputs by tile and head, float32: ``[N, HV or H, R, ...]``.

    Padding has gate 0 and step 0, so it changes no state. Its rows are dropped.
    """

    x: torch.Tensor  # [.., V]
    B: torch.Tensor  # [.., K]
    C: torch.Tensor  # [.., K]
    gate: torch.Tensor  # [.., 1]
    step: torch.Tensor  # [.., 1]

    def part(self, tiles: slice) -> _Inputs:
        return _Inputs(*(x[tiles] for x in self))


def _tile(tokens: Sequence[torch.Tensor], layout: Tiling) -> _Inputs:
    def tiled(x: torch.Tensor) -> torch.Tensor:
        shape = layout.num_tiles, x.shape[1], layout.tile_size, x.shape[2]
        return layout.tile(x, x.new_empty(shape, dtype=torch.float32))

    return _Inputs(*map(tiled, tokens[:3]), *map(layout.tile_factor, tokens[3:]))


def _blocks(layout: Tiling, heads: int) -> Iterator[tuple[slice, list[int]]]:
    """Yield groups of tiles that are computed together, with the steps of the scan."""
    room = max(BLOCK // (heads * layout.tile_size**2), 1)
    steps: list[int] = []
    first = end = 0
    for number, count in enumerate(layout.active):
        if steps and end + count - first > room:
            yield slice(first, end), steps
            first, steps = end, []
        steps.append(number)
        end += count
    yield slice(first, end), steps


class _Tiles(NamedTuple):
    """State-independent factors of N tiles by head: ``[N * HV, ...]``."""

    attention: torch.Tensor  # (C B^T * L) diag(dt) + D I [.., R, R]
    reader: torch.Tensor  # C exp(G) [.., R, K]
    writer: torch.Tensor  # B dt exp(G_R - G) [.., R, K]
    decay: torch.Tensor  # exp(G_R) [.., 1, 1]


def _weigh(inputs: _Inputs, D: torch.Tensor) -> _Tiles:
    count, heads, size = inputs.B.shape[:3]
    group = inputs.x.shape[1] // heads
    B, C = inputs.B[:, :, None], inputs.C[:, :, None]
    grouped = (count, heads, group, size, 1)
    step, total = inputs.step.view(grouped), inputs.gate.cumsum(dim=2).view(grouped)  # G
    closing = total[..., -1:, :]

    future = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    attention = decays_((total - total.mT).masked_fill_(future, -torch.inf))  # L
    products = torch.stack([torch.bmm(c, b.mT) for c, b in zip(inputs.C, inputs.B, strict=True)])
    attention.mul_(step.mT).mul_(products[:, :, None])
    attention.diagonal(dim1=-2, dim2=-1).add_(D.float().view(heads, group, 1))
    return _Tiles(
        attention=attention.flatten(0, 2),
        reader=(C * decays_(total.clone())).flatten(0, 2),
        writer=(B * decays_(closing - total).mul_(step)).flatten(0, 2),
        decay=decays_(closing.clone()).flatten(0, 2),
    )


def decode_mamba2(
    token: Step, *, limits: tuple[float, float] = NO_LIMITS, **where: Unpack[StepInputs]
) -> torch.Tensor:
    """Compute one token of B sequences: gates, update of the state in each slot, read-out.

    ``where``: states ``[S, HV, K, V]`` and their slots; see `kernels.packed.StepInputs`.

    Returns ``[B, HV, V]``, or ``[T, HV, V]``, in x's dtype. Reads and writes every state once per
    token.
    """
    x, B, C, dt, A_log, dt_bias, D = token
    gate, step = gates(dt, A_log, dt_bias, limits)
    values, group = x.float(), x.shape[1] // B.shape[1]
    factors = (
        values * step[..., None],
        _by_head(B, group),
        _by_head(C, group),
        decays_(gate)[..., None, None],
        values * D.float()[:, None],
    )
    return decode(_advance, factors, x, **where)


def _by_head(x: torch.Tensor, group: int) -> torch.Tensor:
    """Expand ``[B, H, K]`` to ``[B, HV, K]``."""
    x = x.float()
    return x.repeat_interleave(group, dim=1) if group > 1 else x


def _advance(
    state: torch.Tensor,
    values: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    decay: torch.Tensor,
    skipped: torch.Tensor,
) -> torch.Tensor:
    """Update states ``[N, K, V]`` in place. Returns the read-outs ``[N, V]``.

    ``values`` are dt x and ``skipped`` are D x, both ``[N, V]``. ``decay``: ``[N, 1, 1]``.
    """
    state.mul_(decay).baddbmm_(B[:, :, None], values[:, None])
    return torch.baddbmm(skipped[:, None], C[:, None], state)[:, 0]
