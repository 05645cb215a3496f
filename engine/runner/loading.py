"""The first phase of a model runner: a model with its weights, and its formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.config import EngineConfig
from engine.layers.linear import ALONE, Build, Rank, WeightSpec
from engine.models import read_model
from engine.models.decoder import Decoder
from engine.models.weights import load_model
from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.runner.memory import (
    MIN_KV_TOKENS,
    STAGING_BYTES,
    MemoryPlan,
    kv_row_bytes,
    state_slot_bytes,
)
from engine.weights.model_config import ModelConfig, ModelError, read_config
from engine.weights.scheme import read_quantization
from engine.weights.tensor_files import dtype_name
from hybridcache.geometry.checkpoints import CheckpointFormat
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.sizes import ModelSizes, SizesError
from hybridcache.scheduling.cache_manager import SLOTS_OF_ONE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights of one rank on its device, and the formats in which it computes."""

    settings: EngineConfig
    device: Device
    kernels: Kernels
    config: ModelConfig
    sizes: ModelSizes
    """Sizes of the part that this rank computes and stores."""
    dtype: torch.dtype
    state_dtype: torch.dtype
    checkpoints: CheckpointFormat | None
    """Format of checkpoints that differs from that of running states, or None."""
    model: Decoder
    weights_note: str
    geometry: ModelGeometry

    @classmethod
    def load(cls, config: EngineConfig, rank: Rank = ALONE) -> LoadedModel:
        """Load the weights that ``config`` names. Raises ModelError."""
        device = Device.resolve(config.device)
        if rank.count > 1:
            device = device.of_rank(rank.number)
            config = config if device.is_cpu else replace(config, graphs="off")
        device.make_current()
        config = config.settled(on_cpu=device.is_cpu)
        kernels = Kernels(device, config.kernels)
        if not device.supports(config.quantization):
            raise ModelError(f"{device.describe()} does not support fp8; use --quantization int8.")
        raw = read_config(config.model_dir)
        family, model_config = read_model(raw)
        sizes = shared_sizes(model_config, rank.count)
        word = model_config.dtype if config.dtype == "auto" else config.dtype
        is_known = getattr(getattr(torch, word, None), "is_floating_point", None) is True
        if word != "auto" and not is_known:
            raise ModelError(f"dtype {word!r} in config.json is unknown: use --dtype bfloat16.")
        dtype = DTYPES.get(word, torch.float32 if device.is_cpu else torch.bfloat16)
        has_sums = sizes.size_of("recurrent") > 0
        build = Build(kernels, _weight_spec(config, raw, device, dtype, kernels), rank)
        model, note = load_model(config, family, model_config, build)
        if model.prediction is not None:
            sizes = replace(model_config.sizes, beside=model.prediction.keeps)
            model_config = replace(model_config, sizes=sizes)
        geometry = ModelGeometry.from_sizes(
            config.model_dir.name,
            model_config.sizes,
            kv_dtype=dtype_name(dtype),
            conv_dtype=dtype_name(dtype),
            state_dtype=config.state_dtype,
            checkpoint_dtype=config.checkpoint_dtype,
        )
        return cls(
            config,
            device,
            kernels,
            model_config,
            sizes,
            dtype,
            DTYPES[config.state_dtype],
            CheckpointFormat.parse(config.checkpoint_dtype) if has_sums else None,
            model,
            note,
            geometry,
        )

    def excerpt(self, max_running: int) -> LoadedModel:
        """Return a model with the first layer of each kind, without drafts and graphs."""
        first = {sizes: rank for rank, sizes in reversed([*enumerate(self.sizes.layers)])}
        ranks = sorted(first.values())
        layers = tuple(self.sizes.layers[rank] for rank in ranks)
        return replace(
            self,
            settings=replace(self.settings, graphs="off", max_running=max_running, plugins=()),
            sizes=replace(self.sizes, layers=layers, beside=()),
            checkpoints=None,
            model=self.model.excerpt(ranks),
        )

    def plan(
        self, num_tokens: int = MIN_KV_TOKENS, num_states: int = SLOTS_OF_ONE, page_size: int = 1
    ) -> MemoryPlan:
        """Return the sizes of a memory for this model, by default the smallest one."""
        return MemoryPlan.of(
            num_tokens,
            num_states,
            kv_row_bytes(self.sizes, self.dtype),
            state_slot_bytes(self.sizes, self.dtype, self.state_dtype, self.checkpoints),
            page_size,
            owns_states=self.checkpoints is not None,
        )

    @property
    def state_bytes(self) -> int:
        return state_slot_bytes(self.sizes, self.dtype, self.state_dtype)

    @property
    def num_staged(self) -> int:
        """Number of exported states that wait until they are narrowed."""
        most = self.settings.most_step_tokens // self.settings.tile_size + self.settings.max_running
        return max(1, min(most, STAGING_BYTES // max(self.state_bytes, 1)))

    @property
    def outer_state_bytes(self) -> int:
        """Bytes of states outside the cache's memory: those after each verified token, and, with
        another format of checkpoints, running and exported ones."""
        num_states = self.settings.num_step_states
        if self.checkpoints is not None:
            num_states += self.num_staged + self.settings.max_running
        return num_states * self.state_bytes


def _weight_spec(
    config: EngineConfig,
    raw: Mapping[str, Any],
    device: Device,
    dtype: torch.dtype,
    kernels: Kernels,
) -> WeightSpec:
    """Return the format of the weights. Raises ModelError if it is not supported."""
    place = device.torch_device, dtype, config.quantization
    if config.fp8_activations:
        fused = [kernels[name].__name__.endswith(".fused") for name in ("linear", "moe")]
        if not (device.supports("fp8") and all(fused)):
            raise ModelError("--fp8-activations needs a GPU with fp8 products, and Triton.")
    if config.load_format == "dummy":
        return WeightSpec(*place, fp8_activations=config.fp8_activations)
    products = {pair for pair in kernels["linear"].PRODUCTS if device.supports(pair[0])}
    files = read_quantization(raw, config.model_dir)
    spec = WeightSpec(*place, files, frozenset(products), config.fp8_activations)
    if spec.fp8_activations and not spec.has_fp8_products:
        raise ModelError("--fp8-activations needs fp8 weights: use --quantization fp8.")
    return spec


def shared_sizes(config: ModelConfig, num_ranks: int) -> ModelSizes:
    """Return the sizes of one of ``num_ranks``. Raises ModelError."""
    try:
        return config.sizes.share(num_ranks)
    except SizesError as error:
        raise ModelError(f"--tp {num_ranks} is not possible for this model: {error}.") from None
