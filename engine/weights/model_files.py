"""Files of a model: a directory with safetensors files, or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.weights.checkpoint import Checkpoint, WeightFiles
from engine.weights.gguf import GgufFile, choose_files
from engine.weights.gguf_names import Model
from engine.weights.gguf_weights import GgufWeights
from engine.weights.layer_names import CONFIG_NAME, is_gguf
from engine.weights.model_config import ModelError
from engine.weights.tensor_files import find_files


def gguf_file(model: Path) -> GgufFile | None:
    """Read the header of the GGUF file that ``model`` names: itself, or the model of a directory.
    None for other models. Raises WeightsError, also if a directory has several."""
    if not is_gguf(model):
        return None
    if model.is_dir():
        names = choose_files((path.name for path in model.glob("*.gguf")), source=str(model))
        model = model / names[0]
    return GgufFile(model)


def weight_files(model: Path) -> list[Path]:
    """List the files with the weights of a model. Raises WeightsError."""
    file = gguf_file(model)
    return find_files(model) if file is None else file.paths


def open_weights(model: Path, config: Mapping[str, Any], *, with_head: bool) -> Checkpoint:
    """Map the weights of a model with this config. Raises ModelError."""
    file = gguf_file(model)
    if file is None:
        return WeightFiles(model, config, with_head=with_head)
    return GgufWeights(Model(file), with_head=with_head)


def config_bytes(model: Path) -> bytes:
    """Return the config of a model as bytes, to compare models. Raises ModelError."""
    if not is_gguf(model):
        return (model / CONFIG_NAME).read_bytes()
    return json.dumps(read_config(model), sort_keys=True).encode()


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return the contents of a model's ``config.json``, or those that a GGUF file has in its place.
    Raises ModelError."""
    file = gguf_file(model_dir)
    if file is not None:
        return Model(file).config
    path = model_dir / CONFIG_NAME
    if not path.is_file():
        raise ModelError(
            f"there is no config.json in {model_dir}: use a model directory, or ORG/NAME for a "
            "model of the Hugging Face Hub."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not contain a JSON object.")
    return config
