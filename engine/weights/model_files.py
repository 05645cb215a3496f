"""Files of a model: a directory with safetensors files, or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.weights.checkpoint import Checkpoint, WeightFiles
from engine.weights.gguf import PART_NAME, GgufFile
from engine.weights.gguf_names import Model
from engine.weights.gguf_weights import GgufWeights
from engine.weights.model_config import ModelError
from engine.weights.tensor_files import enumerated, find_files

CONFIG_NAME = "config.json"
PROJECTOR = "mmproj"
"""Beginning of the names of files with a visual tower, which is not read."""


def gguf_file(model: Path) -> Path | None:
    """Return the GGUF file that ``model`` names: itself, or the only model in a directory without a
    config.json; of a split model the first part. None for other models. Raises ModelError if a
    directory has several."""
    if model.suffix == ".gguf":
        return model
    if (model / CONFIG_NAME).is_file():
        return None
    parts = [path for path in sorted(model.glob("*.gguf")) if not path.name.startswith(PROJECTOR)]
    split = {path: PART_NAME.fullmatch(path.name) for path in parts}
    found = [path for path, place in split.items() if place is None or int(place[2]) == 1]
    if len(found) > 1:
        raise ModelError(
            f"{model} has several models: use one of {enumerated([path.name for path in found])} "
            f"as in --model {found[0]}."
        )
    return found[0] if found else None


def weight_files(model: Path) -> list[Path]:
    """List the files with the weights of a model. Raises WeightsError."""
    file = gguf_file(model)
    return find_files(model) if file is None else GgufFile(file).paths


def open_weights(model: Path, config: Mapping[str, Any], *, with_head: bool) -> Checkpoint:
    """Map the weights of a model with this config. Raises ModelError."""
    file = gguf_file(model)
    if file is None:
        return WeightFiles(model, config, with_head=with_head)
    return GgufWeights(Model(GgufFile(file)), with_head=with_head)


def config_bytes(model: Path) -> bytes:
    """Return the config of a model as bytes, to compare models. Raises ModelError."""
    if gguf_file(model) is None:
        return (model / CONFIG_NAME).read_bytes()
    return json.dumps(read_config(model), sort_keys=True).encode()


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return the contents of a model's ``config.json``, or those that a GGUF file has in its place.
    Raises ModelError."""
    file = gguf_file(model_dir)
    if file is not None:
        return Model(GgufFile(file)).config
    path = model_dir / "config.json"
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
