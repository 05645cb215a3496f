"""Norms, rotary embedding, gated activations, cache writes and copies of states of Qwen3-Next.

Rows have 2,048 numbers, heads 256, gated heads 128. 36 layers have states of 32 x 128 x 128 float32
and 8,192 x 3 bfloat16. All are bound by bandwidth or by the launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

import kernels.activation.fused
import kernels.activation.reference
import kernels.cache_write.fused
import kernels.cache_write.reference
import kernels.rotary.fused
import kernels.rotary.reference
from experiments.gpu.kernel_cases import Case, Setup, fla
from kernels.norm import fused, reference
from kernels.state_copy import fused as copies
from kernels.state_copy import reference as plain_copies
from kernels.state_copy.fused import BLOCK_BYTES

EPS = 1e-6


def plans(is_dry: bool) -> Iterator[tuple[Any, ...]]:
    """Yield norms of one token, a decode batch and a prefill, other work of the latter two, and
    copies of 1 to 16 states."""
    for num_tokens in (3,) if is_dry else (1, 64, 8192):
        for kind in ("rms_norm", "rms_norm and residual", "rms_norm of 16 heads"):
            yield norm, kind, num_tokens
        yield gated_norm, num_tokens
    for num_tokens in (3,) if is_dry else (64, 8192):
        for work in (rotate, silu_and_mul, sigmoid_mul, write_kv, rotate_and_write):
            yield work, num_tokens
    for num_copies in (1, 4, 16):
        yield state_copy, num_copies


def norm(setup: Setup, kind: str, num_tokens: int) -> Case:
    row, head = (48, 16) if setup.is_dry else (2048, 256)
    shape = (num_tokens, 16, head) if kind.endswith("heads") else (num_tokens, row)
    x, weight = setup.randn(*shape), setup.randn(shape[-1], dtype=torch.float32)
    narrow = weight.to(x.dtype)
    rivals = {"torch": lambda: F.rms_norm(x, weight.shape, narrow, EPS)}
    run, expected = partial(fused.rms_norm, x, weight, EPS), x.float()
    moved, path = 2 * x.nbytes, "modules.norm.layernorm.rms_norm"
    others = fla(path, lambda norm: norm(x, narrow, None, eps=EPS))
    if kind.endswith("residual"):
        residual, moved = setup.randn(*shape), 4 * x.nbytes
        rivals["torch"] = lambda: F.rms_norm(x + residual, weight.shape, narrow, EPS)
        run, expected = partial(_first, run, residual=residual), x + residual
        given = {"residual": residual, "eps": EPS, "prenorm": True}
        others = fla(path, lambda norm: norm(x, narrow, None, **given)[0])
    return Case(
        run=run,
        expected=partial(reference.rms_norm, expected, weight, EPS),
        num_bytes=moved + weight.nbytes,
        rivals=rivals | others,
        moved_bytes=moved + _loaded_weight_bytes(x, weight),
    )


def _first(work: Callable[..., Any], *given: Any, **options: Any) -> torch.Tensor:
    """Return the first of several results."""
    return work(*given, **options)[0]


def gated_norm(setup: Setup, num_tokens: int) -> Case:
    size = 24 if setup.is_dry else 128
    x, gate = (setup.randn(num_tokens, 32, size) for _ in range(2))
    weight = setup.randn(size, dtype=torch.float32)
    narrow = weight.to(x.dtype)
    return Case(
        run=partial(fused.gated_rms_norm, x, weight, gate, EPS),
        expected=partial(reference.gated_rms_norm, x.float(), weight, gate.float(), EPS),
        num_bytes=3 * x.nbytes + weight.nbytes,
        rivals={"torch": lambda: F.rms_norm(x, narrow.shape, narrow, EPS) * F.silu(gate)}
        | fla(
            "modules.norm.fused_norm_gate.rms_norm_gated",
            lambda norm: norm(x, gate, narrow, None, eps=EPS),
        ),
        moved_bytes=3 * x.nbytes + _loaded_weight_bytes(x, weight),
    )


def _loaded_weight_bytes(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Return the bytes of the weight, which every program reads."""
    size = len(weight)
    return -(-x.numel() // size // fused.rows_per_program(size)) * weight.nbytes


def _heads(setup: Setup, num_tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return queries, keys and values, slices of one tensor, and cosines and sines."""
    size, turned = (16, 8) if setup.is_dry else (256, 64)
    heads = setup.randn(num_tokens, 20, size).split([16, 2, 2], dim=1)
    return [*heads], [setup.randn(num_tokens, turned // 2).repeat(1, 2) for _ in range(2)]


def rotate(setup: Setup, num_tokens: int) -> Case:
    heads, angles = _heads(setup, num_tokens)
    query, key = (x.contiguous() for x in heads[:2])
    given = query, key, *angles
    plain = partial(_first, kernels.rotary.reference.rotate, *given)
    # Both halves of the angles are equal.
    half = [angle.chunk(2, dim=-1)[0].contiguous() for angle in angles]

    def both(rotary: Callable[..., Any]) -> torch.Tensor:
        turned, _ = (rotary(x[None], *half) for x in (query, key))
        return turned[0]

    return Case(
        run=partial(_first, kernels.rotary.fused.rotate, *given),
        expected=plain,
        num_bytes=2 * (query.nbytes + key.nbytes) + 2 * angles[0].nbytes,
        rivals={"torch": plain} | fla("modules.rotary.rotary_embedding", both),
    )


def silu_and_mul(setup: Setup, num_tokens: int) -> Case:
    x = setup.randn(num_tokens, 80 if setup.is_dry else 10240)
    gate, up = x.chunk(2, dim=-1)
    return Case(
        run=partial(kernels.activation.fused.silu_and_mul, x),
        expected=partial(kernels.activation.reference.silu_and_mul, x),
        num_bytes=x.nbytes * 3 // 2,
        rivals={"torch": lambda: F.silu(gate) * up}
        | fla("modules.activations.swiglu", lambda swiglu: swiglu(gate, up)),
    )


def sigmoid_mul(setup: Setup, num_tokens: int) -> Case:
    x, gate = (setup.randn(num_tokens, 40 if setup.is_dry else 4096) for _ in range(2))
    return Case(
        run=partial(kernels.activation.fused.sigmoid_mul, x, gate),
        expected=partial(kernels.activation.reference.sigmoid_mul, x, gate),
        num_bytes=3 * x.nbytes,
        rivals={"torch": lambda: x * gate.sigmoid()},
    )


def _pools(setup: Setup, of: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return two pools with twice the rows of ``of``, and the indices of new rows."""
    rows = 2 * len(of)
    pools = [of.new_zeros(rows, *of.shape[1:]) for _ in "kv"]
    return pools, torch.randperm(rows, device=setup.device)[: len(of)]


def write_kv(setup: Setup, num_tokens: int) -> Case:
    key, value = (setup.randn(num_tokens, 2, 16 if setup.is_dry else 256) for _ in range(2))
    pools, indices = _pools(setup, key)

    def write(write_kv: Callable[..., None]) -> torch.Tensor:
        write_kv(key, value, *pools, indices)
        return pools[0][indices]

    def index_copy(*_: object) -> None:
        for pool, rows in zip(pools, (key, value), strict=True):
            pool.index_copy_(0, indices, rows)

    return Case(
        run=partial(write, kernels.cache_write.fused.write_kv),
        expected=lambda: key,
        num_bytes=4 * key.nbytes + 2 * key.nbytes,  # and read back
        rivals={
            "torch": partial(write, kernels.cache_write.reference.write_kv),
            "torch index_copy": partial(write, index_copy),
        },
    )


def rotate_and_write(setup: Setup, num_tokens: int) -> Case:
    heads, angles = _heads(setup, num_tokens)
    norms = setup.randn(2, heads[0].shape[2], dtype=torch.float32)
    pools, indices = _pools(setup, heads[1])

    def run(module: ModuleType) -> torch.Tensor:
        options = {"norms": norms.unbind(), "eps": EPS, "angles": tuple(angles)}
        query = module.rotate_and_write(*heads, *pools, indices, **options)
        return torch.cat([query, pools[0][indices]], dim=1)

    plain = partial(run, kernels.rotary.reference)
    kept = heads[0].nbytes + heads[1].nbytes
    return Case(
        run=partial(run, kernels.rotary.fused),
        expected=plain,
        num_bytes=2 * sum(x.nbytes for x in heads) + 2 * kept + heads[1].nbytes,
        rivals={"torch": plain},
    )


def state_copy(setup: Setup, num_copies: int) -> Case:
    """Return a case of whole slots. The loop copies slot by slot, torch gathers and scatters."""
    num_layers, heads, size, channels = (2, 2, 16, 48) if setup.is_dry else (36, 32, 128, 8192)
    shape = (num_layers, 2 * num_copies)
    pools = [
        setup.randn(*shape, heads, size, size, dtype=torch.float32),
        setup.randn(*shape, channels, 3),
    ]
    order = torch.randperm(num_copies).tolist()
    slots = setup.int32(order), setup.int32(range(num_copies, 2 * num_copies))
    sources, targets = (x.long() for x in slots)

    def copied(copy: Callable[..., None]) -> torch.Tensor:
        copy(pools, *slots)
        return pools[0][:, num_copies:]

    def indexed(*_: object) -> None:
        for pool in pools:
            pool[:, targets] = pool[:, sources]

    def index_copy(*_: object) -> None:
        for pool in pools:
            pool.index_copy_(1, targets, pool.index_select(1, slots[0]))

    count = 2 * num_copies * sum(pool[:, 0].nbytes for pool in pools)
    blocks = -(-max(pool[0, 0].nbytes for pool in pools) // BLOCK_BYTES)
    rivals = {"loop": plain_copies.copy_states, "torch": indexed, "torch index_copy": index_copy}
    return Case(
        run=partial(copied, copies.copy_states),
        expected=partial(torch.clone, pools[0][:, order]),
        num_bytes=count,
        rivals={name: partial(copied, copy) for name, copy in rivals.items()},
        tolerance=0.0,
        moved_bytes=count + blocks * num_layers * num_copies * 8,
    )
