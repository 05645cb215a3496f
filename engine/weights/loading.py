"""Construction of a model with its weights from a model directory."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from engine.layers.parameters import Build
from engine.layers.prediction import PredictionHead
from engine.models.decoder import Decoder, Fill
from engine.runner.device import Device
from engine.weights.model_config import ModelConfig, ModelError
from engine.weights.reader import Dummy, WeightFiles
from engine.weights.tensor_files import enumerated
from hybridcache.geometry.units import format_count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Loaded(NamedTuple):
    """A model with its weights."""

    model: Decoder
    head: PredictionHead | None
    """Multi-token head, or None if it was not requested."""
    note: str
    """Description of the number and the source of the weights."""


def load_model(
    model_dir: Path,
    family: type[Decoder],
    config: ModelConfig,
    build: Build,
    *,
    load_format: str,
    num_workers: int,
    seed: int,
    with_head: bool = False,
) -> Loaded:
    """Build a model with its weights, and with its multi-token head if requested.

    Raises WeightsError before any tensor is read if the weight files do not match the config or
    have no head. Raises ModelError if the family's head is not supported.
    """
    outline = replace(build, weights=replace(build.weights, device=torch.device("meta")))
    if load_format == "dummy":
        counted = _counted(family(config, outline), with_head)
        dummy = Dummy(seed)
        model = family(config, build, dummy.fill)
        head = _head(model, dummy.fill) if with_head else None
        return Loaded(model, head, f"{counted}; seeded (seed {seed}), untrained")
    files = WeightFiles(model_dir, num_workers, build.weights.files, with_head=with_head)
    files.tensors = family.published(files.tensors)
    if config.tie_embeddings:
        config = replace(config, tie_embeddings=files.ties(f"{family.embedding_name}.weight"))
    is_stacked = files.has_stacked_experts
    plan = family(config, outline, stacked_experts=is_stacked)
    parameters = plan.parameters()
    if with_head:
        parameters = chain(parameters, _head(plan).parameters())
    files.check(parameters, tied=config.tie_embeddings, sizes=config.described_sizes)
    model = family(config, build, files.fill, stacked_experts=is_stacked)
    head = _head(model, files.fill) if with_head else None
    note = files.close() + build.weights.note()
    if config.unknown_keys:
        note += f"; ignored keys of config.json: {enumerated(sorted(config.unknown_keys))}"
    return Loaded(model, head, f"{_counted(plan, with_head)}; {note}")


def _counted(plan: Decoder, with_head: bool) -> str:
    """Describe the number of weights in all tensors, including embeddings and the parts of all
    ranks."""
    said = f"{format_count(_num_weights(plan))} parameters"
    if not with_head:
        return said
    return f"{said} and {format_count(_num_weights(_head(plan)))} of its multi-token head"


def _num_weights(plan: Decoder | PredictionHead) -> int:
    return sum(math.prod(parameter.shape) for _, parameter in plan.parameters())


def _head(model: Decoder, fill: Fill | None = None) -> PredictionHead:
    """Make the head of ``model``, with weights if ``fill`` is given."""
    head = model.prediction_head()
    if head is None:
        raise ModelError(
            f"--draft mtp requires a multi-token head, which is not supported for "
            f"{type(model).__name__}: use --draft tree, or none."
        )
    if fill is not None:
        fill(head)
        head.seal()
    return head


def resolve_dtype(word: str, config: ModelConfig, device: Device) -> torch.dtype:
    """Return a dtype by name. ``auto`` is that of the weight files if the device supports it.
    Raises ModelError."""
    name = config.dtype if word == "auto" else word
    if name not in DTYPES:
        if word == "auto":
            return device.traits.default_dtype
        raise ModelError(f"dtype {name!r} is not supported; float32 and bfloat16 are.")
    return DTYPES[name]
