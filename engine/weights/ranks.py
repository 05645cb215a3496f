"""Division of a model's weights among the ranks of tensor parallelism.

A dimension that is divided consists of kinds of units, one after the other: heads of queries, heads
of keys, and so on. Every rank has the same number of adjacent units of each kind. If a kind has
fewer units than there are ranks, adjacent ranks share a unit; a kind with one unit is on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from kernels.recording import repeated

Kinds = Sequence[tuple[int, int]]
"""Number of units of each kind, and size of a unit."""


class Group(Protocol):
    """Exchange among all ranks."""

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's ``x``, all of one shape, in the order of ranks. All ranks call it in
        the same order."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Part of a tensor of the weight files that is used, along one dimension."""

    size: int
    """Size of the dimension in the file."""
    index: torch.Tensor
    """int64: indices in the file, in the order in which they are used."""
    dim: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this part of a whole ``tensor``: a view if it has neither gaps nor a new order."""
        if self.index.diff().ne(1).any():
            return tensor.index_select(self.dim, self.index.to(tensor.device))
        return tensor.narrow(self.dim, int(self.index[0]), len(self.index))

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in the file of a tensor with the ``shape`` of this part."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Rank:
    """One of ``count`` processes that share a model; by default the only one."""

    number: int = 0
    count: int = 1
    group: Group | None = None
    """Collectives, or None for a single rank."""

    def cut(self, *kinds: tuple[int, int], dim: int = 0) -> Cut | None:
        """Return this rank's part of a dimension ``dim`` made of ``kinds``, or None for all."""
        (made,) = self.cuts([sum(units * width for units, width in kinds)], kinds, dim=dim)
        return made

    def cuts(self, sizes: Sequence[int], kinds: Kinds, *, dim: int = 0) -> list[Cut | None]:
        """Return the parts of several tensors that together make up the dimension. ``sizes`` are
        theirs; borders of kinds may be inside a tensor."""
        if self.count == 1 or not kinds:
            return [None] * len(sizes)
        held, first, made = self._held(kinds), 0, []
        for size in sizes:
            own = held[(held >= first) & (held < first + size)] - first
            made.append(Cut(size, own, dim))
            first += size
        return list(made)

    def _held(self, kinds: Kinds) -> torch.Tensor:
        spans, first = [], 0
        for units, width in kinds:
            begin = self.number * units // self.count
            end = begin + max(1, units // self.count)
            spans.append(torch.arange(first + begin * width, first + end * width))
            first += units * width
        return torch.cat(spans)

    def span(self, size: int) -> range:
        """Return this rank's part of ``size`` rows, which need not be a multiple of the ranks."""
        return range(
            self.number * size // self.count,
            (self.number + 1) * size // self.count,
        )

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over all ranks in float32, rounded once. The fixed order gives the same bits on
        each rank."""
        out = x.new_empty(x.shape)
        repeated(self._sum, x, out)  # Replayed with recorded steps, like ``_join``.
        return out

    def join(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Concatenate every rank's columns ``x [T, span(size)]`` to ``[T, size]``."""
        out = x.new_empty(len(x), size)
        repeated(self._join, x, out)
        return out

    def _sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        assert self.group is not None
        first, *others = self.group.gather(x.contiguous())
        out.copy_(sum((other.float() for other in others), first.float()))

    def _join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Concatenate parts that are padded to the width of the widest."""
        assert self.group is not None
        ranks = [Rank(number, self.count) for number in range(self.count)]
        counts = [len(rank.span(out.shape[1])) for rank in ranks]
        parts = self.group.gather(F.pad(x, (0, max(counts) - x.shape[1])))
        columns = [part[:, :count] for part, count in zip(parts, counts, strict=True)]
        torch.cat(columns, dim=-1, out=out)


ALONE = Rank()
