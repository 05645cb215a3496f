"""Reader of snapshot files. Invalid files are refused before any cache is changed."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hybridcache.tokens import read_namespace

FORM = "hybridcache snapshot 1"
TABLES = {
    "parent": 1,
    "end": 1,
    "tokens": 1,
    "rows": 1,
    "kv": 2,
    "slot": 1,
    "checkpoint": 2,
    "lost": 2,
    "ghost": 1,
}
"""Arrays of a file and their numbers of dimensions. 2-D arrays have one row of four per node."""

Header = dict[str, Any]
Arrays = dict[str, Any]

MAX_BYTES = 1 << 28
"""Upper bound of the unpacked size of all arrays: more than 20 million tokens or a million
nodes."""
MAX_HEADER_BYTES = 1 << 25
MAX_NUMBER = 1 << 31
"""Exclusive upper bound of positions, rows, slots and tokens."""
MAX_COUNT = 1 << 60
"""Exclusive upper bound of serials, times and uses. Sums of two must fit into 64 bits."""


def read_snapshot(path: str | Path, max_bytes: int = MAX_BYTES) -> tuple[Header, Arrays]:
    """Read the snapshot at ``path`` as (header, int64 arrays). Executes no code from the file.

    Takes O(file) time and memory of a few times ``max_bytes``, for any unpacked size.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a snapshot, or it is damaged or too large.
    """
    with open(path, "rb") as file:
        try:
            header, arrays = _unpack(file, max_bytes)
        except _Damage as found:
            raise ValueError(f"{path} is a damaged snapshot: {found}") from None
        except Exception as error:
            raise ValueError(f"{path} is not a cache snapshot, or it was truncated") from error
    if not isinstance(header, dict) or header.get("form") != FORM:
        raise ValueError(f"{path} is not a cache snapshot of this version")
    try:
        damage = next(_damages(header, arrays), None)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        damage = str(error) or type(error).__name__
    if damage is not None:
        raise ValueError(f"{path} is a damaged snapshot: {damage}")
    return header, arrays


class _Damage(Exception):
    """Defect that is found before the arrays are read."""


def _unpack(file: BinaryIO, max_bytes: int) -> tuple[Any, Arrays]:
    """Return the header and the arrays. Declared sizes are checked before unpacking."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        sizes = {member.filename.removesuffix(".npy"): member.file_size for member in members}
        if len(members) > len(TABLES) + 1 or "header" not in sizes:
            raise ValueError("another archive")
        missing = [name for name in TABLES if name not in sizes]
        if missing:
            raise _Damage(f"it lacks {', '.join(missing)}")
        if sizes["header"] > MAX_HEADER_BYTES or sum(sizes.values()) > max_bytes:
            raise _Damage(f"it unpacks to more than {max_bytes:,} bytes, or its header is too long")
        header = _read_array(archive.read("header.npy"))
        if header.dtype.kind != "U" or header.ndim:
            raise ValueError("another archive")
        arrays = {}
        for name, dimensions in TABLES.items():
            array = _read_array(archive.read(f"{name}.npy"))
            if array.dtype.kind != "i" or array.ndim != dimensions:
                raise _Damage(f"{name} must be an integer array of {dimensions} dimensions")
            arrays[name] = array.astype(np.int64, copy=False)
        return json.loads(str(header)), arrays


def _read_array(raw: bytes) -> npt.NDArray[Any]:
    """Return the array of a .npy file.

    numpy's reader is unsuitable: it allocates the declared size before reading.
    """
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject or any(length < 0 for length in shape):
        raise ValueError("the array does not contain plain numbers or text")
    if math.prod(shape) * dtype.itemsize != len(raw) - file.tell():
        raise ValueError("an array does not have its declared length")
    flat = np.frombuffer(raw, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _damages(header: Header, arrays: Arrays) -> Iterator[str]:
    """Yield the inconsistencies of a file, the most basic ones first. O(file)."""
    parent, end, kv, slot = (arrays[name] for name in ("parent", "end", "kv", "slot"))
    checkpoint, lost, ghost = (arrays[name] for name in ("checkpoint", "lost", "ghost"))
    num_nodes = len(parent)
    for name in ("end", "kv", "slot", "checkpoint", "lost", "ghost"):
        if len(arrays[name]) != num_nodes:
            yield f"{name} has {len(arrays[name])} entries for {num_nodes} nodes"
    yield from _wrong_header(header, num_nodes)
    yield from _wrong_numbers(header, arrays)
    num_roots, page_size, grid = len(header["namespaces"]), header["page_size"], header["grid"]
    below = parent >= 0
    if (parent >= np.arange(num_nodes)).any() or (parent < -num_roots).any():
        yield "a node comes before its parent"
    if len(np.unique(parent[~below])) != num_roots:
        yield "a namespace has no nodes"
    length = end - np.where(below, end[parent] if num_nodes else 0, 0)
    resident, stateful, faded = kv[:, 0] >= 0, checkpoint[:, 0] >= 0, lost[:, 0] >= 0
    if (length <= 0).any() or (length % page_size).any():
        yield "the length of a node is not a multiple of the page size"
    if length.sum() != len(arrays["tokens"]) or length[resident].sum() != len(arrays["rows"]):
        yield "the lengths of nodes, tokens and rows differ"
    if (resident & below & ~resident[parent]).any():
        yield "a node has KV and its parent has none"
    if (stateful & ~resident).any() or ((stateful | faded) & (end % grid != 0)).any():
        yield "a checkpoint is off the grid, or on a node without KV"
    if (stateful & faded).any():
        yield "a node has a checkpoint and a tombstone"
    if ((slot >= 0) != stateful).any() or len(np.unique(slot[stateful])) != stateful.sum():
        yield "checkpoints and slots do not match one to one"
    yield from _wrong_rows(arrays["rows"], page_size)
    if ((ghost >= 0) == resident).any() or len(np.unique(ghost[~resident])) != (~resident).sum():
        yield "places in the order of ghosts are missing or repeated"
    if (~resident & below & (ghost >= ghost[parent]) & ~resident[parent]).any():
        yield "a ghost is ordered after its parent"
    serials = np.concatenate([kv[resident, 0], checkpoint[stateful, 0]])
    if len(np.unique(serials)) != len(serials):
        yield "two items share a serial"


def _wrong_header(header: Header, num_nodes: int) -> Iterator[str]:
    for name, least, most in (
        ("page_size", 1, MAX_NUMBER),
        ("grid", 1, MAX_NUMBER),
        ("now", 0, MAX_COUNT),
        ("num_items", 0, MAX_COUNT),
    ):
        if type(header[name]) is not int or not least <= header[name] < most:
            yield f"{name} is {str(header[name])[:40]}"
    for name in ("labels", "lost_labels", "namespaces"):
        texts = header[name]
        if not isinstance(texts, list) or not set(map(type, texts)) <= {str}:
            yield f"{name} are not texts"
        if name != "namespaces" and len(texts) != num_nodes:
            yield f"{len(texts)} {name} for {num_nodes} nodes"
    if len({read_namespace(text) for text in header["namespaces"]}) < len(header["namespaces"]):
        yield "a namespace occurs twice"


def _wrong_numbers(header: Header, arrays: Arrays) -> Iterator[str]:
    for name in ("end", "tokens", "rows"):
        if _is_outside(arrays[name], 0, MAX_NUMBER):
            yield f"{name} are not all from 0 to {MAX_NUMBER - 1}"
    if _is_outside(arrays["slot"], -1, MAX_NUMBER) or _is_outside(arrays["ghost"], -1, MAX_COUNT):
        yield "a slot or a place in the order of ghosts is out of range"
    for name in ("kv", "checkpoint", "lost"):
        if arrays[name].shape[1] != 4:
            yield f"{name} must have four numbers per node"
        serial, created, last_used, uses = arrays[name].T
        if _is_outside(serial, -1, header["num_items"]):
            yield f"a serial of {name} is not below num_items: two items would share a serial"
        for times in (created, last_used):
            if _is_outside(times, 0, header["now"] + 1):
                yield f"{name} has a time in the future"
        if _is_outside(uses, 0, MAX_COUNT):
            yield f"{name} has an invalid number of uses"


def _is_outside(array: npt.NDArray[Any], least: int, end: int) -> bool:
    return bool(len(array)) and not least <= int(array.min()) <= int(array.max()) < end


def _wrong_rows(rows: Any, page_size: int) -> Iterator[str]:
    pages = rows.reshape(-1, page_size)
    if (pages != pages[:, :1] // page_size * page_size + np.arange(page_size)).any():
        yield "the rows are not whole pages"
