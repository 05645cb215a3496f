"""One tile of FlashAttention's online softmax (Dao et al., 2022), and the tile's size.

All tiles start at absolute positions, so a row's arithmetic depends only on its position and keys.
Key tiles after a query's position leave its running maximum, sum and output unchanged, bit for bit.
The result is therefore the same if such a tile is masked or skipped.
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
):
    """Add keys at positions ``o_n [BN]`` to the running softmax of rows.

    Row i uses keys up to position ``b_limit[i]``, ``b_limit [BM]``. ``b_q`` is ``[BM, BD]``,
    ``b_m`` and ``b_l`` ``[BM]`` are the running maximum (in powers of 2) and sum, and ``b_o [BM,
    BD]`` the weighted values.
    """
    o_d = tl.arange(0, BD)
    m_n = o_n < kv_end
    b_rows = tl.load(p_indices + o_n, mask=m_n, other=0).to(tl.int64) * pool_stride
    p_kv = b_rows[:, None] + o_d[None, :]
    mask = m_n[:, None] & (o_d < D)[None, :]
    b_k = tl.load(k + p_kv, mask=mask, other=0.0)  # [BN, BD]
    b_v = tl.load(v + p_kv, mask=mask, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BM, BN]
    b_s = tl.where(o_n[None, :] <= b_limit[:, None], b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1))
    b_p = tl.exp2(b_s - b_m_new[:, None])
    b_decay = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_decay + tl.sum(b_p, axis=1)
    b_o = b_o * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_m_new, b_l, b_o


def keys_per_tile(size: int, dtype: torch.dtype) -> int:
    """Return BN for a head size and dtype.

    It determines the bits, so it must not depend on anything else.
    """
    return (64 if size <= 128 else 32) // (2 if dtype == torch.float32 else 1)
