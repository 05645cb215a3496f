"""Feed-forward block of a layer: a dense MLP, or experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.layers.experts import ExpertNames, Experts
from engine.layers.inputs import Rows, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.parameters import Build, Composite
from hybridcache.geometry.sizes import ExpertsSizes


class MLP(Composite):
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
        bias: bool = False,
        gate_multiplier: float = 1.0,
        sums: bool = True,
    ) -> None:
        """``inputs``, ``output``: names of gate and up, which may be one matrix, and of down.
        ``gate_multiplier``: factor before silu. ``sums``: see ``Linear``."""
        rows = 2 * intermediate_size // len(inputs)
        parts = [Part(f"{name}.{word}", rows) for word in inputs]
        parts = shared(parts, [(intermediate_size, 1)] * 2, build.rank)
        self.gate_up = Linear(hidden_size, parts, build, bias=bias)
        outputs = [Part(f"{name}.{output}", hidden_size)]
        self.down = Linear(
            intermediate_size, outputs, build, bias=bias, shares_inputs=True, sums=sums
        )
        self.layers = self.gate_up, self.down
        self._gate_multiplier = gate_multiplier
        self._activate = build.kernels["activation"].silu_and_mul

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        gate_up = self.gate_up(x)
        if self._gate_multiplier != 1.0:
            gate, up = gate_up.chunk(2, dim=-1)
            gate_up = torch.cat([gate * self._gate_multiplier, up], dim=-1)
        return self.down(self._activate(gate_up))


class SquaredReluMLP(Composite):
    """``down(relu(up(x))^2)``."""

    def __init__(
        self, name: str, hidden_size: int, intermediate_size: int, build: Build, *, bias: bool
    ) -> None:
        inputs, outputs = [
            [Part(f"{name}.{word}", size)]
            for word, size in (("up_proj", intermediate_size), ("down_proj", hidden_size))
        ]
        inputs = shared(inputs, [(intermediate_size, 1)], build.rank)
        self.up = Linear(hidden_size, inputs, build, bias=bias)
        self.down = Linear(intermediate_size, outputs, build, bias=bias, shares_inputs=True)
        self.layers = self.up, self.down
        self._activate = build.kernels["activation"].relu_squared

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.down(self._activate(self.up(x)))


class ExpertsMLP(Composite):
    """A few experts per token, selected by a router, and a shared expert with a separate gate."""

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
        """``renormalises``: True if the weights of the selected experts are scaled to sum to one.
        ``stacked_names``: True if all experts are one tensor in the files."""
        self._k, self._renormalises = sizes.experts_per_token, renormalises
        self._num_experts, stem = sizes.num_experts, f"{name}.experts"
        one = f"{stem}.{{}}"
        names = ExpertNames(
            (f"{one}.gate_proj.weight", f"{one}.up_proj.weight"), f"{one}.down_proj.weight"
        )
        if stacked_names:
            names = ExpertNames((f"{stem}.gate_up_proj",), f"{stem}.down_proj")
        shared_name = f"{name}.shared_expert"
        shared_names = ExpertNames(
            (f"{shared_name}.gate_proj.weight", f"{shared_name}.up_proj.weight"),
            f"{shared_name}.down_proj.weight",
        )
        self._experts = Experts(stem, hidden_size, sizes, names, build, shared=shared_names)
        # Router and shared gate have the same input, so they are one product.
        gates = [
            Part(f"{name}.gate", sizes.num_experts),
            Part(f"{name}.shared_expert_gate", 1),
        ]
        self._router = Linear(hidden_size, gates, build)
        self._shared: MLP | None = None
        if not self._experts.has_shared:
            self._shared = MLP(
                shared_name, hidden_size, sizes.shared_intermediate, build, sums=False
            )
        layers = self._router, self._shared, self._experts
        self.layers = [layer for layer in layers if layer is not None]
        self._rank = build.rank
        self._route = build.kernels["moe"].route
        self._gate = build.kernels["activation"].sigmoid_mul

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Compute the block. Padding rows are not routed, because they would load experts for
        nothing."""
        scores = self._router(x)
        logits, shared_gate = scores.split([self._num_experts, 1], dim=-1)
        weights, experts = self._route(rows.of(logits), self._k, self._renormalises, live=rows.live)
        routed = rows.of(x), weights, experts
        if self._shared is None:
            out = pad_rows(self._experts(*routed, rows.of(shared_gate)), len(x))
        else:
            out = self._gate(self._shared(x, rows), shared_gate)
            rows.of(out).add_(self._experts(*routed))
        return self._rank.sum(out)
