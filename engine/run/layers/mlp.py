"""The feed-forward half of a layer: one dense MLP, or experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from engine.run.layers.linear import Linear, Part
from engine.run.layers.parameters import Build, Parameter
from hybridcache.geometry.sizes import ExpertsSizes


class MLP:
    """SwiGLU: ``down(silu(gate(x)) * up(x))``; gate and up are one product."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        build: Build,
        *,
        inputs: Sequence[str] = ("gate_proj", "up_proj"),
        output: str = "down_proj",
    ) -> None:
        """``inputs``, ``output``: names of gate and up, which may be one matrix, and of down."""
        rows = 2 * intermediate_size // len(inputs)
        self.gate_up = Linear(hidden_size, [Part(f"{name}.{word}", rows) for word in inputs], build)
        self.down = Linear(intermediate_size, [Part(f"{name}.{output}", hidden_size)], build)
        self._activate = build.kernels["activation"].silu_and_mul

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self.gate_up.parameters()
        yield from self.down.parameters()

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
        name: str,
        hidden_size: int,
        sizes: ExpertsSizes,
        build: Build,
        *,
        renormalises: bool,
        stacked_names: bool,
    ) -> None:
        """``renormalises``: whether the weights of the chosen experts are made to sum to one.
        ``stacked_names``: whether all experts come as one tensor."""
        self.name, self.sizes, self.stacked_names = name, sizes, stacked_names
        self._renormalises = renormalises
        weights = build.weights
        self.w13 = weights.empty(sizes.num_experts, 2 * sizes.intermediate, hidden_size)
        self.w2 = weights.empty(sizes.num_experts, hidden_size, sizes.intermediate)
        self._precision = weights.precision(f"{name}.experts")
        # Router and shared gate read the same input: one product.
        gates = [Part(f"{name}.gate", sizes.num_experts), Part(f"{name}.shared_expert_gate", 1)]
        self.router = Linear(hidden_size, gates, build)
        self.shared = MLP(f"{name}.shared_expert", hidden_size, sizes.shared_intermediate, build)
        self._moe = build.kernels["moe"]
        self._gate = build.kernels["activation"].sigmoid_mul

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self.router.parameters()
        yield from self.shared.parameters()
        stem = f"{self.name}.experts"
        if self.stacked_names:
            yield f"{stem}.gate_up_proj", Parameter(self.w13)
            yield f"{stem}.down_proj", Parameter(self.w2)
            return
        for expert in range(self.sizes.num_experts):
            gate, up = self.w13[expert].chunk(2)
            yield f"{stem}.{expert}.gate_proj.weight", Parameter(gate)
            yield f"{stem}.{expert}.up_proj.weight", Parameter(up)
            yield f"{stem}.{expert}.down_proj.weight", Parameter(self.w2[expert])

    def seal(self) -> None:
        self.router.seal()
        self.shared.seal()
        if self._precision is None:
            self._experts = self._moe.prepare(self.w13, self.w2)
        else:
            up, up_scale = self._moe.quantize_experts(self.w13, self._precision)
            down, down_scale = self._moe.quantize_experts(self.w2, self._precision)
            self._experts = self._moe.prepare_8bit(up, up_scale, down, down_scale)
        del self.w13, self.w2

    def __call__(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Padding rows meet no expert: each would wake experts that nobody needs."""
        scores = self.router(x)
        logits, shared_gate = scores.split([self.sizes.num_experts, 1], dim=-1)
        weights, experts = self._moe.route(
            logits[:num_tokens], self.sizes.experts_per_token, self._renormalises
        )
        out = self._gate(self.shared(x, num_tokens), shared_gate)
        out[:num_tokens] += self._experts(x[:num_tokens], weights, experts)
        return out
