"""The form of compressed-tensors: groups of modules, each with a scheme for its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from engine.weights.layer_names import Names
from engine.weights.model_config import ModelError
from engine.weights.scheme import (
    EightBitScheme,
    GroupedScheme,
    Quantization,
    Scheme,
    Section,
    Stored,
    Tensors,
    UnsupportedError,
    block_size,
    check_served,
    scale_dtype,
)
from kernels.linear.blocks import GGML_TYPES
from kernels.linear.formats import Format, Matrix
from kernels.linear.grouped import Grouped, from_compressed_tensors, from_mxfp4

METHOD = "compressed-tensors"
SERVED = "compressed-tensors with int8, float8, int4 or mxfp4 weights"
UNPACKED = ("int-quantized", "float-quantized", "naive-quantized")
PACKED, MXFP4 = "pack-quantized", "mxfp4-pack-quantized"
STANDARD_EXPONENTS = (0, 14)
"""First version of compressed-tensors whose exponents of mxfp4 are those of the OCP's standard.
Earlier ones stored them less 2 (vllm-project/compressed-tensors, #538)."""
BYTES = (torch.uint8, torch.int8, torch.float8_e8m0fnu)
"""Types in which writers store the bytes of mxfp4; the last one is only for scales."""
UNUSED = ("transform_config", "kv_cache_scheme")
"""Parts that must be empty."""


@dataclass(frozen=True, slots=True)
class PackedScheme(GroupedScheme):
    """One weight ``[M, N]``, stored as ``[M, N / numbers per word]``."""

    has_order: bool = False
    """True if the groups of columns are listed (``actorder``)."""

    FIELDS = "num_bits, group_size and strategy"

    def describe(self) -> str:
        return "int4 with a scale per output channel" if self.is_per_row else self.format.describe()

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        own = self.grouped
        num_groups = self.num_groups(num_columns)
        num_words, num_zeros = (-(-size * own.bits // 32) for size in (num_columns, num_rows))
        found = {
            "weight_packed": Stored(((num_rows, num_words),), (torch.int32,)),
            "weight_scale": Stored(((num_rows, num_groups),), (own.dtype,)),
            "weight_shape": Stored(((2,),)),
            "weight_g_idx": Stored(((num_columns,),), is_optional=not self.has_order),
        }
        if own.has_zeros:
            found["weight_zero_point"] = Stored(((num_zeros, num_groups),), (torch.int32,))
        return found

    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        shape = tensors["weight_shape"].tolist()
        if shape != [num_rows, num_columns]:
            raise ValueError(f"is {shape} by its weight_shape.")
        format, fields = from_compressed_tensors(
            tensors["weight_packed"],
            tensors["weight_scale"],
            num_columns,
            self.group,
            self.grouped.bits,
            tensors.get("weight_zero_point"),
            tensors.get("weight_g_idx"),
        )
        return Matrix(format, fields, num_columns)


@dataclass(frozen=True, slots=True)
class Mxfp4Scheme(Scheme):
    """Numbers of 4 bits (e2m1) with an exponent for each group of 32 columns."""

    FIELDS = "num_bits and group_size"

    @property
    def format(self) -> Format:
        return GGML_TYPES[39]

    def describe(self) -> str:
        return "mxfp4"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        return {
            "weight_packed": Stored(((num_rows, num_columns // 2),), BYTES[:2]),
            "weight_scale": Stored(((num_rows, num_columns // 32),), BYTES),
        }

    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        if num_columns % 32:
            raise ValueError(f"has {num_columns} columns: mxfp4 needs whole groups of 32.")
        packed, scale = (tensors[word].view(torch.uint8) for word in self.tensors(0, 0))
        if (scale == 255).any():
            raise ValueError(
                "has the exponent 255 in weight_scale, which is not a number: the file is damaged, "
                "or its writer failed; download it again."
            )
        return Matrix(self.format, from_mxfp4(packed.unflatten(1, (-1, 16)), scale), num_columns)


def read(section: Section, tensors: Mapping[str, torch.Tensor]) -> Quantization:
    """Read the section. Raises UnsupportedError for parts that change numbers."""
    sparsity = section.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise UnsupportedError("sparsity_config of compressed-tensors")
    check_served("compressed-tensors", section, dict.fromkeys(UNUSED, ({}, None)))
    groups = section.get("config_groups")
    if not groups:
        raise ModelError("quantization_config in config.json has no config_groups.")
    parsed = []
    for name, group in groups.items():
        layout = group.get("format") or section.get("format")
        if layout == MXFP4:
            _check_exponents(str(section.get("version") or ""))
        scheme = _scheme(f"{name} of compressed-tensors", {**group, "format": layout}, tensors)
        targets = group.get("targets") or ()
        parsed.append((scheme, None if "Linear" in targets else Names.of(targets)))
    ignored = Names.of(section.get("ignore") or ())
    return Quantization(tuple(parsed), ignored)


def _check_exponents(version: str) -> None:
    """Raise UnsupportedError if weights may be a quarter of their size."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < STANDARD_EXPONENTS:
        raise UnsupportedError(
            f"{MXFP4} with version {version or 'missing'} (before 0.14 its exponents were stored "
            "less 2; quantise the model again with a later one, or write its version here)"
        )


def _scheme(name: str, group: Section, tensors: Mapping[str, torch.Tensor]) -> Scheme:
    """Read a group.

    This engine's kernels round activations to 8 bits of the weights' kind, symmetric, with a
    dynamic scale per token. With float8 weights they do not round activations, so any dynamic scale
    is accepted.
    """
    formats = (*UNPACKED, PACKED, MXFP4)
    check_served(name, group, {"format": formats, "output_activations": ({}, None)})
    weights = {"num_bits": None, "type": "int", "strategy": None, **group["weights"]}
    kind, strategy, layout = weights["type"], weights["strategy"], group["format"]
    activations = group.get("input_activations")
    if layout in (PACKED, MXFP4):
        check_served(name, {"input_activations": activations}, {"input_activations": ({}, None)})
        return _packed_scheme(f"{name}, weights", weights, layout, tensors)
    served: dict[str, Sequence[object]] = {"num_bits": (8,), "symmetric": (True,)}
    kinds, strategies = ("int", "float"), ("channel", "tensor", "block")
    check_served(f"{name}, weights", weights, {**served, "type": kinds, "strategy": strategies})
    if activations is not None:
        found = {"num_bits": None, "type": kind, "dynamic": False, **activations}
        scales = ("token", None) if kind == "int" else ("token", "group", "tensor", None)
        served |= {"type": (kind,), "dynamic": (True,), "strategy": scales}
        check_served(f"{name}, input_activations", found, served)
    blocks = {"channel": (1, None), "tensor": (None, None)}
    structure = weights.get("block_structure")
    block = blocks.get(strategy) or block_size(structure, f"block_structure of {name}")
    word: Literal["int8", "fp8"] = "int8" if kind == "int" else "fp8"
    return EightBitScheme(word, block, "weight_scale", is_weight_only=activations is None)


def _packed_scheme(
    name: str, weights: Section, layout: str, tensors: Mapping[str, torch.Tensor]
) -> Scheme:
    if layout == MXFP4:
        served = {"num_bits": (4,), "type": ("float",), "group_size": (32,), "symmetric": (True,)}
        check_served(name, weights, served)
        return Mxfp4Scheme()
    is_per_row = weights["strategy"] == "channel"
    sizes = {} if is_per_row else {"group_size": (32, 64, 128)}
    check_served(
        name, weights,
        {"num_bits": (4, 8), "type": ("int",), "strategy": ("group", "channel"), **sizes},
    )  # fmt: skip
    size = 128 if is_per_row else weights["group_size"]
    dtype = scale_dtype(tensors, "weight_scale", torch.bfloat16)
    has_zeros = not weights.get("symmetric", True)
    has_order = weights.get("actorder") in (True, "group", "dynamic")
    grouped = Grouped(weights["num_bits"], size, has_zeros, dtype)
    return PackedScheme(grouped, is_per_row, has_order)
