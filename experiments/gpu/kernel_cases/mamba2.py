"""Mamba-2 on the sizes of Nemotron-H and Falcon-H1, with float32 states.

Nemotron-H has 128 heads of 64 in 8 groups and a state of 128, Falcon-H1 24 heads of 64 in one group
and a state of 256. States of 64 x 64 in bfloat16, which no supported model has, gave two results on
an H200: they also run without products of warp groups (2 warps), and without asynchronous copies (1
stage).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from experiments.gpu.kernel_cases import LENGTHS, Case, Setup, decode_case, gates_case, prompt_case
from kernels.mamba2 import fused, reference
from kernels.packed import TILE, num_tiles
from kernels.tuning import Config, Table, using


class Mamba2Sizes(NamedTuple):
    """Sizes of the heads."""

    groups: int
    heads: int
    state_size: int
    head_dim: int


NEMOTRON_H = Mamba2Sizes(8, 128, 128, 64)
FALCON_H1 = Mamba2Sizes(1, 24, 256, 64)
SQUARE = Mamba2Sizes(2, 4, 64, 64)


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts with and without exports, gates and decoding."""
    yield from _square(setup)
    for sizes in [Mamba2Sizes(1, 2, 16, 16)] if setup.is_dry else [NEMOTRON_H, FALCON_H1]:
        for lengths in [(1, 64, 130)] if setup.is_dry else LENGTHS:
            yield _chunk(setup, sizes, lengths)
        yield _gates(setup, sizes.heads, 70 if setup.is_dry else 8192)
        for num_sequences in (3,) if setup.is_dry else (1, 16, 64, 256):
            yield _decode(setup, sizes, num_sequences)


def _square(setup: Setup) -> Iterator[Case]:
    """Yield a case with our launch parameters, and with each of two others. None is tuned."""
    case = _chunk(setup, SQUARE, (70,) if setup.is_dry else (70, 130), torch.bfloat16)
    keys = ("weigh_kernel", (setup.dtype, 64)), ("scan_kernel", (setup.dtype, 64, 64))
    others: dict[str, Config] = {", 2 warps": {"num_warps": 2}, ", 1 stage": {"num_stages": 1}}
    for name, config in {"": {}, **others}.items():
        table = {(f"mamba2.{kernel}", key): config for kernel, key in keys}

        def run(table: Table = table) -> torch.Tensor:
            with using(table):
                return case.run()

        yield replace(case, name=case.name + name, run=run, rivals={})


def _chunk(
    setup: Setup,
    sizes: Mamba2Sizes,
    lengths: tuple[int, ...],
    state_dtype: torch.dtype = torch.float32,
) -> Case:
    groups, heads, state_size, head_dim = sizes
    tokens = _tokens(setup, sizes, sum(lengths))
    step = torch.rand(sum(lengths), heads, device=setup.device)
    tiles = sum(num_tiles(length) for length in lengths)
    state = heads, state_size, head_dim
    return prompt_case(
        setup,
        f"mamba2 chunk, K {state_size},",
        (fused.chunk_mamba2, reference.chunk_mamba2),
        (*tokens, -step, step, setup.randn(heads, dtype=torch.float32)),
        tokens[0],
        torch.zeros(len(lengths) + 2, *state, dtype=state_dtype, device=setup.device),
        lengths,
        # C B^T of a group; C S, B^T X and P X of a head
        num_flops=2 * tiles * TILE * TILE * (groups * state_size + heads * head_dim)
        + 4 * tiles * heads * TILE * state_size * head_dim,
    )


def _gates(setup: Setup, heads: int, num_tokens: int) -> Case:
    inputs = _gate_inputs(setup, heads, num_tokens)
    return gates_case(f"mamba2 gates {num_tokens} x {heads}", (fused, reference), inputs)


def _decode(setup: Setup, sizes: Mamba2Sizes, num_sequences: int) -> Case:
    _, heads, state_size, head_dim = sizes
    tokens = _tokens(setup, sizes, num_sequences)
    gates = _gate_inputs(setup, heads, num_sequences)
    inputs = *tokens, *gates, setup.randn(heads, dtype=torch.float32)
    states = torch.randn(num_sequences, heads, state_size, head_dim, device=setup.device)
    kernels = fused.decode_mamba2, reference.decode_mamba2
    return decode_case(setup, f"mamba2 decode, K {state_size},", kernels, inputs, tokens[0], states)


def _tokens(setup: Setup, sizes: Mamba2Sizes, count: int) -> tuple[torch.Tensor, ...]:
    """Return x, B and C, scaled so that outputs do not depend on the state size."""
    groups, heads, state_size, head_dim = sizes
    B, C = (setup.randn(count, groups, state_size) for _ in range(2))
    return setup.randn(count, heads, head_dim), B * state_size**-0.5, C


def _gate_inputs(setup: Setup, heads: int, count: int) -> tuple[torch.Tensor, ...]:
    A_log, dt_bias = setup.randn(2, heads, dtype=torch.float32)
    return setup.randn(count, heads), A_log, dt_bias
