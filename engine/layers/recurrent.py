"""Recurrent mixers: a short causal convolution, and a scan after it. Gated DeltaNet and Mamba-2 are
here; a mixer of one family is in the file of its family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from engine.layers.blocks import LayerInputs, OneProduct, Pools, PrefillPart, StepPart, pad_rows
from engine.weights.model_config import ModelError
from engine.weights.parameters import Build, Kinds, Parameter
from engine.weights.products import SCALE_BLOCK, Linear, Part, QuantizedRows
from hybridcache.geometry.mixers import DeltaSizes, MambaSizes
from hybridcache.geometry.sizes import Spec
from kernels.gdn import reference as gdn
from kernels.mamba2 import reference as mamba2


class CausalConv:
    """Convolution of each channel over its last few inputs, which are its state, the window."""

    def __init__(
        self, channels: int, width: int, build: Build, *, bias: bool = False, silu: bool = True
    ) -> None:
        """``silu``: True to apply SiLU to the sums."""
        self.weight = build.weights.empty(channels, width)
        self.bias = build.weights.empty(channels) if bias else None
        self._kernel, self._silu, self._build = build.kernels["conv1d"], silu, build

    def parameters(
        self, channels: Mapping[str, int], kinds: Kinds
    ) -> Iterator[tuple[str, Parameter]]:
        """Yield the parameters of convolutions that follow each other, by name with their numbers
        of channels in the files, which together consist of ``kinds``."""
        for word, target in (("weight", self.weight.unsqueeze(1)), ("bias", self.bias)):
            if target is not None:
                sizes = {f"{name}.{word}": count for name, count in channels.items()}
                yield from self._build.parameters(sizes, target, kinds)

    def __call__(self, x: torch.Tensor, part: StepPart, windows: torch.Tensor) -> torch.Tensor:
        """Convolve the tokens ``[T, C]`` of a part of the step, and update its windows."""
        kernel, is_prefill = self._kernel, isinstance(part, PrefillPart)
        convolve = kernel.prefill_conv1d if is_prefill else kernel.decode_conv1d
        return convolve(
            x, self.weight, self.bias, states=windows, silu=self._silu, **part.scan_inputs
        )


class Recurrent(OneProduct):
    """Mixer that convolves and scans, from each sequence's state, which it updates in its slot."""

    keeps: tuple[Spec, ...]
    projected_size: int
    mixed_shape: tuple[int, ...]
    _output: Linear
    _conv: CausalConv

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Return ``[T, *mixed_shape]``."""
        x, *gates = self._inputs(projected[: inputs.num_tokens])
        windows, *states = pools

        def mix(part: StepPart, tokens: slice) -> torch.Tensor:
            convolved = self._conv(x[tokens], part, windows)
            return self._scan(convolved, [gate[tokens] for gate in gates], part, *states)

        return inputs.by_part(mix)

    def _inputs(self, projected: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the input of the convolution, and further inputs of the scan."""
        raise NotImplementedError

    def _scan(
        self, x: torch.Tensor, gates: Sequence[torch.Tensor], part: StepPart, *states: torch.Tensor
    ) -> torch.Tensor:
        """Scan one part of the step, after the convolution."""
        raise NotImplementedError

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        gated = self._gated(mixed, projected[: len(mixed)])
        return self._output(pad_rows(gated.flatten(1), len(projected)))

    def _gated(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the input of the last product, from the results of ``mix`` and ``project``."""
        raise NotImplementedError


class GatedDeltaNet(Recurrent):
    """Layer in which all inputs are one product ``[query | key | value | z | b | a]``.

    With 8-bit weights, the gates b and a are a separate product, because their few rows determine
    the whole state.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: DeltaSizes,
        inputs: Sequence[Part],
        build: Build,
        *,
        eps: float,
        convs: Mapping[str, int] | None = None,
        output: str = "out_proj",
        norm: str = "norm",
        max_beta: float = 1.0,
    ) -> None:
        """Make the layer.

        ``inputs`` are the matrices of the input product, in the order of its layout. ``convs`` maps
        the names of the convolutions to their numbers of channels; None means one, ``conv1d``.
        ``output`` and ``norm`` name the last product and the norm before it, with epsilon ``eps``.
        ``max_beta`` is the largest step of the delta rule.
        """
        weights = build.weights
        keys, values = (
            (sizes.num_key_heads, sizes.key_dim),
            (sizes.num_value_heads, sizes.value_dim),
        )
        each, convolved = (sizes.num_value_heads, 1), [keys, keys, values]
        kinds = [*convolved, values, each, each]
        self._projection = Linear(hidden_size, inputs, build, outputs=kinds)
        outputs = [Part(f"{name}.{output}", hidden_size)]
        self._output = Linear(sizes.value_width, outputs, build, sums=True)
        self.layers = self._projection, self._output
        convs = convs or {"conv1d": sizes.conv_channels}
        sizes = build.own(sizes)
        self.keeps, self._eps, self._max_beta = sizes.keeps, eps, max_beta
        heads = sizes.num_value_heads
        self._widths = [sizes.conv_channels, sizes.value_width, heads, heads]
        self.projected_size = sum(self._widths)
        self.mixed_shape = heads, sizes.value_dim
        keys = sizes.num_key_heads, sizes.key_dim
        self._shapes = keys, keys, self.mixed_shape
        self._mixed_sizes = [math.prod(shape) for shape in self._shapes]
        self._conv = CausalConv(sizes.conv_channels, sizes.conv_width, build)
        self._A_log = weights.empty(heads, dtype=torch.float32)
        self._dt_bias = weights.empty(heads, dtype=torch.float32)
        self._norm_weight = weights.empty(sizes.value_dim)
        self._gdn, self._norm = build.kernels["gdn"], build.kernels["norm"]
        named = {f"{name}.{conv}": count for conv, count in convs.items()}
        self.own = [
            *self._conv.parameters(named, convolved),
            build.parameter(f"{name}.A_log", self._A_log, "log_decay", [each]),
            build.parameter(f"{name}.dt_bias", self._dt_bias, "time_bias", [each]),
            build.parameter(f"{name}.{norm}.weight", self._norm_weight, "norm"),
        ]

    def seal(self) -> None:
        super().seal()
        self._norm_weight = self._norm_weight.float()

    def _inputs(self, projected: torch.Tensor) -> Sequence[torch.Tensor]:
        qkv, _, b, a = projected.split(self._widths, dim=-1)
        return qkv, a, b

    def _scan(
        self, x: torch.Tensor, gates: Sequence[torch.Tensor], part: StepPart, *states: torch.Tensor
    ) -> torch.Tensor:
        parts = x.split(self._mixed_sizes, dim=-1)
        heads = [part.view(len(x), *shape) for part, shape in zip(parts, self._shapes, strict=True)]
        gates = *gates, self._A_log, self._dt_bias
        if isinstance(part, PrefillPart):
            prompt = gdn.Prompt(*heads, *self._gdn.gates(*gates, max_beta=self._max_beta))
            return self._gdn.chunk_gdn(prompt, states=states[0], **part.scan_inputs)
        token = gdn.Step(*heads, *gates)
        return self._gdn.decode_gdn(
            token, states=states[0], max_beta=self._max_beta, **part.scan_inputs
        )

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        z = projected[: len(mixed)].split(self._widths, dim=-1)[1].view(mixed.shape)
        norm = mixed, self._norm_weight, z, self._eps
        is_whole = len(mixed) == len(projected) and mixed.shape[-1] % SCALE_BLOCK == 0
        if is_whole and self._output.takes_fp8_rows:
            return self._output(self._norm.gated_rms_norm_rows(*norm))
        gated = self._norm.gated_rms_norm(*norm).flatten(1)
        return self._output(pad_rows(gated, len(projected)))


class Mamba2(Recurrent):
    """Layer in which all inputs are one product ``[z | x | B | C | dt]``."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: MambaSizes,
        build: Build,
        *,
        eps: float | None,
        gate_first: bool = True,
        limits: tuple[float, float],
        bias: bool = False,
        output_bias: bool = False,
        conv_bias: bool = True,
        multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0),
    ) -> None:
        """Make the layer.

        ``eps`` is the epsilon of the norm before the output product, over each group of channels,
        or None if the output is only gated. ``gate_first`` is True if the gate is applied before
        that norm, False if after it. ``limits`` are those of time steps. ``bias``,
        ``output_bias`` and ``conv_bias`` are True for the products and the convolution with a bias.
        ``multipliers`` are those of z, x, B, C and dt.
        """
        if eps is not None and sizes.num_groups % build.rank.count:
            raise ModelError(
                f"--tp {build.rank.count} is not supported if the norm after a scan covers the "
                f"parts of several ranks: {name} has {sizes.num_groups} groups of channels."
            )
        groups, conv = (sizes.num_groups, sizes.state_dim), {f"{name}.conv1d": sizes.conv_channels}
        by_head, each = (sizes.num_heads, sizes.head_dim), (sizes.num_heads, 1)
        inputs = [Part(f"{name}.in_proj", sizes.inner + sizes.conv_channels + sizes.num_heads)]
        kinds = [by_head, by_head, groups, groups, each]
        self._projection = Linear(hidden_size, inputs, build, outputs=kinds, bias=bias)
        outputs = [Part(f"{name}.out_proj", hidden_size)]
        self._output = Linear(sizes.inner, outputs, build, bias=output_bias, sums=True)
        self.layers = self._projection, self._output
        sizes = build.own(sizes)
        self.sizes, self.keeps = sizes, sizes.keeps
        self._limits, self._eps, self._gate_first = limits, eps, gate_first
        heads, keys = sizes.num_heads, sizes.num_groups * sizes.state_dim
        self._widths = [sizes.inner, sizes.conv_channels, heads]
        self._mixed_widths = [sizes.inner, keys, keys]
        self.projected_size, self.mixed_shape = sum(self._widths), (heads, sizes.head_dim)
        weights = build.weights
        self._conv = CausalConv(sizes.conv_channels, sizes.conv_width, build, bias=conv_bias)
        self._A_log = weights.empty(heads, dtype=torch.float32)
        self._dt_bias = weights.empty(heads, dtype=torch.float32)
        self._D = weights.empty(heads, dtype=torch.float32)
        self._norm_weight = weights.empty(sizes.inner) if eps is not None else None
        self._multipliers = None
        if set(multipliers) != {1.0}:
            spans = [sizes.inner, *self._mixed_widths, heads]
            pairs = zip(multipliers, spans, strict=True)
            values = [value for factor, span in pairs for value in [factor] * span]
            self._multipliers = torch.tensor(values, dtype=weights.dtype, device=weights.device)
        self._mamba2, self._norm = build.kernels["mamba2"], build.kernels["norm"]
        self._activation = build.kernels["activation"]
        self.own = [
            *self._conv.parameters(conv, [by_head, groups, groups]),
            build.parameter(f"{name}.A_log", self._A_log, "log_decay", [each]),
            build.parameter(f"{name}.dt_bias", self._dt_bias, "time_bias", [each]),
            build.parameter(f"{name}.D", self._D, "skip", [each]),
        ]
        if self._norm_weight is not None:
            weight = build.parameter(f"{name}.norm.weight", self._norm_weight, "norm", [by_head])
            self.own.append(weight)

    def seal(self) -> None:
        super().seal()
        if self._norm_weight is not None:
            self._norm_weight = self._norm_weight.float().view(self.sizes.num_groups, -1)

    def project(self, hidden: torch.Tensor | QuantizedRows) -> torch.Tensor:
        projected = self._projection(hidden)
        return projected if self._multipliers is None else projected * self._multipliers

    def _inputs(self, projected: torch.Tensor) -> Sequence[torch.Tensor]:
        return projected.split(self._widths, dim=-1)[1:]

    def _scan(
        self, x: torch.Tensor, gates: Sequence[torch.Tensor], part: StepPart, *states: torch.Tensor
    ) -> torch.Tensor:
        sizes = self.sizes
        x, B, C = x.split(self._mixed_widths, dim=-1)
        groups = len(x), sizes.num_groups, sizes.state_dim
        heads = x.view(len(x), sizes.num_heads, sizes.head_dim), B.view(groups), C.view(groups)
        inputs = gates[0], self._A_log, self._dt_bias
        if isinstance(part, PrefillPart):
            gate, step = self._mamba2.gates(*inputs, self._limits)
            prompt = mamba2.Prompt(*heads, gate, step, self._D)
            return self._mamba2.chunk_mamba2(prompt, states=states[0], **part.scan_inputs)
        token = mamba2.Step(*heads, *inputs, self._D)
        return self._mamba2.decode_mamba2(
            token, states=states[0], limits=self._limits, **part.scan_inputs
        )

    def _gated(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        mixed, z = mixed.flatten(1), projected[:, : self.sizes.inner]
        if self._eps is None:
            return self._activation.silu_mul(mixed, z)
        groups = len(mixed), self.sizes.num_groups, -1
        options = self._norm_weight, z.view(groups), self._eps
        return self._norm.gated_rms_norm(mixed.view(groups), *options, gate_first=self._gate_first)
