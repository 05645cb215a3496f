"""Kimi Delta Attention on Kimi-Linear's sizes: 32 heads, K = V = 128, float32 states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from experiments.gpu.kernel_cases import Case, Setup
from kernels.gdn.fused import chunk_gdn
from kernels.kda import fused, reference
from kernels.packed import TILE, Packed, num_tiles


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts, with Gated DeltaNet on the same shapes for comparison, gates and decoding."""
    heads, size = (2, 16) if setup.is_dry else (32, 128)
    long, many, mixed = (8192,), (1024,) * 8, (64, 1000, 3000, 17, 2048, 500, 1500, 63)
    for lengths in [(1, 64, 130)] if setup.is_dry else [long, many, mixed]:
        yield _chunk(setup, heads, size, lengths)
    yield _gates(setup, heads, size, 70 if setup.is_dry else 8192)
    for num_sequences in (3,) if setup.is_dry else (1, 16, 64, 256):
        yield _decode(setup, heads, size, num_sequences)


def _chunk(setup: Setup, heads: int, size: int, lengths: tuple[int, ...]) -> Case:
    num_tokens, num_sequences = sum(lengths), len(lengths)
    tokens = [setup.randn(num_tokens, heads, size) for _ in range(3)]
    gate = -torch.rand(num_tokens, heads, size, device=setup.device)
    beta = torch.rand(num_tokens, heads, device=setup.device)
    states = torch.zeros(num_sequences, heads, size, size, device=setup.device)
    layout = {
        "slots": setup.int32(range(num_sequences)),
        "resumed": torch.zeros(num_sequences, dtype=torch.bool, device=setup.device),
    }
    packed, on_cpu = (Packed.from_lengths(lengths, device) for device in (setup.device, "cpu"))
    even = gate[..., :1].expand_as(gate).contiguous()
    shared = {"states": states, "packed": packed, "exports": None, **layout}
    tiles = sum(num_tiles(length) for length in lengths) * heads
    return Case(
        name=f"kda chunk {num_sequences} x {lengths[0]}",
        run=partial(fused.chunk_kda, *tokens, even, beta, **shared),
        expected=lambda: reference.chunk_kda(
            *(x.float().cpu() for x in (*tokens, even, beta)),
            states=states.cpu(),
            packed=on_cpu,
            exports=None,
            **{name: x.cpu() for name, x in layout.items()},
        ),
        num_bytes=sum(x.nbytes for x in (*tokens, tokens[2], gate, beta)) + states.nbytes,
        # <Q, K> and <K, K>; K S, Q S and K^T N; T N and P N
        num_flops=2 * tiles * TILE * (2 * TILE * size + 3 * size * size)
        + 4 * tiles * TILE * TILE * size,
        # With one decay for all channels both compute the same.
        rivals={"gdn": partial(chunk_gdn, *tokens, gate[..., 0].contiguous(), beta, **shared)},
    )


def _gates(setup: Setup, heads: int, size: int, num_tokens: int) -> Case:
    inputs = _gate_inputs(setup, heads, size, num_tokens)
    return Case(
        name=f"kda gates {num_tokens}",
        run=lambda: fused.gates(*inputs)[0],
        expected=lambda: reference.gates(*inputs)[0],
        num_bytes=inputs[0].nbytes + 4 * inputs[0].numel(),
        rivals={"torch": lambda: reference.gates(*inputs)[0]},
    )


def _decode(setup: Setup, heads: int, size: int, num_sequences: int) -> Case:
    tokens = [setup.randn(num_sequences, heads, size) for _ in range(3)]
    inputs = _gate_inputs(setup, heads, size, num_sequences)
    states = torch.randn(num_sequences, heads, size, size, device=setup.device)
    slots, run_states = setup.int32(range(num_sequences)), states.clone()

    def contender(decode: Callable[..., torch.Tensor], states: torch.Tensor) -> Callable:
        return partial(decode, *tokens, *inputs, states=states, slots=slots)

    return Case(
        name=f"kda decode {num_sequences}",
        run=contender(fused.decode_kda, run_states),
        expected=contender(reference.decode_kda, states.clone()),
        num_bytes=2 * states.nbytes + sum(x.nbytes for x in (*tokens, tokens[2], *inputs)),
        rivals={"torch": contender(reference.decode_kda, states.clone())},
        reset=lambda: run_states.copy_(states),
    )


def _gate_inputs(setup: Setup, heads: int, size: int, count: int) -> tuple[torch.Tensor, ...]:
    decay, beta = setup.randn(count, heads, size), setup.randn(count, heads)
    A_log = setup.randn(heads, dtype=torch.float32)
    return decay, beta, A_log, setup.randn(heads, size, dtype=torch.float32)
