"""The feed-forward half of a layer: one dense MLP, or experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from engine.run.layers.linear import Linear, Part, as_kernels_take
from engine.run.layers.parameters import Build, Parameter, Storage
from hybridcache.geometry.sizes import ExpertsSizes

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
Scales = torch.Tensor | None


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
        self.sizes, self.stacked_names = sizes, stacked_names
        self._renormalises = renormalises
        self._stem, self._weights = f"{name}.experts", build.weights
        self._storage = self._stored_as()
        count, inner = sizes.num_experts, sizes.intermediate
        self.w13, self._w13_scale = self._allocate(count, 2 * inner, hidden_size)
        self.w2, self._w2_scale = self._allocate(count, hidden_size, inner)
        # Router and shared gate read the same input: one product.
        gates = [Part(f"{name}.gate", sizes.num_experts), Part(f"{name}.shared_expert_gate", 1)]
        self.router = Linear(hidden_size, gates, build)
        self.shared = MLP(f"{name}.shared_expert", hidden_size, sizes.shared_intermediate, build)
        self._moe = build.kernels["moe"]
        self._gate = build.kernels["activation"].sigmoid_mul

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self.router.parameters()
        yield from self.shared.parameters()
        if self.stacked_names:
            yield f"{self._stem}.gate_up_proj", Parameter(self.w13)
            yield f"{self._stem}.down_proj", Parameter(self.w2)
            return
        scales: list[Scales] = [None, None, None]
        for expert in range(self.sizes.num_experts):
            weights = *self.w13[expert].chunk(2), self.w2[expert]
            if self._w13_scale is not None and self._w2_scale is not None:
                scales = [*self._w13_scale[expert].chunk(2), self._w2_scale[expert]]
            for part, weight, scale in zip(EXPERT_PARTS, weights, scales, strict=True):
                name = f"{self._stem}.{expert}.{part}"
                scheme = self._weights.scheme(name)
                yield f"{name}.weight", Parameter(weight, scheme=scheme, scale=scale)

    def _stored_as(self) -> Storage:
        """All experts alike: they are multiplied together."""
        weights, count = self._weights, self.sizes.num_experts
        if self.stacked_names or weights.files is None:
            return Storage(weights.precision(self._stem))
        names = (
            f"{self._stem}.{expert}.{part}" for expert in range(count) for part in EXPERT_PARTS
        )
        found = set(map(weights.storage, names))
        return found.pop() if len(found) == 1 else Storage(weights.precision(self._stem))

    def _allocate(self, count: int, rows: int, columns: int) -> tuple[torch.Tensor, Scales]:
        storage, weights = self._storage, self._weights
        weight = weights.empty(count, rows, columns, dtype=storage.dtype)
        if storage.dtype is None:
            return weight, None
        shape = storage.scales(rows, columns)
        return weight, weights.empty(count, *shape, dtype=torch.float32)

    def seal(self) -> None:
        self.router.seal()
        self.shared.seal()
        precision = self._storage.precision
        if precision is None:
            self._experts = self._moe.prepare(self.w13, self.w2)
        else:
            if self._w13_scale is None or self._w2_scale is None:
                self.w13, up_scale = self._moe.quantize_experts(self.w13, precision)
                self.w2, down_scale = self._moe.quantize_experts(self.w2, precision)
            else:
                up_scale = as_kernels_take(self._w13_scale)
                down_scale = as_kernels_take(self._w2_scale)
            self._experts = self._moe.prepare_8bit(
                self.w13, up_scale, self.w2, down_scale, self._weights.dtype
            )
        del self.w13, self.w2, self._w13_scale, self._w2_scale

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
