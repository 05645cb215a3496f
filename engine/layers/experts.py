"""Feed-forward blocks with experts: with any router, alone or in parallel with a dense block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from engine.layers.blocks import MLP, Rows, pad_rows
from engine.weights.parameters import Build, Composite
from engine.weights.products import Experts, Linear, Part, QuantizedRows
from hybridcache.geometry.sizes import ExpertsSizes

Routed = tuple[torch.Tensor, object, torch.Tensor]
"""Weights and experts of T tokens, for ``Experts``, and the gate of a shared expert ``[num_rows,
1]``, or an empty tensor if the router has none."""


class Gating(Composite):
    """Selects the most probable experts, weighted by their probabilities."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: ExpertsSizes,
        build: Build,
        *,
        renormalises: bool,
        gate: str | None = None,
    ) -> None:
        """``renormalises``: True if the weights of the selected experts are scaled to sum to one.
        ``gate``: name of the gate of a shared expert, which is one product with the router."""
        self._k, self._renormalises = sizes.experts_per_token, renormalises
        self._count, parts = sizes.num_experts, [Part(name, sizes.num_experts)]
        parts += [] if gate is None else [Part(gate, 1)]
        self._linear = Linear(hidden_size, parts, build)
        self.layers = (self._linear,)

    def __call__(self, x: torch.Tensor | QuantizedRows, rows: Rows, routing: Any) -> Routed:
        """``routing``: that of the experts."""
        logits, gate = self._linear(x).tensor_split([self._count], dim=-1)
        routed = routing.route(rows.of(logits), self._k, self._renormalises, live=rows.live)
        return *routed, gate


class SigmoidRouter(Gating):
    """Selects experts by their sigmoids, plus a bias for the selection only; in float32."""

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
        """``bias``: name of its tensor, or None. ``renormalises``: True if the selected sigmoids
        are divided by their sum plus ``eps``. ``scale``: factor applied afterwards."""
        exact = replace(build, weights=replace(build.weights, dtype=torch.float32))
        super().__init__(name, hidden_size, sizes, exact, renormalises=renormalises)
        self._scale, self._eps = scale, eps
        self._bias: torch.Tensor | None = None
        if bias is not None:
            self._bias = exact.weights.empty(sizes.num_experts)
            self.own = [build.parameter(bias, self._bias)]

    def __call__(self, x: torch.Tensor | QuantizedRows, rows: Rows, routing: Any) -> Routed:
        x = x.x if isinstance(x, QuantizedRows) else x
        logits, gate = self._linear(x.float()).tensor_split([self._count], dim=-1)
        routed = routing.route_sigmoid(
            rows.of(logits),
            self._bias,
            self._k,
            self._renormalises,
            scale=self._scale,
            eps=self._eps,
            live=rows.live,
        )
        return *routed, gate


class RoutedExperts(Composite):
    """A few experts per token, selected by a router, and a shared expert, with the router's gate if
    it has one. A product before the experts may narrow and one after them widen."""

    def __init__(
        self,
        router: Gating,
        experts: Experts,
        build: Build,
        *,
        shared: MLP | None = None,
        narrow: Linear | None = None,
        widen: Linear | None = None,
    ) -> None:
        self._router, self._experts, self._shared = router, experts, shared
        self._narrow, self._widen = narrow, widen
        layers = router, experts, narrow, widen, shared
        self.layers = [layer for layer in layers if layer is not None]
        self._sum = build.rank.sum if build.is_divided else None
        self._gate = build.kernels["activation"].sigmoid_mul
        experts.defers = shared is None and widen is None and not build.is_divided

    @property
    def takes_fp8_rows(self) -> bool:
        return self._narrow is None and self._experts.takes_fp8_rows

    def __call__(self, x: torch.Tensor | QuantizedRows, rows: Rows) -> Any:
        """Compute the block: a tensor, or ``ExpertSums``. Padding rows are not routed, because they
        would load experts for nothing."""
        weights, experts, gate = self._router(x, rows, self._experts.routing)
        inner: Any = x if self._narrow is None else self._narrow(x)
        joined = rows.of(gate) if self._experts.has_shared else None
        out = self._experts(rows.of(inner), weights, experts, joined)
        if not isinstance(out, torch.Tensor):
            return out._replace(num_rows=len(x))
        out = pad_rows(out if self._sum is None else self._sum(out), len(x))
        out = out if self._widen is None else self._widen(out)
        if self._shared is None:
            return out
        shared = self._shared(x, rows)
        return out + (self._gate(shared, gate) if gate.shape[1] else shared)
