"""Files of a model: a directory with safetensors files, or a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

from engine.weights.checkpoint import RawWeights, WeightFiles
from engine.weights.gguf_names import Model
from engine.weights.gguf_weights import GgufWeights
from engine.weights.model_config import RawConfig, read_config
from engine.weights.tensor_files import find_files
from hybridcache.geometry.gguf import gguf_file, is_gguf


def weight_files(model: Path) -> list[Path]:
    """List the files with the weights of a model. Raises WeightsError."""
    file = gguf_file(model)
    return find_files(model) if file is None else file.paths


def open_weights(model: Path, config: RawConfig, *, with_head: bool) -> RawWeights:
    """Map the weights of a model with this config. Raises ModelError."""
    file = gguf_file(model)
    if file is None:
        return WeightFiles(model, config, with_head=with_head)
    return GgufWeights(Model(file), with_head=with_head)


def config_bytes(model: Path) -> bytes:
    """Return the config of a model as bytes, to compare models. Raises ModelError."""
    if not is_gguf(model):
        return (model / "config.json").read_bytes()
    return json.dumps(read_config(model), sort_keys=True).encode()
