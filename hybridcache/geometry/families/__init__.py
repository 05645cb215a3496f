"""Model families: each module reads the sizes of its models from a Hugging Face ``config.json``.

A module defines ``FORMATS`` (the keys of each ``model_type`` that it reads) and ``sizes(config)``.
Modules are discovered, not registered. A config with an unknown ``model_type`` is read by its
``layer_types``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType

from hybridcache.geometry.config_format import Config
from hybridcache.geometry.families import by_layer_types
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import ModelSizes, SizesError

COMPOSITES = ("qwen3_5", "qwen3_5_moe")
"""Model types with a ``text_config`` that set ``tie_word_embeddings`` at the outer level."""


def text_part(config: Fields) -> Fields:
    """Return the language model's part of a ``config.json``.

    This is ``text_config`` if there is one, with ``tie_word_embeddings`` and ``dtype`` of the
    outer level.

    Raises:
        ValueError: the config or its ``text_config`` is not an object.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"must be a JSON object, not {type(config).__name__}")
    text = config.get("text_config")
    if text is None:
        return config
    if not isinstance(text, Mapping):
        raise ValueError("text_config in config.json must be an object.")
    around = {
        name: config[name]
        for name in ("dtype", "torch_dtype", "tie_word_embeddings")
        if config.get(name) is not None
    }
    if config.get("model_type") in COMPOSITES:
        around |= {"model_type": config["model_type"]}
        around.setdefault("tie_word_embeddings", False)
    return {**text, **around}


def read(text: Fields) -> tuple[ModelSizes, Config | None]:
    """Return the sizes of a model's text part, and the config that they were read from.

    The config is None if no module reads the model type.

    Raises:
        KeyError: a required key is missing.
        SizesError: no model can have these sizes.
        TypeError, ValueError: a value has the wrong type.
    """
    module = modules().get(model_type := str(text.get("model_type")))
    if module is None:
        marks = "linear_attn", "linear_num_", "mamba_"
        linear = [name for name, value in text.items() if name.startswith(marks) and value]
        if linear and not (text.get("layer_types") or text.get("full_attention_interval")):
            raise SizesError(
                f"model_type {model_type!r} is unknown, and {linear[0]} tells of linear layers, "
                "which no layer_types list: add these, or set the model_type of a known family "
                "with the same keys."
            )
        return by_layer_types.sizes(text), None
    config: Config = module.FORMATS[model_type].read(text)
    return module.sizes(config), config


@cache
def modules() -> dict[str, ModuleType]:
    """Return the modules by ``model_type``."""
    found: dict[str, ModuleType] = {}
    for file in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{file.name}")
        found |= dict.fromkeys(getattr(module, "FORMATS", ()), module)
    return found
