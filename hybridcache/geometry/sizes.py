"""Sizes of the layers of a model, as plain numbers: sufficient for every byte and FLOP count.

A mixer *declares* the tensors that it stores per token and per sequence (`Spec`). Byte counts,
the engine's pools and the size of a checkpoint are sums over these declarations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

MOST_LAYERS = 10_000


class ModelError(ValueError):
    """The model is not supported; the message gives the reason in one sentence."""


class SizesError(ModelError):
    """Sizes that no model can have. The message is one sentence with the reason."""


Kind = Literal["kv", "conv", "recurrent"]


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor that a layer stores. A checkpoint copies all tensors of a sequence at a chunk
    boundary."""

    name: str
    shape: tuple[int, ...]
    """For one token (``kv``) or one sequence (the others)."""
    kind: Kind
    """``kv``: keys and values, in the KV dtype. ``conv``: unmodified inputs of the layer, in the
    model's dtype. ``recurrent``: sums, in the dtype of states."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Divisible:
    """Sizes that the ranks of a tensor-parallel model divide among themselves."""

    __slots__ = ()

    divided: ClassVar[tuple[str, ...]] = ()
    """Fields that are divided evenly."""
    copied: ClassVar[tuple[str, ...]] = ()
    """Fields that are divided, or 1 if each unit is replicated on several ranks."""

    def share(self, count: int) -> Self:
        """Return the sizes that one of ``count`` ranks computes and stores. Raises SizesError if
        they cannot be divided evenly."""
        own: dict[str, int] = {}
        for name in (*self.divided, *self.copied):
            size: int = getattr(self, name)
            is_copied = name in self.copied and 0 < size < count and count % size == 0
            what = name.removeprefix("num_").replace("_", " ")
            own[name] = 1 if is_copied else part(size, count, what)
        return replace(self, **own)  # type: ignore[type-var]


class MixerSizes(Divisible, ABC):
    """Sizes of the part of a layer that mixes tokens."""

    __slots__ = ()

    @property
    @abstractmethod
    def keeps(self) -> tuple[Spec, ...]:
        """Stored tensors, in the order in which the engine passes them."""

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query with one key. 0 for a recurrence."""
        return 0

    @abstractmethod
    def num_params(self, hidden: int) -> int:
        """Return the weights that a token is multiplied with in a model of width ``hidden``."""


def part(size: int, count: int, what: str) -> int:
    """Divide ``size`` evenly over ``count`` ranks. Raises SizesError if that is not possible."""
    if size % count:
        raise SizesError(f"{count} ranks cannot divide {size} {what} evenly")
    return size // count


@dataclass(frozen=True, slots=True)
class MLPSizes(Divisible):
    """A dense feed-forward block."""

    divided = ("intermediate",)

    intermediate: int
    matrices: int = 3
    """3 with a gate, 2 without a gate."""

    def num_params(self, hidden: int) -> tuple[int, int]:
        """Return (weights used per token, total weights)."""
        count = self.matrices * hidden * self.intermediate
        return count, count


@dataclass(frozen=True, slots=True)
class ExpertsSizes(Divisible):
    """A mixture of experts. Every expert is divided, so that the load is even for any routing."""

    divided = ("intermediate", "shared_intermediate")

    num_experts: int
    experts_per_token: int
    intermediate: int
    """Inner width of one expert."""
    shared_intermediate: int = 0
    """Inner width of the expert that every token uses. 0 if there is none."""
    width: int | None = None
    """Width of the experts' input if it is projected down first, or None for the model's width."""
    matrices: int = 3

    def num_params(self, hidden: int) -> tuple[int, int]:
        """Return (weights used per token, total weights)."""
        width = self.width or hidden
        expert = self.matrices * width * self.intermediate
        narrowing = 2 * hidden * width if width != hidden else 0
        shared = self.matrices * hidden * self.shared_intermediate
        always = shared + hidden * self.num_experts + narrowing
        return always + self.experts_per_token * expert, always + self.num_experts * expert


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """One layer: zero or more parallel mixers, and optionally a feed-forward block."""

    mixers: tuple[MixerSizes, ...] = ()
    mlp: MLPSizes | ExpertsSizes | None = None

    @property
    def keeps(self) -> tuple[Spec, ...]:
        """Stored tensors of all mixers, in order."""
        return tuple(spec for mixer in self.mixers for spec in mixer.keeps)

    def share(self, count: int) -> LayerSizes:
        mixers = tuple(mixer.share(count) for mixer in self.mixers)
        return LayerSizes(mixers, None if self.mlp is None else self.mlp.share(count))


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of one model."""

    hidden: int
    vocab: int
    layers: tuple[LayerSizes, ...]
    beside: tuple[Spec, ...] = ()
    """Tensors stored outside the layers, by a multi-token head."""

    def specs(self) -> Iterator[Spec]:
        """Yield the stored tensors of all layers in order, then those outside the layers."""
        for layer in self.layers:
            yield from layer.keeps
        yield from self.beside

    @property
    def mixers(self) -> tuple[MixerSizes, ...]:
        return tuple(mixer for layer in self.layers for mixer in layer.mixers)

    @property
    def row_size(self) -> int:
        """Number of KV elements of one token, in and outside the layers."""
        return self.size_of("kv")

    def size_of(self, kind: Kind) -> int:
        """Return the number of elements of one kind, in and outside the layers, for one token or
        sequence."""
        return sum(spec.size for spec in self.specs() if spec.kind == kind)

    def num_params(self) -> tuple[int, int]:
        """Return (weights used per token, total weights), embeddings excluded."""
        mixers = sum(mixer.num_params(self.hidden) for mixer in self.mixers)
        mlps = [layer.mlp.num_params(self.hidden) for layer in self.layers if layer.mlp is not None]
        return mixers + sum(active for active, _ in mlps), mixers + sum(total for _, total in mlps)

    def share(self, count: int) -> ModelSizes:
        """Divide the layers over ``count`` ranks. Width and vocabulary stay whole."""
        return replace(self, layers=tuple(layer.share(count) for layer in self.layers))
