"""A linear-attention layer's mixer: Gated DeltaNet behind a short causal convolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from engine.run.layers.inputs import LayerInputs, pad_rows
from engine.run.layers.linear import Linear, Part
from engine.run.layers.parameters import Build, Parameter
from engine.run.model_config import ModelConfig

Layout = Literal["interleaved", "split"]
"""How a checkpoint names the input projection: Qwen3-Next has ``in_proj_qkvz`` and ``in_proj_ba``,
key head by key head; Qwen3.5 has ``in_proj_qkv``, ``in_proj_z``, ``in_proj_b`` and
``in_proj_a``."""


class GatedDeltaNet:
    """All inputs are one product, laid out ``[query | key | value | z | b | a]``; of 8-bit weights
    the gates b and a, few rows on which the whole state hangs, are another."""

    def __init__(
        self, name: str, model: ModelConfig, layer: int, build: Build, *, layout: Layout
    ) -> None:
        assert model.linear is not None
        self.name, self.layer = name, layer
        """Its place among the linear layers: the layer of the state pool."""
        self.shape = shape = model.linear
        self.key_size = shape.num_key_heads * shape.key_dim
        self.value_size = shape.num_value_heads * shape.value_dim
        self.mixed_shape = (shape.num_value_heads, shape.value_dim)
        """Of what ``mix`` gives, per token."""
        self.sizes = [shape.conv_channels, self.value_size, *(2 * [shape.num_value_heads])]
        inputs = self._interleaved() if layout == "interleaved" else self._split()
        self.projection = Linear(model.hidden_size, inputs, build)
        self.output = Linear(self.value_size, [Part(f"{name}.out_proj", model.hidden_size)], build)
        weights = build.weights
        self.conv_weight = weights.empty(shape.conv_channels, shape.conv_width)
        self.A_log = weights.empty(shape.num_value_heads, dtype=torch.float32)
        self.dt_bias = weights.empty(shape.num_value_heads, dtype=torch.float32)
        self.norm_weight = weights.empty(shape.value_dim)
        self.eps = model.norm_eps
        self._conv1d, self._gdn = build.kernels["conv1d"], build.kernels["gdn"]
        self._norm = build.kernels["norm"]

    def _split(self) -> list[Part]:
        words = ("qkv", "z", "b", "a")
        return [
            Part(f"{self.name}.in_proj_{word}", size)
            for word, size in zip(words, self.sizes, strict=True)
        ]

    def _interleaved(self) -> list[Part]:
        shape = self.shape
        group = shape.num_value_heads // shape.num_key_heads
        values = group * shape.value_dim
        qkvz = self._gathered([shape.key_dim, shape.key_dim, values, values])
        ba = self._gathered([group, group])
        return [
            Part(f"{self.name}.in_proj_qkvz", len(qkvz), qkvz),
            Part(f"{self.name}.in_proj_ba", len(ba), ba),
        ]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self.projection.parameters()
        yield f"{self.name}.conv1d.weight", Parameter(self.conv_weight.unsqueeze(1))
        yield f"{self.name}.A_log", Parameter(self.A_log, "log_decay")
        yield f"{self.name}.dt_bias", Parameter(self.dt_bias, "time_bias")
        yield f"{self.name}.norm.weight", Parameter(self.norm_weight, "norm")
        yield from self.output.parameters()

    def _gathered(self, sizes: list[int]) -> torch.Tensor:
        """Rows of a matrix that has ``sizes`` next to each other for every key head, ordered by
        kind instead."""
        heads = self.shape.num_key_heads
        rows = torch.arange(heads * sum(sizes)).view(heads, sum(sizes))
        return torch.cat([part.flatten() for part in rows.split(sizes, dim=1)])

    def seal(self) -> None:
        self.projection.seal()
        self.output.seal()
        self.norm_weight = self.norm_weight.float()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.projection(hidden)

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
        qkv = self._conv1d.decode_conv1d(qkv, self.conv_weight, None, states=windows, slots=slots)
        query, key, value = self._heads(qkv)
        return self._gdn.decode_gdn(
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
        qkv = self._conv1d.prefill_conv1d(
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
        gate, beta = self._gdn.gates(a, b, self.A_log, self.dt_bias)
        return self._gdn.chunk_gdn(
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
        gated = self._norm.gated_rms_norm(mixed, self.norm_weight, z.view(mixed.shape), self.eps)
        return self.output(pad_rows(gated.flatten(1), len(projected)))
