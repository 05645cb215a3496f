"""Short convolution of Qwen3-Next: 8,192 channels, 4 taps, SiLU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from experiments.gpu import kernel_rivals
from experiments.gpu.kernel_cases import Case, Setup
from kernels.conv1d import fused, reference
from kernels.packed import Exports, Packed


def cases(setup: Setup) -> Iterator[Case]:
    """Yield prompts of one and of several sequences, decoding and verification."""
    channels = 48 if setup.is_dry else 8192
    weight = setup.randn(channels, 4)
    for lengths in [(70,), (65, 1, 64)] if setup.is_dry else [(8192,), (1024,) * 8]:
        yield _prefill(setup, weight, lengths)
    for num_sequences in (1, 3) if setup.is_dry else (1, 16, 64, 256):
        yield _decode(setup, weight, num_sequences)
        yield _verify(setup, weight, num_sequences, steps=4)


def _prefill(setup: Setup, weight: torch.Tensor, lengths: tuple[int, ...]) -> Case:
    x = setup.randn(sum(lengths), len(weight))
    packed, on_cpu = (Packed.from_lengths(lengths, device) for device in (setup.device, "cpu"))
    states = torch.zeros(len(lengths) + 1, len(weight), 3, dtype=x.dtype, device=x.device)
    arguments = {"slots": setup.int32(range(len(lengths))), "exports": None}
    arguments["resumed"] = torch.zeros(len(lengths), dtype=torch.bool, device=x.device)
    exports = Exports.plan(packed, [(0, 64, len(lengths))])
    run = partial(fused.prefill_conv1d, x, weight, None, states=states, packed=packed, **arguments)
    rivals = {"exporting": partial(run, exports=exports)}
    if len(set(lengths)) == 1:
        rivals["torch"] = partial(_torch_conv1d, x, weight, len(lengths))
    rivals |= kernel_rivals.prefill_conv1d(x, weight, packed)
    return Case(
        name=f"conv1d prefill {_shape(lengths)}",
        run=run,
        expected=lambda: reference.prefill_conv1d(
            x.cpu(),
            weight.cpu(),
            None,
            states=states.cpu(),
            packed=on_cpu,
            slots=arguments["slots"].cpu(),
            resumed=arguments["resumed"].cpu(),
            exports=None,
        ),
        num_bytes=2 * x.nbytes,
        rivals=rivals,
    )


def _decode(setup: Setup, weight: torch.Tensor, num_sequences: int) -> Case:
    x = setup.randn(num_sequences, len(weight))
    states = setup.randn(num_sequences, len(weight), 3)
    slots = setup.int32(range(num_sequences))
    arguments = [
        {"states": states.clone(), "slots": slots} for _ in range(3)
    ]  # one for each contender, since each moves its windows on
    return Case(
        name=f"conv1d decode {num_sequences}",
        run=partial(fused.decode_conv1d, x, weight, None, **arguments[0]),
        expected=partial(reference.decode_conv1d, x, weight, None, **arguments[1]),
        num_bytes=2 * (x.nbytes + states.nbytes),
        rivals={"torch": partial(reference.decode_conv1d, x, weight, None, **arguments[2])}
        | kernel_rivals.decode_conv1d(x, weight, states),
        reset=lambda: arguments[0]["states"].copy_(states),
    )


def _verify(setup: Setup, weight: torch.Tensor, num_sequences: int, steps: int) -> Case:
    num_tokens = num_sequences * steps
    x = setup.randn(num_tokens, len(weight))
    states = setup.randn(num_sequences + num_tokens, len(weight), 3)
    arguments = {
        "states": states,
        "packed": Packed.from_lengths([steps] * num_sequences, setup.device),
        "slots": setup.int32(range(num_sequences)),
        "step_slots": setup.int32(range(num_sequences, len(states))),
    }
    return Case(
        name=f"conv1d verify {num_sequences} x {steps}",
        run=partial(fused.decode_conv1d, x, weight, None, **arguments),
        expected=partial(reference.decode_conv1d, x, weight, None, **arguments),
        num_bytes=2 * x.nbytes + states.nbytes,
        rivals={"torch": partial(reference.decode_conv1d, x, weight, None, **arguments)},
    )


def _torch_conv1d(x: torch.Tensor, weight: torch.Tensor, num_sequences: int) -> torch.Tensor:
    rows = x.unflatten(0, (num_sequences, -1))
    rows = F.conv1d(rows.mT, weight[:, None], padding=3, groups=len(weight))
    return F.silu(rows[:, :, : len(x) // num_sequences]).mT.flatten(0, 1)


def _shape(lengths: tuple[int, ...]) -> str:
    return f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"{len(lengths)} mixed"
