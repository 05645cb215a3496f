"""Safetensors files: headers, and reads directly into the target.

Files are not mapped: pages of a mapped file count as this process's memory while it is open, and a
page fault reads little at a time. https://huggingface.co/docs/safetensors, format.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.weights.layer_names import INDEX_NAMES
from engine.weights.model_config import ModelError

MAX_NAMED = 8
"""Maximum number of tensors of each kind that an error names; the others are counted."""
FULL_DTYPES = ("F64", "F32", "F16", "BF16")
FILE_DTYPES = {"int8": "I8", "fp8": "F8_E4M3"}
"""Dtypes as headers spell them."""
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000
"""Limit of the format."""


class WeightsError(ModelError):
    """The weight files cannot be read or do not match the model; the message names the fault."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a weight file that has not been read."""

    name: str
    """Name in the file."""
    path: Path
    file: io.FileIO
    """File that stays open while one of its tensors is in use."""
    start: int
    """Offset of its first byte in the file."""
    shape: tuple[int, ...]
    dtype: str
    """dtype as the header spells it: BF16, F8_E4M3 ..."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """dtype in torch, or None if torch has no such type."""
        return TORCH_DTYPES.get(self.dtype)

    @property
    def num_bytes(self) -> int:
        """Size in the file, for a dtype that torch supports."""
        assert self.torch_dtype is not None
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def read(self) -> torch.Tensor:
        """Read the whole tensor. Raises WeightsError."""
        return self.read_part(0, self.shape)

    def read_part(self, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Read numbers from index ``first`` on as a tensor of ``shape``. Raises WeightsError."""
        dtype = self.torch_dtype
        if dtype is None:
            raise WeightsError(f"{self.name} has the unsupported type {self.dtype}.")
        tensor = torch.empty(shape, dtype=dtype)
        self.read_into(tensor, first)
        return tensor

    def read_into(self, target: torch.Tensor, first: int = 0) -> int:
        """Fill a contiguous ``target`` on the CPU, of the file's dtype, with numbers from index
        ``first`` on. Returns the bytes read. Raises WeightsError."""
        if not target.numel():
            return 0
        rest = target.reshape(-1).view(torch.uint8).numpy().data
        offset = self.start + first * target.element_size()
        while rest:
            try:
                count = os.preadv(self.file.fileno(), [rest], offset)
            except OSError as error:
                raise WeightsError(
                    f"{self.name} of {self.path.name} cannot be read: {error.strerror}."
                ) from None
            if not count:
                raise WeightsError(
                    f"{self.path.name} was cut off within {self.name}; download it again."
                )
            rest, offset = rest[count:], offset + count
        return target.nbytes


@dataclass(frozen=True, slots=True)
class Joined(Tensor):
    """Consecutive rows of several tensors, as one tensor."""

    parts: tuple[Tensor, ...] = ()
    """Tensors of one dtype with equal shapes after the first dimension."""
    skip: int = 0
    """Number of values of ``parts`` before the first."""

    @classmethod
    def of(cls, name: str, parts: tuple[Tensor, ...], rows: range) -> Joined:
        """Join ``rows`` of ``parts``, counted over all of them."""
        first, width = parts[0], math.prod(parts[0].shape[1:])
        shape = len(rows), *first.shape[1:]
        start = rows.start * width
        return cls(name, first.path, first.file, first.start, shape, first.dtype, parts, start)

    def read_into(self, target: torch.Tensor, first: int = 0) -> int:
        flat, done, first = target.reshape(-1), 0, self.skip + first
        for part in self.parts:
            size = math.prod(part.shape)
            count = min(size - first, len(flat) - done)
            if count > 0:
                part.read_into(flat[done : done + count], first)
                done += count
            first = max(0, first - size)
        return target.nbytes


def open_file(path: Path) -> list[Tensor]:
    """List the tensors of one file. Raises WeightsError for a truncated or corrupted one."""
    try:
        file = path.open("rb", buffering=0)
        assert isinstance(file, io.FileIO)
        num_header_bytes = int.from_bytes(file.read(8), "little")
        if num_header_bytes > MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        data = 8 + num_header_bytes
        header = json.loads(os.pread(file.fileno(), num_header_bytes, 8))
        header.pop("__metadata__", None)
        tensors = [_tensor(name, entry, path, file, data) for name, entry in header.items()]
        end = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != os.fstat(file.fileno()).st_size:
            raise ValueError(f"{end} bytes are listed")
    except PermissionError:
        raise WeightsError(f"{path} cannot be read: check its permissions.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path.name} is truncated or corrupted ({error}); download it again."
        ) from None
    return sorted(tensors, key=lambda tensor: tensor.start)


def _tensor(name: str, entry: dict[str, object], path: Path, file: io.FileIO, data: int) -> Tensor:
    """Make a tensor from its entry in a header. Raises KeyError, TypeError, ValueError."""
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError(f"{name} has no shape or no offsets")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, *offsets)):
        raise ValueError(f"{name} has an invalid shape or invalid offsets")
    first, last = offsets
    tensor = Tensor(name, path, file, data + first, tuple(shape), str(entry["dtype"]))
    dtype = tensor.torch_dtype
    if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {last - first} bytes")
    return tensor


def find_files(model_dir: Path) -> list[Path]:
    """List the safetensors files of a model, single or sharded. Raises WeightsError."""
    indices = [model_dir / name for name in INDEX_NAMES if (model_dir / name).is_file()]
    if not indices:
        files = sorted(model_dir.glob("*.safetensors"))
        if not files:
            raise WeightsError(
                f"there are no .safetensors files in {model_dir} (.bin and GGUF are not supported);"
                " use --load-format dummy to try without weights."
            )
        return files
    index = indices[0]
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({os.fspath(name) for name in found})  # TypeError for anything but text.
    except (ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index.name} is not a valid index of safetensors files.") from None
    absent = [name for name in names if not (model_dir / name).is_file()]
    if absent:
        raise WeightsError(f"files named in {index.name} are missing: {enumerated(absent)}.")
    return [model_dir / name for name in names]


def enumerated(names: list[str], most: int = MAX_NAMED) -> str:
    """Return a list such as ``a, b and 3 more``."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


class FileWriter:
    """A new file for tensors of known dtype and shape, written one at a time in any order."""

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        """Raises OSError."""
        spelled = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places: dict[str, int] = {}
        end = 0
        # The widest numbers first: all then begin at a multiple of their size.
        for name, (dtype, shape) in sorted(entries.items(), key=lambda e: -e[1][0].itemsize):
            places[name], end = end, end + math.prod(shape) * dtype.itemsize
            offsets = [places[name], end]
            header[name] = {"dtype": spelled[dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self._places = {name: data + place for name, place in places.items()}
        self._file = path.open("wb", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(data + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the entries. Raises OSError."""
        offset = self._places[name]
        rest = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        while rest:
            count = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[count:], offset + count

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
