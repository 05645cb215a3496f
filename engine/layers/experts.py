"""Weights of experts, with any names in the files and any storage format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.layers.linear import as_kernels_take
from engine.layers.parameters import Build, Parameter, Storage
from hybridcache.geometry.shares import part
from hybridcache.geometry.sizes import ExpertsSizes

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
        self, name: str, width: int, sizes: ExpertsSizes, names: ExpertNames, build: Build
    ) -> None:
        """``name``: common name, which selects the precision. ``width``: size of their input."""
        self._names, self._weights = names, build.weights
        self._rank, own = build.rank, part(sizes.intermediate, build.rank.count, "units")
        self._count, self._inner = sizes.num_experts, (sizes.matrices - 1) * own
        self._kinds = [(sizes.intermediate, 1)] * ((sizes.matrices - 1) // len(names.inputs))
        self._storage = self._stored_as(name)
        self._w13, self._w13_scale = self._allocate(self._inner, width)
        self._w2, self._w2_scale = self._allocate(width, own)
        self._moe = build.kernels["moe"]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        names, size = self._names, self._inner // len(self._names.inputs)
        weights = *self._w13.split(size, dim=1), self._w2
        scales: tuple[Scales, ...] = (len(names.inputs) + 1) * (None,)
        if self._w13_scale is not None and self._w2_scale is not None:
            scales = *self._w13_scale.split(size, dim=1), self._w2_scale
        for name, weight, scale in zip((*names.inputs, names.output), weights, scales, strict=True):
            is_each, kinds = "{}" in name, self._kinds
            dim = 0 if is_each else 1
            if name == names.output:
                kinds, dim = kinds[:1], dim + 1
            cut = self._rank.cut(*kinds, dim=dim)
            if not is_each:
                yield name, Parameter(weight, cut=cut)
                continue
            for expert in range(self._count):
                own = name.format(expert)
                scheme = self._weights.scheme(own.removesuffix(".weight"))
                factor = None if scale is None else scale[expert]
                yield own, Parameter(weight[expert], scheme=scheme, scale=factor, cut=cut)

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
        weight = weights.empty(self._count, rows, columns, dtype=storage.dtype)
        if storage.dtype is None:
            return weight, None
        shape = storage.scales(rows, columns)
        return weight, weights.empty(self._count, *shape, dtype=torch.float32)

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
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        """Compute this rank's summand of the output ``[T, width]`` from ``x`` of the same shape;
        ``weights`` and ``experts`` are ``[T, k]``."""
        out: torch.Tensor = self._product(x, weights, experts)
        return out
