"""Mamba-2 after a short causal convolution: Nemotron-H, Granite 4, Falcon-H1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.layers.inputs import LayerInputs, Pools, PrefillPart, StepPart, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.parameters import Build, Composite, Parameter
from engine.layers.shortconv import CausalConv
from engine.weights.model_config import ModelError
from hybridcache.geometry.mixers import MambaSizes


@dataclass(frozen=True, slots=True)
class GatedNorm:
    """Norm before the output product, over each group of channels separately."""

    eps: float
    gate_first: bool
    """True if the gate is applied before the norm, False if after it."""


class Mamba2(Composite):
    """Layer in which all inputs are one product ``[z | x | B | C | dt]``."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: MambaSizes,
        build: Build,
        *,
        norm: GatedNorm | None,
        limits: tuple[float, float],
        bias: bool = False,
        output_bias: bool = False,
        conv_bias: bool = True,
        multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0),
    ) -> None:
        """Make the layer.

        Without ``norm``, the output is only gated. ``limits`` are those of time steps. ``bias``,
        ``output_bias`` and ``conv_bias`` are True for the products and the convolution with a bias.
        ``multipliers`` are those of z, x, B, C and dt.
        """
        if norm is not None and sizes.num_groups % build.rank.count:
            raise ModelError(
                f"--tp {build.rank.count} is not supported if the norm after a scan covers the "
                f"parts of several ranks: {name} has {sizes.num_groups} groups of channels."
            )
        rank, groups = build.rank, (sizes.num_groups, sizes.state_dim)
        by_head, each = (sizes.num_heads, sizes.head_dim), (sizes.num_heads, 1)
        inputs = [Part(f"{name}.in_proj", sizes.inner + sizes.conv_channels + sizes.num_heads)]
        inputs = shared(inputs, [by_head, by_head, groups, groups, each], rank)
        self._projection = Linear(hidden_size, inputs, build, bias=bias)
        outputs = [Part(f"{name}.out_proj", hidden_size)]
        self._output = Linear(sizes.inner, outputs, build, bias=output_bias, shares_inputs=True)
        self.layers = self._projection, self._output
        self._conv_cut = rank.cut(by_head, groups, groups)
        self._heads_cut, self._channels_cut = rank.cut(each), rank.cut(by_head)
        sizes = sizes.share(rank.count)
        self.name, self.sizes, self.keeps = name, sizes, sizes.keeps
        self._limits, self._gated_norm = limits, norm
        heads, keys = sizes.num_heads, sizes.num_groups * sizes.state_dim
        self._widths = [sizes.inner, sizes.conv_channels, heads]
        self._mixed_widths = [sizes.inner, keys, keys]
        self.projected_size, self.mixed_shape = sum(self._widths), (heads, sizes.head_dim)
        weights = build.weights
        self._conv = CausalConv(sizes.conv_channels, sizes.conv_width, build, bias=conv_bias)
        self._A_log = weights.empty(heads, dtype=torch.float32)
        self._dt_bias = weights.empty(heads, dtype=torch.float32)
        self._D = weights.empty(heads, dtype=torch.float32)
        self._norm_weight = weights.empty(sizes.inner) if norm is not None else None
        self._multipliers = None
        if set(multipliers) != {1.0}:
            spans = [sizes.inner, *self._mixed_widths, heads]
            pairs = zip(multipliers, spans, strict=True)
            values = [value for factor, span in pairs for value in [factor] * span]
            self._multipliers = torch.tensor(values, dtype=weights.dtype, device=weights.device)
        self._mamba2, self._norm = build.kernels["mamba2"], build.kernels["norm"]
        self._activation = build.kernels["activation"]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._projection.parameters()
        yield (
            f"{self.name}.conv1d.weight",
            Parameter(self._conv.weight.unsqueeze(1), cut=self._conv_cut),
        )
        if self._conv.bias is not None:
            yield f"{self.name}.conv1d.bias", Parameter(self._conv.bias, cut=self._conv_cut)
        yield f"{self.name}.A_log", Parameter(self._A_log, "log_decay", cut=self._heads_cut)
        yield f"{self.name}.dt_bias", Parameter(self._dt_bias, "time_bias", cut=self._heads_cut)
        yield f"{self.name}.D", Parameter(self._D, "skip", cut=self._heads_cut)
        if self._norm_weight is not None:
            yield (
                f"{self.name}.norm.weight",
                Parameter(self._norm_weight, "norm", cut=self._channels_cut),
            )
        yield from self._output.parameters()

    def seal(self) -> None:
        super().seal()
        if self._norm_weight is not None:
            self._norm_weight = self._norm_weight.float().view(self.sizes.num_groups, -1)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        projected = self._projection(hidden)
        return projected if self._multipliers is None else projected * self._multipliers

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Convolve and scan, starting from each sequence's state and updating it in its slot.
        Returns ``[T, H, D]``."""
        _, mixed, dt = projected[: inputs.num_tokens].split(self._widths, dim=-1)
        windows, states = pools

        def mix(part: StepPart, tokens: slice) -> torch.Tensor:
            heads = self._heads(self._conv(mixed[tokens], part, windows))
            return self._scan(heads, dt[tokens], part, states)

        return inputs.by_part(mix)

    def _scan(
        self,
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dt: torch.Tensor,
        part: StepPart,
        states: torch.Tensor,
    ) -> torch.Tensor:
        gates, D, limits = (dt, self._A_log, self._dt_bias), self._D, self._limits
        out: torch.Tensor
        if isinstance(part, PrefillPart):
            gate, step = self._mamba2.gates(*gates, limits)
            out = self._mamba2.chunk_mamba2(
                *heads, gate, step, D, states=states, **part.scan_inputs
            )
        else:
            out = self._mamba2.decode_mamba2(
                *heads, *gates, D, states=states, limits=limits, **part.scan_inputs
            )
        return out

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes, tokens = self.sizes, len(mixed)
        x, B, C = mixed.split(self._mixed_widths, dim=-1)
        groups = tokens, sizes.num_groups, sizes.state_dim
        return x.view(tokens, sizes.num_heads, sizes.head_dim), B.view(groups), C.view(groups)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, ``[num_rows, H]``."""
        mixed, z = mixed.flatten(1), projected[: len(mixed), : self.sizes.inner]
        if self._gated_norm is None:
            gated = self._activation.silu_mul(mixed, z)
        else:
            groups = len(mixed), self.sizes.num_groups, -1
            gated = self._norm.gated_rms_norm(
                mixed.view(groups),
                self._norm_weight,
                z.view(groups),
                self._gated_norm.eps,
                gate_first=self._gated_norm.gate_first,
            ).flatten(1)
        return self._output(pad_rows(gated, len(projected)))
