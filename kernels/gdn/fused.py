"""Gated DeltaNet in Triton, token by token and over prompts.

Over prompts, all tiles are computed in parallel, then one scan runs per sequence, head and slice of
V.

The reference multiplies the state by two intermediate matrices, W and Q exp(G), which do not exist
here. Scaling a row of a product equals scaling the row of its left factor. Norms, decays and step
sizes are therefore moved out of the operands, and the scan reads unmodified q, k and v::

    `solve_kernel`:  T = (I + tril(beta K K^T * D, -1))^-1 diag(beta)   P = scale (Q K^T * D)
    `scan_tile`:    N = T (V - exp(G) (K S))          O = scale exp(G) (Q S) + P N
    next state:      S <- exp(G_R) S + K^T (exp(G_R - G) N)

`solve_kernel` needs no state. `scan_tile` walks tile after tile. Each tile of R tokens and each
head passes two R x R matrices and four vectors between the kernels. These replace W, U, the new
values and the state before every tile: at R = 64 and K = V = 128 in bfloat16, 17 KiB are written
instead of 80 KiB, and no state buffer grows with the prompt. The read-out is part of the scan for
the same reason. An exported state is stored from the registers that hold it.

Precision: 16-bit operands multiply in their own type (in the solve, in float16) and accumulate in
float32; float32 operands multiply in float32, never in tf32. The state and everything elementwise
are float32. Each reduction has one order, determined by its tile and head alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack

import torch
import triton
import triton.language as tl

from kernels.gdn.reference import Prompt, Step, scale_of
from kernels.packed import ScanInputs, StepInputs
from kernels.recurrence import block_of, decode, scan, scan_config, tile_tokens
from kernels.strides import rows_contiguous
from kernels.target import has_roomy_memory, is_hopper
from kernels.tuning import Config, tuned

# --- Gates of prompts; the decode kernel computes its own -----------------------------------------

BLOCK = 1024


@triton.jit
def softplus(b_x):
    """Compute ``log(1 + exp(x))`` of float32."""
    b_y = tl.exp(-tl.abs(b_x))
    # log(1 + y) by its series where 1 + y would round y away: slow decays consist of such y.
    b_series = b_y * (1.0 - b_y * (1.0 / 2 - b_y * (1.0 / 3 - b_y * (1.0 / 4))))
    b_log1p = tl.where(b_y < 0.03, b_series, tl.log(1.0 + b_y))
    return tl.maximum(b_x, 0.0) + b_log1p


@triton.jit
def compute_gates(b_a, b_b, b_A_log, b_dt_bias, max_beta):
    """Compute log-decay and step size of one block, in float32, as in `gates`."""
    b_step = softplus(b_a.to(tl.float32) + b_dt_bias.to(tl.float32))
    b_gate = -tl.exp(b_A_log.to(tl.float32)) * b_step
    return b_gate, max_beta / (1.0 + tl.exp(-b_b.to(tl.float32)))


@triton.jit(do_not_specialize=["num_tokens"])
def gates_kernel(
    p_a,
    p_b,
    p_A_log,
    p_dt_bias,
    p_gate,
    p_beta,
    num_tokens,
    stride_a,
    stride_b,
    max_beta,
    HV: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: computes BLOCK of the ``T * HV * K`` decays, in token order, and the step sizes of
    the heads with their first channel in its block. K is 1 for one decay per head."""
    o_gate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_gate < num_tokens * HV * K
    o_token, o_channel = o_gate // (HV * K), o_gate % (HV * K)
    o_head = o_channel // K
    b_gate, b_beta = compute_gates(
        tl.load(p_a + o_token * stride_a + o_channel, mask=mask),
        tl.load(p_b + o_token * stride_b + o_head, mask=mask),
        tl.load(p_A_log + o_head, mask=mask),
        tl.load(p_dt_bias + o_channel, mask=mask),
        max_beta,
    )
    tl.store(p_gate + o_gate, b_gate, mask=mask)
    tl.store(p_beta + o_token * HV + o_head, b_beta, mask=mask & (o_channel % K == 0))


def gates(
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    max_beta: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay ``-exp(A_log) * softplus(a + dt_bias)`` and step size ``max_beta *
    sigmoid(b)``.

    Both are float32, of the shapes of ``a``, ``[T, HV]`` or ``[T, HV, K]``, and ``b``, ``[T, HV]``.
    Each token is contiguous, with any stride between tokens. ``A_log``: ``[HV]``. ``dt_bias``:
    ``[HV]`` or ``[HV, K]``.
    """
    a, b = rows_contiguous(a), rows_contiguous(b)
    gate = a.new_empty(a.shape, dtype=torch.float32)
    beta = b.new_empty(b.shape, dtype=torch.float32)
    if a.numel():
        sizes = {"HV": b.shape[1], "K": a[0].numel() // b.shape[1], "BLOCK": BLOCK}
        given = a, b, A_log, dt_bias, gate, beta, len(a), a.stride(0), b.stride(0), max_beta
        gates_kernel[(triton.cdiv(a.numel(), BLOCK),)](*given, **sizes)
    return gate, beta


# --- Token by token: gates, normalisation, update and read-out in one pass over the state ---------


class DeltaInputs(NamedTuple):
    """Tokens, parameters of their gates, and strides between tokens, passed to kernels as one
    argument."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    max_beta: float
    scale: float
    strides: tuple[int, ...]


@triton.jit
def step(b_state, i_token, i_head, o_k, o_v, inputs,
         H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one token; see `kernels.recurrence`."""
    stride_q, stride_k, stride_v, stride_a, stride_b = inputs.strides
    m_k, m_v = o_k < K, o_v < V
    o_key = i_head // (HV // H) * K + o_k
    b_q = tl.load(inputs.query + i_token * stride_q + o_key, mask=m_k, other=0.0)
    b_k = tl.load(inputs.key + i_token * stride_k + o_key, mask=m_k, other=0.0)
    b_v = tl.load(inputs.value + i_token * stride_v + i_head * V + o_v, mask=m_v, other=0.0)
    b_gate, b_beta = compute_gates(
        tl.load(inputs.a + i_token * stride_a + i_head),
        tl.load(inputs.b + i_token * stride_b + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + i_head),
        inputs.max_beta,
    )
    return write_and_read(b_state, b_q, b_k, b_v, tl.exp(b_gate), b_beta, inputs.scale)


@triton.jit
def write_and_read(b_state, b_q, b_k, b_v, b_decay, b_beta, scale):
    """Compute the delta rule for one token. ``b_decay`` is that of the state, or of each row."""
    b_q, b_k = unit(b_q) * scale, unit(b_k)
    b_state *= b_decay
    b_delta = (b_v.to(tl.float32) - tl.sum(b_state * b_k[:, None], axis=0)) * b_beta
    b_state += b_k[:, None] * b_delta
    return b_state, tl.sum(b_state * b_q[:, None], axis=0)


@triton.jit
def unit(b_x):
    """Compute ``x / sqrt(sum(x^2) + 1e-6)`` of one vector, in float32."""
    b_x = b_x.to(tl.float32)
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) + 1e-6)


def decode_gdn(token: Step, *, max_beta: float = 1.0, **where: Unpack[StepInputs]) -> torch.Tensor:
    """Compute one token of B sequences, or several with ``packed`` and ``step_slots``.

    One launch. Arguments, formula and source: `kernels.gdn.reference`. Each token and each state is
    contiguous, with any stride between tokens and between slots. The number of tokens of each
    sequence is read from ``packed.cu_seqlens``.
    """
    config = tuned(
        "gdn.decode_kernel", where["states"].dtype, token.key.shape[-1], token.value.shape[-1]
    )
    return decode_delta(step, token, max_beta, config, where)


def decode_delta(
    step: triton.JITFunction, token: Step, max_beta: float, config: Config, where: StepInputs
) -> torch.Tensor:
    """Compute one step of the delta rule; ``config`` are launch parameters that are not usual."""
    *tokens, A_log, dt_bias = token
    _, key, value, *_ = tokens = [rows_contiguous(x) for x in tokens]
    strides = tuple(x.stride(0) for x in tokens)
    return decode(
        step,
        DeltaInputs(*tokens, A_log, dt_bias, max_beta, scale_of(token.key), strides),
        value.new_empty(value.shape),
        num_groups=key.shape[-2],
        config={"num_warps": 2, **config},
        **where,
    )


# --- Prompts: all tiles in parallel, then one scan per sequence, head and slice of V --------------


@triton.jit
def solve_kernel(
    p_q,
    p_k,
    p_gate,
    p_beta,
    p_matrices,
    p_vectors,
    packed,
    stride_q,
    stride_k,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    LOG_BT: tl.constexpr,
    BK: tl.constexpr,
    SOLVE_TYPE: tl.constexpr,
):
    """Program (i_tile, i_part): solves HEADS value heads of one key head, which share Q K^T, K K^T.

    Writes T and P into ``p_matrices`` ``[N, HV, 2, BT, BT]``. Writes the row scales of K S, of Q S,
    of N and of the state into ``p_vectors`` ``[N, HV, 4, BT]``.
    """
    BT: tl.constexpr = 1 << LOG_BT
    i_tile, i_first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    i_key = i_first // (HV // H)
    o_t = tl.arange(0, BT)
    o_token, m_token = tile_tokens(packed, i_tile, BT)

    p_q += i_key * K + o_token[:, None] * stride_q
    p_k += i_key * K + o_token[:, None] * stride_k
    b_qk = tl.zeros([BT, BT], dtype=tl.float32)
    b_kk = tl.zeros([BT, BT], dtype=tl.float32)
    b_qq = tl.zeros([BT], dtype=tl.float32)
    b_diagonal = tl.zeros([BT], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        mask = m_token[:, None] & (o_k < K)
        b_q = tl.load(p_q + o_k, mask=mask, other=0.0)  # [BT, BK]
        b_k = tl.load(p_k + o_k, mask=mask, other=0.0)
        b_qk = tl.dot(b_q, tl.trans(b_k), b_qk, input_precision="ieee")
        b_kk = tl.dot(b_k, tl.trans(b_k), b_kk, input_precision="ieee")
        b_qq += tl.sum(b_q.to(tl.float32) * b_q.to(tl.float32), axis=1)
        b_diagonal += tl.sum(b_k.to(tl.float32) * b_k.to(tl.float32), axis=1)
    b_q_norm = tl.rsqrt(b_qq + 1e-6) * scale  # [BT]
    b_k_norm = tl.rsqrt(b_diagonal + 1e-6)

    # Two loops, so that Q K^T occupies no registers while systems are solved.
    for i_head in tl.range(i_first, i_first + HEADS, num_stages=1):
        b_gate = tl.load(p_gate + o_token * HV + i_head, mask=m_token, other=0.0).to(tl.float32)
        b_gate = tl.cumsum(b_gate, axis=0)
        b_last = tl.sum(tl.where(o_t == BT - 1, b_gate, 0.0), axis=0)
        i_matrix = (i_tile * HV + i_head) * 2
        p_vector = p_vectors + i_matrix * 2 * BT + o_t
        tl.store(p_vector, tl.exp(b_gate) * b_k_norm)
        tl.store(p_vector + BT, tl.exp(b_gate) * b_q_norm)
        tl.store(p_vector + 2 * BT, tl.exp(b_last - b_gate) * b_k_norm)
        tl.store(p_vector + 3 * BT, tl.exp(b_last) + tl.zeros([BT], dtype=tl.float32))
        b_attention = b_qk * pairwise_decay(b_gate) * b_k_norm * b_q_norm[:, None]
        p_matrix = p_matrices + (i_matrix + 1) * BT * BT + o_t[:, None] * BT + o_t
        tl.store(p_matrix, b_attention.to(p_matrices.dtype.element_ty))
    for i_head in tl.range(i_first, i_first + HEADS, num_stages=1):
        b_gate = tl.load(p_gate + o_token * HV + i_head, mask=m_token, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta + o_token * HV + i_head, mask=m_token, other=0.0).to(tl.float32)
        b_system = b_kk * pairwise_decay(tl.cumsum(b_gate, axis=0)) * b_k_norm
        b_inverse = invert_unit_lower(b_system * (b_beta * b_k_norm)[:, None], LOG_BT, SOLVE_TYPE)
        p_matrix = p_matrices + (i_tile * HV + i_head) * 2 * BT * BT + o_t[:, None] * BT + o_t
        tl.store(p_matrix, (b_inverse * b_beta).to(p_matrices.dtype.element_ty))


@triton.jit
def pairwise_decay(b_gate):
    """Compute D ``[BT, BT]`` from the running sum ``[BT]`` of the gate."""
    o_t = tl.arange(0, b_gate.shape[0])
    b_between = b_gate[:, None] - b_gate[None, :]
    return tl.exp(tl.where(o_t[:, None] >= o_t[None, :], b_between, float("-inf")))


@triton.jit
def invert_unit_lower(b_a, LOG_BT: tl.constexpr, SOLVE_TYPE: tl.constexpr):
    """Compute ``(I + tril(A, -1))^-1`` of a ``[BT, BT]`` by doubling the size of inverted blocks.

    ``[[P, 0], [N, Q]]^-1 = [[P^-1, 0], [-Q^-1 N P^-1, Q^-1]]``. With D the inverse of the block
    diagonal and N the entries between two adjacent blocks, this is D - D N D. No power of A is
    computed, because powers can grow until they cancel the result. No row depends on the row above.
    Unit keys and beta <= 1 keep all entries within [-1, 1], where float16 has the 11 significant
    bits of tf32 at half the size.
    """
    o_t = tl.arange(0, b_a.shape[0])
    o_i, o_j = o_t[:, None], o_t[None, :]
    b_d = tl.where(o_i == o_j, 1.0, 0.0)
    b_d -= tl.where((o_i // 2 == o_j // 2) & (o_i > o_j), b_a, 0.0)
    b_factor = b_a.to(SOLVE_TYPE)
    for log_s in tl.static_range(1, LOG_BT):
        between = (o_i >> (log_s + 1) == o_j >> (log_s + 1)) & (o_i >> log_s > o_j >> log_s)
        b_n = tl.where(between, b_factor, 0.0)
        b_dn = tl.dot(b_d.to(SOLVE_TYPE), b_n, input_precision="ieee")
        b_d -= tl.dot(b_dn.to(SOLVE_TYPE), b_d.to(SOLVE_TYPE), input_precision="ieee")
    return b_d


class GDNTiles(NamedTuple):
    """Tokens, results of `solve_kernel`, and strides between tokens, passed as one argument."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    matrices: torch.Tensor
    vectors: torch.Tensor
    strides: tuple[int, ...]


@triton.jit
def scan_tile(b_state, i_tile, i_head, o_token, m_token, o_k, o_v, tiles,
              H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
              BT: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one tile; see `kernels.recurrence`."""
    stride_q, stride_k, stride_v = tiles.strides
    o_t, i_key = tl.arange(0, BT), i_head // (HV // H) * K
    m_k, m_v = m_token & (o_k < K), m_token & (o_v < V)
    i_matrix = (i_tile * HV + i_head) * 2
    p_matrix = tiles.matrices + i_matrix * BT * BT + (o_t[:, None] * BT + o_t)
    p_vector = tiles.vectors + i_matrix * 2 * BT + o_t
    b_q = tl.load(tiles.query + i_key + o_k + o_token[:, None] * stride_q, mask=m_k, other=0.0)
    b_operand = b_state.to(b_q.dtype)
    # Before the key is loaded, so that only one of them is in shared memory.
    b_read = tl.dot(b_q, b_operand, input_precision="ieee")  # [BT, BV]
    b_k = tl.load(tiles.key + i_key + o_k + o_token[:, None] * stride_k, mask=m_k, other=0.0)
    p_v = tiles.value + i_head * V + o_v + o_token[:, None] * stride_v
    b_v = tl.load(p_v, mask=m_v, other=0.0)

    b_recalled = tl.dot(b_k, b_operand, input_precision="ieee")
    b_new = b_v.to(tl.float32) - b_recalled * tl.load(p_vector)[:, None]
    b_new = tl.dot(tl.load(p_matrix), b_new.to(b_k.dtype), input_precision="ieee")
    b_out = b_read * tl.load(p_vector + BT)[:, None]
    b_attention = tl.load(p_matrix + BT * BT)
    b_out = tl.dot(b_attention, b_new.to(b_k.dtype), b_out, input_precision="ieee")
    b_new = (b_new * tl.load(p_vector + 2 * BT)[:, None]).to(b_k.dtype)
    b_state *= tl.load(tiles.vectors + i_matrix * 2 * BT + 3 * BT)
    return tl.dot(tl.trans(b_k), b_new, b_state, input_precision="ieee"), b_out


def chunk_gdn(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Apply the gated delta rule to packed sequences by tiles; store each last state in its slot.

    Returns ``[T, HV, V]`` in value's dtype. Two launches. K up to 256, any V.
    Arguments, formula and source: `kernels.gdn.reference`.
    """
    query, key, value = map(rows_contiguous, prompt[:3])
    gate, beta = prompt[3:]
    packed, (num_heads, key_dim) = where["packed"], key.shape[1:]
    num_value_heads, value_dim = value.shape[1:]
    num_tiles, tile_size = len(packed.tile_sequences), packed.tile_size
    out = value.new_empty(value.shape)
    if not num_tiles:
        return out
    matrices = value.new_empty(num_tiles, num_value_heads, 2, tile_size, tile_size)
    vectors = gate.new_empty(num_tiles, num_value_heads, 4, tile_size, dtype=torch.float32)
    exact = value.dtype == torch.float32
    # Solving one system after another takes 1.5 times the registers, so few tiles are solved alone.
    shared = has_roomy_memory() and not exact
    solving = {
        "HEADS": num_value_heads // num_heads if shared else 1,
        # Products of two warps are synchronous. On an H200 they take 0.86 times as long as those of
        # four, whose inverse was wrong with assembler 13.5.
        "num_warps": 8 if exact else 2 if is_hopper() else 4,
        "num_stages": 2,
    }
    solving |= tuned("gdn.solve_kernel", value.dtype, key_dim)
    solving["HEADS"] = math.gcd(solving["HEADS"], num_value_heads // num_heads)
    solve_kernel[num_tiles, num_value_heads // solving["HEADS"]](
        query,
        key,
        gate.contiguous(),
        beta.contiguous(),
        matrices,
        vectors,
        packed.tables,
        query.stride(0),
        key.stride(0),
        scale_of(prompt.key),
        H=num_heads,
        HV=num_value_heads,
        K=key_dim,
        LOG_BT=tile_size.bit_length() - 1,
        BK=min(block_of(key_dim), 32 if exact else 64),
        SOLVE_TYPE=tl.float32 if exact else tl.float16,
        **solving,
    )
    strides = query.stride(0), key.stride(0), value.stride(0)
    return scan(
        scan_tile,
        GDNTiles(query, key, value, matrices, vectors, strides),
        out,
        num_groups=num_heads,
        config=scan_config(
            *(value.dtype, key_dim, value_dim, tile_size),
            operands=2,
            matrices=2,
            **tuned("gdn.scan_kernel", value.dtype, key_dim, value_dim),
        ),
        **where,
    )
