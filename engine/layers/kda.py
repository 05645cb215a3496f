"""Kimi Delta Attention after a short causal convolution."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.layers.inputs import LayerInputs, Pools, PrefillPart, StepPart, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.norm import RMSNorm
from engine.layers.parameters import Build, Composite, Parameter
from engine.layers.shortconv import CausalConv
from hybridcache.geometry.mixers import DeltaSizes


class KimiDeltaAttention(Composite):
    """Layer in which decays and the output gate are two products each, through a width of one head.

    The input of ``mix`` and ``finish`` is laid out as ``[query | key | value | decay | gate |
    beta]``.
    """

    def __init__(
        self, name: str, hidden_size: int, sizes: DeltaSizes, build: Build, norm: RMSNorm
    ) -> None:
        """``norm``: norm over a head, before the output gate."""
        heads, head, width = sizes.num_value_heads, sizes.value_dim, sizes.value_width
        rank, by_head, all_of_it = build.rank, (heads, head), (1, head)
        inputs = [Part(f"{name}.{word}_proj", width) for word in "qkv"]
        inputs += [Part(f"{name}.{word}_a_proj", head) for word in "gf"]
        inputs += [Part(f"{name}.b_proj", heads)]
        kinds = [*[by_head] * 3, all_of_it, all_of_it, (heads, 1)]
        self._projection = Linear(hidden_size, shared(inputs, kinds, rank), build)
        self._decay, self._gate = (
            Linear(head, shared([Part(f"{name}.{word}_b_proj", width)], [by_head], rank), build)
            for word in "fg"
        )
        outputs = [Part(f"{name}.o_proj", hidden_size)]
        self._output = Linear(width, outputs, build, shares_inputs=True)
        self._channels_cut, self._heads_cut = rank.cut(by_head), rank.cut((heads, 1), dim=2)
        sizes = sizes.share(rank.count)
        self.name, self.sizes, self.keeps = name, sizes, sizes.keeps
        heads, width = sizes.num_value_heads, sizes.value_width
        self._narrow_widths = [sizes.conv_channels, head, head, heads]
        self._widths = [sizes.conv_channels, width, width, heads]
        self.projected_size, self.mixed_shape = sum(self._widths), (heads, head)
        weights = build.weights
        self._conv = CausalConv(sizes.conv_channels, sizes.conv_width, build)
        self._A_log = weights.empty(heads, dtype=torch.float32)
        self._dt_bias = weights.empty(heads, head, dtype=torch.float32)
        self._norm, self._kda = norm, build.kernels["kda"]
        self.layers = self._projection, self._decay, self._gate, norm, self._output
        self._sigmoid_mul = build.kernels["activation"].sigmoid_mul

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from super().parameters()
        for word, weight in zip("qkv", self._conv.weight.chunk(3), strict=True):
            taps = Parameter(weight.unsqueeze(1), cut=self._channels_cut)
            yield f"{self.name}.{word}_conv1d.weight", taps
        yield (
            f"{self.name}.A_log",
            Parameter(self._A_log.view(1, 1, -1, 1), "log_decay", cut=self._heads_cut),
        )
        yield (
            f"{self.name}.dt_bias",
            Parameter(self._dt_bias.flatten(), "time_bias", cut=self._channels_cut),
        )

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv, gate, decay, beta = self._projection(hidden).split(self._narrow_widths, dim=-1)
        decay, gate = self._decay(decay.contiguous()), self._gate(gate.contiguous())
        return torch.cat([qkv, decay, gate, beta], dim=-1)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Convolve and scan, starting from each sequence's state and updating it in its slot.
        Returns ``[T, H, V]``."""
        qkv, decay, _, beta = projected[: inputs.num_tokens].split(self._widths, dim=-1)
        windows, states = pools

        def mix(part: StepPart, tokens: slice) -> torch.Tensor:
            query_key_value = self._conv(qkv[tokens], part, windows).chunk(3, dim=-1)
            heads = [x.unflatten(1, self.mixed_shape) for x in (*query_key_value, decay[tokens])]
            return self._scan(heads, beta[tokens], part, states)

        return inputs.by_part(mix)

    def _scan(
        self, heads: list[torch.Tensor], beta: torch.Tensor, part: StepPart, states: torch.Tensor
    ) -> torch.Tensor:
        *heads, decay = heads
        gates = decay, beta, self._A_log, self._dt_bias
        out: torch.Tensor
        if isinstance(part, PrefillPart):
            gates = self._kda.gates(*gates)
            out = self._kda.chunk_kda(*heads, *gates, states=states, **part.scan_inputs)
        else:
            out = self._kda.decode_kda(*heads, *gates, states=states, **part.scan_inputs)
        return out

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, ``[num_rows, H]``."""
        gate = projected[: len(mixed)].split(self._widths, dim=-1)[2]
        gated = self._sigmoid_mul(self._norm(mixed).flatten(1), gate)
        return self._output(pad_rows(gated, len(projected)))
