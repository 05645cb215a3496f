"""Softmax attention with grouped queries, norms, partial rotary embedding and optional output
gate."""

from __future__ import annotations

import math

import torch

from engine.layers.inputs import LayerInputs, Pools, PrefillPart, StepPart, VerifyPart, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.norm import RMSNorm
from engine.layers.parameters import Build, Composite
from engine.weights.model_config import ModelError
from hybridcache.geometry.mixers import AttentionSizes


class Attention(Composite):
    """Attention in which gate, queries, keys and values are one product ``[gate | query | key |
    value]``."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: AttentionSizes,
        build: Build,
        *,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
        bias: bool = False,
        output: str = "o_proj",
        output_bias: bool | None = None,
        rotates: bool = True,
        scale: float | None = None,
    ) -> None:
        """Make the layer.

        ``norms`` are those of queries and keys, over one head or over all heads. ``output`` is the
        name of the last product. Its bias is that of the others if ``output_bias`` is None.
        ``scale`` multiplies the products with keys; None means ``head_dim ** -0.5``.
        """
        if build.rank.count > 1 and norms is not None and norms[0].size != sizes.head_dim:
            raise ModelError(
                f"--tp does not support norms over all heads, as in {name}: omit --tp."
            )
        heads, keys = ((n, sizes.head_dim) for n in (sizes.num_heads, sizes.num_kv_heads))
        kinds = [heads] * (1 + sizes.gated) + [keys, keys]
        inputs = [
            Part(f"{name}.q_proj", math.prod(heads) * (1 + sizes.gated), _gate_first(sizes)),
            Part(f"{name}.k_proj", math.prod(keys)),
            Part(f"{name}.v_proj", math.prod(keys)),
        ]
        self._projection = Linear(hidden_size, shared(inputs, kinds, build.rank), build, bias=bias)
        self._output = Linear(
            math.prod(heads),
            [Part(f"{name}.{output}", hidden_size)],
            build,
            bias=bias if output_bias is None else output_bias,
            shares_inputs=True,
        )
        self.sizes = sizes = sizes.share(build.rank.count)
        self.keeps, self._rotates = sizes.keeps, rotates
        queries, kept = (n * sizes.head_dim for n in (sizes.num_heads, sizes.num_kv_heads))
        self._widths = [queries * sizes.gated, queries, kept, kept]
        self.projected_size, self.mixed_shape = sum(self._widths), (queries,)
        self._norms = norms
        self.layers = self._projection, self._output, *(norms or ())
        self._scale = sizes.head_dim**-0.5 if scale is None else scale
        self._attention, self._cache_write = (
            build.kernels["attention"],
            build.kernels["cache_write"],
        )
        self._rotary, self._activation = build.kernels["rotary"], build.kernels["activation"]

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._projection(hidden)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Attend to this step's and all earlier tokens, and write this step's KV. Returns ``[T, HQ
        * D]``."""
        key_pool, value_pool = pools
        query = self.write(projected, inputs, pools)
        where = {"table": inputs.table, "scale": self._scale}

        def attend(part: StepPart, tokens: slice) -> torch.Tensor:
            kernel = self._attention.decode_attention
            if isinstance(part, VerifyPart):
                kernel = self._attention.verify_attention
            elif isinstance(part, PrefillPart):
                kernel = self._attention.prefill_attention
            attended: torch.Tensor = kernel(
                query[tokens], key_pool, value_pool, **part.attention_inputs, **where
            )
            return attended

        return inputs.by_part(attend).flatten(1)

    def write(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Write this step's KV. Returns the queries, ``[T, HQ, D]``."""
        tokens = inputs.num_tokens
        _, query, key, value = projected[:tokens].split(self._widths, dim=-1)
        query, key = self._prepare(query, key, inputs)
        value = value.view(tokens, -1, self.sizes.head_dim)
        self._cache_write.write_kv(key, value, *pools, inputs.kv_indices)
        return query

    def _prepare(
        self, query: torch.Tensor, key: torch.Tensor, inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split queries and keys by head, and apply norms and rotation."""
        per_head = inputs.num_tokens, -1, self.sizes.head_dim
        if self._norms is None:
            query, key = query.view(per_head), key.view(per_head)
        elif self._norms[0].size == self.sizes.head_dim:
            query = self._norms[0](query.view(per_head))
            key = self._norms[1](key.view(per_head))
        else:
            query = self._norms[0](query).view(per_head)
            key = self._norms[1](key).view(per_head)
        if not self._rotates:
            return query, key
        rotated: tuple[torch.Tensor, torch.Tensor] = self._rotary.rotate(
            query, key, inputs.cos, inputs.sin
        )
        return rotated

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, ``[num_rows, H]``."""
        if self.sizes.gated:
            gate = projected[: len(mixed), : self._widths[0]]
            mixed = self._activation.sigmoid_mul(mixed, gate)
        return self._output(pad_rows(mixed, len(projected)))


def _gate_first(sizes: AttentionSizes) -> torch.Tensor | None:
    """Return the order of rows with the gates first. Checkpoints have query and gate head by head,
    ``[q_0 | g_0 | q_1 | g_1 ...]``."""
    if not sizes.gated:
        return None
    rows = torch.arange(2 * sizes.num_heads * sizes.head_dim).view(-1, 2, sizes.head_dim)
    return torch.cat([rows[:, 1].flatten(), rows[:, 0].flatten()])
