"""Multi-head latent attention without rotation, in absorbed form."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from engine.layers.inputs import LayerInputs, Pools, PrefillPart, StepPart, VerifyPart, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.norm import RMSNorm
from engine.layers.parameters import Build, Composite, Parameter
from hybridcache.geometry.mixers import LatentAttentionSizes


class LatentAttention(Composite):
    """Layer in which queries and the latent row are one product ``[query | latent | shared key]``.

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
        """``norm``: norm of the latent. ``bias``: True if the products of latent and output have
        one."""
        rank, beside = build.rank, sizes.rope_dim
        by_head = sizes.num_heads, sizes.nope_dim + beside
        expanded = sizes.num_heads, sizes.nope_dim + sizes.value_dim
        queries = shared([Part(f"{name}.q_proj", math.prod(by_head))], [by_head], rank)
        self._query = Linear(hidden_size, queries, build)
        latent = Part(f"{name}.kv_a_proj_with_mqa", sizes.rank + beside)
        self._latent = Linear(hidden_size, [latent], build, bias=bias)
        self._output = Linear(
            sizes.num_heads * sizes.value_dim,
            [Part(f"{name}.o_proj", hidden_size)],
            build,
            bias=bias,
            shares_inputs=True,
        )
        self._expand_cut, sizes = rank.cut(expanded), sizes.share(rank.count)
        self.name, self.sizes, self.keeps = name, sizes, sizes.keeps
        heads = sizes.num_heads
        self._widths = [heads * by_head[1], sizes.rank, beside]
        self.projected_size, self.mixed_shape = sum(self._widths), (heads * sizes.value_dim,)
        self._norm = norm
        self.layers = self._query, self._latent, norm, self._output
        self._expand_scheme = build.weights.scheme(f"{name}.kv_b_proj")
        self._expand = build.weights.empty(heads, expanded[1], sizes.rank)
        self._scale = by_head[1] ** -0.5
        self._mla, self._cache_write = build.kernels["mla"], build.kernels["cache_write"]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from super().parameters()
        yield (
            f"{self.name}.kv_b_proj.weight",
            Parameter(self._expand.flatten(0, 1), scheme=self._expand_scheme, cut=self._expand_cut),
        )

    def seal(self) -> None:
        super().seal()
        keys, values = self._expand.split([self.sizes.nope_dim, self.sizes.value_dim], dim=1)
        self._to_keys = self._mla.prepare_heads(keys)
        self._from_latent = self._mla.prepare_heads(values.mT)
        del self._expand

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._query(hidden), self._latent(hidden)], dim=-1)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Attend to this step's and all earlier tokens, and write this step's rows. Returns ``[T, H
        * V]``."""
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
            attended: torch.Tensor
            if isinstance(part, PrefillPart):
                attended = self._mla.prefill_mla(
                    query[tokens], pool, **part.attention_inputs, **where
                )
            else:
                # The heads of one token fill a program, so drafts of a sequence do not share one.
                sequences = part.tokens if isinstance(part, VerifyPart) else part.sequences
                attended = self._mla.decode_mla(query[tokens], pool, sequences=sequences, **where)
            return attended

        out = inputs.by_part(attend)
        mixed: torch.Tensor = self._from_latent(out).flatten(1)
        return mixed

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, ``[num_rows, H]``."""
        return self._output(pad_rows(mixed, len(projected)))
