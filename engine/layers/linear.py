"""Dense products, and norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from engine.layers.parameters import Build, Composite, Parameter, Role, Storage
from engine.layers.rank import ALONE, Kinds, Rank, RankCut

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of the weight files, out of those with the same input."""

    name: str
    """Full name without ``.weight``."""
    num_rows: int
    """Number of rows in the files."""
    rows: torch.Tensor | None = None
    """See ``Parameter.rows``."""
    cut: RankCut | None = None
    """See ``Parameter.cut``; a cut of rows."""

    @property
    def num_outputs(self) -> int:
        """Number of rows of this rank."""
        return self.num_rows if self.cut is None else len(self.cut)


def shared(parts: Sequence[Part], kinds: Kinds, rank: Rank) -> list[Part]:
    """Cut ``parts`` for ``rank``. Their outputs together consist of ``kinds``."""
    cuts = rank.cuts([part.num_rows for part in parts], kinds)
    return [replace(part, cut=cut) for part, cut in zip(parts, cuts, strict=True)]


class Linear:
    """``x @ weight.T + bias``. Each row of the result is independent of the number of rows.

    The outputs of all parts are next to each other. The name of a part determines its storage
    format; adjacent parts of the same format are one product.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        build: Build,
        *,
        bias: bool = False,
        weight: torch.Tensor | None = None,
        shares_inputs: bool = False,
        sums: bool = True,
    ) -> None:
        """Make the product.

        ``weight`` is an existing weight for all parts. With ``shares_inputs``, each rank has a part
        of the inputs, and the outputs are summed over ranks. Without ``sums``, the caller sums them
        together with others.
        """
        stacks = groupby(parts, key=lambda part: build.weights.storage(part.name))
        inputs = build.rank.cut((in_features, 1), dim=1) if shares_inputs else None
        self._stacks = [
            _Stack(in_features, list(stacked), storage, build, inputs, bias=bias, weight=weight)
            for storage, stacked in stacks
        ]
        self._kernel = build.kernels["linear"]
        self._rank = build.rank if shares_inputs and sums else ALONE

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for stack in self._stacks:
            yield from stack.parameters()

    def seal(self) -> None:
        products = [stack.product(self._kernel) for stack in self._stacks]
        self._product: Product = self._kernel.join(products)
        self._stacks.clear()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._rank.sum(self._product(x))


class _Stack:
    """Adjacent parts with the same storage format, stacked in one weight."""

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        storage: Storage,
        build: Build,
        inputs: RankCut | None,
        *,
        bias: bool,
        weight: torch.Tensor | None,
    ) -> None:
        if weight is not None:
            storage = Storage(None)
        self._parts, self._storage, self._weights = parts, storage, build.weights
        self._inputs, self._adds_bias = inputs, inputs is None or build.rank.number == 0
        num_rows, weights = sum(part.num_outputs for part in parts), build.weights
        in_features = in_features if inputs is None else len(inputs)
        self._weight = (
            weights.empty(num_rows, in_features, dtype=storage.dtype) if weight is None else weight
        )
        self._scale: torch.Tensor | None = None
        if storage.dtype is not None:
            shape = storage.scales(num_rows, in_features)
            self._scale = weights.empty(*shape, dtype=torch.float32)
        self._bias = weights.empty(num_rows) if bias else None

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        sizes = [part.num_outputs for part in self._parts]
        weights = self._weight.split(sizes)
        scales = len(sizes) * [None] if self._scale is None else self._scale.split(sizes)
        for part, weight, scale in zip(self._parts, weights, scales, strict=True):
            scheme = self._weights.scheme(part.name)
            cut = part.cut or self._inputs
            yield f"{part.name}.weight", Parameter(weight, "matrix", part.rows, scheme, scale, cut)
        if self._bias is not None:
            for part, bias in zip(self._parts, self._bias.split(sizes), strict=True):
                yield f"{part.name}.bias", Parameter(bias, rows=part.rows, cut=part.cut)

    def product(self, kernel: Any) -> Product:
        made: Product
        precision, dtype = self._storage.precision, self._weights.dtype
        if self._bias is not None and not self._adds_bias:
            self._bias.zero_()  # The bias of one rank is in the sum.
        if precision is None:
            made = kernel.prepare(self._weight, self._bias)
        else:
            if self._scale is None:
                quantized, scale = kernel.quantize(self._weight, precision)
            else:
                quantized, scale = self._weight, as_kernels_take(self._scale)
            options = self._weights.product_options(precision)
            made = kernel.prepare_8bit(quantized, scale, self._bias, dtype, **options)
        return made


def as_kernels_take(scale: torch.Tensor) -> torch.Tensor:
    """Return scales ``[..., M, blocks]`` as ``[..., M]`` if a row has one block."""
    return scale.squeeze(-1) if scale.shape[-1] == 1 else scale


class RMSNorm(Composite):
    """``x / rms(x) * weight``. With ``centred`` the weight is stored around zero: ``* (1 +
    weight)``."""

    def __init__(
        self, name: str, size: int, build: Build, *, eps: float, centred: bool = False
    ) -> None:
        self.size, self.eps, self._offset = size, eps, 1.0 if centred else 0.0
        self.weight = build.weights.empty(size)
        role: Role = "centred_norm" if centred else "norm"
        self.own = [(f"{name}.weight", Parameter(self.weight, role))]
        self._norm = build.kernels["norm"].rms_norm

    def seal(self) -> None:
        super().seal()
        self.weight = self.weight.float() + self._offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm of x + residual, x + residual). ``residual`` is None in the first layer."""
        if residual is None:
            return self(x), x
        return self._norm(x, self.weight, self.eps, residual=residual)
