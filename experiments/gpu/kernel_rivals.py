"""Kernels of flash-linear-attention (fla-core 0.6) for comparison in `experiments.gpu.kernels`.

They are called with the same tensors. fla-core must be in a separate folder, because transformers
would use it if it found it. `make rivals` installs it into ``out/rivals``, like `pip install
--no-deps --target`. Only the benchmark uses that folder, with the same torch and triton. A rival
that is not installed is left out; one that fails is reported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from experiments.provenance import ROOT
from kernels.packed import Packed

FOLDER = ROOT / "out" / "rivals"
Rivals = Mapping[str, Callable[[], torch.Tensor]]


def find() -> None:
    """Add the folder of fla-core to the end of the import path."""
    if FOLDER.is_dir():
        sys.path.append(str(FOLDER))


def _fla(run: Callable[[], torch.Tensor]) -> Rivals:
    return {"fla": run} if importlib.util.find_spec("fla") else {}


def chunk_gdn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    packed: Packed,
    initial: torch.Tensor,
) -> Rivals:
    """Return the rival of packed prompts ``[T, heads, size]``, with new tensors for its last
    states.

    ``initial`` is float32 ``[B, HV, K, V]``.
    """
    tokens = [x[None] for x in (query, key, value, gate, beta.to(query.dtype))]
    starts = packed.cu_seqlens.long()

    def run() -> torch.Tensor:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        out, _ = chunk_gated_delta_rule(
            *tokens,
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=starts,
        )
        return out[0]

    return _fla(run)


def decode_gdn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    initial: torch.Tensor,
) -> Rivals:
    """Return the rival of one token of B sequences, ``[B, heads, size]``, with new tensors for its
    states.

    Gates are computed in the kernel, as in ours.
    """
    query, key, value, a, b = (x[:, None] for x in (query, key, value, a, b))

    def run() -> torch.Tensor:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

        out, _ = fused_recurrent_gated_delta_rule(
            query,
            key,
            value,
            g=a,
            beta=b,
            A_log=A_log,
            dt_bias=dt_bias,
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )
        return out[:, 0]

    return _fla(run)


def gates(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> Rivals:
    """Return the rival of the log-decay ``[T, HV]``."""

    def run() -> torch.Tensor:
        from fla.ops.gated_delta_rule.gate import fused_gdn_gate

        return fused_gdn_gate(a[None], A_log, dt_bias)[0]

    return _fla(run)


def prefill_conv1d(x: torch.Tensor, weight: torch.Tensor, packed: Packed) -> Rivals:
    """Return the rival of packed ``[T, C]`` from zeros, with new tensors for the last windows."""
    starts = packed.cu_seqlens.long()

    def run() -> torch.Tensor:
        from fla.modules.causal_conv1d import causal_conv1d

        out, _ = causal_conv1d(
            x[None], weight, activation="silu", output_final_state=True, cu_seqlens=starts
        )
        return out[0]

    return _fla(run)


def decode_conv1d(x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor) -> Rivals:
    """Return the rival of one token of B sequences ``[B, C]``.

    Its windows have W inputs, ours W - 1. It updates a copy of ``states``.
    """
    cache = F.pad(states, (1, 0))

    def run() -> torch.Tensor:
        from fla.modules.causal_conv1d import causal_conv1d_update

        return causal_conv1d_update(x, cache, weight=weight, activation="silu")[0]

    return _fla(run)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> Rivals:
    """Return the rival of ``x [..., N]`` times ``weight``. With a residual, the sum is written
    too."""

    def run() -> torch.Tensor:
        from fla.modules.norm.layernorm import rms_norm

        if residual is None:
            return rms_norm(x, weight, None, eps=eps)
        return rms_norm(x, weight, None, residual=residual, eps=eps, prenorm=True)[0]

    return _fla(run)


def gated_rms_norm(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float) -> Rivals:
    """Return the rival of ``rms_norm(x) * silu(gate)``."""

    def run() -> torch.Tensor:
        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        return rms_norm_gated(x, gate, weight, None, eps=eps)

    return _fla(run)


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Rivals:
    """Return the rival that rotates both, one after the other.

    It takes half of the R columns, because both halves are equal.
    """
    cos, sin = (x.chunk(2, dim=-1)[0].contiguous() for x in (cos, sin))

    def run() -> torch.Tensor:
        from fla.modules.rotary import rotary_embedding

        turned, _ = (rotary_embedding(x[None], cos, sin) for x in (query, key))
        return turned[0]

    return _fla(run)


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> Rivals:
    """Return the rival of ``silu(gate) * up``."""

    def run() -> torch.Tensor:
        from fla.modules.activations import swiglu

        return swiglu(gate, up)

    return _fla(run)
