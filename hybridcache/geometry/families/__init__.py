"""Model families: each module reads the sizes of its models from a Hugging Face ``config.json``.

A module defines ``FORMATS`` (the keys of each ``model_type`` that it reads) and ``sizes(config)``,
which raises SizesError for sizes that no model can have, or for an unknown layer type.
Modules are discovered, not registered. A config with an unknown ``model_type`` is read by its
list of layers (``LISTS``), and a warning says how.
"""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from hybridcache.geometry.config_format import Config
from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import LayerSizes, MixerSizes, ModelSizes, SizesError

COMPOSITES = ("qwen3_5", "qwen3_5_moe")
"""Model types with a ``text_config`` that set ``tie_word_embeddings`` at the outer level."""


def text_part(config: Fields) -> Fields:
    """Return the language model's part of a ``config.json``: ``text_config`` if there is one, with
    ``tie_word_embeddings`` and ``dtype`` of the outer level. Raises ValueError if it is no
    object."""
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
    """Return the sizes of a model's text part, and the config that they were read from, or None if
    no module reads the model type.

    Raises:
        KeyError: a required key is missing.
        SizesError: no model can have these sizes.
        TypeError, ValueError: a value has the wrong type.
    """
    module = modules().get(model_type := str(text.get("model_type")))
    if module is None:
        return _of_unknown_type(text, model_type), None
    config: Config = module.FORMATS[model_type].read(text)
    return module.sizes(config), config


def _attention(text: Fields) -> MixerSizes:
    return fields.latent_attention(text) if text.get("kv_lora_rank") else fields.attention(text)


MLP_ALONE = "mlp"
"""Type of a layer without a mixer."""
MARKS = "linear_attn", "linear_num_", "mamba_", "attn_layer_"
"""Beginnings of fields that only models with linear layers have."""
READERS: dict[str, Callable[[Fields], MixerSizes]] = {
    "full_attention": _attention,
    "attention": _attention,
    "linear_attention": fields.gated_delta_net,
    "mamba": fields.mamba2,
}


LISTS = "layer_types", "layers_block_type", "hybrid_pattern", "hybrid_override_pattern"
"""Fields that list the types of all layers, as words or as a letter each."""
WORDS = {"M": "mamba", "mamba2": "mamba", "attn": "attention", "*": "attention", "-": MLP_ALONE}
"""Other words and letters for types of layers. Words of ``READERS`` stay as they are."""


def _types(text: Fields) -> tuple[str, list[str]]:
    """Return the field that says which layer is of which type, and a type per layer. The field is
    empty, and all layers attend, if there is none."""
    count = fields.num_layers(text)
    for name in LISTS:
        if text.get(name):
            given = {
                name: [WORDS.get(word, word) for word in text[name]],
                "num_hidden_layers": count,
            }
            return name, fields.sorts(given, (*READERS, MLP_ALONE), name)
    if interval := int(text.get("full_attention_interval") or 0):
        return "full_attention_interval", fields.every_nth_attends(text, interval)
    return "", ["attention"] * count


def _of_unknown_type(text: Fields, model_type: str) -> ModelSizes:
    """Compute the sizes of a model of an unknown type, with an MLP or experts in every layer unless
    some are one alone. A warning says how it was read."""
    name, types = _types(text)
    linear = [key for key, value in text.items() if key.startswith(MARKS) and value]
    if linear and not name:
        raise SizesError(
            f"model_type {model_type!r} is unknown, and {linear[0]} tells of linear layers, "
            "which no layer_types list: add these, or set the model_type of a known family "
            "with the same keys."
        )
    if name == "hybrid_override_pattern" and "mamba_num_heads" in text:
        raise SizesError(
            f"model_type {model_type!r} is unknown, and its keys are those of Nemotron-H: set "
            "model_type to nemotron_h."
        )
    _attention(text)
    mlp = fields.experts(text) or fields.dense(text)
    mixers = {sort: (READERS[sort](text),) for sort in {*types} - {MLP_ALONE}}
    parts = ", ".join(f"{types.count(sort)} of {sort}" for sort in dict.fromkeys(types))
    assumed = [one for one in ("num_key_value_heads", "head_dim") if text.get(one) is None]
    said = f"model_type {model_type!r} is unknown: read as {len(types)} layers, {parts}"
    said += f" ({name})" if name else f", none with a state: there is none of {', '.join(LISTS)}"
    said += f"; without {', '.join(assumed)}, as in attention of equal heads" * bool(assumed)
    warnings.warn(said, stacklevel=2)
    mlps = {sort: mlp if sort == MLP_ALONE or MLP_ALONE not in types else None for sort in types}
    return fields.model(text, tuple(LayerSizes(mixers.get(s, ()), mlps[s]) for s in types))


@cache
def modules() -> dict[str, Any]:
    """Return the modules by ``model_type``."""
    return {word: module for module, words in defined(__name__, "FORMATS") for word in words}


def defined(package: str, name: str) -> Iterator[tuple[Any, Any]]:
    """Yield (owner, value) for each module of ``package``, and each class in one, that defines
    ``name``. A file that is added to a package is found in this way, without a list of them."""
    for file in pkgutil.iter_modules(import_module(package).__path__):
        module = import_module(f"{package}.{file.name}")
        parts = vars(module).values()
        own = (one for one in parts if isinstance(one, type) and one.__module__ == module.__name__)
        for owner in (module, *own):
            if name in vars(owner):
                yield owner, vars(owner)[name]
