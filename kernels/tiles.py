"""Recurrences over packed sequences in plain PyTorch: by tiles for prompts, else token by token.

Shared by the references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Unpack

import numpy as np
import torch

from kernels.packed import Packed, ScanInputs, StepInputs, num_tiles, running_sum

LEAST_LOG = -60.0
"""Natural logarithm of the least decay that is not rounded to zero. Products of smaller ones are
subnormal, and so are results of ``exp`` below -87.3. Both are up to 100 times slower."""


def decays_(log: torch.Tensor) -> torch.Tensor:
    """Compute ``exp`` of logarithms, at most 0, in place; 0 below ``LEAST_LOG``."""
    is_zero = log < LEAST_LOG
    return log.clamp_(min=LEAST_LOG).exp_().masked_fill_(is_zero, 0.0)


def groups(count: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` matrices. A library chooses its code by the shape of a product, so
    products are computed by tile or by sequence: the shape of a call depends on neither number."""
    return (slice(first, first + size) for first in range(0, count, size))


class Tiling(NamedTuple):
    """Tiles in the order of the scan: first the first tile of every sequence, then the second ones.

    Sequences are ordered from the longest, so the tiles of one step of the scan are adjacent.
    """

    order: list[int]
    """Sequences, the longest first."""
    active: list[int]
    """Number of sequences with a tile left, by step."""
    sources: torch.Tensor | None
    """int64[num_tiles * tile_size]: token at each place. Padding refers to the last token of its
    sequence. None for the identity."""
    padding: torch.Tensor | None
    """bool[num_tiles * tile_size]: True for padding. None if there is no padding."""
    places: torch.Tensor
    """int64[T]: place of each token."""
    tile_size: int
    """Tokens per tile, as in ``Packed.tile_size``."""

    @property
    def num_tiles(self) -> int:
        return sum(self.active)

    def tile(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Arrange ``[T, H, D]`` into out float32 ``[num_tiles, H, tile_size, D]``."""
        if self.sources is not None:
            x = x.index_select(0, self.sources)
        return out.copy_(x.unflatten(0, (-1, self.tile_size)).transpose(1, 2))

    def tile_factor(self, x: torch.Tensor) -> torch.Tensor:
        """Arrange factors ``[T, H]`` or ``[T, H, K]`` into float32 tiles; zero for padding.

        The result is ``[num_tiles, H, tile_size, 1 or K]``.
        """
        x = x[..., None] if x.ndim == 2 else x
        shape = self.num_tiles, x.shape[1], self.tile_size, x.shape[2]
        out = self.tile(x, x.new_empty(shape, dtype=torch.float32))
        if self.padding is not None:
            out.masked_fill_(self.padding.view(-1, 1, self.tile_size, 1), 0.0)
        return out

    def untile(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Arrange ``[num_tiles, H, tile_size, D]`` back to ``[T, H, D]``."""
        rows = x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
        return rows if self.sources is None else rows.index_select(0, self.places)


@lru_cache(maxsize=8)
def lay_out(lengths: tuple[int, ...], tile_size: int, device: torch.device) -> Tiling:
    """Compute the layout. Cached, because every linear layer of a step uses the same one. O(T)."""
    sizes = np.array(lengths, np.int64)
    counts = -(-sizes // tile_size)
    order = np.argsort(-counts, kind="stable")
    active = [int((counts > step).sum()) for step in range(counts.max(initial=0))]
    step_starts = np.array(running_sum(active), np.int64)
    # Of each place, in the order of the sequences: its sequence, and its position there.
    owner = np.repeat(np.arange(len(sizes)), counts * tile_size)
    inside = np.concatenate([np.arange(0), *map(np.arange, counts * tile_size)])
    tile, row = np.divmod(inside, tile_size)
    at = (step_starts[tile] + np.argsort(order)[owner]) * tile_size + row
    is_token = inside < sizes[owner]
    places = at[is_token]
    padding, sources = np.empty(len(at), np.bool_), np.empty(len(at), np.int64)
    padding[at] = ~is_token
    # Padding reads a token of the same sequence, so it cannot affect other sequences.
    sources[at] = (sizes.cumsum() - sizes)[owner] + np.minimum(inside, sizes[owner] - 1)
    is_plain = np.array_equal(places, np.arange(len(at)))
    return Tiling(
        order=order.tolist(),
        active=active,
        sources=None if is_plain else torch.from_numpy(sources).to(device),
        padding=torch.from_numpy(padding).to(device) if padding.any() else None,
        places=torch.from_numpy(places).to(device),
        tile_size=tile_size,
    )


class Tiles(NamedTuple):
    """State-independent factors of N tiles by head: ``[N * HV, ...]``. R is tokens per tile."""

    new_values: torch.Tensor  # U [.., R, V]
    reader: torch.Tensor  # W [.., R, K]
    query: torch.Tensor  # scale * exp(G) Q [.., R, K]
    attention: torch.Tensor  # scale * (Q K^T * D) [.., R, R]
    writer: torch.Tensor  # exp(G_R - G) K [.., R, K]
    decay: torch.Tensor  # exp(G_R) [.., 1, 1], or [.., K, 1] if channels decay on their own


def scan(
    solve: Callable[[Tiling], Tiles], value: torch.Tensor, **where: Unpack[ScanInputs]
) -> torch.Tensor:
    """Carry every sequence's state through its tiles, whose factors ``solve`` computes.

    Returns the read-outs, with shape and dtype of ``value``.
    """
    layout = lay_out(where["packed"].lengths, where["packed"].tile_size, value.device)
    if not layout.active:
        return torch.empty_like(value)
    tiles = solve(layout)
    states, (order, index, carried, saves) = where["states"], carry(layout, **where)
    heads = carried.shape[1]
    new_values = torch.empty_like(tiles.new_values, memory_format=torch.contiguous_format)
    read_out = torch.empty_like(new_values)
    first = 0
    for step, num_active in enumerate(layout.active):
        state = carried[:num_active]
        for one in state:
            span = slice(first * heads, (first + 1) * heads)
            first += 1
            new = new_values[span]
            torch.baddbmm(tiles.new_values[span], tiles.reader[span], one, alpha=-1, out=new)
            torch.bmm(tiles.query[span], one, out=read_out[span])
            one.mul_(tiles.decay[span]).baddbmm_(tiles.writer[span].mT, new)
        save(states, state, [saves.get((sequence, step), ()) for sequence in order[:num_active]])
    states[index] = carried.to(states.dtype)
    for group in groups(len(read_out), heads):
        read_out[group].baddbmm_(tiles.attention[group], new_values[group])
    return layout.untile(read_out.unflatten(0, (-1, heads)), value.dtype)


def carry(
    layout: Tiling, **where: Unpack[ScanInputs]
) -> tuple[list[int], torch.Tensor, torch.Tensor, dict[tuple[int, int], list[int]]]:
    """Return the sequences with tokens in the layout's order, their slots, their states before the
    first tile in float32, and the slots for the state after each ``(sequence, tile)``."""
    packed, exports = where["packed"], where["exports"]
    order = [b for b in layout.order if packed.lengths[b]]
    index = where["slots"].long()[order]
    carried = where["states"][index].float()
    carried[~where["resumed"][order]] = 0.0
    saves: dict[tuple[int, int], list[int]] = {}
    if exports is not None:
        for sequence, end, slot in zip(exports.sequences, exports.ends, exports.slots, strict=True):
            tile = num_tiles(end, packed.tile_size) - 1
            saves.setdefault((sequence, tile), []).append(slot)
    return order, index, carried, saves


def save(states: torch.Tensor, carried: torch.Tensor, slots: Sequence[Sequence[int]]) -> None:
    """Round states after a tile as ``states`` are, and copy each of them to its ``slots``."""
    if states.dtype != torch.float32:
        carried.copy_(carried.to(states.dtype))
    for state, targets in zip(carried, slots, strict=True):
        for slot in targets:
            states[slot].copy_(state)


def decode(
    step: Callable[..., torch.Tensor],
    token: Sequence[torch.Tensor],
    value: torch.Tensor,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Carry states ``[S, HV, K, V]`` through the tokens of their sequences.

    ``step(state, *token)`` updates the states ``[HV, K, V]`` of one sequence in place, and returns
    their read-outs ``[HV, V]``. ``token`` has factors ``[T, HV, ...]``. Returns the read-outs of
    all tokens, with shape and dtype of ``value``. The other arguments are those of the decoding
    functions.
    """
    states, slots = where["states"], where["slots"]
    out = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    if (packed := where.get("packed")) is not None:
        step_slots = where.get("step_slots")
        assert step_slots is not None, "several tokens per sequence need slots for their states"
        for rows, state in steps(states, packed, slots, step_slots):
            for one, row in zip(state, rows.tolist(), strict=True):
                out[row] = step(one, *(part[row] for part in token))
        return out.to(value.dtype)
    for i, slot in enumerate(slots.tolist()):
        state = states[slot].float()
        out[i] = step(state, *(part[i] for part in token))
        if state.data_ptr() != states[slot].data_ptr():
            states[slot] = state
    return out.to(value.dtype)


def steps(
    states: torch.Tensor, packed: Packed, slots: torch.Tensor, step_slots: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the first token of every sequence, then the second ones, with the states before them.

    Each item is the tokens' rows int64[N] and states float32 ``[N, ...]``, to be advanced in place.
    They are then stored in the tokens' ``step_slots``. The states in ``slots`` are only read.
    """
    order = sorted(range(len(packed.lengths)), key=lambda b: -packed.lengths[b])
    first = torch.tensor(running_sum(packed.lengths), device=states.device)[order]
    state, targets = states[slots.long()[order]].float(), step_slots.long()
    for step in range(max(packed.lengths, default=0)):
        count = sum(length > step for length in packed.lengths)
        rows, active = first[:count] + step, state[:count]
        yield rows, active
        kept = active.to(states.dtype)
        states[targets[rows]] = kept
        if states.dtype != torch.float32:
            active.copy_(kept)
