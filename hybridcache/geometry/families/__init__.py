"""Families of models: each file reads the sizes of its own out of a Hugging Face ``config.json``.

A file names the ``model_type`` values it reads in ``MODEL_TYPES`` and has ``sizes(text)``; nothing
else lists it. A model of another type is read by the file whose ``MARK`` is a field of its config,
or else by its ``layer_types``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from hybridcache.geometry.sizes import ModelSizes

Fields = Mapping[str, Any]
Reader = Callable[[Fields], ModelSizes]


def text_part(config: Fields) -> Fields:
    """The language model's part of a ``config.json``: its ``text_config`` over what stands around
    it. Raises ValueError for what is no object."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a JSON object was expected, not {type(config).__name__}")
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise ValueError("text_config in config.json must be an object.")
    said = {name: value for name, value in text.items() if value is not None or name not in config}
    return {**config, **said}


def sizes_of(text: Fields) -> ModelSizes:
    """Of one model's text part. Raises KeyError for a field that is missing, SizesError for sizes
    that no model can have, TypeError or ValueError for values of the wrong type."""
    by_type, by_mark = _readers()
    read = by_type.get(str(text.get("model_type")))
    if read is None:
        read = next((read for mark, read in by_mark.items() if text.get(mark)), by_type[""])
    return read(text)


def model_types() -> frozenset[str]:
    """Those that a file of their own reads."""
    return frozenset(_readers()[0]) - {""}


@cache
def _readers() -> tuple[dict[str, Reader], dict[str, Reader]]:
    """By ``model_type``, and by mark."""
    by_type, by_mark = {}, {}
    for file in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{file.name}")
        for model_type in getattr(module, "MODEL_TYPES", ()):
            by_type[model_type] = module.sizes
        if hasattr(module, "MARK"):
            by_mark[module.MARK] = module.sizes
    return by_type, by_mark
