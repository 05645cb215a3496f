"""Which part of a model this process has, and how parts become wholes: what layers know of ranks.

A dimension that is shared out is made of kinds of units, one after the other: heads of queries,
heads of keys ... Every rank has the same number of neighbouring units of each kind. Where a kind
has fewer units than there are ranks, neighbours have the same unit; a kind of one unit is
everybody's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.recording import repeated

Kinds = Sequence[tuple[int, int]]
"""Units of each kind, and numbers in one of them."""


class Group(ABC):
    """Collectives among all ranks; each is called by all of them, in the same order. Sums and
    wholes are repeated with what is being recorded."""

    def __init__(self, count: int, spin_s: float = 0.0) -> None:
        """``spin_s``: how long a rank asks again and again for what it waits for."""
        self.count, self.spin_s = count, spin_s

    @abstractmethod
    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's ``x``, all of one shape, in the order of ranks: on every rank."""

    def sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``x`` of all ranks, added in their order in float32 and rounded once, into ``out``."""
        repeated(self._sum, x, out)

    def join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Every rank's ``x [T, span(C)]``, side by side, into ``out [T, C]``."""
        repeated(self._join, x, out)

    def check(self) -> None:
        """RunnerLost: an exchange since the last call broke off, and what was computed since is
        worth nothing. Here an exchange says so itself."""
        return

    @abstractmethod
    def set_timeout(self, seconds: float) -> None:
        """Of one exchange, from now on."""

    def _sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        first, *others = self.gather(x.contiguous())
        total = first.float()
        for other in others:
            total = total + other.float()
        out.copy_(total)

    def _join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """All parts are exchanged as wide as the widest."""
        spans = [Rank(number, self.count).span(out.shape[1]) for number in range(self.count)]
        counts = [len(span) for span in spans]
        parts = self.gather(F.pad(x, (0, max(counts) - x.shape[1])))
        columns = [part[:, :count] for part, count in zip(parts, counts, strict=True)]
        torch.cat(columns, dim=-1, out=out)


@dataclass(frozen=True, slots=True)
class RankCut:
    """The part of a tensor of the weight files that one rank has: some of it along one
    dimension."""

    size: int
    """Of the dimension in the file."""
    index: torch.Tensor
    """int64: what the rank has of it, ascending."""
    dim: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a whole ``tensor``."""
        before, span = (slice(None),) * self.dim, self.span
        return tensor[(*before, self.index.to(tensor.device) if span is None else span)]

    @property
    def span(self) -> slice | None:
        """What the index is, where it has no gaps."""
        first, end = int(self.index[0]), int(self.index[-1]) + 1
        return slice(first, end) if end - first == len(self.index) else None

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape in the file of what is ``shape`` here."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Rank:
    """One of ``count`` processes that share a model; by default the only one."""

    number: int = 0
    count: int = 1
    group: Group | None = None
    """None: the only one."""

    def cut(self, *kinds: tuple[int, int], dim: int = 0) -> RankCut | None:
        """What this rank has of a tensor whose dimension ``dim`` is made of ``kinds``; None: all
        of it."""
        (made,) = self.cuts([sum(units * width for units, width in kinds)], kinds, dim=dim)
        return made

    def cuts(self, sizes: Sequence[int], kinds: Kinds, *, dim: int = 0) -> list[RankCut | None]:
        """The same of several tensors that together make up the dimension, ``sizes`` of it each:
        borders of kinds need not be theirs."""
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
        """What this rank has of ``size`` rows, which need not be a multiple of the ranks."""
        return range(
            self.number * size // self.count,
            (self.number + 1) * size // self.count,
        )

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of all ranks, added in their order whoever adds: the same bits on each. In float32,
        rounded once."""
        if self.group is None:
            return x
        out = x.new_empty(x.shape)
        self.group.sum(x, out)
        return out

    def join(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """``[T, size]`` of every rank's columns ``x [T, span(size)]``."""
        if self.group is None:
            return x
        out = x.new_empty(len(x), size)
        self.group.join(x, out)
        return out


ALONE = Rank()
