"""Parts of a model for tensor parallelism, and the collectives that layers use.

A dimension that is divided consists of kinds of units, one after the other: heads of queries, heads
of keys, and so on. Every rank has the same number of adjacent units of each kind. If a kind has
fewer units than there are ranks, adjacent ranks share a unit; a kind with one unit is on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.recording import repeated

Kinds = Sequence[tuple[int, int]]
"""Number of units of each kind, and size of a unit."""


class Group(ABC):
    """Collectives among all ranks. All ranks call each of them, in the same order. Sums and joins
    are replayed with recorded steps."""

    def __init__(self, count: int, spin_s: float = 0.0) -> None:
        """``spin_s``: time that a rank polls for a message before it sleeps."""
        self.count, self.spin_s = count, spin_s

    @abstractmethod
    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's ``x``, all of one shape, in the order of ranks."""

    def sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add ``x`` of all ranks, in their order in float32 and rounded once, into ``out``."""
        repeated(self._sum, x, out)

    def join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Concatenate every rank's ``x [T, span(C)]`` into ``out [T, C]``."""
        repeated(self._join, x, out)

    def check(self) -> None:
        """Raise RunnerLost if an exchange failed since the last call, so that the results since
        then are invalid. Here the exchange itself raises."""
        return

    @abstractmethod
    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of each further exchange."""

    def _sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        first, *others = self.gather(x.contiguous())
        total = first.float()
        for other in others:
            total = total + other.float()
        out.copy_(total)

    def _join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Concatenate parts that are padded to the width of the widest."""
        spans = [Rank(number, self.count).span(out.shape[1]) for number in range(self.count)]
        counts = [len(span) for span in spans]
        parts = self.gather(F.pad(x, (0, max(counts) - x.shape[1])))
        columns = [part[:, :count] for part, count in zip(parts, counts, strict=True)]
        torch.cat(columns, dim=-1, out=out)


@dataclass(frozen=True, slots=True)
class RankCut:
    """The part of a tensor of the weight files that one rank has, along one dimension."""

    size: int
    """Size of the dimension in the file."""
    index: torch.Tensor
    """int64: indices of the rank, ascending."""
    dim: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this part of a whole ``tensor``."""
        before, span = (slice(None),) * self.dim, self.span
        return tensor[(*before, self.index.to(tensor.device) if span is None else span)]

    @property
    def span(self) -> slice | None:
        """The index as a slice, or None if it has gaps."""
        first, end = int(self.index[0]), int(self.index[-1]) + 1
        return slice(first, end) if end - first == len(self.index) else None

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in the file of a tensor with ``shape`` on this rank."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Rank:
    """One of ``count`` processes that share a model; by default the only one."""

    number: int = 0
    count: int = 1
    group: Group | None = None
    """Collectives, or None for a single rank."""

    def cut(self, *kinds: tuple[int, int], dim: int = 0) -> RankCut | None:
        """Return this rank's part of a tensor with a dimension ``dim`` made of ``kinds``, or None
        for all of it."""
        (made,) = self.cuts([sum(units * width for units, width in kinds)], kinds, dim=dim)
        return made

    def cuts(self, sizes: Sequence[int], kinds: Kinds, *, dim: int = 0) -> list[RankCut | None]:
        """Return the parts of several tensors that together make up the dimension. ``sizes`` are
        theirs; borders of kinds may be inside a tensor."""
        if self.count == 1:
            return [None] * len(sizes)
        held, first, made = self._held(kinds), 0, []
        for size in sizes:
            own = held[(held >= first) & (held < first + size)] - first
            made.append(RankCut(size, own, dim))
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
        if self.group is None:
            return x
        out = x.new_empty(x.shape)
        self.group.sum(x, out)
        return out

    def join(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Concatenate every rank's columns ``x [T, span(size)]`` to ``[T, size]``."""
        if self.group is None:
            return x
        out = x.new_empty(len(x), size)
        self.group.join(x, out)
        return out


ALONE = Rank()
