"""Root-mean-square norms in Triton, with one read of the input and one write of the output.

The sum of squares is in float32. A program processes whole rows, and their number depends only on
the row length, so a row's sum is always taken in one order.
"""

from __future__ import annotations

from typing import overload

import torch
import triton
import triton.language as tl

from kernels.linear.formats import QuantizedRows
from kernels.linear.fused import BLOCK, narrow
from kernels.linear.reference import SCALE_BLOCK
from kernels.moe.sums import ExpertSums, add_experts
from kernels.tuning import tuned

ELEMENTS = 2048
"""Approximate number of elements per program. Short rows (query and key heads) share one."""


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def rms_norm_kernel(
    x,
    summands,
    residual,
    gate,
    weight,
    y,
    rows,
    row_scales,
    total,
    num_rows,
    num_tokens,
    heads,
    x_stride_t,
    x_stride_h,
    gate_stride_t,
    gate_stride_h,
    eps,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_n = tl.arange(0, BN)
    mask = (o_r < num_rows)[:, None] & (o_n < N)[None, :]
    o_t, o_h = o_r // heads, o_r % heads
    p_out = o_r[:, None] * N + o_n[None, :]

    if summands is None:
        p_x = (o_t * x_stride_t + o_h * x_stride_h)[:, None] + o_n[None, :]
        b_x = tl.load(x + p_x, mask=mask, other=0.0).to(tl.float32)  # [BR, BN]
    else:
        b_x = add_experts(summands, num_tokens, o_r, o_n, EXPERTS, N).to(tl.float32)
    if residual is not None:
        b_x += tl.load(residual + p_out, mask=mask, other=0.0).to(tl.float32)
        b_sum = b_x.to(total.dtype.element_ty)
        tl.store(total + p_out, b_sum, mask=mask)
        b_x = b_sum.to(tl.float32)
    if gate is not None:
        p_gate = (o_t * gate_stride_t + o_h * gate_stride_h)[:, None] + o_n[None, :]
        b_gate = tl.load(gate + p_gate, mask=mask, other=0.0).to(tl.float32)
        b_gate *= tl.sigmoid(b_gate)
        if GATE_FIRST:
            b_x *= b_gate
    b_rstd = tl.math.rsqrt(tl.sum(b_x * b_x, axis=1) / N + eps)
    if BY_HEAD:
        p_weight = weight + (o_h * N)[:, None] + o_n[None, :]
        b_w = tl.load(p_weight, mask=mask, other=0.0).to(tl.float32)
    else:
        b_w = tl.load(weight + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    b_y = b_x * b_rstd[:, None] * b_w
    if gate is not None and not GATE_FIRST:
        b_y *= b_gate
    b_y = b_y.to(y.dtype.element_ty)
    tl.store(y + p_out, b_y, mask=mask)
    if rows is not None:
        b_rows, b_scale = narrow(tl.reshape(b_y, [BR, BN // BLOCK, BLOCK]), 2)
        tl.store(rows + p_out, tl.reshape(b_rows, [BR, BN]), mask=mask)
        o_b = tl.arange(0, BN // BLOCK)
        m_b = (o_r < num_rows)[:, None] & (o_b * BLOCK < N)[None, :]
        tl.store(row_scales + (o_r * (N // BLOCK))[:, None] + o_b[None, :], b_scale, mask=m_b)


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: None = None
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor | ExpertSums, weight: torch.Tensor, eps: float, *, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor | ExpertSums,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute ``x / sqrt(mean(x^2) + eps) * weight``; see ``reference.rms_norm``.

    ``x [..., N]`` may be a strided view with a unit last stride, such as heads of a wider
    projection. With a residual it may be the sums of experts.
    """
    y = torch.empty_like(residual) if isinstance(x, ExpertSums) else x.new_empty(x.shape)
    total = torch.empty_like(y) if residual is not None else None
    if residual is not None:
        residual = residual.contiguous()
    _launch(x, residual, None, weight, y, total, eps)
    return y if total is None else (y, total)


def gated_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    *,
    gate_first: bool = False,
) -> torch.Tensor:
    """Compute ``rms_norm(x) * silu(gate)``, or ``rms_norm(x * silu(gate))``.

    See ``reference.gated_rms_norm``. Both may be strided views.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, gate, weight, y, None, eps, gate_first=gate_first)
    return y


def rms_norm_rows(
    x: torch.Tensor | ExpertSums,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> tuple[QuantizedRows, torch.Tensor | ExpertSums]:
    """Compute ``rms_norm`` of x ``[T, N]``, also quantised as ``linear.quantize_rows`` does.

    N is a multiple of 128. The second result is the sum with the residual, or x.
    """
    out = _empty_rows(x if residual is None else residual)
    total = torch.empty_like(out.x) if residual is not None else None
    residual = None if residual is None else residual.contiguous()
    _launch(x, residual, None, weight, out.x, total, eps, quantized=out)
    return out, x if total is None else total


def gated_rms_norm_rows(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float
) -> QuantizedRows:
    """Compute ``gated_rms_norm`` of x ``[T, H, N]``, also quantised: ``[T, H * N]``.

    N is a multiple of 128.
    """
    out = _empty_rows(x)
    _launch(x, None, gate, weight, out.x, None, eps, quantized=out)
    return out


def _empty_rows(x: torch.Tensor) -> QuantizedRows:
    num_tokens, size = len(x), x.shape[1:].numel()
    return QuantizedRows(
        x.new_empty(num_tokens, size),
        x.new_empty(num_tokens, size, dtype=torch.float8_e4m3fn),
        x.new_empty(num_tokens, size // SCALE_BLOCK, dtype=torch.float32),
    )


def _launch(
    x: torch.Tensor | ExpertSums,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    y: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
    *,
    gate_first: bool = False,
    quantized: QuantizedRows | None = None,
) -> None:
    summands, num_tokens, experts_per_token = None, 0, 0
    if isinstance(x, ExpertSums):
        summands, num_tokens, x = x.summands, x.num_tokens, y
        experts_per_token = summands.experts.shape[1]
    x = as_heads(x)
    gate = as_heads(gate) if gate is not None else None
    tokens, heads, size = x.shape
    num_rows = tokens * heads
    if num_rows == 0:
        return
    block, rows = triton.next_power_of_2(size), rows_per_program(size)
    rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        summands,
        residual,
        gate,
        weight.contiguous(),
        y,
        None if quantized is None else quantized.rows,
        None if quantized is None else quantized.scale,
        total,
        num_rows,
        num_tokens,
        heads,
        x.stride(0),
        x.stride(1),
        gate.stride(0) if gate is not None else 0,
        gate.stride(1) if gate is not None else 0,
        eps,
        EXPERTS=experts_per_token,
        N=size,
        BN=block,
        BR=rows,
        GATE_FIRST=gate_first,
        BY_HEAD=weight.dim() == 2,
        **{"num_warps": 4 if block <= 4096 else 8, **tuned("norm.rms_norm_kernel", size)},
    )


def rows_per_program(size: int) -> int:
    """Return the number of rows of ``size`` elements per program."""
    return max(1, min(16, ELEMENTS // triton.next_power_of_2(size)))


def as_heads(x: torch.Tensor) -> torch.Tensor:
    """Return ``[..., H, N]`` or ``[T, N]`` as ``[T, H, N]`` with a unit last stride.

    The result is a view if the strides allow it.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 2:
        return x[:, None]
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
