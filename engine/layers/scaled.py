"""A mixer with multiplied input and output, as in muP."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.layers.inputs import LayerInputs
from engine.layers.parameters import Parameter
from engine.layers.residual import Mixer, verifies
from engine.runner.memory import Pools


class Scaled:
    """``output * mixer(input * x)``."""

    def __init__(self, mixer: Mixer, *, input: float, output: float) -> None:
        self._mixer, self._input, self._output = mixer, input, output
        self.keeps, self.mixed_shape = mixer.keeps, mixer.mixed_shape
        self.projected_size, self.verifies = mixer.projected_size, verifies(mixer)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._mixer.parameters()

    def seal(self) -> None:
        self._mixer.seal()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._mixer.project(hidden if self._input == 1.0 else hidden * self._input)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        return self._mixer.mix(projected, inputs, pools)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        out = self._mixer.finish(mixed, projected)
        return out if self._output == 1.0 else out * self._output
