"""Weights of experts, with any names in the files and any storage format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.layers.linear import as_kernels_take
from engine.layers.parameters import Build, Parameter, Storage
from hybridcache.geometry.sizes import ExpertsSizes, part

Scales = torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of the matrices of experts in the weight files.

    A name with ``{}`` is that of one expert, by number; a name without belongs to all.
    """

    inputs: tuple[str, ...]
    """Gate and up, or one name of both; or only up, for experts without gates."""
    output: str


class Experts:
    """All experts of a layer: SwiGLU, or squared ReLU if ``sizes.matrices`` is 2. All have the same
    storage format, because they are multiplied together."""

    def __init__(
        self,
        name: str,
        width: int,
        sizes: ExpertsSizes,
        names: ExpertNames,
        build: Build,
        *,
        shared: ExpertNames | None = None,
    ) -> None:
        """``name``: common name, which selects the precision. ``width``: size of their input.
        ``shared``: names of a shared expert, which becomes the last one if ``has_shared`` says
        so."""
        self._names, self._weights = names, build.weights
        self._rank, own = build.rank, part(sizes.intermediate, build.rank.count, "units")
        self._count, self._inner = sizes.num_experts, (sizes.matrices - 1) * own
        self._kinds = [(sizes.intermediate, 1)] * (sizes.matrices - 1)
        self._storage, self._moe = self._stored_as(name), build.kernels["moe"]
        self._shared = None
        if shared is not None and sizes.shared_intermediate == sizes.intermediate:
            self._shared = shared if self._joins(shared) else None
        self._w13, self._w13_scale = self._allocate(self._inner, width)
        self._w2, self._w2_scale = self._allocate(width, own)

    @property
    def has_shared(self) -> bool:
        """True if the shared expert is computed here: it has the size and the format of the others,
        and the kernels are faster with all of them together."""
        return self._shared is not None

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._parameters_of(self._names, range(self._count))
        if self._shared is not None:
            yield from self._parameters_of(self._shared, range(self._count, self._count + 1))

    def _parameters_of(self, names: ExpertNames, experts: range) -> Iterator[tuple[str, Parameter]]:
        size, num_inputs = self._inner // len(names.inputs), len(names.inputs)
        weights = *self._w13.split(size, dim=1), self._w2
        scales: tuple[Scales, ...] = (num_inputs + 1) * (None,)
        if self._w13_scale is not None and self._w2_scale is not None:
            scales = *self._w13_scale.split(size, dim=1), self._w2_scale
        for name, weight, scale in zip((*names.inputs, names.output), weights, scales, strict=True):
            is_stack = len(experts) > 1 and "{}" not in name
            kinds, dim = self._kinds[: len(self._kinds) // num_inputs], int(is_stack)
            if name == names.output:
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

    def _joins(self, shared: ExpertNames) -> bool:
        names = *shared.inputs, shared.output
        stored = {self._weights.storage(name.removesuffix(".weight")) for name in names}
        return bool(self._moe.JOINS_SHARED) and stored == {self._storage}

    def _stored_as(self, name: str) -> Storage:
        weights, names = self._weights, (*self._names.inputs, self._names.output)
        asked = Storage(weights.precision(name))
        if weights.files is None or not all("{}" in own for own in names):
            return asked
        found = {
            weights.storage(own.format(expert).removesuffix(".weight"))
            for expert in range(self._count)
            for own in names
        }
        return found.pop() if len(found) == 1 else asked

    def _allocate(self, rows: int, columns: int) -> tuple[torch.Tensor, Scales]:
        storage, weights = self._storage, self._weights
        count = self._count + self.has_shared
        weight = weights.empty(count, rows, columns, dtype=storage.dtype)
        if storage.dtype is None:
            return weight, None
        shape = storage.scales(rows, columns)
        return weight, weights.empty(count, *shape, dtype=torch.float32)

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
            self._product = self._moe.prepare_8bit(self._w13, up_scale, self._w2, down_scale, dtype)
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
        out: torch.Tensor = self._product(x, weights, experts, shared_gate=shared_gate)
        return out
