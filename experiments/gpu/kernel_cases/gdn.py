"""Gated DeltaNet on Qwen3-Next's sizes, with float32 states.

16 key heads, 32 value heads, K = V = 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from experiments.gpu import kernel_rivals
from experiments.gpu.kernel_cases import Case, Setup
from kernels.gdn import fused, reference
from kernels.packed import TILE, Exports, Packed, num_tiles
from kernels.recurrence import BLOCK_V


class Sizes(NamedTuple):
    """Sizes of the heads."""

    heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    def state_bytes(self) -> int:
        """Return the bytes of one float32 state."""
        return 4 * self.value_heads * self.key_dim * self.value_dim


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts with and without exports, gates, decoding and verification."""
    sizes = Sizes(1, 2, 16, 16) if setup.is_dry else Sizes(16, 32, 128, 128)
    long, many, mixed = (8192,), (1024,) * 8, (64, 1000, 3000, 17, 2048, 500, 1500, 63)
    for lengths in [(70,), (1, 64, 130)] if setup.is_dry else [long, many, mixed, (1024,)]:
        yield _chunk(setup, sizes, lengths)
    yield _gates(setup, sizes.value_heads, 70 if setup.is_dry else 8192)
    for num_sequences in (1, 3) if setup.is_dry else (1, 16, 64, 256):
        yield _decode(setup, sizes, num_sequences)
    for num_sequences in (2,) if setup.is_dry else (1, 16, 64):
        yield _verify(setup, sizes, num_sequences, num_steps=4)


def _chunk(setup: Setup, sizes: Sizes, lengths: tuple[int, ...]) -> Case:
    num_tokens, num_sequences = sum(lengths), len(lengths)
    tokens = _tokens(setup, sizes, num_tokens)
    gate = -torch.rand(num_tokens, sizes.value_heads, device=setup.device)
    beta = torch.rand(num_tokens, sizes.value_heads, device=setup.device)
    states = torch.zeros(num_sequences + 2, *sizes[1:], device=setup.device)
    slots = setup.int32(range(num_sequences))
    resumed = torch.zeros(num_sequences, dtype=torch.bool, device=setup.device)
    packed, on_cpu = (Packed.from_lengths(lengths, device) for device in (setup.device, "cpu"))
    longest = max(range(num_sequences), key=lengths.__getitem__)
    ends = sorted({TILE, lengths[longest] // 2 // TILE * TILE} - {0})
    exports = [(longest, end, num_sequences + i) for i, end in enumerate(ends)]
    run = partial(
        fused.chunk_gdn,
        *tokens,
        gate,
        beta,
        states=states,
        packed=packed,
        slots=slots,
        resumed=resumed,
        exports=None,
    )
    rivals = {"exporting": partial(run, exports=Exports.plan(packed, exports))}
    rivals |= kernel_rivals.chunk_gdn(*tokens, gate, beta, packed, torch.zeros_like(states[:-2]))
    tiles = sum(num_tiles(length) for length in lengths) * sizes.value_heads
    return Case(
        name=f"gdn chunk {_shape(lengths)}",
        run=run,
        expected=lambda: reference.chunk_gdn(
            *(x.float().cpu() for x in (*tokens, gate, beta)),
            states=states.cpu(),
            packed=on_cpu,
            slots=slots.cpu(),
            resumed=resumed.cpu(),
            exports=None,
        ),
        num_bytes=sum(x.nbytes for x in (*tokens, tokens[2], gate, beta))
        + num_sequences * sizes.state_bytes(),
        # Q K^T and K K^T; K S, Q S and K^T N; T N and P N
        num_flops=2
        * tiles
        * TILE
        * (2 * TILE * sizes.key_dim + 3 * sizes.key_dim * sizes.value_dim)
        + 4 * tiles * TILE * TILE * sizes.value_dim,
        rivals=rivals,
    )


def _gates(setup: Setup, value_heads: int, num_tokens: int) -> Case:
    inputs = _gate_inputs(setup, value_heads, num_tokens)
    return Case(
        name=f"gdn gates {num_tokens}",
        run=lambda: fused.gates(*inputs)[0],
        expected=lambda: reference.gates(*inputs)[0],
        num_bytes=2 * inputs[0].nbytes + 8 * inputs[0].numel(),
        rivals={"torch": lambda: reference.gates(*inputs)[0]}
        | kernel_rivals.gates(inputs[0], *inputs[2:]),
    )


def _decode(setup: Setup, sizes: Sizes, num_sequences: int) -> Case:
    tokens = _tokens(setup, sizes, num_sequences)
    inputs = _gate_inputs(setup, sizes.value_heads, num_sequences)
    states = torch.randn(num_sequences, *sizes[1:], device=setup.device)
    slots = setup.int32(range(num_sequences))

    run_states = states.clone()

    def contender(decode: Callable[..., torch.Tensor], states: torch.Tensor) -> Callable:
        return partial(decode, *tokens, *inputs, states=states, slots=slots)

    return Case(
        name=f"gdn decode {num_sequences}",
        run=contender(fused.decode_gdn, run_states),
        expected=contender(reference.decode_gdn, states.clone()),
        num_bytes=2 * states.nbytes + _token_bytes(tokens, inputs),
        rivals={"torch": contender(reference.decode_gdn, states.clone())}
        | kernel_rivals.decode_gdn(*tokens, *inputs, states),
        moved_bytes=2 * states.nbytes + _loaded_bytes(tokens, inputs, slots),
        reset=lambda: run_states.copy_(states),
    )


def _token_bytes(tokens: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> int:
    """Return the bytes of the tokens of a decode. Inputs are read once, outputs are written
    once."""
    return sum(x.nbytes for x in (*tokens, tokens[2], *inputs))


def _loaded_bytes(
    tokens: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...], slots: torch.Tensor
) -> int:
    """Return the bytes that a decode loads.

    Keys and queries are loaded for each value head and slice of V, gate inputs for each slice.
    """
    query, key, value = tokens
    a, b, *parameters = inputs
    slices = -(-value.shape[2] // BLOCK_V)
    group, programs = value.shape[1] // key.shape[1], slices * value.shape[1] * len(slots)
    per_token = sum(x.nbytes for x in (a, b)) + len(query) * sum(x.nbytes for x in parameters)
    keys = (query.nbytes + key.nbytes) * group
    return slices * (keys + per_token) + 2 * value.nbytes + programs * slots.element_size()


def _verify(setup: Setup, sizes: Sizes, num_sequences: int, num_steps: int) -> Case:
    num_tokens = num_sequences * num_steps
    tokens = _tokens(setup, sizes, num_tokens)
    a, b, *parameters = _gate_inputs(setup, sizes.value_heads, num_tokens)
    states = torch.randn(num_sequences + num_tokens, *sizes[1:], device=setup.device)
    layout = {
        "packed": Packed.from_lengths([num_steps] * num_sequences, setup.device),
        "slots": setup.int32(range(num_sequences)),
        "step_slots": setup.int32(range(num_sequences, len(states))),
    }

    def contender(verify: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        return partial(verify, *tokens, a, b, *parameters, states=states, **layout)

    return Case(
        name=f"gdn verify {num_sequences} x {num_steps}",
        run=contender(fused.decode_gdn),
        expected=contender(reference.decode_gdn),
        num_bytes=states.nbytes + _token_bytes(tokens, (a, b, *parameters)),
        rivals={"torch": contender(reference.decode_gdn)},
    )


def _tokens(setup: Setup, sizes: Sizes, count: int) -> tuple[torch.Tensor, ...]:
    key = (sizes.heads, sizes.key_dim)
    value = (sizes.value_heads, sizes.value_dim)
    return setup.randn(count, *key), setup.randn(count, *key), setup.randn(count, *value)


def _gate_inputs(setup: Setup, value_heads: int, count: int) -> tuple[torch.Tensor, ...]:
    a, b = setup.randn(2, count, value_heads)
    return a, b, *setup.randn(2, value_heads, dtype=torch.float32)


def _shape(lengths: tuple[int, ...]) -> str:
    return f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"{len(lengths)} mixed"
