"""Layouts of quantised weights in safetensors files, and the modules of a checkpoint that have one:
by ``quantization_config`` in its config.json, or by ModelSlim's file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engine.weights.layer_names import MODEL_SLIM_FILE, Names
from engine.weights.model_config import ModelError
from kernels.linear.eight_bits import EightBits
from kernels.linear.formats import Format, Matrix

Tensors = Mapping[str, torch.Tensor]
"""Tensors of one module, by the last part of their names."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a module in a file."""

    shapes: tuple[tuple[int, ...], ...] = ()
    """Allowed shapes; errors name the first one. Empty to allow any."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Allowed dtypes, or empty to allow any."""
    is_optional: bool = False


class Scheme(ABC):
    """Layout of the weight of one linear layer in a file. Instances are immutable."""

    @property
    @abstractmethod
    def format(self) -> Format:
        """Format of the matrix that the file's tensors become."""

    @abstractmethod
    def describe(self) -> str:
        """Return a description such as ``fp8 in blocks of 128 x 128``."""

    @abstractmethod
    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        """Return the tensors of a weight ``[num_rows, num_columns]``, by the last part of their
        names."""

    @abstractmethod
    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        """Return the weight. Raises ValueError for contents that are not supported, with a sentence
        about them that a name can precede."""


@dataclass(frozen=True, slots=True)
class EightBitScheme(Scheme):
    """One 8-bit weight ``[M, N]``: ``stored * scale``, with one scale per block."""

    kind: Literal["int8", "fp8"]
    block: tuple[int | None, int | None]
    """Rows and columns of a block; blocks at the end may be smaller. None means all; ``(1, None)``
    is one scale per output channel."""
    scale_name: str
    """Last part of the name of the scales, in place of ``weight``."""
    is_weight_only: bool = False
    """True if activations stay in full precision."""

    @property
    def format(self) -> EightBits:
        return EightBits(self.kind, self.block[1], self.is_weight_only)

    def describe(self) -> str:
        rows, columns = self.block
        if columns is not None:
            said = f"{self.kind} in blocks of {rows or 'all'} x {columns}"
        else:
            said = f"{self.kind} with a scale per {'tensor' if rows is None else 'output channel'}"
        return f"{said}, weights only" if self.is_weight_only else said

    def scale_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a weight; partial blocks count."""
        rows, columns = self.block
        return (
            1 if rows is None else -(-num_rows // rows),
            1 if columns is None else -(-num_columns // columns),
        )

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        shape = self.scale_shape(num_rows, num_columns)
        shapes: tuple[tuple[int, ...], ...] = (shape,)
        if self.block[1] is None:  # The last dimensions may be missing.
            shapes = (shape, shape[:1]) if self.block[0] is not None else (shape, (1,), ())
        return {
            "weight": Stored(((num_rows, num_columns),), (self.format.fields["weight"].dtype,)),
            self.scale_name: Stored(shapes),
            OFFSET: Stored(is_optional=True),
        }

    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        """Return the weight with the scales of each row, so that rows can be read in any order."""
        if OFFSET in tensors and tensors[OFFSET].count_nonzero():
            raise ValueError("has zero points: only symmetric weights are supported.")
        scale = tensors[self.scale_name]
        if scale.dtype is torch.uint8:  # exponents (ue8m0)
            scale = scale.view(torch.float8_e8m0fnu)
        grid = scale.float().reshape(self.scale_shape(num_rows, num_columns))
        scales = grid.repeat_interleave(self.block[0] or num_rows, dim=0)[:num_rows]
        return Matrix(self.format, {"weight": tensors["weight"], "scale": scales}, num_columns)


OFFSET = "weight_offset"
"""Last part of the name of zero points, which ModelSlim also writes if all are 0."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Formats of the modules of a checkpoint. Modules are named as in the files or without a
    multimodal prefix; fused products are not supported."""

    groups: tuple[tuple[Scheme, Names | None], ...]
    """Schemes, each with its modules, or None for every linear layer."""
    ignored: Names
    """Modules in full precision."""

    def scheme(self, module: str) -> Scheme | None:
        """Return the layout of the linear layer ``module``, or None for full precision."""
        is_table = module.rpartition(".")[2].startswith("embed")
        if is_table or self.ignored.has(module):
            return None
        return next((s for s, names in self.groups if names is None or names.has(module)), None)

    def format(self, module: str) -> Format | None:
        scheme = self.scheme(module)
        return None if scheme is None else scheme.format

    def column_order(self, module: str) -> torch.Tensor | None:
        return None

    def schemes(self) -> tuple[Scheme, ...]:
        """Return every distinct scheme."""
        return tuple(dict.fromkeys(scheme for scheme, _ in self.groups))

    def described(self) -> Sequence[tuple[str, Format]]:
        return [(scheme.describe(), scheme.format) for scheme in self.schemes()]

    def describe(self) -> str:
        """Return a description such as ``fp8 in blocks of 128 x 128``."""
        return " and ".join(scheme.describe() for scheme in self.schemes())


REMEDY = (
    "supported are fp8 in blocks, compressed-tensors with int8 or float8 weights, ModelSlim's "
    "W8A8_DYNAMIC, and the model in full precision with --quantization int8 or fp8"
)
FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
"""Formats of compressed-tensors with unpacked weights."""
UNUSED = ("transform_config", "kv_cache_scheme")
"""Parts of compressed-tensors that must be empty."""


def read_quantization(
    config: Mapping[str, Any], model_dir: Path | None = None
) -> Quantization | None:
    """Read the formats of a checkpoint's weights from its ``config.json``, or else from ModelSlim's
    file in its directory.

    Returns None if no weight is quantised. Raises ModelError, also for unsupported formats.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    section = config.get("quantization_config") or nested
    if not section:
        return _model_slim(model_dir / MODEL_SLIM_FILE) if model_dir is not None else None
    if not isinstance(section, Mapping):
        raise ModelError("quantization_config in config.json must be an object.")
    method = str(section.get("quant_method", section.get("quant_algo", ""))).lower()
    try:
        if method == "fp8":
            return _fp8(section)
        if method == "compressed-tensors":
            return _compressed_tensors(section)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"quantization_config in config.json lacks a value, or one has the wrong type: {error}."
        ) from None
    raise ModelError(f"{method or 'unnamed'} weights are not supported; {REMEDY}.")


def _fp8(section: Mapping[str, Any]) -> Quantization:
    """Read the form of DeepSeek and Qwen: e4m3 with a scale for each block. Without a list of
    exceptions everything except the head is in 8 bits, as in Qwen3's dense models."""
    _check_only("fp8 weights", section, {"fmt": ("e4m3",), "activation_scheme": ("dynamic",)})
    size = section.get("weight_block_size")
    key = "ignored_layers" if "ignored_layers" in section else "modules_to_not_convert"
    scheme = EightBitScheme("fp8", _block(size, "weight_block_size"), "weight_scale_inv")
    ignored = Names.of(section.get(key) or ("lm_head",), anywhere=True)
    return Quantization(((scheme, None),), ignored)


def _block(size: Any, name: str) -> tuple[int, int]:
    if not (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise ModelError(f"{name} must be two positive integers in config.json (got {size}).")
    return size[0], size[1]


def _compressed_tensors(section: Mapping[str, Any]) -> Quantization:
    """Read compressed-tensors. Raises ModelError for unsupported parts that change numbers."""
    sparsity = section.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ModelError(f"sparsity_config of compressed-tensors is not supported; {REMEDY}.")
    _check_only("compressed-tensors", section, dict.fromkeys(UNUSED, ({}, None)))
    groups = section.get("config_groups")
    if not groups:
        raise ModelError("quantization_config in config.json has no config_groups.")
    parsed = []
    for name, group in groups.items():
        layout = group.get("format") or section.get("format")
        scheme = _group_scheme(name, {**group, "format": layout})
        targets = group.get("targets") or ()
        parsed.append((scheme, None if "Linear" in targets else Names.of(targets)))
    ignored = Names.of(section.get("ignore") or ())
    return Quantization(tuple(parsed), ignored)


def _check_only(
    name: str, section: Mapping[str, Any], served: Mapping[str, Sequence[object]]
) -> None:
    """Raise ModelError if a key of ``section`` has a value that is not ``served``."""
    for key, values in served.items():
        if key in section and section[key] not in values:
            raise ModelError(f"{name} with {key} {section[key]!r} is not supported; {REMEDY}.")


def _group_scheme(name: str, group: Mapping[str, Any]) -> Scheme:
    """Read a group of compressed-tensors.

    This engine's kernels round activations to 8 bits of the weights' kind, symmetric, with a
    dynamic scale per token. With float8 weights they do not round activations, so any dynamic scale
    is accepted.
    """
    name = f"{name} of compressed-tensors"
    _check_only(name, group, {"format": FORMATS, "output_activations": ({}, None)})
    weights = {"num_bits": None, "type": "int", "strategy": None, **group["weights"]}
    kind, strategy = weights["type"], weights["strategy"]
    served: dict[str, Sequence[object]] = {"num_bits": (8,), "symmetric": (True,)}
    kinds, strategies = ("int", "float"), ("channel", "tensor", "block")
    _check_only(f"{name}, weights", weights, {**served, "type": kinds, "strategy": strategies})
    activations = group.get("input_activations")
    if activations is not None:
        found = {"num_bits": None, "type": kind, "dynamic": False, **activations}
        scales = ("token", None) if kind == "int" else ("token", "group", "tensor", None)
        served |= {"type": (kind,), "dynamic": (True,), "strategy": scales}
        _check_only(f"{name}, input_activations", found, served)
    blocks = {"channel": (1, None), "tensor": (None, None)}
    block = blocks.get(strategy) or _block(weights.get("block_structure"), name)
    word: Literal["int8", "fp8"] = "int8" if kind == "int" else "fp8"
    return EightBitScheme(word, block, "weight_scale", is_weight_only=activations is None)


def _model_slim(path: Path) -> Quantization | None:
    """Read Ascend's file with the kind of every tensor: FLOAT, W8A8_DYNAMIC ..."""
    if not path.is_file():
        return None
    try:
        kinds = json.loads(path.read_text(encoding="utf-8"))
        listed = {
            name.removesuffix(".weight"): kind
            for name, kind in kinds.items()
            if name.endswith(".weight") and isinstance(kind, str)
        }
    except (ValueError, AttributeError):
        raise ModelError(f"{path.name} is not a valid description of weights.") from None
    for module, kind in listed.items():
        if kind not in ("FLOAT", "W8A8_DYNAMIC"):
            raise ModelError(
                f"{module} is {kind} in {path.name}, which is not supported; {REMEDY}."
            )
    quantized = Names.of(module for module, kind in listed.items() if kind == "W8A8_DYNAMIC")
    if not quantized.names:
        return None
    scheme = EightBitScheme("int8", (1, None), "weight_scale")
    return Quantization(((scheme, quantized),), Names.of(()))
