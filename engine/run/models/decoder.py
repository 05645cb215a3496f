"""The decoder that all families share: embedding, layers, final norm, head. A family says how its
layers are made.

A layer runs in three parts, so that the dense ones can be captured as device graphs around the
middle one, which works on the pools: ``project`` (norm, input product), ``mix`` (attention or
scan), ``finish`` (output product, norm, MLP).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F

from engine.run.backends import Kernels
from engine.run.layers.attention import Attention
from engine.run.layers.gated_delta_net import GatedDeltaNet
from engine.run.layers.inputs import LayerInputs
from engine.run.layers.linear import Linear
from engine.run.layers.mlp import MLP, ExpertsMLP
from engine.run.layers.norm import RMSNorm
from engine.run.layers.parameters import Layer, Parameter, WeightSpec
from engine.run.memory import KVPool, StatePool
from engine.run.model_config import ModelConfig

T = TypeVar("T", bound=Layer)

Fill = Callable[[str, Layer], None]
"""Called with every part and its checkpoint prefix right after it is made: fills in its weights."""


class DecoderLayer:
    """A mixer and an MLP, each behind a norm and around a residual."""

    def __init__(
        self,
        mixer: Attention | GatedDeltaNet,
        mixer_name: str,
        mlp: MLP | ExpertsMLP,
        input_norm: RMSNorm,
        post_norm: RMSNorm,
    ) -> None:
        self.mixer, self.mlp = mixer, mlp
        self.is_full = isinstance(mixer, Attention)
        self.input_norm, self.post_norm = input_norm, post_norm
        self._parts: dict[str, Layer] = {
            "input_layernorm": input_norm,
            mixer_name: mixer,
            "post_attention_layernorm": post_norm,
            "mlp": mlp,
        }

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        for name, part in self._parts.items():
            yield from part.parameters(f"{prefix}.{name}")

    def seal(self) -> None:
        for part in self._parts.values():
            part.seal()

    def project(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the mixer's input product, the new residual)."""
        normed, residual = self.input_norm.add(hidden, residual)
        return self.mixer.project(normed), residual

    def finish(
        self,
        mixed: torch.Tensor,
        projected: torch.Tensor,
        residual: torch.Tensor,
        num_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the MLP's output, the residual it is still to be added to)."""
        normed, residual = self.post_norm.add(self.mixer.finish(mixed, projected), residual)
        return self.mlp(normed, num_tokens), residual


class Decoder(ABC):
    """One model with its weights. Subclasses say how a family's layers are built and named."""

    centred_norms: ClassVar[bool] = True

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        place: WeightSpec,
        fill: Fill | None = None,
        *,
        stacked_experts: bool = False,
    ) -> None:
        self.config = config
        self.stacked_experts = stacked_experts
        self._kernels, self._place = kernels, place
        self._parts: dict[str, Layer] = {}
        self.embedding = self._add("model.embed_tokens", Embedding(config, place), fill)
        self.layers = [
            self._add(f"model.layers.{layer}", self._layer(layer), fill)
            for layer in range(config.num_layers)
        ]
        self.norm = self._add("model.norm", self._norm(config.hidden_size), fill)
        self.head = Head(config, self.embedding, kernels, place)
        self._add("lm_head", self.head, fill)

    @abstractmethod
    def mixer(self, layer: int) -> tuple[str, Attention | GatedDeltaNet]:
        """The mixer of one layer and its name in checkpoints."""

    def mlp(self, layer: int) -> MLP | ExpertsMLP:
        config = self.config
        return MLP(config.hidden_size, config.intermediate_size, self._kernels, self._place)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every checkpoint tensor of the model; only before it is sealed."""
        for prefix, part in self._parts.items():
            yield from part.parameters(prefix)

    def forward(
        self,
        token_ids: torch.Tensor,
        inputs: LayerInputs,
        kv: KVPool | None,
        states: StatePool | None,
    ) -> torch.Tensor:
        """Hidden states ``[num_rows, H]`` behind the final norm; moves the pools on."""
        hidden: torch.Tensor = self.embedding(token_ids)
        residual: torch.Tensor | None = None
        kv_pools = (kv.key, kv.value) if kv is not None else None
        state_pools = states.tensors if states is not None else None
        for layer in self.layers:
            projected, residual = layer.project(hidden, residual)
            pools = kv_pools if layer.is_full else state_pools
            assert pools is not None
            mixed = layer.mixer.mix(projected, inputs, pools)
            hidden, residual = layer.finish(mixed, projected, residual, inputs.num_tokens)
        return self.norm.add(hidden, residual)[0]

    def rank(self, layer: int) -> int:
        """How many layers of the same type come before ``layer``: its place in the pools."""
        types = self.config.layer_types
        return types[:layer].count(types[layer])

    def _layer(self, layer: int) -> DecoderLayer:
        name, mixer = self.mixer(layer)
        size = self.config.hidden_size
        return DecoderLayer(mixer, name, self.mlp(layer), self._norm(size), self._norm(size))

    def _norm(self, size: int) -> RMSNorm:
        eps = self.config.norm_eps
        return RMSNorm(size, eps, self._kernels, self._place, centred=self.centred_norms)

    def _add(self, prefix: str, part: T, fill: Fill | None) -> T:
        self._parts[prefix] = part
        if fill is not None:
            fill(prefix, part)
            part.seal()
        return part


class Embedding:
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig, place: WeightSpec) -> None:
        self.weight = place.empty(config.vocab_size, config.hidden_size)

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        yield f"{prefix}.weight", Parameter(self.weight)

    def seal(self) -> None:
        pass

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)


class Head:
    """Hidden states to logits; where a model ties its embeddings it has no weights of its own."""

    def __init__(
        self, config: ModelConfig, embedding: Embedding, kernels: Kernels, place: WeightSpec
    ) -> None:
        self._linear = Linear(
            config.hidden_size, config.vocab_size, kernels, place, full_precision=True
        )
        self._is_tied = config.tie_embeddings
        if self._is_tied:
            self._linear.weight = embedding.weight

    def parameters(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        if not self._is_tied:
            yield from self._linear.parameters(prefix)

    def seal(self) -> None:
        self._linear.seal()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear(hidden)
