"""Mamba-2 in Triton, token by token and over prompts.

Over prompts, all tiles are computed in parallel, then one scan runs per sequence, head and slice of
V.

As in `kernels.gdn.fused`, row factors are kept out of the operands, and the scan reads unmodified
x, B and C::

    `weigh_kernel`, without a state:    P = (C B^T * L) diag(dt)
    `scan_tile`, tile after tile:     O = exp(G) (C S) + P X + D X
    next state:                         S <- exp(G_R) S + B^T (dt exp(G_R - G) X)

Each tile of R tokens passes one R x R matrix and three vectors per head between the kernels.
The usual form of the state space dual writes the state of every tile to memory, in order to read
out all tiles at once. At K = 128, V = 64 in float32 this is 32 KiB per tile and head, written and
read, while P has 8 KiB in bfloat16. Here a state stays in registers and is stored only for exports.

Precision: 16-bit operands multiply in their own type and accumulate in float32; float32 operands
multiply in float32, never in tf32. The state, the skip and everything elementwise are float32. Each
reduction has one order, determined by its tile and head alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack

import torch
import triton
import triton.language as tl

from kernels.gdn.fused import BLOCK, pairwise_decay, softplus
from kernels.mamba2.reference import NO_LIMITS, Prompt, Step
from kernels.packed import ScanInputs, StepInputs
from kernels.recurrence import block_of, decode, scan, scan_config, tile_tokens
from kernels.strides import rows_contiguous
from kernels.target import has_roomy_memory
from kernels.tuning import tuned

# --- Gates of prompts; the decode kernel computes its own -----------------------------------------


@triton.jit
def compute_gates(b_dt, b_A_log, b_dt_bias, low, high):
    """Compute log-decay and time step of one block, in float32, as in `gates`."""
    b_step = softplus(b_dt.to(tl.float32) + b_dt_bias.to(tl.float32))
    b_step = tl.minimum(tl.maximum(b_step, low), high)
    return -tl.exp(b_A_log.to(tl.float32)) * b_step, b_step


@triton.jit(do_not_specialize=["num_tokens"])
def gates_kernel(
    p_dt,
    p_A_log,
    p_dt_bias,
    p_gate,
    p_step,
    num_tokens,
    stride_dt,
    low,
    high,
    HV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: computes BLOCK of the ``T * HV`` gates, in token order."""
    o_gate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_gate < num_tokens * HV
    o_token, o_head = o_gate // HV, o_gate % HV
    b_gate, b_step = compute_gates(
        tl.load(p_dt + o_token * stride_dt + o_head, mask=mask),
        tl.load(p_A_log + o_head, mask=mask),
        tl.load(p_dt_bias + o_head, mask=mask),
        low,
        high,
    )
    tl.store(p_gate + o_gate, b_gate, mask=mask)
    tl.store(p_step + o_gate, b_step, mask=mask)


def gates(
    dt: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    limits: tuple[float, float] = NO_LIMITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay ``-exp(A_log) * step`` and time step ``softplus(dt + dt_bias)``.

    The time step is clamped to ``limits``. Both results are float32 ``[T, HV]``.

    ``dt``: ``[T, HV]``; the heads of a token are contiguous, with any stride between tokens.
    ``A_log``, ``dt_bias``: ``[HV]``.
    """
    gate = dt.new_empty(dt.shape, dtype=torch.float32)
    step = dt.new_empty(dt.shape, dtype=torch.float32)
    if not dt.numel():
        return gate, step
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    gates_kernel[(triton.cdiv(dt.numel(), BLOCK),)](
        dt,
        A_log,
        dt_bias,
        gate,
        step,
        dt.shape[0],
        dt.stride(0),
        *(float(limit) for limit in limits),
        HV=dt.shape[1],
        BLOCK=BLOCK,
    )
    return gate, step


# --- Token by token: gates, update and read-out in one pass over the state ------------------------


class Mamba2Inputs(NamedTuple):
    """Tokens, parameters, and strides between tokens, passed to kernels as one argument."""

    x: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    dt: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    D: torch.Tensor
    low: float
    high: float
    strides: tuple[int, ...]


@triton.jit
def step(b_state, i_token, i_head, o_k, o_v, inputs,
         H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one token; see `kernels.recurrence`."""
    stride_x, stride_b, stride_c, stride_dt = inputs.strides
    m_k, m_v = o_k < K, o_v < V
    o_key = i_head // (HV // H) * K + o_k
    b_x = tl.load(inputs.x + i_token * stride_x + i_head * V + o_v, mask=m_v, other=0.0)
    b_b = tl.load(inputs.B + i_token * stride_b + o_key, mask=m_k, other=0.0).to(tl.float32)
    b_c = tl.load(inputs.C + i_token * stride_c + o_key, mask=m_k, other=0.0).to(tl.float32)
    b_x = b_x.to(tl.float32)
    b_gate, b_step = compute_gates(
        tl.load(inputs.dt + i_token * stride_dt + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + i_head),
        inputs.low,
        inputs.high,
    )
    b_state *= tl.exp(b_gate)
    b_state += b_b[:, None] * (b_x * b_step)
    b_out = tl.sum(b_state * b_c[:, None], axis=0)
    b_out += b_x * tl.load(inputs.D + i_head).to(tl.float32)
    return b_state, b_out


def decode_mamba2(
    token: Step, *, limits: tuple[float, float] = NO_LIMITS, **where: Unpack[StepInputs]
) -> torch.Tensor:
    """Compute one token of B sequences, or several with ``packed`` and ``step_slots``.

    One launch. Arguments, formula and source: `kernels.mamba2.reference`. Each token and each state
    is contiguous, with any stride between tokens and between slots. The number of tokens of each
    sequence is read from ``packed.cu_seqlens``.
    """
    *tokens, A_log, dt_bias, D = token
    x, B, *_ = tokens = [rows_contiguous(part) for part in tokens]
    strides = tuple(part.stride(0) for part in tokens)
    key_dim, value_dim = B.shape[-1], x.shape[-1]
    return decode(
        step,
        Mamba2Inputs(*tokens, A_log, dt_bias, D, *(float(limit) for limit in limits), strides),
        x.new_empty(x.shape),
        num_groups=B.shape[-2],
        config={"num_warps": 2 if key_dim <= 128 else 4}
        | tuned("mamba2.decode_kernel", where["states"].dtype, key_dim, value_dim),
        **where,
    )


# --- Prompts: all tiles in parallel, then one scan per sequence, head and slice of V --------------


@triton.jit
def weigh_kernel(
    p_b,
    p_c,
    p_gate,
    p_step,
    p_matrices,
    p_vectors,
    packed,
    stride_b,
    stride_c,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Program (i_tile, i_part): HEADS heads of one group, which share C B^T.

    Writes P into ``p_matrices`` ``[N, HV, BT, BT]``, and the row scales of C S, of X and of the
    state into ``p_vectors`` ``[N, HV, 3, BT]``.
    """
    i_tile, i_first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    i_group = i_first // (HV // H)
    o_t = tl.arange(0, BT)
    o_token, m_token = tile_tokens(packed, i_tile, BT)

    p_b += i_group * K + o_token[:, None] * stride_b
    p_c += i_group * K + o_token[:, None] * stride_c
    b_cb = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        mask = m_token[:, None] & (o_k < K)
        b_b = tl.load(p_b + o_k, mask=mask, other=0.0)  # [BT, BK]
        b_c = tl.load(p_c + o_k, mask=mask, other=0.0)
        b_cb = tl.dot(b_c, tl.trans(b_b), b_cb, input_precision="ieee")

    for i_head in tl.range(i_first, i_first + HEADS, num_stages=1):
        b_gate = tl.load(p_gate + o_token * HV + i_head, mask=m_token, other=0.0).to(tl.float32)
        b_step = tl.load(p_step + o_token * HV + i_head, mask=m_token, other=0.0).to(tl.float32)
        b_gate = tl.cumsum(b_gate, axis=0)
        b_last = tl.sum(tl.where(o_t == BT - 1, b_gate, 0.0), axis=0)
        p_vector = p_vectors + (i_tile * HV + i_head) * 3 * BT + o_t
        tl.store(p_vector, tl.exp(b_gate))
        tl.store(p_vector + BT, tl.exp(b_last - b_gate) * b_step)
        tl.store(p_vector + 2 * BT, tl.exp(b_last) + tl.zeros([BT], dtype=tl.float32))
        b_weights = b_cb * pairwise_decay(b_gate) * b_step
        p_matrix = p_matrices + (i_tile * HV + i_head) * BT * BT + o_t[:, None] * BT + o_t
        tl.store(p_matrix, b_weights.to(p_matrices.dtype.element_ty))


class Mamba2Tiles(NamedTuple):
    """Tokens, results of `weigh_kernel`, and strides between tokens, passed as one argument."""

    x: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    matrices: torch.Tensor
    vectors: torch.Tensor
    strides: tuple[int, ...]


@triton.jit
def scan_tile(b_state, i_tile, i_head, o_token, m_token, o_k, o_v, tiles,
              H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
              BT: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one tile; see `kernels.recurrence`."""
    stride_x, stride_b, stride_c = tiles.strides
    o_t, i_key = tl.arange(0, BT), i_head // (HV // H) * K
    m_k, m_v = m_token & (o_k < K), m_token & (o_v < V)
    skip = tl.load(tiles.D + i_head).to(tl.float32)
    i_matrix = i_tile * HV + i_head
    p_matrix = tiles.matrices + i_matrix * BT * BT + (o_t[:, None] * BT + o_t)
    p_vector = tiles.vectors + i_matrix * 3 * BT + o_t
    p_x = tiles.x + i_head * V + o_v + o_token[:, None] * stride_x
    b_x = tl.load(p_x, mask=m_v, other=0.0)
    b_c = tl.load(tiles.C + i_key + o_k + o_token[:, None] * stride_c, mask=m_k, other=0.0)
    b_out = tl.dot(b_c, b_state.to(b_c.dtype), input_precision="ieee")  # [BT, BV]
    b_out = b_out * tl.load(p_vector)[:, None] + b_x.to(tl.float32) * skip
    b_out = tl.dot(tl.load(p_matrix), b_x, b_out, input_precision="ieee")

    b_b = tl.load(tiles.B + i_key + o_k + o_token[:, None] * stride_b, mask=m_k, other=0.0)
    b_new = (b_x.to(tl.float32) * tl.load(p_vector + BT)[:, None]).to(b_b.dtype)
    b_state *= tl.load(tiles.vectors + i_matrix * 3 * BT + 2 * BT)
    return tl.dot(tl.trans(b_b), b_new, b_state, input_precision="ieee"), b_out


def chunk_mamba2(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Compute Mamba-2 over packed sequences by tiles; store each last state in its slot.

    Returns ``[T, HV, V]`` in x's dtype. Two launches. K up to 256 (above 128 some registers of the
    scan spill to memory on sm_90), any V. Arguments, formula and source:
    `kernels.mamba2.reference`.
    """
    x, B, C = map(rows_contiguous, prompt[:3])
    gate, step, D = prompt[3:]
    packed, (num_heads, value_dim) = where["packed"], x.shape[1:]
    num_groups, key_dim = B.shape[1:]
    num_tiles, size = len(packed.tile_sequences), packed.tile_size
    out = x.new_empty(x.shape)
    if not num_tiles:
        return out
    matrices = x.new_empty(num_tiles, num_heads, size, size)
    vectors = gate.new_empty(num_tiles, num_heads, 3, size, dtype=torch.float32)
    exact, group = x.dtype == torch.float32, num_heads // num_groups
    shared = has_roomy_memory() and not exact
    weighing = {"HEADS": min(group, 4) if shared else 1, "num_warps": 4, "num_stages": 2}
    weighing |= tuned("mamba2.weigh_kernel", x.dtype, key_dim)
    weighing["HEADS"] = math.gcd(weighing["HEADS"], group)
    weigh_kernel[num_tiles, num_heads // weighing["HEADS"]](
        B,
        C,
        gate.contiguous(),
        step.contiguous(),
        matrices,
        vectors,
        packed.tables,
        B.stride(0),
        C.stride(0),
        H=num_groups,
        HV=num_heads,
        K=key_dim,
        BT=size,
        BK=min(block_of(key_dim), 32 if exact else 64),
        **weighing,
    )
    return scan(
        scan_tile,
        Mamba2Tiles(x, B, C, D, matrices, vectors, (x.stride(0), B.stride(0), C.stride(0))),
        out,
        num_groups=num_groups,
        config=scan_config(
            *(x.dtype, key_dim, value_dim, size),
            operands=2,
            matrices=1,
            is_large=key_dim > 128,
            **tuned("mamba2.scan_kernel", x.dtype, key_dim, value_dim),
        ),
        **where,
    )
