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

from engine.run.layers.attention import Attention
from engine.run.layers.gated_delta_net import GatedDeltaNet
from engine.run.layers.inputs import LayerInputs
from engine.run.layers.linear import Linear, Part
from engine.run.layers.mlp import MLP, ExpertsMLP
from engine.run.layers.norm import RMSNorm
from engine.run.layers.parameters import Build, Layer, Parameter
from engine.run.memory import KVPool, StatePool
from engine.run.model_config import ModelConfig

T = TypeVar("T", bound=Layer)

Fill = Callable[[Layer], None]
"""Called with every part right after it is made: fills in its weights."""


class DecoderLayer:
    """A mixer and an MLP, each behind a norm and around a residual."""

    def __init__(
        self,
        mixer: Attention | GatedDeltaNet,
        mlp: MLP | ExpertsMLP,
        input_norm: RMSNorm,
        post_norm: RMSNorm,
    ) -> None:
        self.mixer, self.mlp = mixer, mlp
        self.is_full = isinstance(mixer, Attention)
        self.input_norm, self.post_norm = input_norm, post_norm

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for part in self._parts():
            yield from part.parameters()

    def seal(self) -> None:
        for part in self._parts():
            part.seal()

    def _parts(self) -> tuple[Layer, ...]:
        return self.input_norm, self.mixer, self.post_norm, self.mlp

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
        build: Build,
        fill: Fill | None = None,
        *,
        stacked_experts: bool = False,
    ) -> None:
        self.config = config
        self.stacked_experts = stacked_experts
        self._build = build
        self._parts: list[Layer] = []
        self.embedding = self._add(Embedding("model.embed_tokens", config, build), fill)
        self.layers = [self._add(self._layer(layer), fill) for layer in range(config.num_layers)]
        self.norm = self._add(self._norm("model.norm"), fill)
        self.head = self._add(Head("lm_head", config, self.embedding, build), fill)

    @abstractmethod
    def mixer(self, name: str, layer: int) -> Attention | GatedDeltaNet:
        """The mixer of the layer called ``name``."""

    def mlp(self, name: str, layer: int) -> MLP | ExpertsMLP:
        config = self.config
        return MLP(f"{name}.mlp", config.hidden_size, config.intermediate_size, self._build)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every checkpoint tensor of the model; only before it is sealed."""
        for part in self._parts:
            yield from part.parameters()

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
        name = f"model.layers.{layer}"
        return DecoderLayer(
            self.mixer(name, layer),
            self.mlp(name, layer),
            self._norm(f"{name}.input_layernorm"),
            self._norm(f"{name}.post_attention_layernorm"),
        )

    def _norm(self, name: str) -> RMSNorm:
        config = self.config
        return RMSNorm(
            name,
            config.hidden_size,
            self._build,
            eps=config.norm_eps,
            centred=self.centred_norms,
        )

    def _add(self, part: T, fill: Fill | None) -> T:
        self._parts.append(part)
        if fill is not None:
            fill(part)
            part.seal()
        return part


class Embedding:
    """Token ids to hidden states."""

    def __init__(self, name: str, config: ModelConfig, build: Build) -> None:
        self.name = name
        self.weight = build.weights.empty(config.vocab_size, config.hidden_size)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield f"{self.name}.weight", Parameter(self.weight)

    def seal(self) -> None:
        pass

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)


class Head:
    """Hidden states to logits; where a model ties its embeddings it has no weights of its own."""

    def __init__(self, name: str, config: ModelConfig, embedding: Embedding, build: Build) -> None:
        self._is_tied = config.tie_embeddings
        self._linear = Linear(
            config.hidden_size,
            [Part(name, config.vocab_size)],
            build,
            weight=embedding.weight if self._is_tied else None,
        )

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        if not self._is_tied:
            yield from self._linear.parameters()

    def seal(self) -> None:
        self._linear.seal()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear(hidden)
