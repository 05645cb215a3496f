"""A linear-attention layer's mixer: Gated DeltaNet behind a short causal convolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from engine.run.backends import Kernels
from engine.run.layers.inputs import LayerInputs, pad_rows
from engine.run.layers.linear import Linear
from engine.run.layers.parameters import Parameter, WeightSpec
from engine.run.model_config import ModelConfig

Layout = Literal["interleaved", "split"]
"""How a checkpoint names the input projection: Qwen3-Next has ``in_proj_qkvz`` and ``in_proj_ba``,
key head by key head; Qwen3.5 has ``in_proj_qkv``, ``in_proj_z``, ``in_proj_b`` and
``in_proj_a``."""


class GatedDeltaNet:
    """All inputs are one product, laid out ``[query | key | value | z | b | a]``; with 8-bit
    weights the gates b and a, few rows on which the whole state hangs, are another in full
    precision."""

    def __init__(
        self, model: ModelConfig, layer: int, kernels: Kernels, place: WeightSpec, *, layout: Layout
    ) -> None:
        assert model.linear is not None
        self.layer = layer
        """Its place among the linear layers: the layer of the state pool."""
        self.layout = layout
        self.shape = shape = model.linear
        self.key_size = shape.num_key_heads * shape.key_dim
        self.value_size = shape.num_value_heads * shape.value_dim
        self.mixed_shape = (shape.num_value_heads, shape.value_dim)
        """Of what ``mix`` gives, per token."""
        self.sizes = [shape.conv_channels, self.value_size, *(2 * [shape.num_value_heads])]
        num_mixed, num_gates = sum(self.sizes[:2]), sum(self.sizes[2:])
        self.gates: Linear | None = None
        if place.quantization is None:
            self.projection = Linear(model.hidden_size, num_mixed + num_gates, kernels, place)
        else:
            self.projection = Linear(model.hidden_size, num_mixed, kernels, place)
            self.gates = Linear(model.hidden_size, num_gates, kernels, place, full_precision=True)
        self.output = Linear(self.value_size, model.hidden_size, kernels, place)
        self.conv_weight = place.empty(shape.conv_channels, shape.conv_width)
        self.A_log = place.empty(shape.num_value_heads, dtype=torch.float32)
        self.dt_bias = place.empty(shape.num_value_heads, dtype=torch.float32)
        self.norm_weight = place.empty(shape.value_dim)
        self.eps = model.norm_eps
        self._kernels = kernels

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        num_mixed = sum(self.sizes[:2])
        qkvz, ba = self.projection.weight[:num_mixed], self.projection.weight[num_mixed:]
        if self.gates is not None:
            ba = self.gates.weight
        if self.layout == "interleaved":
            shape = self.shape
            group = shape.num_value_heads // shape.num_key_heads
            values = group * shape.value_dim
            yield (
                f"{prefix}.in_proj_qkvz.weight",
                Parameter(
                    qkvz, rows=self._gathered([shape.key_dim, shape.key_dim, values, values])
                ),
            )
            yield (
                f"{prefix}.in_proj_ba.weight",
                Parameter(ba, rows=self._gathered([group, group])),
            )
        else:
            qkv, z = qkvz.split(self.sizes[:2])
            b, a = ba.split(self.sizes[2:])
            yield f"{prefix}.in_proj_qkv.weight", Parameter(qkv)
            yield f"{prefix}.in_proj_z.weight", Parameter(z)
            yield f"{prefix}.in_proj_b.weight", Parameter(b)
            yield f"{prefix}.in_proj_a.weight", Parameter(a)
        yield f"{prefix}.conv1d.weight", Parameter(self.conv_weight.unsqueeze(1))
        yield f"{prefix}.A_log", Parameter(self.A_log, "log_decay")
        yield f"{prefix}.dt_bias", Parameter(self.dt_bias, "time_bias")
        yield f"{prefix}.norm.weight", Parameter(self.norm_weight, "norm")
        yield from self.output.parameters(f"{prefix}.out_proj")

    def _gathered(self, sizes: list[int]) -> torch.Tensor:
        """Rows of a matrix that has ``sizes`` next to each other for every key head, ordered by
        kind instead."""
        heads = self.shape.num_key_heads
        rows = torch.arange(heads * sum(sizes)).view(heads, sum(sizes))
        return torch.cat([part.flatten() for part in rows.split(sizes, dim=1)])

    def seal(self) -> None:
        self.projection.seal()
        if self.gates is not None:
            self.gates.seal()
        self.output.seal()
        self.norm_weight = self.norm_weight.float()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        projected = self.projection(hidden)
        if self.gates is None:
            return projected
        return torch.cat([projected, self.gates(hidden)], dim=-1)

    def mix(
        self, projected: torch.Tensor, inputs: LayerInputs, pools: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Convolve and scan from each sequence's state, which moves on in its slot. ``[T, HV,
        V]``."""
        qkv, _, b, a = projected[: inputs.num_tokens].split(self.sizes, dim=-1)
        windows, states = pools[0][self.layer], pools[1][self.layer]
        outs, decodes = [], inputs.num_decode
        if inputs.decode is not None:
            outs.append(
                self._decode(qkv[:decodes], a[:decodes], b[:decodes], inputs, windows, states)
            )
        if inputs.prefill is not None:
            outs.append(
                self._prefill(qkv[decodes:], a[decodes:], b[decodes:], inputs, windows, states)
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _decode(
        self,
        qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        inputs: LayerInputs,
        windows: torch.Tensor,
        states: torch.Tensor,
    ) -> torch.Tensor:
        assert inputs.decode is not None
        slots = inputs.decode.slots
        qkv = self._kernels.conv1d.decode_conv1d(
            qkv, self.conv_weight, None, states=windows, slots=slots
        )
        query, key, value = self._heads(qkv)
        return self._kernels.gdn.decode_gdn(
            query, key, value, a, b, self.A_log, self.dt_bias, states=states, slots=slots
        )

    def _prefill(
        self,
        qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        inputs: LayerInputs,
        windows: torch.Tensor,
        states: torch.Tensor,
    ) -> torch.Tensor:
        part = inputs.prefill
        assert part is not None
        qkv = self._kernels.conv1d.prefill_conv1d(
            qkv,
            self.conv_weight,
            None,
            states=windows,
            packed=part.packed,
            slots=part.slots,
            resumed=part.resumed,
            exports=part.exports,
        )
        query, key, value = self._heads(qkv)
        gate, beta = self._kernels.gdn.gates(a, b, self.A_log, self.dt_bias)
        return self._kernels.gdn.chunk_gdn(
            query,
            key,
            value,
            gate,
            beta,
            states=states,
            packed=part.packed,
            slots=part.slots,
            resumed=part.resumed,
            exports=part.exports,
        )

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = qkv.split([self.key_size, self.key_size, self.value_size], dim=-1)
        shape, tokens = self.shape, len(qkv)
        return (
            query.view(tokens, shape.num_key_heads, shape.key_dim),
            key.view(tokens, shape.num_key_heads, shape.key_dim),
            value.view(tokens, shape.num_value_heads, shape.value_dim),
        )

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """The layer's output, ``[num_rows, H]``."""
        z = projected[: len(mixed), self.sizes[0] : self.sizes[0] + self.value_size]
        gated = self._kernels.norm.gated_rms_norm(
            mixed, self.norm_weight, z.view(mixed.shape), self.eps
        )
        return self.output(pad_rows(gated.flatten(1), len(projected)))
