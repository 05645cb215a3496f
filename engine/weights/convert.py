"""``engine convert``: converts a full-precision checkpoint to an 8-bit one, one matrix at a
time."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.weights.convert_plan import FilePiece, into_shards, plan_pieces, shard_paths
from engine.weights.model_config import ModelError, read_config
from engine.weights.quantized_formats import read_quantization
from engine.weights.scheme import BAND_ELEMENTS, Scheme, quantize_blocks, widen
from engine.weights.tensor_files import FileWriter, find_files, open_file
from kernels.linear.reference import SCALE_BLOCK, Format

SCHEMES: dict[Format, Scheme] = {
    "int8": Scheme("int8", (1, None), "weight_scale"),
    "fp8": Scheme("fp8", (SCALE_BLOCK, SCALE_BLOCK), "weight_scale_inv"),
}
"""Formats that are written: compressed-tensors' W8A8, and the fp8 layout of DeepSeek and Qwen."""
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt")
"""Endings of files that are not copied, in addition to config.json."""


@dataclass(frozen=True, slots=True)
class Converted:
    """Result for one matrix."""

    module: str
    shape: tuple[int, ...]
    error: float | None
    """Root mean square of the rounding divided by that of the weights, or None if the matrix was
    not converted."""
    reason: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """Result of ``convert``."""

    scheme: Scheme
    source_bytes: int
    written_bytes: int
    num_files: int
    modules: tuple[Converted, ...]


def convert(
    source: Path,
    target: Path,
    to: Format,
    ignore: Sequence[str] = (),
    *,
    scheme: Scheme | None = None,
    shard_bytes: int | None = None,
    show_progress: bool | None = None,
) -> Conversion:
    """Write the checkpoint of ``source`` into ``target`` with linear layers in 8 bits, everything
    else unchanged.

    ``target`` appears when all is written.

    Args:
      ignore: additional layers to keep: words of names, or regular expressions after ``re:``.
      scheme: replaces the scheme of ``to``.
      show_progress: None to show progress if the output is a terminal.

    Takes the memory of the largest matrix, before and after its conversion. Raises ModelError.
    """
    _check_target(target)
    config = read_config(source)
    quantization = read_quantization(config, source)
    if quantization is not None:
        raise ModelError(
            f"{source} is already {quantization.describe()}: convert the model in full precision."
        )
    files = find_files(source)
    scheme = scheme or SCHEMES[to]
    tensors = (tensor for file in files for tensor in open_file(file))
    pieces = plan_pieces(tensors, scheme, ignore)
    shards = into_shards(pieces, *(() if shard_bytes is None else (shard_bytes,)))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        modules = _write(shards, partial, show_progress)
        _copy_rest(source, partial)
        section = _section(pieces, scheme)
        text = json.dumps(config | {"quantization_config": section}, indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        written_bytes = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        os.replace(partial, target)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    source_bytes = sum(path.stat().st_size for path in files)
    return Conversion(scheme, source_bytes, written_bytes, len(shards), tuple(modules))


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not an empty directory: choose a new one.")


def _write(
    shards: Sequence[Sequence[FilePiece]], directory: Path, show_progress: bool | None
) -> list[Converted]:
    weight_map: dict[str, str] = {}
    modules: list[Converted] = []
    total = sum(piece.num_bytes for shard in shards for piece in shard)
    disable = None if show_progress is None else not show_progress
    paths = shard_paths(directory, len(shards))
    with tqdm(total=total, unit="B", unit_scale=True, disable=disable, file=sys.stderr) as bar:
        for shard, path in zip(shards, paths, strict=True):
            entries = {name: e for piece in shard for name, e in piece.entries().items()}
            with FileWriter(path, entries) as file:
                for piece in shard:
                    modules += _convert_one(piece, file)
                    bar.update(piece.num_bytes)
            weight_map |= dict.fromkeys(entries, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2)
        (directory / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    return modules


def _convert_one(piece: FilePiece, file: FileWriter) -> list[Converted]:
    """Write the converted ``piece``. Returns a record if it is a matrix."""
    weight = piece.source.read_part(piece.first, piece.shape)
    if piece.scheme is None:
        file.write(piece.name, weight)
        named = [Converted(piece.module, piece.shape, None, piece.reason)]
        return named if piece.reason else []
    stored, scale, error = quantize_rows(weight, piece.scheme)
    if not error < 1:  # also true for NaN
        raise ModelError(f"{piece.name} contains numbers that are not finite.")
    file.write(piece.name, stored)
    file.write(f"{piece.module}.{piece.scheme.scale_name}", scale)
    return [Converted(piece.module, piece.shape, error, "")]


@torch.inference_mode()
def quantize_rows(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Quantise ``weight`` ``[M, N]`` to ``scheme``, one band of rows at a time.

    Returns the stored weight, the scales as in files, and the root mean square of the rounding
    divided by that of the weights.
    """
    num_rows, num_columns = weight.shape
    height, width = (
        size or whole for size, whole in zip(scheme.block, (num_rows, num_columns), strict=True)
    )
    stored = torch.empty(weight.shape, dtype=scheme.dtype)
    scale = torch.empty(scheme.scale_shape(num_rows, num_columns))
    band = max(1, BAND_ELEMENTS // (num_columns * height)) * height
    squares = torch.zeros(2, dtype=torch.float64)
    for first in range(0, num_rows, band):
        rows = slice(first, first + band)
        blocks = slice(first // height, -(-min(first + band, num_rows) // height))
        exact = weight[rows].float()
        stored[rows], scale[blocks] = quantize_blocks(exact, scheme.format, (height, width))
        rounded = torch.empty_like(exact)
        row_scales = scale[blocks].repeat_interleave(height, dim=0)[: len(exact)]
        widen(rounded, stored[rows], row_scales, width)
        for sums, part in zip(squares, (rounded.sub_(exact), exact), strict=True):
            sums += part.mul_(part).sum(dtype=torch.float64)
    error, size = squares.sqrt().tolist()
    return stored, scale, error / size if size else 0.0


def _copy_rest(source: Path, target: Path) -> None:
    """Copy the tokenizer, templates, generation_config.json and all other files except the
    weights."""
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
