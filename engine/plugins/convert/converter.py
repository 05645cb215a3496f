"""``engine convert``: converts a full-precision checkpoint to an 8-bit one, one matrix at a time.

The format of each weight is decided from the headers of the files.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.layers.linear import FULL_PRECISION
from engine.weights.layer_names import INDEX_NAME, Names
from engine.weights.model_config import ModelError, read_config
from engine.weights.scheme import BAND_ELEMENTS, Scheme, quantize_blocks, read_quantization
from engine.weights.tensor_files import (
    FULL_DTYPES,
    FileWriter,
    Tensor,
    WeightsError,
    find_files,
    open_file,
)
from kernels.linear.reference import SCALE_BLOCK, Format

SHARD_BYTES = 4 * 2**30
"""Maximum size of a file, unless a single piece is larger."""

LEFT_ALONE = (*(f"re:(.*\\.)?{word}(\\.|$)" for word in FULL_PRECISION), "re:(.*\\.)?mtp\\.fc$")
"""Layers in which a few numbers have a large effect: router and shared-expert gates, the gates of
linear attention, the head, and the input product of multi-token prediction."""
OTHER_KINDS = re.compile(r"(.*\.)?(\w*embed\w*|wte|visual\..*|vision_tower\..*|vision_model\..*)")
"""Matrices that are not linear layers, and those of vision towers."""
IGNORED = "selected by --ignore"
STACKED = re.compile(
    r"(.*\.experts)\.(gate_up_proj|down_proj)|"
    r"(.*\.block_sparse_moe)\.(input_linear|output_linear)\.weight"
)


@dataclass(frozen=True, slots=True)
class FilePiece:
    """One tensor to write: a tensor of the source, or one expert's part of it."""

    source: Tensor
    name: str
    """Name of the written tensor."""
    shape: tuple[int, ...]
    scheme: Scheme | None = None
    """Format of the written tensor, or None to keep it unchanged."""
    first: int = 0
    """Index of its first number in the source."""
    reason: str = ""
    """Reason why a matrix is not converted."""

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    def entries(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each tensor to write, by name. Raises WeightsError."""
        if self.scheme is not None:
            scale = f"{self.module}.{self.scheme.scale_name}"
            shape = self.scheme.scale_shape(*self.shape)
            return {self.name: (self.scheme.dtype, self.shape), scale: (torch.float32, shape)}
        if self.source.torch_dtype is None:
            raise WeightsError(f"{self.name} has the unsupported type {self.source.dtype}.")
        return {self.name: (self.source.torch_dtype, self.shape)}

    @property
    def num_bytes(self) -> int:
        """Bytes to write, including scales."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.entries().values())


def plan_pieces(
    tensors: Iterable[Tensor], scheme: Scheme, ignore: Sequence[str]
) -> list[FilePiece]:
    """Return a piece for each tensor, with experts one by one.

    Raises ModelError for a pattern of ``ignore`` that matches no linear layer, and if no layer is
    left to quantise.
    """
    ignored, defaults = Names.of(ignore, anywhere=True), Names.of(LEFT_ALONE)
    pieces: list[FilePiece] = []
    left: list[str] = []
    for tensor in tensors:
        parts = _parts(tensor)
        decided = [_decide(part, scheme, defaults, ignored) for part in parts]
        left += [part.module for part in decided if part.reason == IGNORED]
        if len(parts) > 1 and all(part.scheme is None for part in decided):
            decided = [FilePiece(tensor, tensor.name, tensor.shape, reason=decided[0].reason)]
        pieces += decided
    for text in ignore:
        if not any(map(Names.of([text], anywhere=True).has, left)):
            raise ModelError(
                f"--ignore {text} matches no linear layer: use words of a name, such as mlp.gate, "
                "or a regular expression after re:."
            )
    if all(piece.scheme is None for piece in pieces):
        reasons = " or ".join(sorted({piece.reason for piece in pieces if piece.reason}))
        raise ModelError(f"there is no linear layer to convert: all are {reasons or 'missing'}.")
    return pieces


def _parts(tensor: Tensor) -> list[FilePiece]:
    """Return the tensor itself, or each expert's gate, up and down projection of a stacked one.
    Gate and up stay together in Granite's."""
    stacked = STACKED.fullmatch(tensor.name)
    if stacked is None or len(tensor.shape) != 3:
        return [FilePiece(tensor, tensor.name, tensor.shape)]
    stem, kind = stacked.group(1, 2) if stacked.group(1) else stacked.group(3, 4)
    if stacked.group(3):
        stem += ".experts"
    count, rows, columns = tensor.shape
    words = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    height = rows // len(words)
    return [
        FilePiece(
            tensor,
            f"{stem}.{expert}.{word}.weight",
            (height, columns),
            first=(expert * rows + i * height) * columns,
        )
        for expert in range(count)
        for i, word in enumerate(words)
    ]


def _decide(piece: FilePiece, scheme: Scheme, defaults: Names, ignored: Names) -> FilePiece:
    """Return ``piece`` with a scheme, or with the reason for keeping it."""
    is_matrix = len(piece.shape) == 2 and piece.name.endswith(".weight")
    if not is_matrix or OTHER_KINDS.fullmatch(piece.module):
        is_stacked = len(piece.shape) == 3 and piece.shape[1] > 1 and ".visual." not in piece.name
        return replace(piece, reason="stacked under one name") if is_stacked else piece
    reason = ""
    if ignored.has(piece.module):
        reason = IGNORED
    elif defaults.has(piece.module):
        reason = "few numbers with a large effect"
    elif piece.source.dtype not in FULL_DTYPES:
        reason = f"{piece.source.dtype} already"
    elif any(size and n % size for n, size in zip(piece.shape, scheme.block, strict=True)):
        reason = "not whole blocks"  # which other readers misinterpret
    return replace(piece, scheme=None if reason else scheme, reason=reason)


def into_shards(pieces: Iterable[FilePiece]) -> list[list[FilePiece]]:
    """Divide ``pieces``, in order, into shards of at most ``SHARD_BYTES`` or one piece."""
    shards: list[list[FilePiece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.num_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.num_bytes
    return shards


SCHEMES: dict[Format, Scheme] = {
    "int8": Scheme("int8", (1, None), "weight_scale"),
    "fp8": Scheme("fp8", (SCALE_BLOCK, SCALE_BLOCK), "weight_scale_inv"),
}
"""Formats that are written: compressed-tensors' W8A8, and the fp8 layout of DeepSeek and Qwen."""
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt")
"""Endings of files that are not copied, in addition to config.json."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Result of ``convert``."""

    scheme: Scheme
    source_bytes: int
    written_bytes: int
    num_files: int
    modules: tuple[FilePiece, ...]
    """Matrices that were converted, or that have a reason why not."""


def convert(
    source: Path,
    target: Path,
    to: Format,
    ignore: Sequence[str] = (),
) -> Conversion:
    """Write the checkpoint of ``source`` into ``target`` with linear layers in 8 bits, everything
    else unchanged.

    ``target`` must be empty or absent, and has files once all are written.

    Args:
      ignore: additional layers to keep: words of names, or regular expressions after ``re:``.

    Takes the memory of the largest matrix, before and after its conversion. Raises ModelError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not an empty directory: choose a new one.")
    config = read_config(source)
    quantization = read_quantization(config, source)
    if quantization is not None:
        raise ModelError(
            f"{source} is already {quantization.describe()}: convert the model in full precision."
        )
    files = find_files(source)
    scheme = SCHEMES[to]
    tensors = (tensor for file in files for tensor in open_file(file))
    pieces = plan_pieces(tensors, scheme, ignore)
    shards = into_shards(pieces)
    partial = target / ".partial"
    try:
        partial.mkdir(parents=True)
        _write(shards, partial)
        _copy_rest(source, partial)
        section = _section(pieces, scheme)
        text = json.dumps(config | {"quantization_config": section}, indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        written_bytes = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        for path in partial.iterdir():
            os.replace(path, target / path.name)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    source_bytes = sum(path.stat().st_size for path in files)
    modules = tuple(piece for piece in pieces if piece.scheme is not None or piece.reason)
    return Conversion(scheme, source_bytes, written_bytes, len(shards), modules)


def _write(shards: Sequence[Sequence[FilePiece]], directory: Path) -> None:
    """Write all pieces, in files that are named as Hugging Face names them."""
    weight_map: dict[str, str] = {}
    total, count = sum(piece.num_bytes for shard in shards for piece in shard), len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    paths = [directory / name for name in (names if count > 1 else ["model.safetensors"])]
    # Without a terminal there is no bar.
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        for shard, path in zip(shards, paths, strict=True):
            entries = {name: e for piece in shard for name, e in piece.entries().items()}
            with FileWriter(path, entries) as file:
                for piece in shard:
                    _convert_one(piece, file)
                    bar.update(piece.num_bytes)
            weight_map |= dict.fromkeys(entries, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2)
        (directory / INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def _convert_one(piece: FilePiece, file: FileWriter) -> None:
    """Write the converted ``piece``, or the tensor itself if it stays unchanged."""
    weight = piece.source.read_part(piece.first, piece.shape)
    if piece.scheme is None:
        file.write(piece.name, weight)
        return
    stored, scale = quantize_rows(weight, piece.scheme)
    if not scale.isfinite().all():
        raise ModelError(f"{piece.name} contains numbers that are not finite.")
    file.write(piece.name, stored)
    file.write(f"{piece.module}.{piece.scheme.scale_name}", scale)


@torch.inference_mode()
def quantize_rows(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``weight`` ``[M, N]`` to ``scheme``, one band of rows at a time. Returns the stored
    weight and the scales as in files."""
    num_rows, num_columns = weight.shape
    height, width = (
        size or whole for size, whole in zip(scheme.block, (num_rows, num_columns), strict=True)
    )
    stored = torch.empty(weight.shape, dtype=scheme.dtype)
    scale = torch.empty(scheme.scale_shape(num_rows, num_columns))
    band = max(1, BAND_ELEMENTS // (num_columns * height)) * height
    for first in range(0, num_rows, band):
        rows = slice(first, first + band)
        blocks = slice(first // height, -(-min(first + band, num_rows) // height))
        part = weight[rows].float()
        stored[rows], scale[blocks] = quantize_blocks(part, scheme.format, (height, width))
    return stored, scale


def _copy_rest(source: Path, target: Path) -> None:
    """Copy all files except weights and config.json: tokenizer, templates and others."""
    for path in sorted(source.iterdir()):
        is_copied = path.name != "config.json" and not path.name.endswith(WEIGHT_SUFFIXES)
        if path.is_file() and is_copied:
            shutil.copyfile(path, target / path.name)


def _section(pieces: Sequence[FilePiece], scheme: Scheme) -> dict[str, Any]:
    """Return the section ``quantization_config``.

    It lists every matrix that was not converted by its full name, and the head: a tied head has no
    tensor, but other readers treat it as a linear layer.
    """
    left = [
        piece.module
        for piece in pieces
        if piece.scheme is None and len(piece.shape) > 1 and piece.name.endswith(".weight")
    ]
    left += [] if "lm_head" in left else ["lm_head"]
    if scheme.format == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(scheme.block),
            "modules_to_not_convert": left,
        }
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**shared, "strategy": "channel", "dynamic": False},
        "input_activations": {**shared, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
        "kv_cache_scheme": None,
    }
