"""Kernels of flash-linear-attention (fla-core 0.6) for comparison in `experiments.gpu.kernels`.

They are called with the same tensors. fla-core must be in a separate folder, because transformers
would use it if it found it. `make rivals` installs it into ``out/rivals``, like `pip install
--no-deps --target`. Only the benchmark uses that folder, with the same torch and triton. A rival
that is not installed is left out; one that fails is reported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from experiments.gpu.kernel_cases import Rivals
from experiments.provenance import ROOT
from kernels.packed import Packed

FOLDER = ROOT / "out" / "rivals"


def find() -> None:
    """Add the folder of fla-core to the end of the import path."""
    if FOLDER.is_dir():
        sys.path.append(str(FOLDER))


def _fla(path: str, run: Callable[[Callable[..., Any]], torch.Tensor]) -> Rivals:
    """Return the rival that passes the function ``path`` of the package to ``run``. It is imported
    by each call, so that a missing function is a failure of this rival only."""
    module, _, name = path.rpartition(".")
    if not importlib.util.find_spec("fla"):
        return {}
    return {"fla": lambda: run(getattr(importlib.import_module(f"fla.{module}"), name))}


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
    options = {
        "initial_state": initial,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "cu_seqlens": packed.cu_seqlens.long(),
    }
    path = "ops.gated_delta_rule.chunk_gated_delta_rule"
    return _fla(path, lambda chunk: chunk(*tokens, **options)[0][0])


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
    options = {
        "g": a,
        "beta": b,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "initial_state": initial,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
    }
    path = "ops.gated_delta_rule.fused_recurrent_gated_delta_rule"
    return _fla(path, lambda decode: decode(query, key, value, **options)[0][:, 0])


def gates(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> Rivals:
    """Return the rival of the log-decay ``[T, HV]``."""
    path = "ops.gated_delta_rule.gate.fused_gdn_gate"
    return _fla(path, lambda gate: gate(a[None], A_log, dt_bias)[0])


def prefill_conv1d(x: torch.Tensor, weight: torch.Tensor, packed: Packed) -> Rivals:
    """Return the rival of packed ``[T, C]`` from zeros, with new tensors for the last windows."""
    starts = packed.cu_seqlens.long()
    options = {"activation": "silu", "output_final_state": True, "cu_seqlens": starts}
    path = "modules.causal_conv1d.causal_conv1d"
    return _fla(path, lambda conv: conv(x[None], weight, **options)[0][0])


def decode_conv1d(x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor) -> Rivals:
    """Return the rival of one token of B sequences ``[B, C]``.

    Its windows have W inputs, ours W - 1. It updates a copy of ``states``.
    """
    cache = F.pad(states, (1, 0))
    path = "modules.causal_conv1d.causal_conv1d_update"
    return _fla(path, lambda update: update(x, cache, weight=weight, activation="silu")[0])


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> Rivals:
    """Return the rival of ``x [..., N]`` times ``weight``. With a residual, the sum is written
    too."""
    path = "modules.norm.layernorm.rms_norm"
    if residual is None:
        return _fla(path, lambda norm: norm(x, weight, None, eps=eps))
    options = {"residual": residual, "eps": eps, "prenorm": True}
    return _fla(path, lambda norm: norm(x, weight, None, **options)[0])


def gated_rms_norm(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float) -> Rivals:
    """Return the rival of ``rms_norm(x) * silu(gate)``."""
    path = "modules.norm.fused_norm_gate.rms_norm_gated"
    return _fla(path, lambda norm: norm(x, gate, weight, None, eps=eps))


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Rivals:
    """Return the rival that rotates both, one after the other.

    It takes half of the R columns, because both halves are equal.
    """
    cos, sin = (x.chunk(2, dim=-1)[0].contiguous() for x in (cos, sin))

    def both(rotary: Callable[..., torch.Tensor]) -> torch.Tensor:
        turned, _ = (rotary(x[None], cos, sin) for x in (query, key))
        return turned[0]

    return _fla("modules.rotary.rotary_embedding", both)


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> Rivals:
    """Return the rival of ``silu(gate) * up``."""
    return _fla("modules.activations.swiglu", lambda swiglu: swiglu(gate, up))
