"""Short causal convolution: a part of recurrent mixers, and a mixer between two gates."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.layers.inputs import LayerInputs, Pools, PrefillPart, StepPart, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.parameters import Build, Composite, Parameter
from hybridcache.geometry.mixers import ShortConvSizes


class CausalConv:
    """Convolution of each channel over its last few inputs, which are its state, the window."""

    def __init__(
        self, channels: int, width: int, build: Build, *, bias: bool = False, silu: bool = True
    ) -> None:
        """``silu``: True to apply SiLU to the sums."""
        self.weight = build.weights.empty(channels, width)
        self.bias = build.weights.empty(channels) if bias else None
        self._kernel, self._silu = build.kernels["conv1d"], silu

    def __call__(self, x: torch.Tensor, part: StepPart, windows: torch.Tensor) -> torch.Tensor:
        """Convolve the tokens ``[T, C]`` of a part of the step, and update its windows."""
        kernel, is_prefill = self._kernel, isinstance(part, PrefillPart)
        convolve = kernel.prefill_conv1d if is_prefill else kernel.decode_conv1d
        out: torch.Tensor = convolve(
            x, self.weight, self.bias, states=windows, silu=self._silu, **part.scan_inputs
        )
        return out


class ShortConv(Composite):
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
        self.layers = self._projection, self._output
        self._cut, sizes = build.rank.cut(channels), sizes.share(build.rank.count)
        self.name, self.keeps = name, sizes.keeps
        width = sizes.channels
        self.projected_size, self.mixed_shape = 3 * width, (width,)
        self._conv = CausalConv(width, sizes.conv_width, build, bias=bias, silu=False)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._projection.parameters()
        yield f"{self.name}.conv.weight", Parameter(self._conv.weight.unsqueeze(1), cut=self._cut)
        if self._conv.bias is not None:
            yield f"{self.name}.conv.bias", Parameter(self._conv.bias, cut=self._cut)
        yield from self._output.parameters()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._projection(hidden)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Convolve, starting from each sequence's window and updating it in its slot. Returns ``[T,
        C]``."""
        gate, _, x = projected[: inputs.num_tokens].chunk(3, dim=-1)
        x, (windows,) = gate * x, pools
        return inputs.by_part(lambda part, tokens: self._conv(x[tokens], part, windows))

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, ``[num_rows, H]``."""
        gate = projected[: len(mixed)].chunk(3, dim=-1)[1]
        return self._output(pad_rows(gate * mixed, len(projected)))
