"""``engine convert``: converts a checkpoint in full precision to 8 or 4 bits, one file at a time.

The format of each weight is decided before any is read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from engine.errors import JsonObject
from engine.weights.forms import read_quantization
from engine.weights.forms.compressed_tensors import PACKED, PackedScheme
from engine.weights.layer_names import INDEX_NAME, Names
from engine.weights.model_config import ModelError, read_config
from engine.weights.parameters import FULL_PRECISION, Precision
from engine.weights.scheme import EightBitScheme
from engine.weights.tensor_files import FULL_DTYPES, dtype_name, find_files, open_file
from hybridcache.geometry.gguf import is_gguf, said_of
from hybridcache.geometry.units import counted, format_bytes
from kernels.linear.grouped import Grouped, to_compressed_tensors
from kernels.linear.reference import SCALE_BLOCK, quantize

SHARD_BYTES = 2**30
"""Maximum size of a file, unless a single piece is larger."""

Written = EightBitScheme | PackedScheme

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

    name: str
    """Name of the written tensor."""
    source: torch.Tensor
    scheme: Written | None = None
    """Format of the written tensor, or None to keep it unchanged."""
    reason: str = ""
    """Reason why a matrix is not converted."""

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def num_bytes(self) -> int:
        """Bytes to write, including scales, without those of short rows."""
        bits = None if self.scheme is None else self.scheme.format.num_bits
        return self.source.nbytes if bits is None else int(self.source.numel() * bits) // 8

    def written(self) -> dict[str, torch.Tensor]:
        """Return the tensors to write, by name. Raises ModelError."""
        if self.scheme is None:
            return {self.name: self.source.clone()}
        tensors = quantized(self.source, self.scheme)
        if not all(tensor.isfinite().all() for word, tensor in tensors.items() if "scale" in word):
            raise ModelError(f"{self.name} contains numbers that are not finite.")
        return {f"{self.module}.{word}": tensor for word, tensor in tensors.items()}


def plan_pieces(
    tensors: Mapping[str, torch.Tensor], scheme: Written, ignore: Sequence[str]
) -> list[FilePiece]:
    """Return a piece for each tensor, with experts one by one.

    Raises ModelError for a pattern of ``ignore`` that matches no linear layer, and if no layer is
    left to quantise.
    """
    ignored, defaults = Names.of(ignore, anywhere=True), Names.of(LEFT_ALONE)
    pieces: list[FilePiece] = []
    left: list[str] = []
    for name, tensor in tensors.items():
        parts = _parts(name, tensor)
        decided = [_decide(part, scheme, defaults, ignored) for part in parts]
        left += [part.module for part in decided if part.reason == IGNORED]
        if len(parts) > 1 and all(part.scheme is None for part in decided):
            decided = [FilePiece(name, tensor, reason=decided[0].reason)]
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


def _parts(name: str, tensor: torch.Tensor) -> list[FilePiece]:
    """Return the tensor itself, or each expert's gate, up and down projection of a stacked one.
    Gate and up stay together in Granite's."""
    stacked = STACKED.fullmatch(name)
    if stacked is None or tensor.dim() != 3:
        return [FilePiece(name, tensor)]
    stem, kind = stacked.group(1, 2) if stacked.group(1) else stacked.group(3, 4)
    if stacked.group(3):
        stem += ".experts"
    words = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    return [
        FilePiece(f"{stem}.{expert}.{word}.weight", part)
        for expert, whole in enumerate(tensor)
        for word, part in zip(words, whole.chunk(len(words)), strict=True)
    ]


def _decide(piece: FilePiece, scheme: Written, defaults: Names, ignored: Names) -> FilePiece:
    """Return ``piece`` with a scheme, or with the reason for keeping it."""
    shape = piece.source.shape
    is_matrix = len(shape) == 2 and piece.name.endswith(".weight")
    if not is_matrix or OTHER_KINDS.fullmatch(piece.module):
        is_stacked = len(shape) == 3 and shape[1] > 1 and ".visual." not in piece.name
        return replace(piece, reason="stacked under one name") if is_stacked else piece
    block = scheme.block if isinstance(scheme, EightBitScheme) else (None, scheme.grouped.group)
    reason = ""
    if ignored.has(piece.module):
        reason = IGNORED
    elif defaults.has(piece.module):
        reason = "few numbers with a large effect"
    elif piece.source.dtype not in FULL_DTYPES:
        reason = f"{dtype_name(piece.source.dtype)} already"
    elif any(size and n % size for n, size in zip(shape, block, strict=True)):
        reason = "not whole blocks"  # which other readers misinterpret
    return replace(piece, scheme=None if reason else scheme, reason=reason)


SCHEMES: dict[Precision, Written] = {
    "int8": EightBitScheme("int8", (1, None), "weight_scale"),
    "fp8": EightBitScheme("fp8", (SCALE_BLOCK, SCALE_BLOCK), "weight_scale_inv"),
    "int4": PackedScheme(Grouped(4, 32), False),
    "int4-128": PackedScheme(Grouped(4, 128), False),
}
"""Formats that are written: compressed-tensors' W8A8 and W4A16, and the fp8 layout of DeepSeek and
Qwen."""
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt")
"""Endings of files that are not copied, in addition to config.json."""


def convert(source: Path, target: Path, to: Precision, ignore: Sequence[str] = ()) -> str:
    """Write the checkpoint of ``source`` into ``target`` with linear layers in 8 bits, everything
    else unchanged.

    ``target`` must be empty or absent, and has files once all are written. Returns a table of the
    matrices.

    Args:
      ignore: additional layers to keep: words of names, or regular expressions after ``re:``.

    Takes the memory of one file that it writes, and of the largest matrix. Raises ModelError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not an empty directory: choose a new one.")
    if is_gguf(source):
        raise ModelError(f"{source} is a GGUF file: convert the model in full precision.")
    config = read_config(source)
    quantization = read_quantization(config, source)
    if quantization is not None:
        raise ModelError(
            f"{source} is already {quantization.describe()}: convert the model in full precision."
        )
    files = find_files(source)
    scheme = SCHEMES[to]
    tensors = {name: tensor for file in files for name, tensor in open_file(file).items()}
    pieces = plan_pieces(tensors, scheme, ignore)
    partial = target / ".partial"
    try:
        partial.mkdir(parents=True)
        num_files = _write(pieces, partial)
        for path in sorted(source.iterdir()):  # The tokenizer, templates and others.
            is_replaced = path.name == "config.json" or path.name.endswith(WEIGHT_SUFFIXES)
            if path.is_file() and not is_replaced:
                shutil.copyfile(path, partial / path.name)
        section = _section(pieces, scheme)
        text = json.dumps(config | {"quantization_config": section}, indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        written_bytes = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        mode = (partial / "config.json").stat().st_mode  # safetensors writes files for one user.
        for path in partial.iterdir():
            path.chmod(mode)
            os.replace(path, target / path.name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{target} cannot be written: {said_of(error)}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    source_bytes = sum(path.stat().st_size for path in files)
    return "\n".join(
        [
            f"{scheme.describe()}: {format_bytes(source_bytes)} were converted to "
            f"{format_bytes(written_bytes)} in {counted(num_files, 'file')}",
            *_table(pieces),
        ]
    )


def _table(pieces: Sequence[FilePiece]) -> Iterator[str]:
    """Yield a line for the same matrix in all layers, and one for all experts."""
    alike = Counter(
        (re.sub(r"\.\d+(?=\.)", ".*", piece.module), piece.reason or "converted")
        for piece in pieces
        if piece.scheme is not None or piece.reason
    )
    width = max(len(name) for name, _ in alike)
    for (name, why), count in alike.items():
        yield f"  {name:<{width}} {count:>9,}   {why}"


def _write(pieces: Sequence[FilePiece], directory: Path) -> int:
    """Write all pieces, in files that are named as Hugging Face names them, and return the number
    of files."""
    named, weight_map = {piece.name: piece for piece in pieces}, dict[str, str]()
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda piece: piece.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    total = sum(piece.num_bytes for piece in pieces)
    # Without a terminal there is no bar.
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        for file, names in split.filename_to_tensors.items():
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                tensors |= named[name].written()
                bar.update(named[name].num_bytes)
            save_file(tensors, directory / file, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(split.filename_to_tensors)


@torch.inference_mode()
def quantized(weight: torch.Tensor, scheme: Written) -> dict[str, torch.Tensor]:
    """Return the tensors of ``weight [M, N]`` in a scheme, by the last part of their names."""
    if isinstance(scheme, EightBitScheme):
        stored, scale = quantize_blocks(weight, scheme)
        return {"weight": stored, scheme.scale_name: scale}
    own = scheme.grouped
    return to_compressed_tensors(own, own.quantized(weight), weight.shape[1])


def quantize_blocks(
    weight: torch.Tensor, scheme: EightBitScheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``weight [M, N]``, which has whole blocks of ``scheme``, symmetrically: the largest
    magnitude of a block becomes that of the format.

    Returns the stored weight, and float32 scales ``[M / rows, N / columns]``. For blocks of one
    row, the bits equal those of ``kernels.linear.reference.quantize``.
    """
    sizes = zip(scheme.block, weight.shape, strict=True)
    rows, columns = (size or whole for size, whole in sizes)
    grid = weight.float().view(-1, rows, weight.shape[1] // columns, columns).transpose(1, 2)
    stored, scale = quantize(grid.flatten(2), scheme.kind)
    return stored.view(grid.shape).transpose(1, 2).reshape(weight.shape), scale


def _section(pieces: Sequence[FilePiece], scheme: Written) -> JsonObject:
    """Return the section ``quantization_config``.

    It lists every matrix that was not converted by its full name, and the head: a tied head has no
    tensor, but other readers treat it as a linear layer.
    """
    left = [
        piece.module
        for piece in pieces
        if piece.scheme is None and piece.source.dim() > 1 and piece.name.endswith(".weight")
    ]
    left += [] if "lm_head" in left else ["lm_head"]
    if isinstance(scheme, EightBitScheme) and scheme.kind == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(scheme.block),
            "modules_to_not_convert": left,
        }
    shared: JsonObject = {"num_bits": 8, "type": "int", "symmetric": True}
    layout, weights = "int-quantized", {**shared, "strategy": "channel", "dynamic": False}
    activations: JsonObject | None = {**shared, "strategy": "token", "dynamic": True}
    if isinstance(scheme, PackedScheme):
        layout, activations, size = PACKED, None, scheme.grouped.group
        weights |= {"num_bits": 4, "strategy": "group", "group_size": size}
    group: JsonObject = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
        "kv_cache_scheme": None,
    }
