"""Experts with any router and any names, and parallel feed-forward blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from engine.layers.experts import ExpertNames, Experts
from engine.layers.inputs import Rows, pad_rows
from engine.layers.linear import Linear, Part
from engine.layers.parameters import Build, Composite, Layer, Parameter
from engine.layers.residual import FeedForward
from hybridcache.geometry.sizes import ExpertsSizes


class Router(Layer, Protocol):
    """Selects the experts of each token and their weights."""

    def __call__(self, x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and experts ``[T, k]`` of the ``rows`` of ``x [num_rows, H]``."""
        ...


class SoftmaxRouter(Composite):
    """Selects the most probable experts, weighted by their probabilities."""

    def __init__(
        self, name: str, hidden_size: int, sizes: ExpertsSizes, build: Build, *, renormalises: bool
    ) -> None:
        """``renormalises``: True if the weights of the selected experts are scaled to sum to
        one."""
        self._k, self._renormalises = sizes.experts_per_token, renormalises
        self._linear = Linear(hidden_size, [Part(name, sizes.num_experts)], build)
        self.layers = (self._linear,)
        self._route = build.kernels["moe"].route

    def __call__(self, x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = self._route(
            rows.of(self._linear(x)), self._k, self._renormalises, live=rows.live
        )
        return weights, experts


class SigmoidRouter(Composite):
    """Selects the experts with the highest sigmoids plus a bias that affects only the selection; in
    float32."""

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
        eps: float = 1e-20,
    ) -> None:
        """``bias``: name of its tensor, or None. ``renormalises``: True if the selected sigmoids
        are divided by their sum plus ``eps``. ``scale``: factor applied afterwards."""
        self._bias_name, self._k = bias, sizes.experts_per_token
        self._renormalises, self._scale, self._eps = renormalises, scale, eps
        exact = replace(build, weights=replace(build.weights, dtype=torch.float32))
        self._linear = Linear(hidden_size, [Part(name, sizes.num_experts)], exact)
        self.layers = (self._linear,)
        self._bias = None if bias is None else exact.weights.empty(sizes.num_experts)
        self._route = build.kernels["moe"].route_sigmoid

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from super().parameters()
        if self._bias is not None and self._bias_name is not None:
            yield self._bias_name, Parameter(self._bias)

    def __call__(self, x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = self._route(
            rows.of(self._linear(x.float())),
            self._bias,
            self._k,
            self._renormalises,
            scale=self._scale,
            eps=self._eps,
            live=rows.live,
        )
        return weights, experts


class RoutedExperts(Composite):
    """A few experts per token, selected by a router. If ``sizes.width`` is set, a product before
    the experts narrows and one after them widens."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: ExpertsSizes,
        router: Router,
        names: ExpertNames,
        build: Build,
        *,
        narrow: Part | None = None,
        widen: Part | None = None,
        bias: bool = False,
    ) -> None:
        """``name``: common name of the experts, which selects the precision. ``bias``: True if the
        products around them have one."""
        width = sizes.width or hidden_size
        self._router, self._experts = router, Experts(name, width, sizes, names, build)
        self._narrow = None if narrow is None else Linear(hidden_size, [narrow], build, bias=bias)
        self._widen = None if widen is None else Linear(width, [widen], build, bias=bias)
        layers = self._router, self._experts, self._narrow, self._widen
        self.layers = [layer for layer in layers if layer is not None]
        self._rank = build.rank

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Compute the block. Padding rows are not routed, because they would load experts for
        nothing."""
        weights, experts = self._router(x, rows)
        inner = x if self._narrow is None else self._narrow(x)
        out = self._rank.sum(self._experts(rows.of(inner), weights, experts))
        out = pad_rows(out, len(x))
        return out if self._widen is None else self._widen(out)


class Beside(Composite):
    """Parallel feed-forward blocks on one input, with summed outputs: routed and shared experts."""

    def __init__(self, blocks: Sequence[FeedForward]) -> None:
        self.layers = self._blocks = blocks

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        outs = [block(x, rows) for block in self._blocks]
        return sum(outs[1:], outs[0])
