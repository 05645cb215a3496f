"""Kimi Linear: three layers of Kimi Delta Attention for each one of latent attention, without
rotation.

Both mixers are only in this family. The experts include a shared one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from engine.layers.blocks import (
    MLP,
    FeedForward,
    LayerInputs,
    Mixer,
    Pools,
    PrefillPart,
    RMSNorm,
    StepPart,
    VerifyPart,
    pad_rows,
)
from engine.layers.experts import RoutedExperts
from engine.layers.recurrent import CausalConv, Recurrent
from engine.models.decoder import Decoder
from engine.weights.model_config import ModelConfig, ModelError, Served
from engine.weights.parameters import Build, Composite
from engine.weights.products import Experts, Linear, Part, QuantizedRows, expert_names
from hybridcache.geometry.config_format import Config
from hybridcache.geometry.mixers import DeltaSizes, LatentAttentionSizes
from hybridcache.geometry.sizes import ExpertsSizes, MixerSizes, MLPSizes, ModelSizes
from kernels.gdn.reference import Prompt, Step

DENSE_MLP = re.compile(r"\.block_sparse_moe\.((gate|up|down)_proj\.)")
LATENT_NORM_EPS = 1e-6
"""Epsilon of the latent's norm, independent of the config."""


class KimiDeltaAttention(Recurrent):
    """Layer in which decays and the output gate are two products each, through a width of one head.

    The input of ``mix`` and ``finish`` is laid out as ``[query | key | value | decay | gate |
    beta]``.
    """

    def __init__(
        self, name: str, hidden_size: int, sizes: DeltaSizes, build: Build, norm: RMSNorm
    ) -> None:
        """``norm``: norm over a head, before the output gate."""
        heads, head, width = sizes.num_value_heads, sizes.value_dim, sizes.value_width
        by_head, all_of_it, each = (heads, head), (1, head), (heads, 1)
        inputs = [Part(f"{name}.{word}_proj", width) for word in "qkv"]
        inputs += [Part(f"{name}.{word}_a_proj", head) for word in "gf"]
        inputs += [Part(f"{name}.b_proj", heads)]
        kinds = [*[by_head] * 3, all_of_it, all_of_it, each]
        self._projection = Linear(hidden_size, inputs, build, outputs=kinds)
        self._decay, self._gate = (
            Linear(head, [Part(f"{name}.{word}_b_proj", width)], build, outputs=[by_head])
            for word in "fg"
        )
        outputs = [Part(f"{name}.o_proj", hidden_size)]
        self._output = Linear(width, outputs, build, sums=True)
        convs = {f"{name}.{word}_conv1d": width for word in "qkv"}
        sizes = build.own(sizes)
        self.keeps = sizes.keeps
        heads, width = sizes.num_value_heads, sizes.value_width
        self._narrow_widths = [sizes.conv_channels, head, head, heads]
        self._widths = [sizes.conv_channels, width, width, heads]
        self.projected_size, self.mixed_shape = sum(self._widths), (heads, head)
        self._conv = CausalConv(sizes.conv_channels, sizes.conv_width, build)
        self._A_log = build.weights.empty(heads, dtype=torch.float32)
        self._dt_bias = build.weights.empty(heads, head, dtype=torch.float32)
        self._norm, self._kda = norm, build.kernels["kda"]
        self.layers = self._projection, self._decay, self._gate, norm, self._output
        self._sigmoid_mul = build.kernels["activation"].sigmoid_mul
        decays, steps = self._A_log.view(1, 1, -1, 1), self._dt_bias.flatten()
        self.own = [
            *self._conv.parameters(convs, [by_head] * 3),
            build.parameter(f"{name}.A_log", decays, "log_decay", [each], dim=2),
            build.parameter(f"{name}.dt_bias", steps, "time_bias", [by_head]),
        ]

    def project(self, hidden: torch.Tensor | QuantizedRows) -> torch.Tensor:
        qkv, gate, decay, beta = self._projection(hidden).split(self._narrow_widths, dim=-1)
        decay, gate = self._decay(decay.contiguous()), self._gate(gate.contiguous())
        return torch.cat([qkv, decay, gate, beta], dim=-1)

    def _inputs(self, projected: torch.Tensor) -> Sequence[torch.Tensor]:
        qkv, decay, _, beta = projected.split(self._widths, dim=-1)
        return qkv, decay, beta

    def _scan(
        self, x: torch.Tensor, gates: Sequence[torch.Tensor], part: StepPart, *states: torch.Tensor
    ) -> torch.Tensor:
        parts = *x.chunk(3, dim=-1), gates[0]
        *heads, decay = (one.unflatten(1, self.mixed_shape) for one in parts)
        gates = [decay, gates[1], self._A_log, self._dt_bias]
        if isinstance(part, PrefillPart):
            prompt = Prompt(*heads, *self._kda.gates(*gates))
            return self._kda.chunk_kda(prompt, states=states[0], **part.scan_inputs)
        token = Step(*heads, *gates)
        return self._kda.decode_kda(token, states=states[0], **part.scan_inputs)

    def _gated(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        gate = projected.split(self._widths, dim=-1)[2]
        return self._sigmoid_mul(self._norm(mixed).flatten(1), gate)


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


class KimiLinear(Decoder):
    """Decoder with the names of the published checkpoint: ``mlp`` in dense layers,
    ``block_sparse_moe`` in layers with experts."""

    model_types = ("kimi_linear",)
    own_keys = "norm_topk_prob", "routed_scaling_factor"
    served: ClassVar[Served] = {
        "moe_router_activation_func": ("sigmoid",),
        "moe_layer_freq": (1,),
        "q_lora_rank": (None,),
        "linear_attn_config": ({},),
        "mla_use_nope": (True,),
        "n_group": (1,),
        "topk_group": (1,),
    }
    rope_defaults = None

    @classmethod
    def read(cls, config: Config, sizes: ModelSizes) -> ModelConfig:
        """Read the config. Raises ModelError for groups of heads."""
        if config["num_key_value_heads"] != config["num_attention_heads"]:
            raise ModelError(
                "num_key_value_heads must be num_attention_heads in config.json: latent attention "
                "has no groups of heads."
            )
        return super().read(config, sizes)

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the MLP of dense layers, to which transformers gives the name of the experts."""
        return {DENSE_MLP.sub(r".mlp.\1", name): tensor for name, tensor in tensors.items()}

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        config, build, attention = self.config, self.build, f"{name}.self_attn"
        if isinstance(sizes, DeltaSizes):
            norm = self.norm_of(f"{attention}.o_norm", sizes.value_dim)
            return KimiDeltaAttention(attention, config.hidden_size, sizes, build, norm)
        assert isinstance(sizes, LatentAttentionSizes)
        norm = RMSNorm(f"{attention}.kv_a_layernorm", sizes.rank, build, eps=LATENT_NORM_EPS)
        return LatentAttention(
            attention, config.hidden_size, sizes, build, norm, bias=config.attention_bias
        )

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        if isinstance(sizes, MLPSizes):
            return super().mlp(name, sizes)
        hidden, name = self.config.hidden_size, f"{name}.block_sparse_moe"
        router = self.sigmoid_router(name, sizes, "gate.e_score_correction_bias")
        names, shared = expert_names(f"{name}.experts.{{}}", "w1", "w3", "w2"), None
        if sizes.shared_intermediate:
            shared = MLP(f"{name}.shared_experts", hidden, sizes.shared_intermediate, self.build)
        experts = Experts(f"{name}.experts", hidden, sizes, names, self.build)
        return RoutedExperts(router, experts, self.build, shared=shared)
