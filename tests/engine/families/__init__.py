"""Small models of each family as oracles, built by transformers; one file per family.

A file names transformers' classes in ``CLASSES`` and the fields of a small config in ``CONFIG``. It
may also have:

- ``VARIANTS``: more configs by name.
- ``VARIANT_CLASSES``: classes of variants, if different.
- ``official``: a function that renames transformers' tensors to those of official checkpoints.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 36,
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """Classes and config of one small model."""

    classes: tuple[str, str]
    """Names of transformers' config and model classes."""
    config: dict[str, Any]
    is_variant: bool
    official: Callable[[Tensors], Tensors] | None


def find() -> dict[str, Family]:
    """Return all families and variants by name."""
    found = {}
    for file in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{file.name}")
        configs = {file.name: module.CONFIG} | getattr(module, "VARIANTS", {})
        for name, config in configs.items():
            official = getattr(module, "official", None)
            classes = getattr(module, "VARIANT_CLASSES", {}).get(name, module.CLASSES)
            found[name] = Family(classes, config, name != file.name, official)
    return found
