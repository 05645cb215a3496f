"""FlashAttention's online softmax (Dao et al., 2022) over one tile of keys, and its size.

Every cut is at an absolute position, so a row's arithmetic depends on its own position and keys
alone. Key tiles past a query's position leave its running maximum, sum and output as they are, bit
for bit: it makes no difference whether a tile was walked over masked or not at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def attend_tile(
    b_q,
    b_m,
    b_l,
    b_o,
    p_indices,
    k,
    v,
    o_n,
    b_limit,
    kv_end,
    pool_stride,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds keys at positions ``o_n [BN]`` to the running softmax of rows that see positions up to
    ``b_limit [BM]``.

    ``b_q [BM, BD]``; ``b_m``, ``b_l [BM]`` running maximum (in powers of 2) and sum; ``b_o [BM,
    BD]`` the weighted values.
    """
    o_d = tl.arange(0, BD)
    m_n = o_n < kv_end
    b_rows = tl.load(p_indices + o_n, mask=m_n, other=0).to(tl.int64) * pool_stride
    p_kv = b_rows[:, None] + o_d[None, :]
    mask = m_n[:, None] & (o_d < D)[None, :]
    b_k = tl.load(k + p_kv, mask=mask, other=0.0)  # [BN, BD]
    b_v = tl.load(v + p_kv, mask=mask, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BM, BN]
    b_s = tl.where(o_n[None, :] <= b_limit[:, None], b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1))
    b_p = tl.exp2(b_s - b_m_new[:, None])
    b_decay = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_decay + tl.sum(b_p, axis=1)
    b_o = b_o * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_m_new, b_l, b_o


def tile_config(size: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Key tile and precision by head size and dtype: they decide the bits, so nothing else may
    choose them."""
    exact = dtype == torch.float32
    keys = (64 if size <= 128 else 32) // (2 if exact else 1)
    return {"BN": keys, "PRECISION": "ieee" if exact else "tf32"}
