"""Short convolution of Qwen3-Next: 8,192 channels, 4 taps, SiLU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from experiments.gpu import kernel_rivals
from experiments.gpu.kernel_cases import Case, Rivals, Setup, decode_case, prompt_case, verify_case
from kernels.conv1d import fused, reference
from kernels.packed import Packed


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts of one and of several sequences, decoding and verification."""
    channels = 48 if setup.is_dry else 8192
    weight = setup.randn(channels, 4)
    for lengths in [(70,), (65, 1, 64)] if setup.is_dry else [(8192,), (1024,) * 8]:
        yield _prefill(setup, weight, lengths)
    for num_sequences in (1, 3) if setup.is_dry else (1, 16, 64, 256):
        yield _decode(setup, weight, num_sequences)
        yield _verify(setup, weight, num_sequences, num_steps=4)


def _prefill(setup: Setup, weight: torch.Tensor, lengths: tuple[int, ...]) -> Case:
    x = setup.randn(sum(lengths), len(weight))
    states = torch.zeros(len(lengths) + 2, len(weight), 3, dtype=x.dtype, device=x.device)
    kernels, inputs = (fused.prefill_conv1d, reference.prefill_conv1d), (x, weight, None)

    def rivals(packed: Packed) -> Rivals:
        fla = kernel_rivals.prefill_conv1d(x, weight, packed)
        is_even = len(set(lengths)) == 1
        return {"torch": partial(_torch_conv1d, x, weight, len(lengths)), **fla} if is_even else fla

    name = "conv1d prefill"
    return prompt_case(setup, name, kernels, inputs, x, states, lengths, rivals=rivals)


def _decode(setup: Setup, weight: torch.Tensor, num_sequences: int) -> Case:
    x = setup.randn(num_sequences, len(weight))
    states = setup.randn(num_sequences, len(weight), 3)
    kernels, inputs = (fused.decode_conv1d, reference.decode_conv1d), (x, weight, None)
    rivals = kernel_rivals.decode_conv1d(x, weight, states)
    return decode_case(setup, "conv1d decode", kernels, inputs, x, states, rivals)


def _verify(setup: Setup, weight: torch.Tensor, num_sequences: int, num_steps: int) -> Case:
    x = setup.randn(num_sequences * num_steps, len(weight))
    states = setup.randn(num_sequences + len(x), len(weight), 3)
    kernels, inputs = (fused.decode_conv1d, reference.decode_conv1d), (x, weight, None)
    return verify_case(setup, "conv1d verify", kernels, inputs, x, states, num_steps)


def _torch_conv1d(x: torch.Tensor, weight: torch.Tensor, num_sequences: int) -> torch.Tensor:
    rows = x.unflatten(0, (num_sequences, -1))
    rows = F.conv1d(rows.mT, weight[:, None], padding=3, groups=len(weight))
    return F.silu(rows[:, :, : len(x) // num_sequences]).mT.flatten(0, 1)
