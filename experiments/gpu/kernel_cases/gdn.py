"""Gated DeltaNet on Qwen3-Next's sizes, with float32 states.

16 key heads, 32 value heads, K = V = 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from experiments.gpu import kernel_rivals
from experiments.gpu.kernel_cases import (
    LENGTHS,
    Case,
    Setup,
    decode_case,
    gates_case,
    prompt_case,
    verify_case,
)
from kernels.gdn import fused, reference
from kernels.packed import TILE, num_tiles
from kernels.recurrence import BLOCK_V


class GDNSizes(NamedTuple):
    """Sizes of the heads."""

    heads: int
    value_heads: int
    key_dim: int
    value_dim: int


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts with and without exports, gates, decoding and verification."""
    sizes = GDNSizes(1, 2, 16, 16) if setup.is_dry else GDNSizes(16, 32, 128, 128)
    for lengths in [(70,), (1, 64, 130)] if setup.is_dry else [*LENGTHS, (1024,)]:
        yield _chunk(setup, sizes, lengths)
    yield _gates(setup, sizes.value_heads, 70 if setup.is_dry else 8192)
    for num_sequences in (1, 3) if setup.is_dry else (1, 16, 64, 256):
        yield _decode(setup, sizes, num_sequences)
    for num_sequences in (2,) if setup.is_dry else (1, 16, 64):
        yield _verify(setup, sizes, num_sequences, num_steps=4)


def _chunk(setup: Setup, sizes: GDNSizes, lengths: tuple[int, ...]) -> Case:
    tokens = _tokens(setup, sizes, sum(lengths))
    gate, beta = torch.rand(2, sum(lengths), sizes.value_heads, device=setup.device)
    inputs = *tokens, -gate, beta
    states = torch.zeros(len(lengths) + 2, *sizes[1:], device=setup.device)
    tiles = sum(num_tiles(length) for length in lengths) * sizes.value_heads
    key, value = sizes.key_dim, sizes.value_dim
    return prompt_case(
        setup,
        "gdn chunk",
        (fused.chunk_gdn, reference.chunk_gdn),
        inputs,
        tokens[2],
        states,
        lengths,
        # Q K^T and K K^T; K S, Q S and K^T N; T N and P N
        num_flops=2 * tiles * TILE * (2 * TILE * key + 3 * key * value + 2 * TILE * value),
        rivals=lambda packed: kernel_rivals.chunk_gdn(
            *inputs, packed, torch.zeros_like(states[:-2])
        ),
    )


def _gates(setup: Setup, value_heads: int, num_tokens: int) -> Case:
    inputs = _gate_inputs(setup, value_heads, num_tokens)
    rivals = kernel_rivals.gates(inputs[0], *inputs[2:])
    return gates_case(f"gdn gates {num_tokens}", (fused, reference), inputs, rivals)


def _decode(setup: Setup, sizes: GDNSizes, num_sequences: int) -> Case:
    tokens = _tokens(setup, sizes, num_sequences)
    gates = _gate_inputs(setup, sizes.value_heads, num_sequences)
    inputs, states = (*tokens, *gates), torch.randn(num_sequences, *sizes[1:], device=setup.device)
    return decode_case(
        setup,
        "gdn decode",
        (fused.decode_gdn, reference.decode_gdn),
        inputs,
        tokens[2],
        states,
        kernel_rivals.decode_gdn(*inputs, states),
        _loaded_bytes(tokens, gates, num_sequences),
    )


def _loaded_bytes(
    tokens: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...], num_sequences: int
) -> int:
    """Return the bytes that a decode loads.

    Keys and queries are loaded for each value head and slice of V, gate inputs for each slice.
    """
    query, key, value = tokens
    a, b, *parameters = inputs
    slices = -(-value.shape[2] // BLOCK_V)
    group, programs = value.shape[1] // key.shape[1], slices * value.shape[1] * num_sequences
    per_token = sum(x.nbytes for x in (a, b)) + len(query) * sum(x.nbytes for x in parameters)
    keys = (query.nbytes + key.nbytes) * group
    return slices * (keys + per_token) + 2 * value.nbytes + 4 * programs


def _verify(setup: Setup, sizes: GDNSizes, num_sequences: int, num_steps: int) -> Case:
    num_tokens = num_sequences * num_steps
    tokens = _tokens(setup, sizes, num_tokens)
    inputs = *tokens, *_gate_inputs(setup, sizes.value_heads, num_tokens)
    states = torch.randn(num_sequences + num_tokens, *sizes[1:], device=setup.device)
    kernels = fused.decode_gdn, reference.decode_gdn
    return verify_case(setup, "gdn verify", kernels, inputs, tokens[2], states, num_steps)


def _tokens(setup: Setup, sizes: GDNSizes, count: int) -> tuple[torch.Tensor, ...]:
    key = (sizes.heads, sizes.key_dim)
    value = (sizes.value_heads, sizes.value_dim)
    return setup.randn(count, *key), setup.randn(count, *key), setup.randn(count, *value)


def _gate_inputs(setup: Setup, value_heads: int, count: int) -> tuple[torch.Tensor, ...]:
    a, b = setup.randn(2, count, value_heads)
    return a, b, *setup.randn(2, value_heads, dtype=torch.float32)
