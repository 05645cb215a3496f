"""Causal convolution with ``native.cpp``; see ``reference``."""

from __future__ import annotations

from typing import Unpack

import torch

from kernels.conv1d import reference
from kernels.conv1d.reference import check_window
from kernels.native import DTYPES, address, function, has_whole_rows, step_addresses
from kernels.packed import ScanInputs, StepInputs

__all__ = ["decode_conv1d", "prefill_conv1d"]

WIDTHS = (2, 3, 4)


def prefill_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    silu: bool = True,
    **where: Unpack[ScanInputs],
) -> torch.Tensor:
    """Compute ``reference.prefill_conv1d``. A token has the same bits as in `decode_conv1d`."""
    states, slots = where["states"], where["slots"]
    packed, exports = where["packed"], where["exports"]
    check_window(x, weight, states)
    if not _is_served(x, weight, bias, states):
        return reference.prefill_conv1d(x, weight, bias, silu=silu, **where)
    if x.stride(1) != 1:
        x = x.contiguous()
    ends, export_slots, cu_exports = packed.no_exports if exports is None else exports.tables
    weight, out = weight.contiguous(), x.new_empty(x.shape)
    function(f"prefill_conv1d_{DTYPES[x.dtype]}", "pipppipppppppiiiit")(
        x.data_ptr(), x.stride(0), weight.data_ptr(), address(bias), states.data_ptr(),
        states.stride(0), slots.data_ptr(), where["resumed"].data_ptr(),
        packed.cu_seqlens.data_ptr(), ends.data_ptr(), export_slots.data_ptr(),
        cu_exports.data_ptr(), out.data_ptr(), len(slots), x.shape[1], weight.shape[1], silu,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def decode_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    silu: bool = True,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Compute ``reference.decode_conv1d``. Lengths are those of ``packed.cu_seqlens``."""
    states, slots = where["states"], where["slots"]
    check_window(x, weight, states)
    if not _is_served(x, weight, bias, states):
        return reference.decode_conv1d(x, weight, bias, silu=silu, **where)
    if x.stride(1) != 1:
        x = x.contiguous()
    weight, out = weight.contiguous(), x.new_empty(x.shape)
    function(f"decode_conv1d_{DTYPES[x.dtype]}", "pipppippppiiiiit")(
        x.data_ptr(), x.stride(0), weight.data_ptr(), address(bias),
        states.data_ptr(), states.stride(0), slots.data_ptr(),
        *step_addresses(where), out.data_ptr(), len(x), len(slots), x.shape[1],
        weight.shape[1], silu, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _is_served(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor
) -> bool:
    return (
        x.dtype in DTYPES
        and x.dtype is weight.dtype is states.dtype
        and (bias is None or bias.dtype is x.dtype)
        and weight.shape[1] in WIDTHS
        and has_whole_rows(states)
    )
