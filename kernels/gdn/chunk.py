"""Gated DeltaNet over prompts in Triton: all tiles in parallel, then one scan per sequence, head
and slice of V.

The reference multiplies the state by two intermediate matrices, W and Q exp(G), which do not exist
here. Scaling a row of a product equals scaling the row of its left factor. Norms, decays and step
sizes are therefore moved out of the operands, and the scan reads unmodified q, k and v::

    `solve_kernel`:  T = (I + tril(beta K K^T * D, -1))^-1 diag(beta)   P = scale (Q K^T * D)
    `scan_kernel`:   N = T (V - exp(G) (K S))          O = scale exp(G) (Q S) + P N
    next state:      S <- exp(G_R) S + K^T (exp(G_R - G) N)

`solve_kernel` needs no state. `scan_kernel` walks tile after tile. Each tile of R tokens and each
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

import torch
import triton
import triton.language as tl

from kernels.packed import Exports, Packed
from kernels.strides import row_stride, rows_contiguous
from kernels.target import fitting_stages, has_roomy_memory, is_hopper, max_recurrence_warps
from kernels.tuning import tuned


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
    i_sequence = tl.load(packed.tile_sequences + i_tile)
    first = tl.load(packed.cu_seqlens + i_sequence)
    first += (i_tile - tl.load(packed.cu_tiles + i_sequence)) * BT
    o_t = tl.arange(0, BT)
    o_token = (first + o_t).to(tl.int64)
    m_token = o_token < tl.load(packed.cu_seqlens + i_sequence + 1)

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


@triton.jit
def scan_kernel(
    p_q,
    p_k,
    p_v,
    p_matrices,
    p_vectors,
    p_out,
    p_states,
    p_slots,
    p_resumed,
    packed,
    exports,
    strides,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (i_v, i_head, i_sequence): carries ``[K, BV]`` of one state through one sequence.

    The loop runs from export to export. The last one is the sequence's own slot at its end.
    """
    i_v, i_head, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stride_q, stride_k, stride_v, stride_slot = strides
    first = tl.load(packed.cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(packed.cu_seqlens + i_sequence + 1)
    if first == end:
        return
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_state = m_k[:, None] & m_v
    o_matrix = o_t[:, None] * BT + o_t
    p_q += i_head // (HV // H) * K + o_k
    p_k += i_head // (HV // H) * K + o_k
    p_v += i_head * V + o_v
    p_out += i_head * V + o_v
    p_states += i_head * K * V + o_k[:, None] * V + o_v

    i_slot = tl.load(p_slots + i_sequence).to(tl.int64)
    m_initial = m_state & tl.load(p_resumed + i_sequence)
    b_state = tl.load(p_states + i_slot * stride_slot, mask=m_initial, other=0.0)  # [BK, BV]
    b_state = b_state.to(tl.float32)
    i_first = tl.load(packed.cu_tiles + i_sequence).to(tl.int64)
    i_begin = tl.load(exports.cu_exports + i_sequence)
    i_last = tl.load(exports.cu_exports + i_sequence + 1)
    for i_stop in range(i_begin, i_last + 1):
        # Not carried by this loop: Triton 3.6 and 3.7 replace a carried number by its first value
        # if only the bounds of an inner loop use it.
        start = tl.load(exports.ends + i_stop - 1, mask=i_stop > i_begin, other=0)
        stop = tl.load(exports.ends + i_stop, mask=i_stop < i_last, other=end - first)
        i_target = tl.load(exports.slots + i_stop, mask=i_stop < i_last, other=i_slot)
        i_until = i_first + tl.cdiv(stop, BT)
        for i in range(i_first + tl.cdiv(start, BT), i_until):
            o_token = first + (i - i_first) * BT + o_t
            m_token = o_token[:, None] < end
            i_matrix = (i * HV + i_head) * 2
            p_matrix = p_matrices + i_matrix * BT * BT + o_matrix
            p_vector = p_vectors + i_matrix * 2 * BT + o_t
            b_q = tl.load(p_q + o_token[:, None] * stride_q, mask=m_token & m_k, other=0.0)
            b_operand = b_state.to(b_q.dtype)
            # Before the key is loaded, so that only one of them is in shared memory.
            b_read = tl.dot(b_q, b_operand, input_precision="ieee")  # [BT, BV]
            b_k = tl.load(p_k + o_token[:, None] * stride_k, mask=m_token & m_k, other=0.0)
            b_v = tl.load(p_v + o_token[:, None] * stride_v, mask=m_token & m_v, other=0.0)

            b_recalled = tl.dot(b_k, b_operand, input_precision="ieee")
            b_new = b_v.to(tl.float32) - b_recalled * tl.load(p_vector)[:, None]
            b_new = tl.dot(tl.load(p_matrix), b_new.to(b_k.dtype), input_precision="ieee")
            b_out = b_read * tl.load(p_vector + BT)[:, None]
            b_attention = tl.load(p_matrix + BT * BT)
            b_out = tl.dot(b_attention, b_new.to(b_k.dtype), b_out, input_precision="ieee")
            b_new = (b_new * tl.load(p_vector + 2 * BT)[:, None]).to(b_k.dtype)
            b_state *= tl.load(p_vectors + i_matrix * 2 * BT + 3 * BT)
            b_state = tl.dot(tl.trans(b_k), b_new, b_state, input_precision="ieee")
            # Rounded as a resumed run would load it from a slot, so that it has equal bits.
            b_state = b_state.to(p_states.dtype.element_ty).to(tl.float32)
            p_row = p_out + o_token[:, None] * (HV * V)
            tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_token & m_v)
        p_target = p_states + i_target.to(tl.int64) * stride_slot
        tl.store(p_target, b_state.to(p_states.dtype.element_ty), mask=m_state)


def chunk_gdn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    *,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    resumed: torch.Tensor,
    exports: Exports | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Apply the gated delta rule to packed sequences by tiles; store each last state in its slot.

    - ``query``, ``key``: ``[T, H, K]``, L2-normalised inside. ``value``: ``[T, HV, V]``, HV a
      multiple of H. All have one dtype. The heads of a token are contiguous, with any stride
      between tokens.
    - ``gate``: ``[T, HV]`` log-decay, at most 0. ``beta``: ``[T, HV]``.
    - ``states``: ``[S, HV, K, V]``, for one layer; changed in place at ``slots`` and at the
      exports' slots. A state is contiguous, with any stride between slots.
    - ``slots``: int32[B]. ``resumed``: bool[B]; False starts from zeros and ignores the slot. The
      slot of a sequence without tokens is not changed.
    - ``scale``: scale of the query; ``K ** -0.5`` if None.

    Returns ``[T, HV, V]`` in value's dtype. Two launches. K up to 256, any V.
    Formula and source: `kernels.gdn.reference`.
    """
    query, key, value = (rows_contiguous(x) for x in (query, key, value))
    strides = (*(x.stride(0) for x in (query, key, value)), row_stride("a state", states))
    num_heads, key_dim = key.shape[1:]
    num_value_heads, value_dim = value.shape[1:]
    num_tiles, num_sequences = len(packed.tile_sequences), len(packed.lengths)
    tile_size = packed.tile_size
    out = value.new_empty(value.shape)
    if not num_tiles:
        return out
    matrices = value.new_empty(num_tiles, num_value_heads, 2, tile_size, tile_size)
    vectors = gate.new_empty(num_tiles, num_value_heads, 4, tile_size, dtype=torch.float32)
    exact = value.dtype == torch.float32
    block_k = max(16, triton.next_power_of_2(key_dim))
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
    scanning = scan_config(value.dtype, key_dim, value_dim, tile_size)
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
        scale or key_dim**-0.5,
        H=num_heads,
        HV=num_value_heads,
        K=key_dim,
        LOG_BT=tile_size.bit_length() - 1,
        BK=min(block_k, 32 if exact else 64),
        SOLVE_TYPE=tl.float32 if exact else tl.float16,
        **solving,
    )
    scan_kernel[triton.cdiv(value_dim, scanning["BV"]), num_value_heads, num_sequences](
        query,
        key,
        value,
        matrices,
        vectors,
        out,
        states,
        slots,
        resumed,
        packed.tables,
        exports.tables if exports else packed.no_exports,
        strides,
        H=num_heads,
        HV=num_value_heads,
        K=key_dim,
        V=value_dim,
        BT=tile_size,
        BK=block_k,
        **scanning,
    )
    return out


def scan_config(
    dtype: torch.dtype, key_dim: int, value_dim: int, tile_size: int = 64
) -> dict[str, int]:
    """Return the tile of V and the launch parameters, by the layer's shape and the device."""
    exact = dtype == torch.float32
    config = {
        "BV": max(16, min(16 if exact else 32, triton.next_power_of_2(value_dim))),
        "num_warps": 4,
        "num_stages": 1 if exact else 2,
    }
    config |= tuned("gdn.scan_kernel", dtype, key_dim, value_dim)
    block_k = max(16, triton.next_power_of_2(key_dim))
    # Query and key, two matrices, and the values; besides, the state as an operand.
    numbers = tile_size * (2 * block_k + 2 * tile_size + config["BV"])
    vectors = 4 * 4 * tile_size
    stages = fitting_stages(
        config["num_stages"],
        dtype.itemsize * numbers + vectors,
        dtype.itemsize * block_k * config["BV"],
    )
    return config | {
        "num_warps": min(config["num_warps"], max_recurrence_warps()),
        "num_stages": stages,
    }
