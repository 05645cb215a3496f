"""Causal depthwise convolution with optional SiLU in plain PyTorch: the definition, and the CPU
path.

``out[t, c] = silu(bias[c] + sum_w weight[c, w] * x[t - W + 1 + w, c])``, with x before a sequence's
start taken from its saved window (or zero). Models with another gate use the sum without SiLU. It
is computed in float32 from the oldest input to the newest, so a row does not depend on its batch.
The window, ``states[slot]``, has the last ``W - 1`` inputs, the oldest first. Its dtype must
represent x exactly, or a resumed run would differ from a cold one.

Source: Mamba (arXiv 2312.00752), section 3.4, where the short convolution precedes the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import torch

from kernels.packed import ScanInputs, StepInputs, running_sum

BLOCK = 2**17
"""Number of elements computed at once."""


def prefill_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    silu: bool = True,
    **where: Unpack[ScanInputs],
) -> torch.Tensor:
    """Convolve packed sequences from the windows in their slots, and store their last windows.

    - ``x``: ``[T, C]``. ``weight``: ``[C, W]``. ``bias``: ``[C]`` or None.
    - ``where``: windows ``[S, C, W - 1]`` and their slots; see `kernels.packed.ScanInputs`.
    - ``silu``: True to apply SiLU to the sums.

    Returns ``[T, C]`` in x's dtype.
    """
    states, slots, packed = where["states"], where["slots"], where["packed"]
    check_window(x, weight, states)
    reach = weight.shape[1] - 1
    windows = states[slots.long()].masked_fill_(~where["resumed"][:, None, None], 0)
    padded, rows = _behind(windows, x, packed.lengths)
    num_rows, channels = max(len(padded) - reach, 0), len(weight)
    out = padded.new_empty(num_rows, channels)
    # A few rows at a time, so that every pass hits the processor's cache.
    room = max(BLOCK // channels, 1)
    for begin in range(0, num_rows, room):
        stop = min(begin + room, num_rows)
        block = padded[begin : stop + reach].float()
        taps = [block[w : w + stop - begin] for w in range(reach + 1)]
        out[begin:stop] = _convolved(taps, weight, bias, silu, torch.float32)
    own = zip(range(len(slots)), packed.lengths, slots.tolist(), strict=True)
    saves = [one for one in own if one[1]]  # Sequences with tokens.
    if (exports := where["exports"]) is not None:
        saves += zip(exports.sequences, exports.ends, exports.slots, strict=True)
    starts = running_sum(packed.lengths)
    for sequence, end, slot in saves:
        first = starts[sequence] + sequence * reach + end
        states[slot].copy_(padded[first : first + reach].mT)
    return out[rows]


def decode_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    silu: bool = True,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Convolve one token of B sequences, or several with ``packed`` and ``step_slots``, and advance
    the windows ``[S, C, W - 1]`` in their slots; see `kernels.packed.StepInputs`.

    ``weight``, ``bias`` and ``silu`` are as in `prefill_conv1d`. Returns ``[B, C]`` or ``[T, C]``.
    """
    states, packed, step_slots = where["states"], where.get("packed"), where.get("step_slots")
    check_window(x, weight, states)
    index = where["slots"].long()
    if packed is None:
        window = torch.cat([states[index], x[:, :, None].to(states.dtype)], dim=2)  # [B, C, W]
        states[index] = window[:, :, 1:]
        return _convolved(window.unbind(2), weight, bias, silu, x.dtype)
    assert step_slots is not None, "several tokens per sequence need slots for their windows"
    padded, first = _behind(states[index], x.to(states.dtype), packed.lengths)
    taps = [padded[first + w] for w in range(weight.shape[1])]
    states[step_slots.long()] = torch.stack(taps[1:], dim=2)
    return _convolved(taps, weight, bias, silu, x.dtype)


def _behind(
    windows: torch.Tensor, x: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of each sequence behind its window, ``[T + B (W - 1), C]``, and the row of
    the oldest input of each token."""
    pieces = [x[:0]]
    for window, tokens in zip(windows.mT, x.split(lengths), strict=True):
        pieces += [window.to(x.dtype), tokens]
    rows = np.arange(len(x)) + np.repeat(np.arange(len(windows)) * windows.shape[2], lengths)
    return torch.cat(pieces), torch.from_numpy(rows).to(x.device)


def _convolved(
    taps: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    total = taps[0].float() * weight[:, 0].float()
    for w, tap in enumerate(taps[1:], start=1):
        total.addcmul_(tap.float(), weight[:, w].float())
    if bias is not None:
        total += bias.float()
    if not silu:
        return total.to(dtype)
    # Not torch's silu: on a CPU its bits depend on the position of an element, those of exp do not.
    return (total / total.neg().exp_().add_(1)).to(dtype)


def check_window(x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor) -> None:
    """Raise ValueError if windows do not fit the weights, or would round the inputs."""
    if states.shape[1:] != (x.shape[-1], weight.shape[1] - 1):
        raise ValueError(f"windows {tuple(states.shape)} do not fit weights {tuple(weight.shape)}")
    if torch.promote_types(x.dtype, states.dtype) != states.dtype:
        raise ValueError(f"a window in {states.dtype} would round inputs in {x.dtype}")
