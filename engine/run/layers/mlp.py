"""The feed-forward half of a layer: one dense MLP, or experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.run.backends import Kernels
from engine.run.layers.linear import Linear
from engine.run.layers.parameters import Parameter, WeightSpec
from engine.run.model_config import ExpertsShape


class MLP:
    """SwiGLU: ``down(silu(gate(x)) * up(x))``; gate and up are one product."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, kernels: Kernels, place: WeightSpec
    ) -> None:
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, kernels, place)
        self.down = Linear(intermediate_size, hidden_size, kernels, place)
        self._activate = kernels.activation.silu_and_mul

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        gate, up = self.gate_up.weight.chunk(2)
        yield f"{prefix}.gate_proj.weight", Parameter(gate)
        yield f"{prefix}.up_proj.weight", Parameter(up)
        yield from self.down.parameters(f"{prefix}.down_proj")

    def seal(self) -> None:
        self.gate_up.seal()
        self.down.seal()

    def __call__(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return self.down(self._activate(self.gate_up(x)))


class ExpertsMLP:
    """A few experts per token, chosen by a router, beside a shared expert with a gate of its
    own."""

    def __init__(
        self,
        hidden_size: int,
        shape: ExpertsShape,
        kernels: Kernels,
        place: WeightSpec,
        *,
        stacked_names: bool,
    ) -> None:
        self.shape = shape
        self.stacked_names = stacked_names
        self.w13 = place.empty(shape.num_experts, 2 * shape.intermediate_size, hidden_size)
        self.w2 = place.empty(shape.num_experts, hidden_size, shape.intermediate_size)
        # Router and shared gate read the same input: one product, and one where a little decides
        # much.
        self.router = Linear(
            hidden_size, shape.num_experts + 1, kernels, place, full_precision=True
        )
        self.shared = MLP(hidden_size, shape.shared_intermediate_size, kernels, place)
        self._moe = kernels.moe
        self._quantization = place.quantization
        self._gate = kernels.activation.sigmoid_mul

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        router, shared_gate = self.router.weight.split([self.shape.num_experts, 1])
        yield f"{prefix}.gate.weight", Parameter(router)
        yield f"{prefix}.shared_expert_gate.weight", Parameter(shared_gate)
        yield from self.shared.parameters(f"{prefix}.shared_expert")
        if self.stacked_names:
            yield f"{prefix}.experts.gate_up_proj", Parameter(self.w13)
            yield f"{prefix}.experts.down_proj", Parameter(self.w2)
            return
        for expert in range(self.shape.num_experts):
            gate, up = self.w13[expert].chunk(2)
            yield f"{prefix}.experts.{expert}.gate_proj.weight", Parameter(gate)
            yield f"{prefix}.experts.{expert}.up_proj.weight", Parameter(up)
            yield f"{prefix}.experts.{expert}.down_proj.weight", Parameter(self.w2[expert])

    def seal(self) -> None:
        self.router.seal()
        self.shared.seal()
        if self._quantization is None:
            self._experts = self._moe.prepare(self.w13, self.w2)
        else:
            self._experts = self._moe.prepare_8bit(self.w13, self.w2, self._quantization)
        del self.w13, self.w2

    def __call__(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Padding rows meet no expert: each would wake experts that nobody needs."""
        scores = self.router(x)
        logits, shared_gate = scores.split([self.shape.num_experts, 1], dim=-1)
        weights, experts = self._moe.route(
            logits[:num_tokens], self.shape.experts_per_token, self.shape.renormalise
        )
        out = self._gate(self.shared(x, num_tokens), shared_gate)
        out[:num_tokens] += self._experts(x[:num_tokens], weights, experts)
        return out
