"""Feed-forward blocks with experts: with any router and names, alone or in parallel with a dense
block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from engine.layers.blocks import MLP, Rows, pad_rows
from engine.weights.parameters import Build, Composite, Parameter, Storage, plain_or
from engine.weights.products import Linear, Part
from hybridcache.geometry.sizes import ExpertsSizes, part
from kernels.linear.formats import Matrix


def expert_names(stem: str, *words: str) -> tuple[str, ...]:
    """Return the names of the weights ``words`` of the module ``stem``."""
    return tuple(f"{stem}.{word}.weight" for word in words)


class Experts:
    """All experts of a layer: SwiGLU, or squared ReLU if ``sizes.matrices`` is 2. The first
    matrices of all experts have the same storage format, and so have the last ones, because they
    are multiplied together."""

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
        self._names, self._weights, self._rank = names, build.weights, build.rank
        own = part(sizes.intermediate, build.rank.count, "units")
        self._count, inner = sizes.num_experts, (sizes.matrices - 1) * own
        self._kinds = [(sizes.intermediate, 1)] * (sizes.matrices - 1)
        self._moe = build.kernels["moe"]
        self._storages = self._stored_as(name, names)
        self._shared = None
        if shared is not None and sizes.shared_intermediate == sizes.intermediate:
            is_joined = self._moe.JOINS_SHARED and self._stored_as("", shared) == self._storages
            self._shared = shared if is_joined else None
        count = self._count + self.has_shared
        shapes = (count, inner, width), (count, width, own)
        self._up, self._down = (
            Matrix.empty(storage.loaded, shape, build.weights.empty)
            for storage, shape in zip(self._storages, shapes, strict=True)
        )

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
        size = self._up.shape[1] // num_inputs
        matrices = *self._up.split([size] * num_inputs), self._down
        for name, matrix in zip(names, matrices, strict=True):
            is_stack = len(experts) > 1 and "{}" not in name
            kinds, dim = self._kinds[: len(self._kinds) // num_inputs], int(is_stack)
            if name == names[-1]:
                kinds, dim = self._kinds[:1], dim + 1
            cut = self._rank.cut(*kinds, dim=dim)
            if is_stack:
                yield name, Parameter(plain_or(matrix[: len(experts)]), cut=cut)
                continue
            for expert in experts:
                yield name.format(expert), Parameter(plain_or(matrix[expert]), cut=cut)

    def _stored_as(self, name: str, names: Sequence[str]) -> tuple[Storage, Storage]:
        """Return the storage of the first and of the last matrices: that in the files if it is the
        same for all experts, else the one that is asked for the module ``name``."""
        weights, asked = self._weights, self._weights.storage(name)
        if names is self._names and (weights.files is None or "{}" not in names[0]):
            return asked, asked
        stored = []
        for group in (names[:-1], names[-1:]):
            found = {
                weights.storage(own.format(expert).removesuffix(".weight"))
                for expert in range(self._count if "{}" in group[0] else 1)
                for own in group
            }
            stored.append(found.pop() if len(found) == 1 else asked)
        first, last = stored
        are_alike = (first.computed == asked.computed) == (last.computed == asked.computed)
        return (first, last) if are_alike else (asked, asked)

    def seal(self) -> None:
        up, down = (
            matrix if storage.computed == matrix.format else matrix.quantized(storage.computed)
            for matrix, storage in zip((self._up, self._down), self._storages, strict=True)
        )
        options = self._weights.product_options(up.format)
        self._product = up.format.experts(self._moe, up, down, self._weights.dtype, **options)
        del self._up, self._down

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        shared_gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the built part's summand of the output ``[T, width]`` from ``x`` of the same
        shape; ``weights`` and ``experts`` are ``[T, k]``. The shared expert is included if its gate
        ``[T, 1]`` is given."""
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
            self.own = [build.parameter(bias, self._bias)]

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
        self._sum, self._gate = build.rank.sum, build.kernels["activation"].sigmoid_mul

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Compute the block. Padding rows are not routed, because they would load experts for
        nothing."""
        weights, experts, gate = self._router(x, rows)
        inner = x if self._narrow is None else self._narrow(x)
        joined = rows.of(gate) if self._experts.has_shared else None
        out = self._sum(self._experts(rows.of(inner), weights, experts, joined))
        out = pad_rows(out, len(x))
        out = out if self._widen is None else self._widen(out)
        if self._shared is None:
            return out
        shared = self._shared(x, rows)
        return out + (self._gate(shared, gate) if gate.shape[1] else shared)
