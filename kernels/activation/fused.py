"""Gated activations in Triton, computed in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements of a row per program."""


@triton.jit
def silu_and_mul_kernel(x, y, stride, N: tl.constexpr, BN: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = o_n < N
    b_gate = tl.load(x + i_t * stride + o_n, mask=mask, other=0.0).to(tl.float32)  # [BN]
    b_up = tl.load(x + i_t * stride + N + o_n, mask=mask, other=0.0).to(tl.float32)
    b_y = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(y + i_t * N + o_n, b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gate_mul_kernel(
    x,
    gate,
    y,
    heads,
    x_stride_t,
    x_stride_h,
    gate_stride_t,
    gate_stride_h,
    gate_stride_n,
    N: tl.constexpr,
    BN: tl.constexpr,
    SILU: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_t, i_h = i_r // heads, i_r % heads
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = o_n < N
    p_gate = gate + i_t * gate_stride_t + i_h * gate_stride_h + o_n * gate_stride_n
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    b_x = tl.load(x + i_t * x_stride_t + i_h * x_stride_h + o_n, mask=mask, other=0.0)  # [BN]
    b_y = b_x.to(tl.float32) * tl.sigmoid(b_gate)
    if SILU:
        b_y *= b_gate
    tl.store(y + i_r * N + o_n, b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def relu_squared_kernel(p_x, p_y, count, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < count
    b_x = tl.maximum(tl.load(p_x + o_n, mask=mask, other=0.0).to(tl.float32), 0.0)
    tl.store(p_y + o_n, (b_x * b_x).to(p_y.dtype.element_ty), mask=mask)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Compute ``silu(a) * b`` of the halves of ``x [..., 2I]``; see ``reference.silu_and_mul``."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    size = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
    if y.numel():
        block = min(BLOCK, triton.next_power_of_2(size))
        silu_and_mul_kernel[(len(rows), triton.cdiv(size, block))](
            rows, y, rows.stride(0), N=size, BN=block
        )
    return y


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute ``x * sigmoid(gate)``; see ``reference.sigmoid_mul``.

    x is ``[..., N]``, gate has the same shape or ``[..., 1]``. Views are allowed.
    """
    return _gate_mul(x, gate, silu=False)


def silu_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute ``x * silu(gate)``; see ``reference.silu_mul``. Views are allowed."""
    return _gate_mul(x, gate, silu=True)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Compute ``max(x, 0)^2``; see ``reference.relu_squared``."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        relu_squared_kernel[(triton.cdiv(y.numel(), BLOCK),)](x, y, y.numel(), BLOCK=BLOCK)
    return y


def _gate_mul(x: torch.Tensor, gate: torch.Tensor, *, silu: bool) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, gate = _as_heads(x), _as_heads(gate.expand(x.shape))
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, heads, size = x.shape
    block = min(BLOCK, triton.next_power_of_2(size))
    gate_mul_kernel[(tokens * heads, triton.cdiv(size, block))](
        x, gate, y, heads, x.stride(0), x.stride(1), *gate.stride(), N=size, BN=block, SILU=silu
    )
    return y


def _as_heads(x: torch.Tensor) -> torch.Tensor:
    """View ``[T, N]`` as ``[T, 1, N]``. Further leading dimensions are merged into T."""
    return x[:, None] if x.dim() == 2 else x.reshape(-1, *x.shape[-2:])
