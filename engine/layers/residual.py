"""How blocks stand around the residual stream: what a decoder is a list of.

A mixer runs in three parts, so that the dense ones can be captured as device graphs around the
middle one, which works on the pools: ``project`` (input product), ``mix`` (attention or scan),
``finish`` (output product).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from engine.layers.inputs import LayerInputs
from engine.layers.norm import RMSNorm
from engine.layers.parameters import Layer, Parameter
from engine.runner.memory import Pools
from hybridcache.geometry.sizes import Spec

B = TypeVar("B", bound=Layer)


class Mixer(Layer, Protocol):
    """A block that looks at other tokens: attention, a scan, or several side by side."""

    @property
    def keeps(self) -> tuple[Spec, ...]:
        """What it keeps of every token and every sequence; ``mix`` gets a pool for each."""
        ...

    @property
    def projected_size(self) -> int:
        """Numbers that ``project`` gives for each token."""
        ...

    @property
    def mixed_shape(self) -> tuple[int, ...]:
        """Of what ``mix`` gives for each token."""
        ...

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[num_rows, H]`` to ``[num_rows, projected_size]``."""
        ...

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """``[T, *mixed_shape]``; moves the pools on. A mixer that computes ``inputs.verify`` too
        says so by an attribute ``verifies``; for others ``stepwise`` decodes."""
        ...

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """The block's output, ``[num_rows, H]``."""
        ...


def verifies(mixer: Mixer) -> bool:
    """Whether ``mixer`` can compute several tokens of a sequence and keep the state after each."""
    return getattr(mixer, "verifies", False)


class FeedForward(Layer, Protocol):
    """A block that works on each token alone."""

    def __call__(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """``[num_rows, H]`` to the same; rows past ``num_tokens`` are padding."""
        ...


class Residual(Generic[B]):
    """The norms of one block, before it (pre-norm), behind it (post-norm) or both, and what its
    output is multiplied with on its way into the residual stream."""

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
        self._parts: list[Layer] = [part for part in (before, block, after) if part is not None]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for part in self._parts:
            yield from part.parameters()

    def seal(self) -> None:
        for part in self._parts:
            part.seal()

    def enter(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the block's input, the residual stream), of the output of the block before, not yet
        added, and the stream before that; None: there is none."""
        if self._before is not None:
            return self._before.add(hidden, residual)
        stream = hidden if residual is None else hidden + residual
        return stream, stream

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output as it is to be added."""
        if self._after is not None:
            hidden = self._after(hidden)
        return hidden if self._multiplier == 1.0 else hidden * self._multiplier


class MixerStep(Residual[Mixer]):
    """A mixer and its norms."""

    def project(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the mixer's input product, the residual stream)."""
        normed, residual = self.enter(hidden, residual)
        return self.block.project(normed), residual

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """What is to be added to the stream."""
        return self.leave(self.block.finish(mixed, projected))


class FeedForwardStep(Residual[FeedForward]):
    """An MLP or experts, and their norms."""

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is to be added to the stream, the stream)."""
        normed, residual = self.enter(hidden, residual)
        return self.leave(self.block(normed, num_tokens)), residual


class Parallel:
    """Mixers side by side on one input, their outputs summed."""

    def __init__(self, mixers: Sequence[Mixer]) -> None:
        self.mixers = mixers
        self.keeps = tuple(spec for mixer in mixers for spec in mixer.keeps)
        self.verifies = all(verifies(mixer) for mixer in mixers)
        self._inputs = [mixer.projected_size for mixer in mixers]
        self._outputs = [torch.Size(mixer.mixed_shape).numel() for mixer in mixers]
        self.projected_size, self.mixed_shape = sum(self._inputs), (sum(self._outputs),)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for mixer in self.mixers:
            yield from mixer.parameters()

    def seal(self) -> None:
        for mixer in self.mixers:
            mixer.seal()

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
