"""Softmax attention: with grouped queries, norms, partial rotary embedding and optional output
gate, or multi-head latent attention."""

from __future__ import annotations

import math

import torch

from engine.layers.blocks import (
    LayerInputs,
    OneProduct,
    Pools,
    PrefillPart,
    RMSNorm,
    StepPart,
    VerifyPart,
    pad_rows,
)
from engine.weights.model_config import ModelError
from engine.weights.parameters import Build, Composite
from engine.weights.products import Linear, Part
from hybridcache.geometry.mixers import AttentionSizes, LatentAttentionSizes


class Attention(OneProduct):
    """Attention with one product ``[gate | query | key | value]``."""

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
        if build.is_divided and norms is not None and norms[0].size != sizes.head_dim:
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
        self._projection = Linear(hidden_size, inputs, build, outputs=kinds, bias=bias)
        self._output = Linear(
            math.prod(heads),
            [Part(f"{name}.{output}", hidden_size)],
            build,
            bias=bias if output_bias is None else output_bias,
            sums=True,
        )
        self.sizes = sizes = build.own(sizes)
        self.keeps, self._rotates = sizes.keeps, rotates
        queries, kept = (n * sizes.head_dim for n in (sizes.num_heads, sizes.num_kv_heads))
        self._widths = [queries * sizes.gated, queries, kept, kept]
        self.projected_size, self.mixed_shape = sum(self._widths), (queries,)
        self._norms = norms
        self.layers = self._projection, self._output, *(norms or ())
        self._scale = sizes.head_dim**-0.5 if scale is None else scale
        self._attention = build.kernels["attention"]
        self._rotate_and_write = build.kernels["rotary"].rotate_and_write

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Write this step's KV, and attend to all tokens so far. Returns ``[T, HQ * D]``, gated if
        the layer has a gate."""
        key_pool, value_pool = pools
        query, gate = self.write(projected, inputs, pools), None
        if self.sizes.gated:
            gate = projected[: inputs.num_tokens, : self._widths[0]]

        def attend(part: StepPart, tokens: slice) -> torch.Tensor:
            kernel = self._attention.decode_attention
            if isinstance(part, VerifyPart):
                kernel = self._attention.verify_attention
            elif isinstance(part, PrefillPart):
                kernel = self._attention.prefill_attention
            where = {"table": inputs.table, "scale": self._scale} | part.attention_inputs
            own_gate = None if gate is None else gate[tokens]
            return kernel(query[tokens], key_pool, value_pool, gate=own_gate, **where)

        return inputs.by_part(attend).flatten(1)

    def write(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Write this step's KV. Returns the queries, ``[T, HQ, D]``."""
        parts = projected[: inputs.num_tokens].split(self._widths, dim=-1)[1:]
        options: dict[str, object] = {}
        if self._norms is not None and self._norms[0].size == self.sizes.head_dim:
            options = {"norms": [norm.weight for norm in self._norms], "eps": self._norms[0].eps}
        elif self._norms is not None:
            parts = *(norm(x) for norm, x in zip(self._norms, parts, strict=False)), parts[2]
        if self._rotates:
            options["angles"] = inputs.angles
        heads = [part.unflatten(-1, (-1, self.sizes.head_dim)) for part in parts]
        return self._rotate_and_write(*heads, *pools, inputs.kv_indices, **options)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        return self._output(pad_rows(mixed, len(projected)))


def _gate_first(sizes: AttentionSizes) -> torch.Tensor | None:
    """Return the order of rows with the gates first. Checkpoints have query and gate head by head,
    ``[q_0 | g_0 | q_1 | g_1 ...]``."""
    if not sizes.gated:
        return None
    rows = torch.arange(2 * sizes.num_heads * sizes.head_dim).view(-1, 2, sizes.head_dim)
    return torch.cat([rows[:, 1].flatten(), rows[:, 0].flatten()])


class LatentAttention(Composite):
    """Multi-head latent attention without rotation, in absorbed form. Queries and the latent row
    are one product ``[query | latent | shared key]``.

    The matrices that would expand a latent into keys and values are multiplied with queries and
    outputs instead, in full precision. So prefills and decodes, hits and cold runs all read
    latents. Ranks share the heads, and each stores the complete latent row.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: LatentAttentionSizes,
        build: Build,
        norm: RMSNorm,
        *,
        bias: bool,
    ) -> None:
        """``norm``: that of the latent. ``bias``: True if latent and output products have one."""
        beside = sizes.rope_dim
        by_head = sizes.num_heads, sizes.nope_dim + beside
        expanded = sizes.num_heads, sizes.nope_dim + sizes.value_dim
        queries = [Part(f"{name}.q_proj", math.prod(by_head))]
        self._query = Linear(hidden_size, queries, build, outputs=[by_head])
        latent = Part(f"{name}.kv_a_proj_with_mqa", sizes.rank + beside)
        self._latent = Linear(hidden_size, [latent], build, bias=bias)
        self._output = Linear(
            sizes.num_heads * sizes.value_dim,
            [Part(f"{name}.o_proj", hidden_size)],
            build,
            bias=bias,
            sums=True,
        )
        sizes = build.own(sizes)
        self.sizes, self.keeps = sizes, sizes.keeps
        heads = sizes.num_heads
        self._widths = [heads * by_head[1], sizes.rank, beside]
        self.projected_size, self.mixed_shape = sum(self._widths), (heads * sizes.value_dim,)
        self._norm = norm
        self.layers = self._query, self._latent, norm, self._output
        self._expand = build.weights.empty(heads, expanded[1], sizes.rank)
        expand = self._expand.flatten(0, 1)
        self.own = [build.parameter(f"{name}.kv_b_proj.weight", expand, kinds=[expanded])]
        self._scale = by_head[1] ** -0.5
        self._mla, self._cache_write = build.kernels["mla"], build.kernels["cache_write"]

    def seal(self) -> None:
        super().seal()
        keys, values = self._expand.split([self.sizes.nope_dim, self.sizes.value_dim], dim=1)
        self._to_keys = self._mla.prepare_heads(keys)
        self._from_latent = self._mla.prepare_heads(values.mT)
        del self._expand

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._query(hidden), self._latent(hidden)], dim=-1)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Write this step's rows, and attend to all tokens so far. Returns ``[T, H * V]``."""
        (pool,) = pools
        query, latent, shared = projected[: inputs.num_tokens].split(self._widths, dim=-1)
        rows = torch.cat([self._norm(latent.contiguous()), shared], dim=-1)
        self._cache_write.write_rows(rows, pool, inputs.kv_indices)
        own, query_shared = query.unflatten(1, (self.sizes.num_heads, -1)).split(
            [self.sizes.nope_dim, self.sizes.rope_dim], dim=-1
        )
        query = torch.cat([self._to_keys(own), query_shared], dim=-1)
        where = {"table": inputs.table, "scale": self._scale, "rank": self.sizes.rank}

        def attend(part: StepPart, tokens: slice) -> torch.Tensor:
            if isinstance(part, PrefillPart):
                return self._mla.prefill_mla(query[tokens], pool, **part.attention_inputs, **where)
            # The heads of one token fill a program, so drafts of a sequence do not share one.
            sequences = part.tokens if isinstance(part, VerifyPart) else part.sequences
            return self._mla.decode_mla(query[tokens], pool, sequences=sequences, **where)

        return self._from_latent(inputs.by_part(attend)).flatten(1)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        return self._output(pad_rows(mixed, len(projected)))
