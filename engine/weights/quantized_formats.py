"""Reader of ``quantization_config`` in a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.weights.layer_names import Names
from engine.weights.model_config import ModelError
from engine.weights.scheme import Quantization, ScaleGroup, Scheme
from kernels.linear.reference import Format

REMEDY = (
    "supported are fp8 in blocks, compressed-tensors with int8 or float8 weights, and "
    "the model in full precision with --quantization int8 or fp8"
)
FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
"""Formats of compressed-tensors with unpacked weights."""


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Read the formats of a checkpoint's weights from its ``config.json``.

    Returns None if no weight is quantised. Raises ModelError, also for unsupported formats.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    section = config.get("quantization_config") or nested
    if not section:
        return None
    if not isinstance(section, Mapping):
        raise ModelError("quantization_config in config.json must be an object.")
    method = str(section.get("quant_method", section.get("quant_algo", ""))).lower()
    try:
        if method == "fp8":
            return _fp8(section)
        if method == "compressed-tensors":
            return _compressed_tensors(section)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"quantization_config in config.json has a value of the wrong type: {error}."
        ) from None
    raise ModelError(f"{method or 'unnamed'} weights are not supported; {REMEDY}.")


def _fp8(section: Mapping[str, Any]) -> Quantization:
    """Read the form of DeepSeek and Qwen: e4m3 with a scale for each block. Without a list of
    exceptions everything except the head is in 8 bits, as in Qwen3's dense models."""
    for name, served in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if section.get(name, served) != served:
            found = section[name]
            raise ModelError(f"fp8 weights with {name} {found} are not supported; {REMEDY}.")
    size = section.get("weight_block_size")
    key = "ignored_layers" if "ignored_layers" in section else "modules_to_not_convert"
    scheme = Scheme("fp8", _block(size, "weight_block_size"), "weight_scale_inv")
    ignored = Names.of(section.get(key) or ("lm_head",), anywhere=True)
    return Quantization((ScaleGroup(scheme, None),), ignored, key)


def _block(size: Any, name: str) -> tuple[int, int]:
    if not (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise ModelError(f"{name} must be two positive integers in config.json (got {size}).")
    return size[0], size[1]


def _compressed_tensors(section: Mapping[str, Any]) -> Quantization:
    """Read compressed-tensors. Raises ModelError for every unsupported part of the format that
    changes numbers."""
    _refuse(section, "transform_config", "sparsity_config", "kv_cache_scheme")
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError("quantization_config in config.json has no config_groups.")
    parsed = []
    for name, group in groups.items():
        _refuse(group, "output_activations")
        layout = group.get("format") or section.get("format")
        scheme = _group_scheme(name, group, layout)
        targets = group.get("targets") or ()
        parsed.append(ScaleGroup(scheme, None if "Linear" in targets else Names.of(targets)))
    ignored = Names.of(section.get("ignore") or ())
    return Quantization(tuple(parsed), ignored, "ignore")


def _refuse(section: Mapping[str, Any], *keys: str) -> None:
    """Raise ModelError if one of the keys has a value. Empty values, and a sparsity that keeps all
    weights, are accepted."""
    for key in keys:
        value = section.get(key)
        is_dense = isinstance(value, Mapping) and value.get("format") == "dense"
        if value and not is_dense:
            raise ModelError(f"{key} of compressed-tensors is not supported; {REMEDY}.")


def _group_scheme(name: str, group: Mapping[str, Any], layout: Any) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ModelError(f"{name} of compressed-tensors does not describe weights; {REMEDY}.")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if bits != 8 or kind not in ("int", "float") or layout not in FORMATS:
        raise ModelError(
            f"{name} of compressed-tensors has {kind}{bits} weights as {layout}, which is not "
            f"supported; {REMEDY}."
        )
    if not weights.get("symmetric", True):
        raise ModelError(
            f"{name} of compressed-tensors has zero points: only symmetric weights are supported."
        )
    strategy = weights.get("strategy")
    if strategy == "block":
        block: tuple[int | None, int | None] = _block(weights.get("block_structure"), name)
    elif strategy in ("channel", "tensor"):
        block = (1 if strategy == "channel" else None), None
    else:
        raise ModelError(
            f"{name} of compressed-tensors has one scale per {strategy}; only scales per channel, "
            "tensor or block are supported."
        )
    activations = group.get("input_activations")
    if activations is not None:
        _check_activations(name, activations, kind)
    format: Format = "int8" if kind == "int" else "fp8"
    return Scheme(format, block, "weight_scale", is_weight_only=activations is None)


def _check_activations(name: str, activations: Mapping[str, Any], kind: str) -> None:
    """Raise ModelError if activations are rounded differently from this engine's kernels.

    The kernels round to 8 bits of the weights' kind, symmetric, with a dynamic scale per token.
    With float8 weights they do not round activations, so any dynamic scale is accepted.
    """
    strategies = ("token", None) if kind == "int" else ("token", "group", "tensor", None)
    defaults = {"type": kind, "symmetric": True, "dynamic": False, "strategy": None}
    found = {**defaults, **activations}
    served = {"num_bits": (8,), "type": (kind,), "symmetric": (True,), "dynamic": (True,)}
    for key, values in {**served, "strategy": strategies}.items():
        if found.get(key) not in values:
            raise ModelError(
                f"{name} of compressed-tensors has input_activations with {key} "
                f"{found.get(key)!r}, which is not supported: use dynamic ones of 8 bits with one "
                "scale per token."
            )
