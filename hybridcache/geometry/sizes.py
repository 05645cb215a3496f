"""What the layers of a model are made of, as plain numbers: enough for every byte and every FLOP.

A mixer *declares* what it keeps: `KVSpec` for each token, `StateSpec` for each sequence. Byte
counts, the engine's pools and what a checkpoint costs are sums over these declarations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

MOST_LAYERS = 10_000


class SizesError(ValueError):
    """Sizes that no model can have, in one sentence that says why."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """One tensor that every token leaves in a layer, in the dtype of the KV."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor that a layer keeps for every sequence. A checkpoint is a copy of all of them, as
    they are at a chunk boundary."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["conv", "recurrent"]
    """``conv``: inputs of the layer as they were, in the model's dtype. ``recurrent``: sums, in the
    dtype of states."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


Spec = KVSpec | StateSpec


class MixerSizes(Protocol):
    """The part of a layer that looks at other tokens."""

    @property
    def keeps(self) -> tuple[Spec, ...]:
        """What it keeps, in the order in which the engine hands it over."""
        ...

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query with one key; 0 for a recurrence."""
        ...

    def num_params(self, hidden: int) -> int:
        """Weights a token is multiplied with, of a model that is ``hidden`` wide."""
        ...


@dataclass(frozen=True, slots=True)
class MLPSizes:
    """A dense feed-forward block."""

    intermediate: int
    matrices: int = 3
    """3 with a gate, 2 without."""

    def num_params(self, hidden: int) -> tuple[int, int]:
        """(weights that one token meets, weights in all)."""
        count = self.matrices * hidden * self.intermediate
        return count, count


@dataclass(frozen=True, slots=True)
class ExpertsSizes:
    """A mixture of experts."""

    num_experts: int
    experts_per_token: int
    intermediate: int
    """Of one expert."""
    shared_intermediate: int = 0
    """Of what every token meets beside its experts; 0: nothing."""
    width: int | None = None
    """Of the experts' input where it is narrowed before them; None: the model's."""
    matrices: int = 3

    def num_params(self, hidden: int) -> tuple[int, int]:
        """(weights that one token meets, weights in all)."""
        width = self.width or hidden
        expert = self.matrices * width * self.intermediate
        narrowing = 2 * hidden * width if width != hidden else 0
        shared = self.matrices * hidden * self.shared_intermediate
        always = shared + hidden * self.num_experts + narrowing
        return always + self.experts_per_token * expert, always + self.num_experts * expert


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """One layer: one mixer, none, or several side by side; and a feed-forward block or none."""

    mixers: tuple[MixerSizes, ...] = ()
    mlp: MLPSizes | ExpertsSizes | None = None

    @property
    def keeps(self) -> tuple[Spec, ...]:
        """Of all its mixers, one after the other."""
        return tuple(spec for mixer in self.mixers for spec in mixer.keeps)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """One model."""

    hidden: int
    vocab: int
    layers: tuple[LayerSizes, ...]
    beside: tuple[Spec, ...] = ()
    """What is kept beside the layers: a multi-token head's keys, values and hidden vector."""

    def specs(self) -> Iterator[Spec]:
        """What all layers keep, in their order, and what is kept beside them."""
        for layer in self.layers:
            yield from layer.keeps
        yield from self.beside

    @property
    def mixers(self) -> tuple[MixerSizes, ...]:
        """Of all layers."""
        return tuple(mixer for layer in self.layers for mixer in layer.mixers)

    @property
    def row_size(self) -> int:
        """Numbers of one token's KV in all layers, and beside them."""
        return sum(spec.size for spec in self.specs() if isinstance(spec, KVSpec))

    def state_size(self, dtype: Literal["conv", "recurrent"]) -> int:
        """Numbers of one sequence's states of one kind in all layers, and beside them."""
        return sum(
            spec.size
            for spec in self.specs()
            if isinstance(spec, StateSpec) and spec.dtype == dtype
        )

    def num_params(self) -> tuple[int, int]:
        """(weights that one token meets, weights in all), embeddings excluded."""
        mixers = sum(mixer.num_params(self.hidden) for mixer in self.mixers)
        mlps = [layer.mlp.num_params(self.hidden) for layer in self.layers if layer.mlp is not None]
        return mixers + sum(active for active, _ in mlps), mixers + sum(total for _, total in mlps)
