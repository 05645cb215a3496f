"""The decoder that all families share: embedding, residual steps, final norm, head.

A family defines the layers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, ClassVar, Self, TypeVar

import torch

from engine.layers.attention import Attention
from engine.layers.blocks import (
    MLP,
    FeedForward,
    FeedForwardStep,
    LayerInputs,
    Mixer,
    MixerStep,
    Pools,
    RMSNorm,
    Rows,
)
from engine.layers.experts import SigmoidRouter
from engine.layers.prediction import PredictionHead
from engine.layers.recurrent import Mamba2
from engine.layers.rotary import RopeDefaults, read_rope
from engine.weights.model_config import (
    ModelConfig,
    ModelError,
    Served,
    check_only,
    mixer_of,
    read_settings,
)
from engine.weights.parameters import Build, Layer, Parameter
from engine.weights.products import Embedding, Head
from hybridcache.geometry.config_format import Config
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import (
    ExpertsSizes,
    LayerSizes,
    MixerSizes,
    MLPSizes,
    ModelSizes,
    Spec,
)

T = TypeVar("T", bound=Layer)

Step = MixerStep | FeedForwardStep
Fill = Callable[[Layer], None]
"""Called with each part directly after it is made, to load its weights."""


class Decoder(ABC):
    """One model with its weights. A subclass is a family: it defines and names the layers."""

    model_types: ClassVar[tuple[str, ...]] = ()
    """Supported ``model_type`` values of a config.json."""
    own_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a config.json that only the layers of this family use, as ``config.own``."""
    served: ClassVar[Served] = {}
    """Supported values of further keys, for which the layers have no settings."""
    eps_key: ClassVar[str] = "rms_norm_eps"
    """Key of the epsilon of norms."""
    rope_defaults: ClassVar[RopeDefaults | None] = {}
    """Arguments of ``read_rope``, or None for a family without rotation."""
    centred_norms: ClassVar[bool] = False
    """True if the norms of the residual stream are stored around zero."""
    step_norms: ClassVar[tuple[str, str]] = "input_layernorm", "post_attention_layernorm"
    """Names of the norms before the mixer and before the MLP of a layer."""
    embedding_name: ClassVar[str] = "model.embed_tokens"
    layers_name: ClassVar[str] = "model.layers"
    norm_name: ClassVar[str] = "model.norm"

    def __init__(
        self,
        config: ModelConfig,
        build: Build,
        fill: Fill | None = None,
        *,
        stacked_experts: bool = False,
        with_prediction: bool = False,
    ) -> None:
        """``with_prediction``: with the multi-token head. Raises ModelError if the family has
        none."""
        self.config, self.build, self.stacked_experts = config, build, stacked_experts
        self._parts: list[Layer] = []
        self._sealing = Sealing(beside=build.weights.device.type == "cpu")
        sizes, factor = (config.vocab_size, config.hidden_size), config.embedding_multiplier
        self.embedding = self._add(Embedding(self.embedding_name, *sizes, build, factor), fill)
        """Start of the residual stream."""
        layers: list[Sequence[Step]] = []
        for index, layer in enumerate(config.sizes.layers):
            layers.append(self.steps(f"{self.layers_name}.{index}", layer))
            for step in layers[-1]:
                self._add(step, fill)
        self._arrange(layers)
        self.norm = self._add(self.norm_of(self.norm_name), fill)
        is_tied, factor = config.tie_embeddings, config.logit_multiplier
        head = Head("lm_head", config.vocab_size, self.embedding, build, factor, is_tied=is_tied)
        self.head = self._add(head, fill)
        self.prediction: PredictionHead | None = None
        if with_prediction:
            self.prediction = self._add(self.prediction_head(), fill)
        self._sealing.finish()
        del self._sealing  # Its thread ends.

    def _arrange(self, layers: Sequence[Sequence[Step]]) -> None:
        self._layers = layers
        self.mixers: list[MixerStep] = []
        self._between: list[list[FeedForwardStep]] = [[]]
        """Feed-forward steps before the first mixer, between each two, and after the last."""
        for step in chain.from_iterable(layers):
            if isinstance(step, MixerStep):
                self.mixers.append(step)
                self._between.append([])
            else:
                self._between[-1].append(step)

    def excerpt(self, indices: Sequence[int]) -> Self:
        """Return a decoder with some of the layers and no multi-token head, which shares their
        weights."""
        part = copy.copy(self)
        part.prediction = None
        part._arrange([self._layers[index] for index in indices])
        return part

    @classmethod
    def read(cls, config: Config, sizes: ModelSizes) -> ModelConfig:
        """Read the config of a model of this family. Raises ModelError."""
        check_only(config, cls.served)
        rope = None
        if cls.rope_defaults is not None:
            head_dim = mixer_of(sizes, AttentionSizes).head_dim
            rope = read_rope(config, head_dim, **cls.rope_defaults)
        return read_settings(config, sizes, rope, cls.own_keys, eps=cls.eps_key)

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert the names and shapes of a checkpoint to those of the published files. Needed if
        transformers' ``save_pretrained`` writes others; by default it does not."""
        return dict(tensors)

    def steps(self, name: str, sizes: LayerSizes) -> Sequence[Step]:
        """Return the steps of the layer ``name``. By default a mixer and an MLP, each after a norm
        and multiplied by ``residual_multiplier``, if the family has that key."""
        assert sizes.mlp is not None
        before, between = (self.norm_of(f"{name}.{norm}") for norm in self.step_norms)
        factor = self.config.own.get("residual_multiplier", 1.0)
        return [
            MixerStep(self.mixer(name, sizes.mixers[0]), before=before, multiplier=factor),
            FeedForwardStep(self.mlp(name, sizes.mlp), before=between, multiplier=factor),
        ]

    @abstractmethod
    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        """Return a mixer of the layer ``name``."""

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        """Return the MLP of the layer ``name``. By default a dense one."""
        return MLP(f"{name}.mlp", self.config.hidden_size, sizes.intermediate, self.build)

    def attention(self, name: str, sizes: AttentionSizes, **options: Any) -> Attention:
        """Return attention with the config's biases and rotation, and further ``options``."""
        config = self.config
        own = {"bias": config.attention_bias, "rotates": config.rope is not None}
        return Attention(name, config.hidden_size, sizes, self.build, **(own | options))

    def mamba2(self, name: str, sizes: MambaSizes, bias: bool, **options: Any) -> Mamba2:
        """Return Mamba-2 with the config's norm and limits, ``bias`` in both products, and further
        ``options``."""
        config = self.config
        low, high = config.own["time_step_limit"]
        own: dict[str, Any] = {"eps": config.norm_eps, "limits": (float(low), float(high))}
        own |= {"bias": bias, "output_bias": bias, **options}
        return Mamba2(name, config.hidden_size, sizes, self.build, **own)

    def head_norms(self, name: str, sizes: AttentionSizes) -> tuple[RMSNorm, RMSNorm]:
        """Return the norms over each head of queries and keys."""
        size = sizes.head_dim
        return self.norm_of(f"{name}.q_norm", size), self.norm_of(f"{name}.k_norm", size)

    def sigmoid_router(
        self, name: str, sizes: ExpertsSizes, bias: str | None, *, eps: float = 1e-20
    ) -> SigmoidRouter:
        """Return the router ``gate`` of the block ``name``, which reads ``bias`` there."""
        return SigmoidRouter(
            f"{name}.gate",
            self.config.hidden_size,
            sizes,
            self.build,
            bias=None if bias is None else f"{name}.{bias}",
            renormalises=self.config.own["norm_topk_prob"],
            scale=self.config.own["routed_scaling_factor"],
            eps=eps,
        )

    def norm_of(self, name: str, size: int | None = None) -> RMSNorm:
        """Return a norm over the hidden size, or over ``size``."""
        config = self.config
        return RMSNorm(
            name,
            size or config.hidden_size,
            self.build,
            eps=config.norm_eps,
            centred=self.centred_norms,
        )

    def prediction_head(self) -> PredictionHead:
        """Return the multi-token head without weights. Raises ModelError if the family has none."""
        raise ModelError(
            f"--draft mtp requires a multi-token head, which is not supported for "
            f"{type(self).__name__}: use --draft tree, or none."
        )

    @property
    def keeps(self) -> list[tuple[Spec, ...]]:
        """Declared tensors of each mixer, then of the multi-token head."""
        keeps = [step.block.keeps for step in self.mixers]
        return keeps if self.prediction is None else [*keeps, self.prediction.keeps]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield every checkpoint tensor of the model. Only before it is sealed."""
        for part in self._parts:
            yield from part.parameters()

    def new_empty(self, *shape: int) -> torch.Tensor:
        """Allocate a tensor in the dtype and on the device of hidden states."""
        weights = self.build.weights
        return torch.empty(*shape, dtype=weights.dtype, device=weights.device)

    def forward(
        self, token_ids: torch.Tensor, inputs: LayerInputs, pools: Sequence[Pools]
    ) -> torch.Tensor:
        """Compute the hidden states ``[num_rows, H]`` after the final norm, and update the pools,
        one entry per entry of ``keeps``."""
        rows = Rows(inputs.num_tokens, inputs.live)
        out, residual = self.advance(0, self.embedding(token_ids), None, rows)
        for index, step in enumerate(self.mixers):
            mixed = step.block.mix(out, inputs, pools[index])
            hidden = step.leave(step.block.finish(mixed, out))
            out, residual = self.advance(index + 1, hidden, residual, rows)
        if self.prediction is not None:
            self.follow(token_ids, out, inputs, pools)
        return out

    def follow(
        self,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        inputs: LayerInputs,
        pools: Sequence[Pools],
    ) -> None:
        """Update the pools of the multi-token head, if there is one, after a step with the result
        ``hidden``, which may have more rows. ``forward`` does so itself."""
        if self.prediction is not None:
            embedded = self.embedding(token_ids)
            self.prediction.follow(embedded, hidden[: len(token_ids)], inputs, pools[-1])

    def advance(
        self, index: int, hidden: torch.Tensor, residual: torch.Tensor | None, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute up to mixer ``index``, or after the last one to the end.

        ``hidden`` is the output of the mixer before, not yet added; ``residual`` is the stream
        before that mixer, or None at the beginning. Returns (the input product of the mixer or the
        hidden states after the final norm, the residual stream).
        """
        for step in self._between[index]:
            normed, residual = step.enter(hidden, residual)
            hidden = step.leave(step.block(normed, rows))
        if index == len(self.mixers):
            return self.norm.add(hidden, residual)
        mixer = self.mixers[index]
        normed, residual = mixer.enter(hidden, residual)
        return mixer.block.project(normed), residual

    def _add(self, part: T, fill: Fill | None) -> T:
        self._parts.append(part)
        if fill is not None:
            fill(part)
            self._sealing.seal(part)
        return part


class Sealing:
    """Seals one part at a time. On a CPU a separate thread converts weights while the next are
    read, so at most two parts are in memory in both forms."""

    def __init__(self, *, beside: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sealing") if beside else None
        self._last: Future[None] | None = None

    def seal(self, part: Layer) -> None:
        """Seal ``part``, now or in the thread. Raises the error of the previous part."""
        if self._pool is None:
            part.seal()
            return
        self.finish()
        self._last = self._pool.submit(part.seal)

    def finish(self) -> None:
        """Wait until all parts are sealed. Raises the error of the last one."""
        if self._last is not None:
            self._last.result()
