"""Mamba-2 on the sizes of Nemotron-H and Falcon-H1, with float32 states.

Nemotron-H has 128 heads of 64 in 8 groups and a state of 128, Falcon-H1 24 heads of 64 in one group
and a state of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from experiments.gpu.kernel_cases import Case, Setup
from kernels.mamba2 import fused, reference
from kernels.packed import TILE, Exports, Packed, num_tiles


class Sizes(NamedTuple):
    """Sizes of the heads."""

    groups: int
    heads: int
    state_size: int
    head_dim: int


NEMOTRON_H = Sizes(8, 128, 128, 64)
FALCON_H1 = Sizes(1, 24, 256, 64)


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts with and without exports, gates and decoding."""
    long, many, mixed = (8192,), (1024,) * 8, (64, 1000, 3000, 17, 2048, 500, 1500, 63)
    for sizes in [Sizes(1, 2, 16, 16)] if setup.is_dry else [NEMOTRON_H, FALCON_H1]:
        for lengths in [(1, 64, 130)] if setup.is_dry else [long, many, mixed]:
            yield _chunk(setup, sizes, lengths)
        yield _gates(setup, sizes.heads, 70 if setup.is_dry else 8192)
        for num_sequences in (3,) if setup.is_dry else (1, 16, 64, 256):
            yield _decode(setup, sizes, num_sequences)


def _chunk(setup: Setup, sizes: Sizes, lengths: tuple[int, ...]) -> Case:
    groups, heads, state_size, head_dim = sizes
    num_tokens, num_sequences = sum(lengths), len(lengths)
    tokens = _tokens(setup, sizes, num_tokens)
    step = torch.rand(num_tokens, heads, device=setup.device)
    D = setup.randn(heads, dtype=torch.float32)
    states = torch.zeros(num_sequences + 1, heads, state_size, head_dim, device=setup.device)
    layout = {
        "slots": setup.int32(range(num_sequences)),
        "resumed": torch.zeros(num_sequences, dtype=torch.bool, device=setup.device),
    }
    packed, on_cpu = (Packed.from_lengths(lengths, device) for device in (setup.device, "cpu"))
    longest = max(range(num_sequences), key=lengths.__getitem__)
    exports = Exports.plan(packed, [(longest, TILE, num_sequences)])
    run = partial(
        fused.chunk_mamba2, *tokens, -step, step, D, states=states, packed=packed, **layout
    )
    tiles = sum(num_tiles(length) for length in lengths)
    return Case(
        name=f"mamba2 chunk {num_sequences} x {lengths[0]}, K {state_size}",
        run=partial(run, exports=None),
        expected=lambda: reference.chunk_mamba2(
            *(x.float().cpu() for x in (*tokens, -step, step, D)),
            states=states.cpu(),
            packed=on_cpu,
            exports=None,
            **{name: x.cpu() for name, x in layout.items()},
        ),
        num_bytes=sum(x.nbytes for x in (*tokens, tokens[0], step, step)) + states[1:].nbytes,
        # C B^T of a group; C S, B^T X and P X of a head
        num_flops=2 * tiles * TILE * TILE * (groups * state_size + heads * head_dim)
        + 4 * tiles * heads * TILE * state_size * head_dim,
        rivals={"exporting": partial(run, exports=exports)},
    )


def _gates(setup: Setup, heads: int, num_tokens: int) -> Case:
    inputs = _gate_inputs(setup, heads, num_tokens)
    return Case(
        name=f"mamba2 gates {num_tokens} x {heads}",
        run=lambda: fused.gates(*inputs)[0],
        expected=lambda: reference.gates(*inputs)[0],
        num_bytes=inputs[0].nbytes + 8 * inputs[0].numel(),
        rivals={"torch": lambda: reference.gates(*inputs)[0]},
    )


def _decode(setup: Setup, sizes: Sizes, num_sequences: int) -> Case:
    _, heads, state_size, head_dim = sizes
    tokens = _tokens(setup, sizes, num_sequences)
    inputs = *_gate_inputs(setup, heads, num_sequences), setup.randn(heads, dtype=torch.float32)
    states = torch.randn(num_sequences, heads, state_size, head_dim, device=setup.device)
    slots, run_states = setup.int32(range(num_sequences)), states.clone()

    def contender(decode: Callable[..., torch.Tensor], states: torch.Tensor) -> Callable:
        return partial(decode, *tokens, *inputs, states=states, slots=slots)

    return Case(
        name=f"mamba2 decode {num_sequences}, K {state_size}",
        run=contender(fused.decode_mamba2, run_states),
        expected=contender(reference.decode_mamba2, states.clone()),
        num_bytes=2 * states.nbytes + sum(x.nbytes for x in (*tokens, tokens[0], *inputs)),
        rivals={"torch": contender(reference.decode_mamba2, states.clone())},
        reset=lambda: run_states.copy_(states),
    )


def _tokens(setup: Setup, sizes: Sizes, count: int) -> tuple[torch.Tensor, ...]:
    """Return x, B and C, scaled so that outputs do not depend on the state size."""
    groups, heads, state_size, head_dim = sizes
    B, C = (setup.randn(count, groups, state_size) for _ in range(2))
    return setup.randn(count, heads, head_dim), B * state_size**-0.5, C


def _gate_inputs(setup: Setup, heads: int, count: int) -> tuple[torch.Tensor, ...]:
    A_log, dt_bias = setup.randn(2, heads, dtype=torch.float32)
    return setup.randn(count, heads), A_log, dt_bias
