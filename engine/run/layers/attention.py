"""A full-attention layer's mixer: grouped queries, normed heads, partial rotary, an optional gate
on the output."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.run.layers.inputs import LayerInputs, pad_rows
from engine.run.layers.linear import Linear, Part
from engine.run.layers.norm import RMSNorm
from engine.run.layers.parameters import Build, Parameter
from engine.run.model_config import ModelConfig


class Attention:
    """Gate, queries, keys and values are one product, laid out ``[gate | query | key | value]``."""

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        layer: int,
        build: Build,
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
        inputs = [
            Part(f"{name}.q_proj", sum(self.sizes[:2]), self._query_rows()),
            Part(f"{name}.k_proj", kv_size),
            Part(f"{name}.v_proj", kv_size),
        ]
        bias = model.attention_bias
        self.projection = Linear(model.hidden_size, inputs, build, bias=bias)
        self.output = Linear(
            query_size, [Part(f"{name}.o_proj", model.hidden_size)], build, bias=bias
        )
        self.query_norm, self.key_norm = (
            RMSNorm(
                f"{name}.{word}_norm",
                self.head_dim,
                build,
                eps=model.norm_eps,
                centred=centred_norms,
            )
            for word in ("q", "k")
        )
        self.mixed_shape = (query_size,)
        """Of what ``mix`` gives, per token."""
        self.scale = self.head_dim**-0.5
        self._attention, self._rotary = build.kernels["attention"], build.kernels["rotary"]
        self._activation, self._cache_write = (
            build.kernels["activation"],
            build.kernels["cache_write"],
        )

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for part in (self.projection, self.output, self.query_norm, self.key_norm):
            yield from part.parameters()

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
        tokens = inputs.num_tokens
        _, query, key, value = projected[:tokens].split(self.sizes, dim=-1)
        query = self.query_norm(query.view(tokens, self.num_heads, self.head_dim))
        key = self.key_norm(key.view(tokens, self.num_kv_heads, self.head_dim))
        query, key = self._rotary.rotate(query, key, inputs.cos, inputs.sin)
        key_pool, value_pool = pools[0][self.layer], pools[1][self.layer]
        value = value.view(tokens, self.num_kv_heads, self.head_dim)
        self._cache_write.write_kv(key, value, key_pool, value_pool, inputs.kv_indices)
        outs = []
        if inputs.decode is not None:
            outs.append(
                self._attention.decode_attention(
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
                self._attention.prefill_attention(
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
            mixed = self._activation.sigmoid_mul(mixed, gate)
        return self.output(pad_rows(mixed, len(projected)))
