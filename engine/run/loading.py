"""From a model directory to a model with its weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from engine.run.device import Device
from engine.run.layers.parameters import Build
from engine.run.layers.prediction import PredictionHead
from engine.run.model_config import ModelConfig, ModelError
from engine.run.models.decoder import Decoder, Fill
from engine.run.weights import Dummy, WeightFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Loaded(NamedTuple):
    """A model with its weights."""

    model: Decoder
    head: PredictionHead | None
    """Its multi-token head; None: not asked for."""
    note: str
    """Where the weights came from."""


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
    """A model with its weights, and with its multi-token head if that is asked for.

    Raises WeightsError before any tensor is read if the weight files do not fit the config or have
    no head, ModelError where the family's is not served.
    """
    if load_format == "dummy":
        dummy = Dummy(seed)
        model = family(config, build, dummy.fill)
        head = _head(model, dummy.fill) if with_head else None
        return Loaded(model, head, f"seeded weights (seed {seed}), untrained")
    files = WeightFiles(model_dir, num_workers, build.weights.files, with_head=with_head)
    is_stacked = files.has_stacked_experts
    outline = replace(build, weights=replace(build.weights, device=torch.device("meta")))
    plan = family(config, outline, stacked_experts=is_stacked)
    parameters = plan.parameters()
    if with_head:
        parameters = chain(parameters, _head(plan).parameters())
    files.check(parameters, tied=config.tie_embeddings)
    model = family(config, build, files.fill, stacked_experts=is_stacked)
    head = _head(model, files.fill) if with_head else None
    return Loaded(model, head, files.close() + build.weights.note())


def _head(model: Decoder, fill: Fill | None = None) -> PredictionHead:
    """The head of ``model``, with its weights where ``fill`` gives them."""
    head = model.prediction_head()
    if head is None:
        raise ModelError(
            f"draft mtp needs a multi-token head, and {type(model).__name__} is served without: "
            "use draft tree, or none."
        )
    if fill is not None:
        fill(head)
        head.seal()
    return head


def resolve_dtype(word: str, config: ModelConfig, device: Device) -> torch.dtype:
    """``auto`` is the weight files' own where the device computes in it. Raises ModelError."""
    name = config.dtype if word == "auto" else word
    if name not in DTYPES:
        if word == "auto":
            return device.traits.default_dtype
        raise ModelError(f"dtype {name!r} is not supported; float32 and bfloat16 are.")
    return DTYPES[name]
