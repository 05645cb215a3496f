"""Plan of ``engine convert``: the format of each weight, decided from the headers of the files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.layers.parameters import FULL_PRECISION
from engine.weights.layer_names import Names
from engine.weights.model_config import ModelError
from engine.weights.scheme import Scheme
from engine.weights.tensor_files import FULL_DTYPES, Tensor, WeightsError

SHARD_BYTES = 4 * 2**30
"""Maximum size of a file, unless a single piece is larger."""

LEFT_ALONE = (
    *(f"re:(.*\\.)?{word}(\\.|$)" for word in FULL_PRECISION),
    "re:(.*\\.)?mtp\\.fc$",
)
"""Layers in which a few numbers have a large effect: router and shared-expert gates, the gates of
linear attention, the head, and the input product of multi-token prediction."""
OTHER_KINDS = re.compile(r"(.*\.)?(\w*embed\w*|wte|visual\..*|vision_tower\..*|vision_model\..*)")
"""Matrices that are not linear layers, and those of vision towers."""
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
            return {
                self.name: (self.scheme.dtype, self.shape),
                scale: (torch.float32, shape),
            }
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
    lists = [(text, Names.of([text], anywhere=True)) for text in ignore]
    unused, defaults = dict(lists), Names.of(LEFT_ALONE)
    pieces: list[FilePiece] = []
    for tensor in tensors:
        parts = _parts(tensor)
        decided = [_decide(part, scheme, defaults, lists, unused) for part in parts]
        if len(parts) > 1 and all(part.scheme is None for part in decided):
            decided = [FilePiece(tensor, tensor.name, tensor.shape, reason=decided[0].reason)]
        pieces += decided
    if unused:
        raise ModelError(
            f"--ignore {next(iter(unused))} matches no linear layer: use words of a name, such as "
            "mlp.gate, or a regular expression after re:."
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


def _decide(
    piece: FilePiece,
    scheme: Scheme,
    defaults: Names,
    lists: Sequence[tuple[str, Names]],
    unused: dict[str, Names],
) -> FilePiece:
    """Return ``piece`` with a scheme, or with the reason for keeping it. Removes the patterns that
    match it from ``unused``."""
    is_matrix = len(piece.shape) == 2 and piece.name.endswith(".weight")
    if not is_matrix or OTHER_KINDS.fullmatch(piece.module):
        is_stacked = len(piece.shape) == 3 and piece.shape[1] > 1 and ".visual." not in piece.name
        return replace(piece, reason="stacked under one name") if is_stacked else piece
    matching = [text for text, names in lists if names.has(piece.module)]
    for text in matching:
        unused.pop(text, None)
    reason = ""
    if matching:
        reason = "selected by --ignore"
    elif defaults.has(piece.module):
        reason = "few numbers with a large effect"
    elif piece.source.dtype not in FULL_DTYPES:
        reason = f"{piece.source.dtype} already"
    elif not _is_whole(piece.shape, scheme):
        reason = "not whole blocks"  # which other readers misinterpret
    return replace(piece, scheme=None if reason else scheme, reason=reason)


def _is_whole(shape: tuple[int, ...], scheme: Scheme) -> bool:
    return all(size is None or n % size == 0 for n, size in zip(shape, scheme.block, strict=True))


def into_shards(
    pieces: Iterable[FilePiece], most_bytes: int = SHARD_BYTES
) -> list[list[FilePiece]]:
    """Divide ``pieces``, in order, into shards of at most ``most_bytes`` each, unless one piece is
    larger."""
    shards: list[list[FilePiece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.num_bytes > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.num_bytes
    return shards


def shard_paths(directory: Path, count: int) -> list[Path]:
    """Return the paths of ``count`` files, named as Hugging Face names them."""
    if count == 1:
        return [directory / "model.safetensors"]
    return [directory / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
