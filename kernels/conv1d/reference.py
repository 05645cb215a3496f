"""Causal depthwise convolution with SiLU, in plain PyTorch: the definition, and the CPU path.

``out[t, c] = silu(bias[c] + sum_w weight[c, w] * x[t - W + 1 + w, c])``, where x before a sequence's start is its saved
window (or zero). The sum runs in float32 from the oldest input to the newest, so a row does not depend on its batch.
The window, ``states[slot]``, holds the last ``W - 1`` inputs, oldest first; its dtype must hold x's exactly, or a
resumed run would differ from a cold one.

Source: Mamba (arXiv 2312.00752), section 3.4, where the short convolution precedes the scan.
"""

from __future__ import annotations

import torch

from kernels.packed import Exports, Packed


def prefill_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    resumed: torch.Tensor,
    exports: Exports | None,
) -> torch.Tensor:
    """Convolve packed sequences, each from the window in its slot, and leave its last window there.

    - ``x``: ``[T, C]``. ``weight``: ``[C, W]``. ``bias``: ``[C]`` or None.
    - ``states``: ``[S, C, W - 1]``, one layer's windows; changed in place at ``slots`` and at the exports' slots.
    - ``slots``: int32[B]. ``resumed``: bool[B]; False starts from zeros, whatever the slot holds. A sequence of no tokens
      leaves its slot as it is.

    Returns ``[T, C]`` in x's dtype.
    """
    _check_window(x, weight, states)
    reach = weight.shape[1] - 1
    windows = states[slots.long()].mT * resumed[:, None, None]
    pieces, starts, start = [], [], 0
    for window, tokens in zip(windows, x.split(packed.lengths), strict=True):
        pieces += [window.to(x.dtype), tokens]
        starts.append(start)
        start += reach + len(tokens)
    padded = (
        torch.cat(pieces) if pieces else x
    )  # [T + B (W - 1), C]: every sequence behind its window
    rows = [
        padded.new_empty(0, dtype=torch.long),
        *(torch.arange(s, s + n) for s, n in zip(starts, packed.lengths, strict=True)),
    ]
    out = _convolve(padded, weight, bias, num_rows=max(len(padded) - reach, 0))
    saves = [
        (b, n, slot) for (b, n), slot in zip(enumerate(packed.lengths), slots.tolist(), strict=True)
    ]
    if exports is not None:
        saves += zip(exports.sequences, exports.ends, exports.slots, strict=True)
    for sequence, end, slot in saves:
        first = starts[sequence] + end
        states[slot].copy_(padded[first : first + reach].mT)
    return out[torch.cat(rows)]


def decode_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    states: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """One token of B sequences, ``[B, C]`` in, ``[B, C]`` out; the window in each slot moves on by one.

    ``states`` ``[S, C, W - 1]``, ``slots`` int32[B], ``weight`` and ``bias`` as in `prefill_conv1d`.
    """
    _check_window(x, weight, states)
    index = slots.long()
    window = torch.cat([states[index], x[:, :, None].to(states.dtype)], dim=2)  # [B, C, W]
    states[index] = window[:, :, 1:]
    return _finish(_taps(list(window.unbind(2)), weight), bias, x.dtype)


def _convolve(
    padded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, num_rows: int
) -> torch.Tensor:
    taps = [padded[w : w + num_rows] for w in range(weight.shape[1])]
    return _finish(_taps(taps, weight), bias, padded.dtype)


def _taps(taps: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    total = taps[0].float() * weight[:, 0].float()
    for w, tap in enumerate(taps[1:], start=1):
        total.addcmul_(tap.float(), weight[:, w].float())
    return total


def _finish(total: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if bias is not None:
        total += bias.float()
    # Not torch's silu: on a CPU its bits depend on where an element stands in the tensor; those of exp do not.
    return (total / total.neg().exp_().add_(1)).to(dtype)


def _check_window(x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor) -> None:
    if states.shape[1:] != (x.shape[-1], weight.shape[1] - 1):
        raise ValueError(f"windows {tuple(states.shape)} do not fit weights {tuple(weight.shape)}")
    if torch.promote_types(x.dtype, states.dtype) != states.dtype:
        raise ValueError(f"a window in {states.dtype} would round inputs in {x.dtype}")
