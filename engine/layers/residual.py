"""Blocks around the residual stream, of which a decoder consists.

A mixer runs in three parts: ``project`` (input product), ``mix`` (attention or scan), ``finish``
(output product). The first and last are dense and can be captured as device graphs; the middle one
works on the pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch

from engine.layers.inputs import LayerInputs, Pools, Rows
from engine.layers.linear import RMSNorm
from engine.layers.parameters import Composite, Layer
from hybridcache.geometry.sizes import Spec

B = TypeVar("B", bound=Layer)


class Mixer(Layer, Protocol):
    """A block that reads other tokens: attention, a scan, or several in parallel."""

    @property
    def keeps(self) -> tuple[Spec, ...]:
        """Declared tensors per token and per sequence; ``mix`` gets a pool for each."""
        ...

    @property
    def projected_size(self) -> int:
        """Number of values that ``project`` returns per token."""
        ...

    @property
    def mixed_shape(self) -> tuple[int, ...]:
        """Shape of the result of ``mix`` per token."""
        ...

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Convert ``[num_rows, H]`` to ``[num_rows, projected_size]``."""
        ...

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Return ``[T, *mixed_shape]`` and update the pools."""
        ...

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the block's output, ``[num_rows, H]``."""
        ...


class FeedForward(Layer, Protocol):
    """A block that processes each token separately."""

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Convert ``[num_rows, H]`` to the same shape; ``rows`` are those that are tokens."""
        ...


class Residual(Composite, Generic[B]):
    """A block with its norms, before it (pre-norm), after it (post-norm) or both, and the
    multiplier of its output."""

    def __init__(
        self,
        block: B,
        *,
        before: RMSNorm | None = None,
        after: RMSNorm | None = None,
        multiplier: float = 1.0,
    ) -> None:
        self.block = block
        self._before, self._after, self._multiplier = before, after, multiplier
        self.layers = [part for part in (before, block, after) if part is not None]

    def enter(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the block's input, the residual stream).

        ``hidden`` is the output of the previous block, not yet added; ``residual`` is the stream
        before that block, or None.
        """
        if self._before is not None:
            return self._before.add(hidden, residual)
        stream = hidden if residual is None else hidden + residual
        return stream, stream

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the block's output in the form that is added to the stream."""
        if self._after is not None:
            hidden = self._after(hidden)
        return hidden if self._multiplier == 1.0 else hidden * self._multiplier


class MixerStep(Residual[Mixer]):
    """A mixer and its norms."""

    def project(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the mixer's input product, the residual stream)."""
        normed, residual = self.enter(hidden, residual)
        return self.block.project(normed), residual

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the output that is added to the stream."""
        return self.leave(self.block.finish(mixed, projected))


class FeedForwardStep(Residual[FeedForward]):
    """An MLP or experts, and their norms."""

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the output that is added to the stream, the stream)."""
        normed, residual = self.enter(hidden, residual)
        return self.leave(self.block(normed, rows)), residual


class Parallel(Composite):
    """Mixers in parallel on one input, with summed outputs."""

    def __init__(self, mixers: Sequence[Mixer]) -> None:
        self.layers = self.mixers = mixers
        self.keeps = tuple(spec for mixer in mixers for spec in mixer.keeps)
        self._inputs = [mixer.projected_size for mixer in mixers]
        self._outputs = [torch.Size(mixer.mixed_shape).numel() for mixer in mixers]
        self.projected_size, self.mixed_shape = sum(self._inputs), (sum(self._outputs),)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([mixer.project(hidden) for mixer in self.mixers], dim=-1)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        mixed, first = [], 0
        for mixer, part in zip(self.mixers, projected.split(self._inputs, dim=-1), strict=True):
            own = pools[first : first + len(mixer.keeps)]
            first += len(own)
            mixed.append(mixer.mix(part, inputs, own).flatten(1))
        return torch.cat(mixed, dim=-1)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        parts = zip(
            self.mixers,
            mixed.split(self._outputs, dim=-1),
            projected.split(self._inputs, dim=-1),
            strict=True,
        )
        outs = [
            mixer.finish(own.unflatten(-1, mixer.mixed_shape), part) for mixer, own, part in parts
        ]
        return sum(outs[1:], outs[0])


class Scaled(Composite):
    """``output * mixer(input * x)``."""

    def __init__(self, mixer: Mixer, *, input: float, output: float) -> None:
        self._mixer, self._input, self._output = mixer, input, output
        self.layers = (mixer,)
        self.keeps, self.mixed_shape = mixer.keeps, mixer.mixed_shape
        self.projected_size = mixer.projected_size

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._mixer.project(hidden if self._input == 1.0 else hidden * self._input)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        return self._mixer.mix(projected, inputs, pools)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        out = self._mixer.finish(mixed, projected)
        return out if self._output == 1.0 else out * self._output
