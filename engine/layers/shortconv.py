"""A short causal convolution between two gates. Its state consists of its last few inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.layers.inputs import LayerInputs, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.parameters import Build, Parameter
from engine.runner.memory import Pools
from hybridcache.geometry.mixers import ShortConvSizes
from hybridcache.geometry.shares import share


class ShortConv:
    """``out(C * conv(B * x))``; B, C and x are one product ``[B | C | x]``."""

    def __init__(
        self, name: str, hidden_size: int, sizes: ShortConvSizes, build: Build, *, bias: bool
    ) -> None:
        """``bias``: True if both products and the convolution have one."""
        channels = sizes.channels, 1
        inputs = shared([Part(f"{name}.in_proj", 3 * sizes.channels)], [channels] * 3, build.rank)
        outputs = [Part(f"{name}.out_proj", hidden_size)]
        self._projection = Linear(hidden_size, inputs, build, bias=bias)
        self._output = Linear(sizes.channels, outputs, build, bias=bias, shares_inputs=True)
        self._cut, sizes = build.rank.cut(channels), share(sizes, build.rank.count)
        self.name, self.keeps = name, sizes.keeps
        width = sizes.channels
        self.projected_size, self.mixed_shape = 3 * width, (width,)
        self._weight = build.weights.empty(width, sizes.conv_width)
        self._bias = build.weights.empty(width) if bias else None
        self._conv1d = build.kernels["conv1d"]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._projection.parameters()
        yield f"{self.name}.conv.weight", Parameter(self._weight.unsqueeze(1), cut=self._cut)
        if self._bias is not None:
            yield f"{self.name}.conv.bias", Parameter(self._bias, cut=self._cut)
        yield from self._output.parameters()

    def seal(self) -> None:
        self._projection.seal()
        self._output.seal()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._projection(hidden)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Convolve, starting from each sequence's window and updating it in its slot. Returns ``[T,
        C]``."""
        gate, _, x = projected[: inputs.num_tokens].chunk(3, dim=-1)
        x, (windows,), outs = gate * x, pools, []
        if inputs.decode is not None:
            outs.append(
                self._conv1d.decode_conv1d(
                    x[: inputs.num_decode],
                    self._weight,
                    self._bias,
                    states=windows,
                    slots=inputs.decode.slots,
                    silu=False,
                )
            )
        if inputs.prefill is not None:
            part = inputs.prefill
            outs.append(
                self._conv1d.prefill_conv1d(
                    x[inputs.num_decode :],
                    self._weight,
                    self._bias,
                    states=windows,
                    packed=part.packed,
                    slots=part.slots,
                    resumed=part.resumed,
                    exports=part.exports,
                    silu=False,
                )
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, ``[num_rows, H]``."""
        gate = projected[: len(mixed)].chunk(3, dim=-1)[1]
        return self._output(pad_rows(gate * mixed, len(projected)))
