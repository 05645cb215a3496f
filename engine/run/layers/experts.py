"""Experts whose router weighs them by sigmoids, chosen with the help of a bias."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.run.layers.linear import Linear, Part
from engine.run.layers.mlp import MLP
from engine.run.layers.parameters import Build, Parameter
from hybridcache.geometry.sizes import ExpertsSizes


class SigmoidExperts:
    """A few experts per token, beside a shared one without a gate or none. An expert's matrices are
    called w1 (gate), w3 (up) and w2 (down)."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: ExpertsSizes,
        build: Build,
        *,
        bias: str | None,
        renormalises: bool,
        scale: float,
        eps: float,
    ) -> None:
        """``bias``: what the tensor is called that helps to choose; None: there is none.
        ``renormalises``: whether the chosen ones' weights are divided by their sum plus ``eps``;
        ``scale``: what they are multiplied with then."""
        self.name, self.sizes, self._bias_name = name, sizes, bias
        self._renormalises, self._scale, self._eps = renormalises, scale, eps
        weights = build.weights
        self._w13 = weights.empty(sizes.num_experts, 2 * sizes.intermediate, hidden_size)
        self._w2 = weights.empty(sizes.num_experts, hidden_size, sizes.intermediate)
        self._precision = weights.precision(f"{name}.experts")
        self._router = Linear(hidden_size, [Part(f"{name}.gate", sizes.num_experts)], build)
        self._bias = None if bias is None else weights.empty(sizes.num_experts, dtype=torch.float32)
        self._shared: MLP | None = None
        if sizes.shared_intermediate:
            self._shared = MLP(
                f"{name}.shared_experts", hidden_size, sizes.shared_intermediate, build
            )
        self._moe = build.kernels["moe"]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._router.parameters()
        if self._shared is not None:
            yield from self._shared.parameters()
        if self._bias is not None:
            yield f"{self.name}.{self._bias_name}", Parameter(self._bias)
        for expert in range(self.sizes.num_experts):
            stem, (gate, up) = f"{self.name}.experts.{expert}", self._w13[expert].chunk(2)
            yield f"{stem}.w1.weight", Parameter(gate)
            yield f"{stem}.w3.weight", Parameter(up)
            yield f"{stem}.w2.weight", Parameter(self._w2[expert])

    def seal(self) -> None:
        self._router.seal()
        if self._shared is not None:
            self._shared.seal()
        if self._precision is None:
            self._experts = self._moe.prepare(self._w13, self._w2)
        else:
            self._experts = self._moe.prepare_8bit(self._w13, self._w2, self._precision)
        del self._w13, self._w2

    def __call__(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Padding rows meet no expert: each would wake experts that nobody needs."""
        weights, experts = self._moe.route_sigmoid(
            self._router(x)[:num_tokens],
            self._bias,
            self.sizes.experts_per_token,
            self._renormalises,
            scale=self._scale,
            eps=self._eps,
        )
        out = torch.zeros_like(x) if self._shared is None else self._shared(x, num_tokens)
        out[:num_tokens] += self._experts(x[:num_tokens], weights, experts)
        return out
