"""Experts of Qwen3-Next: 10 of 512, 2048 -> 512 -> 2048, full precision, 8 and 4 bits.

With 8-bit floats, the last expert is the shared one of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from experiments.gpu.kernel_cases import Case, Setup
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped
from kernels.moe import fused, reference

FORMATS = ("full", "int8", "int4 in 128", "int4 in 32", "fp8", "fp8 rows")


def plans(is_dry: bool) -> Iterator[tuple[Any, ...]]:
    """Yield routing, and the experts of one token up to a prefill, format by format."""
    sizes = (2, 20) if is_dry else (1, 4, 16, 64, 1024, 4096)
    yield from ((route, num_tokens) for num_tokens in sizes)
    yield from ((experts, format, num_tokens) for format in FORMATS for num_tokens in sizes)


def _sizes(setup: Setup) -> tuple[int, int, int, int]:
    """Return the number of experts and of chosen ones, and the sizes of both layers."""
    return (6, 2, 32, 24) if setup.is_dry else (512, 10, 2048, 512)


class Experts(NamedTuple):
    """Weights of all experts in one format."""

    product: fused.Prepared
    plain: Callable[..., torch.Tensor]
    """Reference, of rows, weights and experts."""
    full: Sequence[torch.Tensor]
    """Weights before they were quantised."""
    num_bytes: int


@lru_cache(1)
def experts_in(setup: Setup, format: str) -> Experts:
    """Return the experts of a format. The last ones are kept, because they take seconds."""
    num_experts, _, hidden, inner = _sizes(setup)
    shapes = (num_experts, 2 * inner, hidden), (num_experts, hidden, inner)
    full = [setup.randn(*shape).mul_(0.05) for shape in shapes]
    kind, _, how = format.partition(" ")
    setup.require(kind)
    if kind == "full":
        count = sum(part.nbytes for part in full)
        return Experts(fused.prepare(*full), partial(_plain, reference.experts, full), full, count)
    if kind == "int4":
        group = Grouped(4, int(how.removeprefix("in ")))
        stacks = [Matrix.of(w).quantized(group) for w in full]
        product = stacks[0].format.experts(fused, *stacks, setup.dtype)
        parts = [stack.widened(setup.dtype) for stack in stacks]
        count = sum(stack.num_bytes for stack in stacks)
        return Experts(product, partial(_plain, reference.experts, parts), full, count)
    parts = [part for w in full for part in reference.quantize_experts(w, kind)]
    options = {"fp8_rows": True} if how else {}
    product = fused.prepare_8bit(*parts, setup.dtype, **options)
    plain = partial(_plain, partial(reference.experts_8bit, **options), parts)
    return Experts(product, plain, full, sum(part.nbytes for part in parts))


def _plain(
    product: Callable[..., torch.Tensor], parts: Sequence[torch.Tensor], *given: torch.Tensor
) -> torch.Tensor:
    """Call a reference, which takes the gates of shared experts after the weights."""
    return product(*given[:3], *parts, *given[3:])


def route(setup: Setup, num_tokens: int) -> Case:
    num_experts, k, _, _ = _sizes(setup)
    logits = setup.randn(num_tokens, num_experts)
    return Case(
        run=lambda: fused.route(logits, k, True)[0],
        expected=lambda: reference.route(logits, k, True)[0],
        num_bytes=logits.nbytes + 8 * num_tokens * k,
        rivals={"torch": partial(_torch_route, logits, k)},
    )


def experts(setup: Setup, format: str, num_tokens: int) -> Case:
    """Return a case of one format, with rivals of full and of 8-bit integer weights."""
    of, (num_experts, k, hidden, inner) = experts_in(setup, format), _sizes(setup)
    is_shared = format.startswith("fp8")
    logits, x = setup.randn(num_tokens, num_experts), setup.randn(num_tokens, hidden)
    routed = num_experts - is_shared
    weights, chosen = reference.route(logits[:, :routed], k, True)
    gates = [logits[:, -1:]] * is_shared
    # A model's routing sorts its experts into blocks.
    blocks = fused.make_blocks(chosen, routed, of.product.most_rows)
    plain = partial(of.plain, x, weights, chosen, *gates)
    rivals = {}
    if format in ("full", "int8"):
        whole = partial(_torch_experts, x, weights, chosen, *of.full)
        rivals = {"loop": plain, "torch grouped_mm, full weights": whole}
    num_used = len(chosen.unique()) + is_shared
    return Case(
        run=partial(of.product, x, weights, fused.Sorted(chosen, blocks), *gates),
        expected=plain,
        num_bytes=2 * x.nbytes + of.num_bytes * num_used // num_experts,
        num_flops=6 * num_tokens * (k + is_shared) * hidden * inner,
        rivals=rivals,
        rival_tolerance=6e-2 if format == "int8" else None,
    )


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
