"""Kimi Delta Attention on Kimi-Linear's sizes: 32 heads, K = V = 128, float32 states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from experiments.gpu.kernel_cases import LENGTHS, Case, Setup, decode_case, gates_case, prompt_case
from kernels.gdn.fused import chunk_gdn
from kernels.kda import fused, reference
from kernels.packed import TILE, num_tiles
from tests.kernels.records import taking


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts, with Gated DeltaNet on the same shapes for comparison, gates and decoding."""
    heads, size = (2, 16) if setup.is_dry else (32, 128)
    for lengths in [(1, 64, 130)] if setup.is_dry else LENGTHS:
        yield _chunk(setup, heads, size, lengths)
    yield _gates(setup, heads, size, 70 if setup.is_dry else 8192)
    for num_sequences in (3,) if setup.is_dry else (1, 16, 64, 256):
        yield _decode(setup, heads, size, num_sequences)


def _chunk(setup: Setup, heads: int, size: int, lengths: tuple[int, ...]) -> Case:
    """Return a case of prompts with one decay for all channels, so that both compute the same."""
    tokens = [setup.randn(sum(lengths), heads, size) for _ in range(3)]
    gate, beta = torch.rand(2, sum(lengths), heads, device=setup.device)
    even = -gate[..., None].repeat(1, 1, size)
    states = torch.zeros(len(lengths) + 2, heads, size, size, device=setup.device)
    tiles = sum(num_tiles(length) for length in lengths) * heads
    case = prompt_case(
        setup,
        "kda chunk",
        (fused.chunk_kda, reference.chunk_kda),
        (*tokens, even, beta),
        tokens[2],
        states,
        lengths,
        # <Q, K> and <K, K>; K S, Q S and K^T N; T N and P N
        num_flops=2 * tiles * TILE * (4 * TILE * size + 3 * size * size),
    )
    gdn = partial(taking(chunk_gdn), *tokens, -gate, beta, **case.run.keywords)
    return replace(case, rivals={**case.rivals, "gdn": gdn})


def _gates(setup: Setup, heads: int, size: int, num_tokens: int) -> Case:
    inputs = _gate_inputs(setup, heads, size, num_tokens)
    return gates_case(f"kda gates {num_tokens}", (fused, reference), inputs)


def _decode(setup: Setup, heads: int, size: int, num_sequences: int) -> Case:
    tokens = [setup.randn(num_sequences, heads, size) for _ in range(3)]
    inputs = *tokens, *_gate_inputs(setup, heads, size, num_sequences)
    states = torch.randn(num_sequences, heads, size, size, device=setup.device)
    kernels = fused.decode_kda, reference.decode_kda
    return decode_case(setup, "kda decode", kernels, inputs, tokens[2], states)


def _gate_inputs(setup: Setup, heads: int, size: int, count: int) -> tuple[torch.Tensor, ...]:
    decay, beta = setup.randn(count, heads, size), setup.randn(count, heads)
    A_log = setup.randn(heads, dtype=torch.float32)
    return decay, beta, A_log, setup.randn(heads, size, dtype=torch.float32)
