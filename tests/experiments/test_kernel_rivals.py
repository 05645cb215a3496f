"""Tests of the calls of flash-linear-attention: signatures of fla-core 0.6.0, and layouts."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from experiments.gpu import kernel_rivals
from kernels.packed import Packed

SIGNATURES = {
    "fla.ops.gated_delta_rule.chunk_gated_delta_rule": (
        "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
        "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, "
        "cp_context=None"
    ),
    "fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule": (
        "q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, "
        "A_log=None, "
        "dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
        "state_v_first=False, "
        "cu_seqlens=None"
    ),
    "fla.ops.gated_delta_rule.gate.fused_gdn_gate": "g, A_log, dt_bias=None, "
    "output_dtype=torch.float32",
    "fla.modules.causal_conv1d.causal_conv1d": (
        "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, "
        "activation=None, backend='triton', cu_seqlens=None, cu_seqlens_cpu=None, "
        "chunk_indices=None, "
        "cp_context=None"
    ),
    "fla.modules.causal_conv1d.causal_conv1d_update": (
        "x, cache, residual=None, weight=None, bias=None, activation=None"
    ),
    "fla.modules.norm.layernorm.rms_norm": (
        "x, weight, bias, residual=None, eps=1e-05, prenorm=False, residual_in_fp32=False"
    ),
    "fla.modules.norm.fused_norm_gate.rms_norm_gated": (
        "x, g, weight, bias, activation='swish', residual=None, prenorm=False, "
        "residual_in_fp32=False, eps=1e-06"
    ),
    "fla.modules.rotary.rotary_embedding": (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, "
        "chunk_indices=None"
    ),
    "fla.modules.activations.swiglu": "x, y",
}
"""Signatures without ``**kwargs``, so that an argument of another name fails."""
PAIRS = {"chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "causal_conv1d"}
"""Functions that always return an output and a state."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of the calls of a fake fla, which returns zeros of the right shape."""
    made: list[dict[str, Any]] = []

    def answer(name: str, arguments: dict[str, Any]) -> Any:
        made.append(arguments)
        like = arguments.get("v", arguments.get("x", arguments.get("g")))
        out = torch.zeros_like(like)
        is_pair = name in PAIRS or name == "causal_conv1d_update" or arguments.get("prenorm")
        return (out, None) if is_pair else out

    for path, signature in SIGNATURES.items():
        module, _, name = path.rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            above = ".".join(parts[:end])
            if above not in sys.modules:
                stand_in = ModuleType(above)
                stand_in.__path__ = []
                stand_in.__spec__ = importlib.machinery.ModuleSpec(above, None)
                monkeypatch.setitem(sys.modules, above, stand_in)
        scope: dict[str, Any] = {"torch": torch, "answer": answer}
        exec(f"def {name}({signature}): return answer({name!r}, dict(locals()))", scope)
        setattr(sys.modules[module], name, scope[name])
    return made


def heads(count: int, num_heads: int, size: int) -> torch.Tensor:
    return torch.randn(count, num_heads, size, dtype=torch.bfloat16)


def test_other_kernels_pass_the_arguments_of_fla(calls) -> None:
    x, weight = torch.randn(8, 24), torch.randn(24)
    taps, packed = torch.randn(24, 4), Packed.from_lengths([8])
    rows = heads(8, 4, 16)
    cos = torch.randn(8, 4).repeat(1, 2)
    made = [
        kernel_rivals.gates(torch.randn(8, 4), torch.randn(4), torch.randn(4)),
        kernel_rivals.prefill_conv1d(x, taps, packed),
        kernel_rivals.decode_conv1d(x, taps, torch.randn(8, 24, 3)),
        kernel_rivals.rms_norm(x, weight, 1e-6),
        kernel_rivals.rms_norm(x, weight, 1e-6, residual=x),
        kernel_rivals.gated_rms_norm(x, weight, x, 1e-6),
        kernel_rivals.rotate(rows, rows[:, :2], cos, cos),
        kernel_rivals.silu_and_mul(x, x),
    ]
    shapes = [rival["fla"]().shape for rival in made]
    assert shapes == [(8, 4), *[(8, 24)] * 5, (8, 4, 16), (8, 24)]
    update, rotary = calls[2], calls[6]
    assert update["cache"].shape == (8, 24, 4)
    assert rotary["x"].shape == (1, 8, 4, 16)
    assert rotary["cos"].shape == (8, 4)


def test_no_rival_is_returned_without_fla() -> None:
    assert kernel_rivals.silu_and_mul(torch.zeros(2), torch.zeros(2)) == {}
