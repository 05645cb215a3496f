"""Rotary embedding, gated activations and cache writes of Qwen3-Next.

All are bound by bandwidth or by the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import kernels.activation.fused
import kernels.activation.reference
import kernels.cache_write.fused
import kernels.cache_write.reference
import kernels.rotary.fused
import kernels.rotary.reference
from experiments.gpu import kernel_rivals
from experiments.gpu.kernel_cases import Case, Setup


def cases(setup: Setup) -> Iterator[Case]:
    """Yield a decode batch and a prefill."""
    for num_tokens in (3,) if setup.is_dry else (64, 8192):
        yield _rotary(setup, num_tokens)
        yield _silu_and_mul(setup, num_tokens)
        yield _sigmoid_mul(setup, num_tokens)
        yield _write(setup, num_tokens)
        yield _rotate_and_write(setup, num_tokens)


def _rotary(setup: Setup, num_tokens: int) -> Case:
    size, turned = (16, 8) if setup.is_dry else (256, 64)
    query, key = setup.randn(num_tokens, 16, size), setup.randn(num_tokens, 2, size)
    cos, sin = (setup.randn(num_tokens, turned // 2).repeat(1, 2) for _ in range(2))
    return Case(
        name=f"rotate {num_tokens}",
        run=lambda: kernels.rotary.fused.rotate(query, key, cos, sin)[0],
        expected=lambda: kernels.rotary.reference.rotate(query, key, cos, sin)[0],
        num_bytes=2 * (query.nbytes + key.nbytes) + 2 * cos.nbytes,
        rivals={"torch": lambda: kernels.rotary.reference.rotate(query, key, cos, sin)[0]}
        | kernel_rivals.rotate(query, key, cos, sin),
    )


def _silu_and_mul(setup: Setup, num_tokens: int) -> Case:
    x = setup.randn(num_tokens, 80 if setup.is_dry else 10240)
    gate, up = x.chunk(2, dim=-1)
    return Case(
        name=f"silu_and_mul {num_tokens}",
        run=partial(kernels.activation.fused.silu_and_mul, x),
        expected=partial(kernels.activation.reference.silu_and_mul, x),
        num_bytes=x.nbytes * 3 // 2,
        rivals={"torch": lambda: F.silu(gate) * up} | kernel_rivals.silu_and_mul(gate, up),
    )


def _sigmoid_mul(setup: Setup, num_tokens: int) -> Case:
    x, gate = (setup.randn(num_tokens, 40 if setup.is_dry else 4096) for _ in range(2))
    return Case(
        name=f"sigmoid_mul {num_tokens}",
        run=partial(kernels.activation.fused.sigmoid_mul, x, gate),
        expected=partial(kernels.activation.reference.sigmoid_mul, x, gate),
        num_bytes=3 * x.nbytes,
        rivals={"torch": lambda: x * gate.sigmoid()},
    )


def _write(setup: Setup, num_tokens: int) -> Case:
    size = 16 if setup.is_dry else 256
    key, value = (setup.randn(num_tokens, 2, size) for _ in range(2))
    indices = torch.randperm(2 * num_tokens, device=setup.device)[:num_tokens]

    def write(write_kv) -> torch.Tensor:
        write_kv(key, value, *pools, indices)
        return pools[0][indices]

    pools = [torch.zeros(2 * num_tokens, 2, size, dtype=key.dtype, device=key.device) for _ in "kv"]
    return Case(
        name=f"write_kv, and read back {num_tokens}",
        run=partial(write, kernels.cache_write.fused.write_kv),
        expected=lambda: key,
        num_bytes=4 * key.nbytes + 2 * key.nbytes,
        rivals={
            "torch": partial(write, kernels.cache_write.reference.write_kv),
            "torch index_copy": partial(write, _index_copy),
        },
    )


def _rotate_and_write(setup: Setup, num_tokens: int) -> Case:
    size, turned = (16, 8) if setup.is_dry else (256, 64)
    heads = setup.randn(num_tokens, 20, size).split([16, 2, 2], dim=1)
    angles = tuple(setup.randn(num_tokens, turned // 2).repeat(1, 2) for _ in range(2))
    norms = setup.randn(2, size, dtype=torch.float32)
    indices = torch.randperm(2 * num_tokens, device=setup.device)[:num_tokens]
    pools = [
        torch.zeros(2 * num_tokens, 2, size, dtype=setup.dtype, device=setup.device) for _ in "kv"
    ]

    def run(module) -> torch.Tensor:
        options = {"norms": norms.unbind(), "eps": 1e-6, "angles": angles}
        query = module.rotate_and_write(*heads, *pools, indices, **options)
        return torch.cat([query, pools[0][indices]], dim=1)

    kept = heads[0].nbytes + heads[1].nbytes
    return Case(
        name=f"rotate_and_write, and read back {num_tokens}",
        run=partial(run, kernels.rotary.fused),
        expected=partial(run, kernels.rotary.reference),
        num_bytes=2 * sum(x.nbytes for x in heads) + 2 * kept + heads[1].nbytes,
        rivals={"torch": partial(run, kernels.rotary.reference)},
    )


def _index_copy(key, value, key_pool, value_pool, indices) -> None:
    key_pool.index_copy_(0, indices, key)
    value_pool.index_copy_(0, indices, value)
