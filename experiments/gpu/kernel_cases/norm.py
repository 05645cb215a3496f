"""Norms of Qwen3-Next: rows of 2048 with and without residual, heads of 256, gated heads of 128."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from experiments.gpu import kernel_rivals
from experiments.gpu.kernel_cases import Case, Setup
from kernels.norm import fused, reference

EPS = 1e-6


def cases(setup: Setup) -> Iterator[Case]:
    """Yield norms of one token, a decode batch and a prefill."""
    sizes = (
        {"row": 48, "head": 16, "gated": 24}
        if setup.is_dry
        else {"row": 2048, "head": 256, "gated": 128}
    )
    weights = {name: torch.randn(size, device=setup.device) for name, size in sizes.items()}
    for num_tokens in (3,) if setup.is_dry else (1, 64, 8192):
        x, residual = (setup.randn(num_tokens, sizes["row"]) for _ in range(2))
        heads = setup.randn(num_tokens, 16, sizes["head"])
        mixed, gate = (setup.randn(num_tokens, 32, sizes["gated"]) for _ in range(2))
        yield _norm(f"rms_norm {num_tokens}", x, weights["row"])
        yield _residual(f"rms_norm and residual {num_tokens}", x, residual, weights["row"])
        yield _norm(f"rms_norm of 16 heads {num_tokens}", heads, weights["head"])
        yield _gated(f"gated_rms_norm of 32 heads {num_tokens}", mixed, gate, weights["gated"])


def _norm(name: str, x: torch.Tensor, weight: torch.Tensor) -> Case:
    narrow = weight.to(x.dtype)
    return Case(
        name=name,
        run=partial(fused.rms_norm, x, weight, EPS),
        expected=partial(reference.rms_norm, x.float(), weight, EPS),
        num_bytes=2 * x.nbytes + weight.nbytes,
        rivals={"torch": partial(F.rms_norm, x, weight.shape, narrow, EPS)}
        | kernel_rivals.rms_norm(x, narrow, EPS),
        moved_bytes=2 * x.nbytes + _loaded_weight_bytes(x, weight),
    )


def _residual(name: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Case:
    narrow = weight.to(x.dtype)
    return Case(
        name=name,
        run=lambda: fused.rms_norm(x, weight, EPS, residual=residual)[0],
        expected=lambda: reference.rms_norm(x + residual, weight, EPS),
        num_bytes=4 * x.nbytes + weight.nbytes,
        rivals={"torch": lambda: F.rms_norm(x + residual, narrow.shape, narrow, EPS)}
        | kernel_rivals.rms_norm(x, narrow, EPS, residual),
        moved_bytes=4 * x.nbytes + _loaded_weight_bytes(x, weight),
    )


def _gated(name: str, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> Case:
    narrow = weight.to(x.dtype)
    return Case(
        name=name,
        run=partial(fused.gated_rms_norm, x, weight, gate, EPS),
        expected=partial(reference.gated_rms_norm, x.float(), weight, gate.float(), EPS),
        num_bytes=3 * x.nbytes + weight.nbytes,
        rivals={"torch": lambda: F.rms_norm(x, narrow.shape, narrow, EPS) * F.silu(gate)}
        | kernel_rivals.gated_rms_norm(x, narrow, gate, EPS),
        moved_bytes=3 * x.nbytes + _loaded_weight_bytes(x, weight),
    )


def _loaded_weight_bytes(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Return the bytes of the weight, which every program reads."""
    size = len(weight)
    return -(-x.numel() // size // fused.rows_per_program(size)) * weight.nbytes
