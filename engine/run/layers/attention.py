"""A full-attention layer's mixer: grouped queries, normed heads, partial rotary, an optional gate
on the output."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.run.backends import Kernels
from engine.run.layers.inputs import LayerInputs, pad_rows
from engine.run.layers.linear import Linear
from engine.run.layers.norm import RMSNorm
from engine.run.layers.parameters import Parameter, WeightSpec
from engine.run.model_config import ModelConfig


class Attention:
    """Gate, queries, keys and values are one product, laid out ``[gate | query | key | value]``."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        kernels: Kernels,
        place: WeightSpec,
        *,
        gated: bool,
        centred_norms: bool,
    ) -> None:
        self.layer = layer
        """Its place among the full-attention layers: the layer of the KV pool."""
        self.gated = gated
        self.num_heads, self.num_kv_heads = model.num_heads, model.num_kv_heads
        self.head_dim = model.head_dim
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.sizes = [query_size * gated, query_size, kv_size, kv_size]
        bias = model.attention_bias
        self.projection = Linear(model.hidden_size, sum(self.sizes), kernels, place, bias=bias)
        self.output = Linear(query_size, model.hidden_size, kernels, place, bias=bias)
        norm_size, eps = self.head_dim, model.norm_eps
        self.query_norm = RMSNorm(norm_size, eps, kernels, place, centred=centred_norms)
        self.key_norm = RMSNorm(norm_size, eps, kernels, place, centred=centred_norms)
        self.mixed_shape = (query_size,)
        """Of what ``mix`` gives, per token."""
        self.scale = self.head_dim**-0.5
        self._kernels = kernels

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        tensors = {"weight": self.projection.weight}
        if self.projection.bias is not None:
            tensors["bias"] = self.projection.bias
        gate, query, kv, _ = self.sizes
        for suffix, fused in tensors.items():
            queries, key, value = fused.split([gate + query, kv, kv])
            yield f"{prefix}.q_proj.{suffix}", Parameter(queries, rows=self._query_rows())
            yield f"{prefix}.k_proj.{suffix}", Parameter(key)
            yield f"{prefix}.v_proj.{suffix}", Parameter(value)
        yield from self.output.parameters(f"{prefix}.o_proj")
        yield from self.query_norm.parameters(f"{prefix}.q_norm")
        yield from self.key_norm.parameters(f"{prefix}.k_norm")

    def _query_rows(self) -> torch.Tensor | None:
        """The checkpoint has query and gate head by head, ``[q_0 | g_0 | q_1 | g_1 ...]``."""
        if not self.gated:
            return None
        rows = torch.arange(2 * self.num_heads * self.head_dim).view(
            self.num_heads, 2, self.head_dim
        )
        return torch.cat([rows[:, 1].flatten(), rows[:, 0].flatten()])

    def seal(self) -> None:
        for part in (self.projection, self.output, self.query_norm, self.key_norm):
            part.seal()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.projection(hidden)

    def mix(
        self, projected: torch.Tensor, inputs: LayerInputs, pools: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Attend to this step's and all earlier tokens; writes this step's KV. ``[T, HQ * D]``."""
        kernels, tokens = self._kernels, inputs.num_tokens
        _, query, key, value = projected[:tokens].split(self.sizes, dim=-1)
        query = self.query_norm(query.view(tokens, self.num_heads, self.head_dim))
        key = self.key_norm(key.view(tokens, self.num_kv_heads, self.head_dim))
        query, key = kernels.rotary.rotate(query, key, inputs.cos, inputs.sin)
        key_pool, value_pool = pools[0][self.layer], pools[1][self.layer]
        value = value.view(tokens, self.num_kv_heads, self.head_dim)
        kernels.cache_write.write_kv(key, value, key_pool, value_pool, inputs.kv_indices)
        outs = []
        if inputs.decode is not None:
            outs.append(
                kernels.attention.decode_attention(
                    query[: inputs.num_decode],
                    key_pool,
                    value_pool,
                    table=inputs.table,
                    sequences=inputs.decode.sequences,
                    scale=self.scale,
                )
            )
        if inputs.prefill is not None:
            outs.append(
                kernels.attention.prefill_attention(
                    query[inputs.num_decode :],
                    key_pool,
                    value_pool,
                    table=inputs.table,
                    sequences=inputs.prefill.sequences,
                    packed=inputs.prefill.packed,
                    scale=self.scale,
                )
            )
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """The layer's output, ``[num_rows, H]``."""
        if self.gated:
            gate = projected[: len(mixed), : self.sizes[0]]
            mixed = self._kernels.activation.sigmoid_mul(mixed, gate)
        return self.output(pad_rows(mixed, len(projected)))
