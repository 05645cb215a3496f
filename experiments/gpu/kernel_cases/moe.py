"""Experts of Qwen3-Next: 10 of 512, 2048 -> 512 -> 2048, full precision and 8-bit.

With 8-bit floats, the last expert is the shared one of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from engine.runner.device import Device
from experiments.gpu.kernel_cases import Case, Setup
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped
from kernels.moe import fused, reference


def cases(setup: Setup) -> Iterator[Case]:
    """Yield routing, and the experts of one token up to a prefill."""
    num_experts, k, hidden, inner = (6, 2, 32, 24) if setup.is_dry else (512, 10, 2048, 512)
    w13 = _weights(setup, num_experts, 2 * inner, hidden)
    w2 = _weights(setup, num_experts, hidden, inner)
    int8 = [part for w in (w13, w2) for part in reference.quantize_experts(w, "int8")]
    fp8 = None
    if setup.is_dry or Device.resolve(setup.device).supports("fp8"):
        fp8 = [part for w in (w13, w2) for part in reference.quantize_experts(w, "fp8")]
    int4 = {}
    for group in (128, 32):
        up, down = (Matrix.of(w).quantized(Grouped(4, group)) for w in (w13, w2))
        int4[group] = up, down, up.format.experts(fused, up, down, setup.dtype)
    for num_tokens in (2, 20) if setup.is_dry else (1, 4, 16, 64, 1024, 4096):
        logits = setup.randn(num_tokens, num_experts)
        x = setup.randn(num_tokens, hidden)
        yield Case(
            name=f"route {num_tokens}",
            run=lambda logits=logits: fused.route(logits, k, True)[0],
            expected=lambda logits=logits: reference.route(logits, k, True)[0],
            num_bytes=logits.nbytes + 8 * num_tokens * k,
            rivals={"torch": lambda logits=logits: _torch_route(logits, k)},
        )
        weights, experts = reference.route(logits, k, True)
        num_used = len(experts.unique())
        for name, run, plain, parts in (
            ("experts", fused.prepare(w13, w2), reference.experts, (w13, w2)),
            ("int8 experts", fused.prepare_8bit(*int8, x.dtype), reference.experts_8bit, int8),
        ):
            read = sum(part.nbytes for part in parts) * num_used // num_experts
            given = (x, weights, experts)
            yield Case(
                name=f"{name} {num_tokens}",
                run=partial(run, x, weights, _sorted(run, experts, num_experts)),
                expected=partial(plain, *given, *parts),
                num_bytes=2 * x.nbytes + read,
                num_flops=6 * num_tokens * k * hidden * inner,
                rivals={
                    "loop": partial(plain, *given, *parts),
                    "torch grouped_mm, full weights": partial(_torch_experts, *given, w13, w2),
                },
                rival_tolerance=6e-2 if parts is int8 else None,
            )
        for group, (up, down, run_int4) in int4.items():
            read = (up.num_bytes + down.num_bytes) * num_used // num_experts
            wide = partial(_widened, up, down, setup.dtype)
            yield Case(
                name=f"int4 experts in {group} {num_tokens}",
                run=partial(run_int4, x, weights, _sorted(run_int4, experts, num_experts)),
                expected=lambda given=(x, weights, experts), wide=wide: reference.experts(
                    *given, *wide()
                ),
                num_bytes=2 * x.nbytes + read,
                num_flops=6 * num_tokens * k * hidden * inner,
            )
        if fp8 is None:
            continue
        gates = logits[:, -1:]
        routed = reference.route(logits[:, :-1], k, True)
        read = sum(part.nbytes for part in fp8) * (len(routed[1].unique()) + 1) // num_experts
        for name, fp8_rows in (("fp8 experts", False), ("fp8 experts and rows", True)):
            given, options = (x, *routed, *fp8, gates), {"fp8_rows": fp8_rows}
            run = fused.prepare_8bit(*fp8, x.dtype, **options)
            chosen = _sorted(run, routed[1], num_experts - 1)
            yield Case(
                name=f"{name} {num_tokens}",
                run=partial(run, x, routed[0], chosen, gates),
                expected=partial(reference.experts_8bit, *given, **options),
                num_bytes=2 * x.nbytes + read,
                num_flops=6 * num_tokens * (k + 1) * hidden * inner,
            )


def _sorted(product: fused.Prepared, experts: torch.Tensor, num_experts: int) -> fused.Sorted:
    """Return experts in blocks, because a model's routing sorts them."""
    return fused.Sorted(experts, fused.make_blocks(experts, num_experts, product.most_rows))


def _widened(up: Matrix, down: Matrix, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return up.widened(dtype), down.widened(dtype)


def _weights(setup: Setup, *shape: int) -> torch.Tensor:
    return torch.empty(shape, device=setup.device, dtype=setup.dtype).normal_(0, 0.05)


def _torch_route(logits: torch.Tensor, k: int) -> torch.Tensor:
    weights = logits.float().softmax(dim=-1).topk(k, dim=-1).values
    return weights / weights.sum(dim=-1, keepdim=True)


def _torch_experts(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
) -> torch.Tensor:
    """Sort by expert, multiply in two grouped products, and sort back, without copies to the
    host."""
    num_tokens, k = experts.shape
    flat = experts.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.zeros(len(w13), dtype=torch.int32, device=flat.device)
    ends = counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0).int()
    rows = hidden.index_select(0, order // k)
    gate, up = torch._grouped_mm(rows, w13.mT, offs=ends).chunk(2, dim=-1)
    sorted_results = torch._grouped_mm(F.silu(gate) * up, w2.mT, offs=ends)
    results = torch.empty_like(sorted_results).index_copy_(0, order, sorted_results)
    return torch.einsum("tkh,tk->th", results.view(num_tokens, k, -1).float(), weights).to(
        hidden.dtype
    )
