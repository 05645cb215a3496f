"""Feed-forward blocks with experts: with any router and names, alone or in parallel with a dense
block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from engine.layers.blocks import MLP, Rows, pad_rows
from engine.layers.linear import Build, Composite, Linear, Parameter, Part, Storage, as_kernels_take
from hybridcache.geometry.sizes import ExpertsSizes, part

Scales = torch.Tensor | None


def expert_names(stem: str, *words: str) -> tuple[str, ...]:
    """Return the names of the weights ``words`` of the module ``stem``."""
    return tuple(f"{stem}.{word}.weight" for word in words)


class Experts:
    """All experts of a layer: SwiGLU, or squared ReLU if ``sizes.matrices`` is 2. All have the same
    storage format, because they are multiplied together."""

    def __init__(
        self,
        name: str,
        width: int,
        sizes: ExpertsSizes,
        names: Sequence[str],
        build: Build,
        *,
        shared: Sequence[str] | None = None,
    ) -> None:
        """``name``: common name, which selects the precision. ``width``: size of their input.
        ``names``: those of the tensors in the weight files, of gate and up, or of both in one, or
        of up alone without gates, and last that of down. A name with ``{}`` is that of one expert,
        by number; a name without belongs to all. ``shared``: names of a shared expert, which
        becomes the last one if ``has_shared`` says so."""
        self._names, self._weights = names, build.weights
        self._rank, own = build.rank, part(sizes.intermediate, build.rank.count, "units")
        self._count, self._inner = sizes.num_experts, (sizes.matrices - 1) * own
        self._kinds = [(sizes.intermediate, 1)] * (sizes.matrices - 1)
        self._storage, self._moe = self._stored_as(name), build.kernels["moe"]
        self._shared = None
        if shared is not None and sizes.shared_intermediate == sizes.intermediate:
            stored = {self._weights.storage(one.removesuffix(".weight")) for one in shared}
            is_joined = bool(self._moe.JOINS_SHARED) and stored == {self._storage}
            self._shared = shared if is_joined else None
        count, storage = self._count + self.has_shared, self._storage
        self._w13, self._w13_scale = storage.allocate(build.weights, count, self._inner, width)
        self._w2, self._w2_scale = storage.allocate(build.weights, count, width, own)

    @property
    def has_shared(self) -> bool:
        """True if the shared expert is computed here: it has the size and the format of the others,
        and the kernels are faster with all of them together."""
        return self._shared is not None

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._parameters_of(self._names, range(self._count))
        if self._shared is not None:
            yield from self._parameters_of(self._shared, range(self._count, self._count + 1))

    def _parameters_of(
        self, names: Sequence[str], experts: range
    ) -> Iterator[tuple[str, Parameter]]:
        num_inputs = len(names) - 1
        size = self._inner // num_inputs
        weights = *self._w13.split(size, dim=1), self._w2
        scales: tuple[Scales, ...] = (num_inputs + 1) * (None,)
        if self._w13_scale is not None and self._w2_scale is not None:
            scales = *self._w13_scale.split(size, dim=1), self._w2_scale
        for name, weight, scale in zip(names, weights, scales, strict=True):
            is_stack = len(experts) > 1 and "{}" not in name
            kinds, dim = self._kinds[: len(self._kinds) // num_inputs], int(is_stack)
            if name == names[-1]:
                kinds, dim = self._kinds[:1], dim + 1
            cut = self._rank.cut(*kinds, dim=dim)
            if is_stack:
                yield name, Parameter(weight[: len(experts)], cut=cut)
                continue
            for expert in experts:
                own = name.format(expert)
                scheme = self._weights.scheme(own.removesuffix(".weight"))
                factor = None if scale is None else scale[expert]
                yield own, Parameter(weight[expert], scheme=scheme, scale=factor, cut=cut)

    def _stored_as(self, name: str) -> Storage:
        weights, names = self._weights, self._names
        asked = Storage(weights.precision(name))
        if weights.files is None or not all("{}" in own for own in names):
            return asked
        found = {
            weights.storage(own.format(expert).removesuffix(".weight"))
            for expert in range(self._count)
            for own in names
        }
        return found.pop() if len(found) == 1 else asked

    def seal(self) -> None:
        precision, dtype = self._storage.precision, self._weights.dtype
        if precision is None:
            self._product = self._moe.prepare(self._w13, self._w2)
        else:
            if self._w13_scale is None or self._w2_scale is None:
                self._w13, up_scale = self._moe.quantize_experts(self._w13, precision)
                self._w2, down_scale = self._moe.quantize_experts(self._w2, precision)
            else:
                up_scale = as_kernels_take(self._w13_scale)
                down_scale = as_kernels_take(self._w2_scale)
            weights = self._w13, up_scale, self._w2, down_scale
            options = self._weights.product_options(precision)
            self._product = self._moe.prepare_8bit(*weights, dtype, **options)
        del self._w13, self._w2, self._w13_scale, self._w2_scale

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        shared_gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute this rank's summand of the output ``[T, width]`` from ``x`` of the same shape;
        ``weights`` and ``experts`` are ``[T, k]``. The shared expert is included if its gate ``[T,
        1]`` is given."""
        return self._product(x, weights, experts, shared_gate=shared_gate)


Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Weights ``[T, k]`` and experts ``[T, k]`` of the T tokens, and the gate of a shared expert
``[num_rows, 1]``, or an empty tensor if the router has none."""


class Router(Composite):
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
        self.layers, self._moe = (self._linear,), build.kernels["moe"]

    def __call__(self, x: torch.Tensor, rows: Rows) -> Routed:
        logits, gate = self._linear(x).tensor_split([self._count], dim=-1)
        routed = self._moe.route(rows.of(logits), self._k, self._renormalises, live=rows.live)
        return *routed, gate


class SigmoidRouter(Router):
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
            self.own = [(bias, Parameter(self._bias))]

    def __call__(self, x: torch.Tensor, rows: Rows) -> Routed:
        logits, gate = self._linear(x.float()).tensor_split([self._count], dim=-1)
        routed = self._moe.route_sigmoid(
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
        router: Router,
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
        self._rank, self._gate = build.rank, build.kernels["activation"].sigmoid_mul

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Compute the block. Padding rows are not routed, because they would load experts for
        nothing."""
        weights, experts, gate = self._router(x, rows)
        inner = x if self._narrow is None else self._narrow(x)
        joined = rows.of(gate) if self._experts.has_shared else None
        out = self._rank.sum(self._experts(rows.of(inner), weights, experts, joined))
        out = pad_rows(out, len(x))
        out = out if self._widen is None else self._widen(out)
        if self._shared is None:
            return out
        shared = self._shared(x, rows)
        return out + (self._gate(shared, gate) if gate.shape[1] else shared)
