"""Reader of GGUF, the files of llama.cpp: metadata and mapped tensors, in one file or split.

Only the header is read. Limits keep the reading of a hostile header below a second and 100 MiB.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hybridcache.geometry.sizes import ModelError
from hybridcache.geometry.units import counted, enumerated, format_bytes

MAGIC, VERSIONS = b"GGUF", (2, 3)
LFS_POINTER = b"version https://git-lfs.github.com/"
"""Beginning of a file that Git LFS has not fetched yet."""
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
"""Name of one file of a split model; parts count from one."""
NUMBERS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Types of metadata that have a fixed size, as codes of ``struct`` and numpy."""
FLOAT, TEXT, ARRAY = 6, 8, 9
MOST_HEADER_BYTES, MOST_TEXTS, MOST_KEYS, MOST_TENSORS = 32 << 20, 1 << 20, 1 << 14, 1 << 16
"""Limits of one header. Vocabularies of 250,000 tokens take 12 MiB and 500,000 texts."""
MOST_DIMS = 4
LABEL = re.compile(r"(?i)[-._]((UD-)?(I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*|NVFP4\w*))$")
"""Format at the end of a file's name, such as Q4_K_M."""
OTHER_FILES = ("mmproj", "mtp-", "imatrix", "ggml-vocab")
"""Beginnings of the names of files that are no model: visual towers, drafters, statistics."""
USUAL_LABEL = "q4_k_m"


ABSENT = "does not exist: correct the path, or download it"


def unreadable(path: Path) -> str | None:
    """Return the reason why a file cannot be read, or None if it can.

    It is found by looking at the file, not taken from the message of a library.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return "is a folder: name a file"
        if not stat.S_ISREG(mode):
            return "is not a regular file: name another"
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which does not exist: download it again"
        return ABSENT
    except PermissionError:
        return f"cannot be read by this user: {_closed(path)}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if start == LFS_POINTER:
        return "is a pointer of Git LFS, not the weights: run `git lfs pull`"
    return None if start else "is empty: download it again"


def _closed(path: Path) -> str:
    """Return the first folder on the way to a file, or the file, that this user may not open."""
    real = Path(os.path.realpath(path))
    for place in (*reversed(real.parents), real):
        needed = os.R_OK if place == real else os.X_OK
        if not os.path.lexists(place):  # It would be made.
            place, needed = place.parent, os.W_OK
        if not os.access(place, needed, effective_ids=os.access in os.supports_effective_ids):
            mode, user = stat.filemode(place.stat().st_mode), place.stat().st_uid
            return f"{place} has the rights {mode} and belongs to user {user}; change them by chmod"
    return f"the system forbids access to {path}"


def said_of(error: BaseException) -> str:
    """Return the sentence of an error, for a path without rights about the first closed folder."""
    if not isinstance(error, OSError) or not (name := error.filename):
        return str(error)
    is_closed = isinstance(error, PermissionError)
    return _closed(Path(str(name))) if is_closed else f"{name}: {error.strerror}"


MetaValue = int | float | str | list[str] | npt.NDArray[np.generic]


class GgmlType(NamedTuple):
    """Type of a tensor: blocks of ``columns`` columns and ``num_bytes`` bytes each."""

    name: str
    columns: int
    num_bytes: int


def _types(text: str) -> dict[int, GgmlType]:
    words = text.split()
    each = zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True)
    return {int(number): GgmlType(name, int(n), int(size)) for number, name, n, size in each}


GGML_TYPES = _types("""
    0 F32 1 4  1 F16 1 2  2 Q4_0 32 18  3 Q4_1 32 20  6 Q5_0 32 22  7 Q5_1 32 24  8 Q8_0 32 34
    10 Q2_K 256 84  11 Q3_K 256 110  12 Q4_K 256 144  13 Q5_K 256 176  14 Q6_K 256 210
    16 IQ2_XXS 256 66  17 IQ2_XS 256 74  18 IQ3_XXS 256 98  19 IQ1_S 256 50  20 IQ4_NL 32 18
    21 IQ3_S 256 110  22 IQ2_S 256 82  23 IQ4_XS 256 136  24 I8 1 1  25 I16 1 2  26 I32 1 4
    27 I64 1 8  28 F64 1 8  29 IQ1_M 256 56  30 BF16 1 2  34 TQ1_0 256 54  35 TQ2_0 256 66
    39 MXFP4 32 17  40 NVFP4 64 36""")
"""Types by number: name, columns and bytes of a block."""


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    """Sizes with rows before columns, as torch has them."""
    type: GgmlType
    data: npt.NDArray[np.uint8]
    """View of the mapping, which ends with the last of its views."""


class GgufFile:
    """A model in one GGUF file or several."""

    def __init__(self, path: Path) -> None:
        """Read the header of ``path``, and those of the other parts of a split model. Raises
        ModelError."""
        self.path = path
        header = _Header(path)
        self.metadata: Mapping[str, MetaValue] = header.metadata
        self.tensors: Mapping[str, StoredTensor] = header.tensors
        self.paths = [path]
        """The file, or all parts of a split model."""
        self._mappings = [header.mapping]
        count = header.count("split.count", 1)
        if count != 1:
            self._join(header, count)

    def drop_pages(self) -> None:
        """Return the memory of pages that were read. They are read again on the next use, from the
        system's cache of the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in self._mappings:
                mapping.madvise(mmap.MADV_DONTNEED)

    def _join(self, header: _Header, count: int | None) -> None:
        """Read the other parts. The first one has the metadata."""
        found = PART_NAME.fullmatch(self.path.name)
        if found is None or count is None or count != int(found[3]):
            raise ModelError(
                f"{self.path.name} is one of {count} parts of a model: the name of the file must "
                "end in -00001-of-00003.gguf for the first of three."
            )
        names = [f"{found[1]}-{part + 1:05}-of-{count:05}.gguf" for part in range(count)]
        paths, expected = [self.path.with_name(name) for name in names], None
        missing = [path.name for path in paths if not os.path.lexists(path)]
        if missing:
            raise ModelError(f"parts of the model are missing: {enumerated(missing)}.")
        tensors: dict[str, StoredTensor] = {}
        for part, path in enumerate(paths):
            own = header if path == self.path else _Header(path)
            place = own.count("split.no"), own.count("split.count")
            if place != (part, count) or not tensors.keys().isdisjoint(own.tensors):
                raise ModelError(f"{path.name} does not belong to the other parts of the model.")
            if part == 0:
                self.metadata, expected = own.metadata, own.count("split.tensors.count")
            tensors |= own.tensors
            self._mappings.append(own.mapping)
        if expected not in (None, len(tensors)):
            raise ModelError(
                f"the parts of {self.path.name} have {counted(len(tensors), 'tensor')} in all "
                f"instead of {expected}: download them again."
            )
        self.tensors, self.paths = tensors, paths


class _Header:
    """Metadata and tensors of one file."""

    def __init__(self, path: Path) -> None:
        self.name, self.metadata = path.name, dict[str, MetaValue]()
        self.tensors: dict[str, StoredTensor] = {}
        self._at, self._num_texts = 0, 0
        if (fault := unreadable(path)) is not None:
            raise ModelError(f"{path} {fault}.")
        try:
            with path.open("rb") as file:
                self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
        self._end = min(len(self.mapping), MOST_HEADER_BYTES)
        self._check_version()
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        if num_tensors > MOST_TENSORS or num_keys > MOST_KEYS:
            raise self._damaged(f"{num_tensors:,} tensors and {num_keys:,} keys are too many")
        for _ in range(num_keys):
            key, kind = self._text(), self._number("I")
            if key in self.metadata:
                raise self._damaged(f"the key {_short(key)} occurs twice")
            self.metadata[key] = self._value(key, kind)
        self._place([self._described() for _ in range(num_tensors)])

    def count(self, key: str, default: int | None = None) -> int | None:
        """Return a whole number of the metadata, or None if there is another value."""
        found = self.metadata.get(key, default)
        return found if isinstance(found, int) else None

    def _check_version(self) -> None:
        if self.mapping[: len(MAGIC)] != MAGIC:
            raise ModelError(f"{self.name} is not a GGUF file: it does not begin with GGUF.")
        self._at = len(MAGIC)
        version = self._number("I")
        if version in VERSIONS:
            return
        order = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = "in big-endian order" if order in VERSIONS else f"of version {version}"
        raise ModelError(
            f"{self.name} is a GGUF file {kind}, which is not supported: use one of version 3 in "
            "little-endian order."
        )

    def _damaged(self, reason: str) -> ModelError:
        return ModelError(f"{self.name} is truncated or damaged ({reason}): download it again.")

    def _take(self, size: int) -> int:
        """Return the position of the next ``size`` bytes, and move behind them."""
        first = self._at
        if size > self._end - first:
            raise self._damaged(
                "its header does not end"
                if self._end == len(self.mapping)
                else f"its header is longer than {format_bytes(MOST_HEADER_BYTES)}"
            )
        self._at = first + size
        return first

    def _number(self, code: str) -> Any:
        form = struct.Struct(f"<{code}")
        return form.unpack_from(self.mapping, self._take(form.size))[0]

    def _text(self) -> str:
        return self._texts(1)[0]

    def _texts(self, count: int) -> list[str]:
        """Read ``count`` texts, each after its size. 0.5 us per text."""
        self._num_texts += count
        if self._num_texts > MOST_TEXTS:
            raise self._damaged(f"it has more than {MOST_TEXTS:,} texts")
        found, data, end, size_of = [], self.mapping, self._end, struct.Struct("<Q").unpack_from
        for _ in range(count):
            first = self._take(8) + 8
            size = size_of(data, first - 8)[0]
            if size > end - first:
                self._take(size)  # Raises.
            self._at = first + size
            found.append(data[first : first + size].decode("utf-8", "replace"))
        return found

    def _value(self, key: str, kind: int) -> MetaValue:
        if kind == TEXT:
            return self._text()
        if kind == FLOAT:  # The decimal number that was rounded: 1e-06, not 9.99999997e-07.
            return float(str(np.float32(self._number("f"))))
        if kind in NUMBERS:
            number: int | float = self._number(NUMBERS[kind])
            return number
        item, count = (self._number("I"), self._number("Q")) if kind == ARRAY else (None, 0)
        if item == TEXT:
            return self._texts(count)
        if item not in NUMBERS:
            raise self._damaged(f"{_short(key)} has an unknown type")
        dtype = np.dtype(f"<{NUMBERS[item]}")
        first = self._take(count * dtype.itemsize)
        return np.frombuffer(self.mapping, dtype, count, first)

    def _described(self) -> tuple[str, tuple[int, ...], GgmlType, int, int]:
        """Read one entry of the table of tensors: name, shape, type, first byte, size."""
        name, num_dims = self._text(), self._number("I")
        if not 1 <= num_dims <= MOST_DIMS:
            raise self._damaged(f"{_short(name)} has {num_dims} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(num_dims)]))
        number, first = self._number("I"), self._number("Q")
        type = GGML_TYPES.get(number)
        if type is None:
            raise ModelError(
                f"{_short(name)} in {self.name} is stored as type {number} of ggml, which is not "
                "supported: use a file of another type, such as Q4_K_M or Q8_0."
            )
        *rows, num_columns = shape
        is_vector = not rows and type.columns > 1
        if 0 in shape or num_columns % type.columns or is_vector:
            raise self._damaged(f"{_short(name)} of {type.name} has the shape {shape}")
        size = type.num_bytes * (num_columns // type.columns)
        for count in rows:
            size *= count
        return name, shape, type, first, size

    def _place(self, found: list[tuple[str, tuple[int, ...], GgmlType, int, int]]) -> None:
        """Map the tensors, which are behind the header and do not overlap."""
        alignment = self.count("general.alignment", 32)
        if alignment is None or alignment < 8 or alignment % 8:
            raise self._damaged(f"general.alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        spans = sorted((first, first + size) for *_, first, size in found)
        if spans and start + spans[-1][1] > len(self.mapping):
            raise self._damaged(
                f"it has {format_bytes(len(self.mapping))} of {format_bytes(start + spans[-1][1])}"
            )
        if any(end > later for (_, end), (later, _) in pairwise(spans)):
            raise self._damaged("tensors overlap")
        if any(first % alignment for first, _ in spans):
            raise self._damaged(f"tensors do not begin at multiples of {alignment} bytes")
        whole = np.frombuffer(self.mapping, np.uint8)
        for name, shape, type, first, size in found:
            if name in self.tensors:
                raise self._damaged(f"the tensor {_short(name)} occurs twice")
            data = whole[start + first : start + first + size]
            self.tensors[name] = StoredTensor(shape, type, data)


def is_gguf(model: Path) -> bool:
    """Return True if ``model`` is a GGUF file, by its name or content, or a directory with such
    files and without safetensors."""
    if model.is_dir():
        return any(model.glob("*.gguf")) and not any(model.glob("*.safetensors"))
    if model.suffix == ".gguf" or unreadable(model) is not None:
        return model.suffix == ".gguf"
    with model.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def gguf_file(model: Path) -> GgufFile | None:
    """Read the header of the GGUF file that ``model`` names: itself, or the model of a directory.
    None for other models. Several calls in a row read it once, unless a file of its directory has
    changed. Raises ModelError, also if a directory has several."""
    if not is_gguf(model):
        return None
    if model.is_dir():
        names = choose_files((path.name for path in model.glob("*.gguf")), str(model))
        model = model / names[0]
    files = filter(Path.is_file, {model, *model.parent.glob("*.gguf")})  # GgufFile refuses others
    stats = [(path, path.stat()) for path in sorted(files)]
    return _read(model, *((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats))


@lru_cache(maxsize=1)
def _read(path: Path, *versions: tuple[Path, int, int]) -> GgufFile:
    return GgufFile(path)


def label_of(name: str) -> str:
    """Return the format at the end of a file's name, or an empty text.

    >>> label_of("BF16/Model-9B-BF16-00001-of-00002.gguf"), label_of("Model.gguf")
    ('BF16', '')
    """
    found = LABEL.search(_stem(name))
    return found[1] if found else ""


def _stem(name: str) -> str:
    part = PART_NAME.fullmatch(name)
    return part[1] if part else name.removesuffix(".gguf")


def choose_files(names: Iterable[str], source: str, label: str | None = None) -> list[str]:
    """Return the files of one model among the ``names`` in ``source``, in order.

    ``label``: format of the model, as in ``ORG/NAME:Q4_K_M``, or the name of its file. Without one
    the only model is chosen, or that with Q4_K_M. Raises ModelError, which lists the first files of
    the models.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        file = name.rpartition("/")[2]
        if file.endswith(".gguf") and not file.startswith(OTHER_FILES):
            models.setdefault(_stem(name), []).append(name)
    if not models:
        raise ModelError(f"{source} has no model in GGUF files.")
    wanted = (label or USUAL_LABEL).lower().removesuffix(".gguf")
    chosen = [
        files
        for stem, files in models.items()
        if wanted in (label_of(files[0]).lower(), stem.rpartition("/")[2].lower())
    ]
    if label is None and len(models) == 1:
        chosen = [*models.values()]
    if len(chosen) == 1:
        return chosen[0]
    fault = f"{len(chosen)} models with the format {label}" if label else "several models"
    firsts = [files[0] for files in models.values()]
    raise ModelError(f"{source} has {fault}: choose one of {enumerated(firsts, len(firsts))}.")


def _short(name: str) -> str:
    """Return a name of the file for an error, without control characters, and cut off."""
    return repr(name if len(name) <= 80 else f"{name[:80]}...")
