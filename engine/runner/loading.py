"""The first phase of a model runner: a model with its weights, and its formats."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from engine.config import EngineConfig
from engine.models import read_model
from engine.models.decoder import Decoder, Fill
from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.runner.memory import (
    MIN_KV_TOKENS,
    STAGING_BYTES,
    MemoryPlan,
    kv_row_bytes,
    state_slot_bytes,
)
from engine.weights.checkpoint import Dummy, RawWeights
from engine.weights.model_config import ModelConfig, ModelError, read_config
from engine.weights.model_files import open_weights
from engine.weights.parameters import PRECISIONS, Build, WeightSpec
from engine.weights.ranks import ALONE, Rank
from engine.weights.tensor_files import dtype_name
from hybridcache.geometry.checkpoints import CheckpointFormat
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.sizes import ModelSizes, SizesError
from hybridcache.geometry.units import format_bytes, format_count
from hybridcache.scheduling.cache_manager import SLOTS_OF_ONE
from kernels.linear.formats import Format, Matrix
from kernels.linear.grouped import Grouped

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
        is_dummy = config.load_format == "dummy"
        with_head = config.drafts.head_len > 0
        files = None if is_dummy else open_weights(config.model_dir, raw, with_head=with_head)
        build = Build(kernels, _weight_spec(config, files, device, dtype, kernels), rank)
        model, note = load_model(config, family, model_config, build, files, device)
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
        first = {sizes: index for index, sizes in reversed([*enumerate(self.sizes.layers)])}
        indices = sorted(first.values())
        layers = tuple(self.sizes.layers[index] for index in indices)
        settings = replace(self.settings, graphs="off", draft="none", draft_running=None, tp=1)
        settings = replace(settings, max_running=max_running)
        return replace(
            self,
            settings=settings,
            sizes=replace(self.sizes, layers=layers, beside=()),
            checkpoints=None,
            model=self.model.excerpt(indices),
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
    files: RawWeights | None,
    device: Device,
    dtype: torch.dtype,
    kernels: Kernels,
) -> WeightSpec:
    """Return the format of the weights. Raises ModelError if it is not supported."""
    place = device.torch_device, dtype, config.quantization

    def has_fp8() -> bool:
        fused = [kernels[name].__name__.endswith(".fused") for name in ("linear", "moe")]
        return all(fused) and device.supports("fp8")

    if config.fp8_activations and not has_fp8():
        raise ModelError("fp8_activations needs a GPU with fp8 products, and Triton.")
    own = PRECISIONS.get(config.quantization or "")
    if isinstance(own, Grouped) and not own.has_product(kernels["linear"]):
        raise ModelError(
            f"--quantization {config.quantization} needs a CPU with AVX2 and the compiled kernels, "
            "or a GPU and Triton, which are not in use here: use int8, or a checkpoint with 4 bits."
        )
    if files is None:
        return WeightSpec(*place, fp8_activations=config.fp8_activations)

    def multiplies(format: Format) -> bool:
        return device.supports(format.kind) and format.has_product(kernels["linear"])

    follows = not device.is_cpu and has_fp8()
    spec = WeightSpec(*place, files.formats, multiplies, config.fp8_activations, follows)
    if spec.fp8_activations and not spec.has_fp8_products:
        raise ModelError("fp8_activations needs fp8 weights: use --quantization fp8.")
    return spec


def load_model(
    settings: EngineConfig,
    family: type[Decoder],
    config: ModelConfig,
    build: Build,
    files: RawWeights | None,
    device: Device | None = None,
) -> tuple[Decoder, str]:
    """Build the model that ``settings`` name, and its multi-token head if it is used, with their
    weights. Also returns the number and the source of these.

    Raises WeightsError before any tensor is read if the weight files do not match the config, and
    ModelError if the family's head is not supported.
    """
    outline = replace(build, weights=replace(build.weights, device=torch.device("meta")))
    with_head, is_stacked = settings.drafts.head_len > 0, False
    fill: Fill = Dummy(settings.seed).fill
    if files is not None:
        files.rename(family.published)
        fill, is_stacked = files.fill, files.is_stacked
        if config.tie_embeddings:
            config = replace(config, tie_embeddings=files.ties(f"{family.embedding_name}.weight"))
    make = partial(family, config, stacked_experts=is_stacked, with_prediction=with_head)
    parameters = list(make(outline).parameters())
    num_weights = sum(math.prod(parameter.shape) for _, parameter in parameters)
    counted = f"{format_count(num_weights)} parameters"  # Those of all ranks.
    if files is not None:
        files.check(parameters, tied=config.tie_embeddings)
    if device is not None:
        check_memory(device, build, [parameter.target for _, parameter in parameters])
    model = make(build, fill)
    if files is None:
        return model, f"{counted}; seeded (seed {settings.seed}), untrained"
    note = f"{counted}; {files.note()}{build.weights.note()}"
    files.close()
    return model, note


def check_memory(device: Device, build: Build, targets: Iterable[torch.Tensor | Matrix]) -> None:
    """Raise ModelError if the weights are larger than the memory that is available now."""
    word, needed = build.weights.quantization, 0.0
    for target in targets:
        if isinstance(target, Matrix):
            needed += target.num_bytes
        else:  # At least that many, if weights of large products are converted.
            num_bits = 8 * target.itemsize if word is None else PRECISIONS[word].num_bits
            needed += target.numel() * min(num_bits / 8, target.itemsize)
    needed *= build.rank.count if device.is_cpu else 1
    if needed > (free := device.free_bytes()):
        raise ModelError(
            f"the weights need {format_bytes(needed)}, but {format_bytes(free)} of the memory of "
            f"{device.torch_device} are available: use a smaller model or one with fewer bits, "
            "--quantization, or --tp on several GPUs."
        )


def shared_sizes(config: ModelConfig, num_ranks: int) -> ModelSizes:
    """Return the sizes of one of ``num_ranks``. Raises ModelError."""
    try:
        return config.sizes.share(num_ranks)
    except SizesError as error:
        raise ModelError(f"--tp {num_ranks} is not possible for this model: {error}.") from None
