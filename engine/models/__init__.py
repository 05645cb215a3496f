"""Model families, one flat file each. A family is found by the ``model_types`` of its class."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from engine.weights.model_config import ModelConfig, ModelError, RawConfig, check_all_read
from hybridcache.geometry.families import COMPOSITES, defined, read, text_part

if TYPE_CHECKING:
    from engine.models.decoder import Decoder


def read_model(raw: RawConfig) -> tuple[type[Decoder], ModelConfig]:
    """Return the class for a ``config.json``, and the config it reads. Raises ModelError."""
    try:
        text = text_part(raw)
    except ValueError as error:
        raise ModelError(str(error)) from None
    model_type = text.get("model_type")
    family = families().get(str(model_type))
    if text is not raw and raw.get("model_type") not in (*COMPOSITES, model_type, None):
        model_type, family = raw["model_type"], None  # Its class may have more than the text part.
    if model_type is None:
        raise ModelError("config.json has no 'model_type', the name of the model's family.")
    if family is None:
        raise ModelError(
            f"models of model_type {model_type!r} are not supported; supported are "
            f"{', '.join(sorted(families()))}."
        )
    sizes, config = read(text)
    assert config is not None
    if not sizes.row_size:
        raise ModelError(
            "models without a layer of attention are not supported: see num_hidden_layers and "
            "layer_types, layers_block_type or attn_layer_period and attn_layer_offset."
        )
    made = family.read(config, sizes)
    check_all_read(config)
    return family, made


@cache
def families() -> dict[str, type[Decoder]]:
    """Map each ``model_type`` of a config.json to the class that supports it."""
    return {word: family for family, words in defined(__name__, "model_types") for word in words}
