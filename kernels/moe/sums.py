"""Weighted sums of experts in Triton: alone, or in the norm that follows them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.moe import reference

NO_EXPERT = tl.constexpr(reference.NO_EXPERT)


class Summands(NamedTuple):
    """Results of T tokens, passed to kernels as one argument."""

    results: torch.Tensor
    """``[T * k, H]``, and with a shared expert T more."""
    weights: torch.Tensor
    """float32 ``[T, k]``."""
    experts: torch.Tensor
    """int32 ``[T, k]``. Results of ``NO_EXPERT`` are not read."""
    shared_gate: torch.Tensor | None
    gate_stride: int


class ExpertSums(NamedTuple):
    """Output ``[num_rows, H]`` of a layer's experts that is not added up yet. Rows from
    ``num_tokens`` on are zero."""

    summands: Summands
    num_tokens: int
    num_rows: int

    def sum(self) -> torch.Tensor:
        """Add up, in one launch."""
        results, k = self.summands.results, self.summands.experts.shape[1]
        size = results.shape[1]
        out = results.new_empty(self.num_rows, size)
        block = min(1024, triton.next_power_of_2(size))
        if self.num_rows:
            weighted_sum_kernel[(self.num_rows, triton.cdiv(size, block))](
                self.summands, out, self.num_tokens, K=k, H=size, BH=block
            )
        return out


@triton.jit
def add_experts(summands, num_tokens, o_t, o_h, K: tl.constexpr, H: tl.constexpr):
    """Return the sums of tokens ``o_t [BT]`` at columns ``o_h [BH]``, added in the order of the k
    in float32 and rounded once."""
    m_t, m_h = o_t < num_tokens, (o_h < H)[None, :]
    b_y = tl.zeros([o_t.shape[0], o_h.shape[0]], tl.float32)
    for i in tl.static_range(K):
        o_p = o_t * K + i
        m_p = tl.load(summands.experts + o_p, mask=m_t, other=NO_EXPERT) != NO_EXPERT
        p_result = summands.results + o_p[:, None] * H + o_h[None, :]
        b_result = tl.load(p_result, mask=m_p[:, None] & m_h, other=0.0).to(tl.float32)
        b_y += b_result * tl.load(summands.weights + o_p, mask=m_t, other=0.0)[:, None]
    if summands.shared_gate is not None:
        p_gate = summands.shared_gate + o_t * summands.gate_stride
        b_gate = tl.sigmoid(tl.load(p_gate, mask=m_t, other=0.0).to(tl.float32))
        p_result = summands.results + (num_tokens * K + o_t)[:, None] * H + o_h[None, :]
        b_result = tl.load(p_result, mask=m_t[:, None] & m_h, other=0.0)
        b_y += b_result.to(tl.float32) * b_gate[:, None]
    return b_y.to(summands.results.dtype.element_ty)


@triton.jit(do_not_specialize=["num_tokens"])
def weighted_sum_kernel(
    summands, y, num_tokens, K: tl.constexpr, H: tl.constexpr, BH: tl.constexpr
):
    o_t = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    b_y = add_experts(summands, num_tokens, o_t, o_h, K, H)
    tl.store(y + o_t[:, None] * H + o_h[None, :], b_y, mask=(o_h < H)[None, :])
