"""Families of models: each file reads the sizes of its own from a Hugging Face ``config.json``.

A file has ``FORMATS``, the keys of each ``model_type`` that it reads, and ``sizes(config)``. No
list names the file. A model of another type is read by the file whose ``MARK`` is a key of its
config, or else by its ``layer_types``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from hybridcache.geometry.config_format import Config, Format
from hybridcache.geometry.families import by_layer_types
from hybridcache.geometry.sizes import ModelSizes

Fields = Mapping[str, Any]

COMPOSITES = ("qwen3_5", "qwen3_5_moe")
"""Types of models that have their text part in ``text_config`` and tie embeddings, or not, as the
level around it says."""


def text_part(config: Fields) -> Fields:
    """The language model's part of a ``config.json``: ``text_config`` where there is one, with
    ``tie_word_embeddings`` and ``dtype`` of the level around it. Raises ValueError for what is no
    object."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a JSON object was expected, not {type(config).__name__}")
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
    """The sizes of one model's text part, and the config that they were read from; None for a type
    of which no file knows the keys. Raises KeyError for a key that is missing there, SizesError for
    sizes that no model can have, TypeError or ValueError for values of the wrong type."""
    by_type, by_mark = _modules()
    module = by_type.get(str(text.get("model_type")))
    module = module or next((by_mark[mark] for mark in by_mark if text.get(mark)), None)
    if module is None:
        return by_layer_types.sizes(text), None
    formats: Mapping[str, Format] = module.FORMATS
    format = formats.get(str(text.get("model_type"))) or next(iter(formats.values()))
    config = format.read(text)
    return module.sizes(config), config


def sizes_of(text: Fields) -> ModelSizes:
    """Of one model's text part. Raises what ``read`` does."""
    return read(text)[0]


def format_of(model_type: str) -> Format:
    """The keys of a type that a file reads. Raises KeyError for another."""
    found: Format = _modules()[0][model_type].FORMATS[model_type]
    return found


@cache
def _modules() -> tuple[dict[str, ModuleType], dict[str, ModuleType]]:
    """Files by ``model_type``, and by mark."""
    by_type, by_mark = {}, {}
    for file in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{file.name}")
        by_type.update(dict.fromkeys(getattr(module, "FORMATS", ()), module))
        if hasattr(module, "MARK"):
            by_mark[module.MARK] = module
    return by_type, by_mark
