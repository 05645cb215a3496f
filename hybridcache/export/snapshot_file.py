"""The file of a snapshot: reading it, and refusing what no cache can have written, before any cache is touched."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
"""The arrays beside the header and their dimensions; a table has a row of four numbers a node."""

Header = dict[str, Any]
Arrays = dict[str, Any]


def read_snapshot(path: str | Path) -> tuple[Header, Arrays]:
    """(header, arrays) of the snapshot at ``path``; runs no code of it. O(file).

    FileNotFoundError: there is none. ValueError: something else is there, or a snapshot that is damaged.
    """
    with open(path, "rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in archive.files}
            header = json.loads(str(arrays.pop("header")))
        except Exception as error:
            raise ValueError(f"{path} is no cache snapshot, or its end was cut off") from error
    if not isinstance(header, dict) or header.get("form") != FORM:
        raise ValueError(f"{path} is no cache snapshot of this version")
    missing = [name for name in TABLES if name not in arrays]
    if missing:
        raise ValueError(f"{path} is a damaged snapshot: it lacks {', '.join(missing)}")
    try:
        damage = next(_damages(header, arrays), None)
    except (KeyError, TypeError, ValueError, IndexError, SyntaxError) as error:
        damage = str(error) or type(error).__name__
    if damage is not None:
        raise ValueError(f"{path} is a damaged snapshot: {damage}")
    return header, arrays


def _damages(header: Header, arrays: Arrays) -> Iterator[str]:
    """What contradicts what, the most basic first. O(file)."""
    for name, dimensions in TABLES.items():
        array = arrays[name]
        if array.dtype.kind != "i" or array.ndim != dimensions:
            yield f"{name} is no integer array of {dimensions} dimensions"
    parent, end, kv, slot = (arrays[name] for name in ("parent", "end", "kv", "slot"))
    num_nodes = len(parent)
    for name in ("end", "kv", "slot", "checkpoint", "lost", "ghost"):
        if len(arrays[name]) != num_nodes:
            yield f"{name} has {len(arrays[name])} entries for {num_nodes} nodes"
    for name in ("kv", "checkpoint", "lost"):
        if arrays[name].shape[1] != 4:
            yield f"{name} has not four numbers a node"
    for name in ("labels", "lost_labels"):
        if len(header[name]) != num_nodes:
            yield f"{len(header[name])} {name} for {num_nodes} nodes"
    if len({ast.literal_eval(text) for text in header["namespaces"]}) < len(header["namespaces"]):
        yield "a namespace stands twice"
    num_roots, page_size = len(header["namespaces"]), header["page_size"]
    below = parent >= 0
    if (parent >= np.arange(num_nodes)).any() or (parent < -num_roots).any():
        yield "a node comes before its parent"
    if len(np.unique(parent[~below])) != num_roots:
        yield "a namespace holds nothing"
    length = end - np.where(below, end[parent] if num_nodes else 0, 0)
    resident, stateful = kv[:, 0] >= 0, arrays["checkpoint"][:, 0] >= 0
    if (length <= 0).any() or (length % page_size).any():
        yield "a node is not whole pages long"
    if length.sum() != len(arrays["tokens"]) or length[resident].sum() != len(arrays["rows"]):
        yield "its nodes are not as long as its tokens and rows"
    if (resident & below & ~resident[parent]).any():
        yield "a node has KV, and its parent none"
    if (stateful & (~resident | (end % header["grid"] != 0))).any():
        yield "a checkpoint stands where none can"
    if ((slot >= 0) != stateful).any() or len(np.unique(slot[stateful])) != stateful.sum():
        yield "its checkpoints have not a slot each"
    yield from _wrong_rows(arrays["rows"], page_size)
    ghost = arrays["ghost"]
    if ((ghost >= 0) == resident).any() or len(np.unique(ghost[~resident])) != (~resident).sum():
        yield "its ghosts are not in one order"
    if (~resident & below & (ghost >= ghost[parent]) & ~resident[parent]).any():
        yield "a ghost outlives its parent"
    serials = np.concatenate([kv[resident, 0], arrays["checkpoint"][stateful, 0]])
    if len(np.unique(serials)) != len(serials) or (serials >= header["num_items"]).any():
        yield "two items share a serial"


def _wrong_rows(rows: Any, page_size: int) -> Iterator[str]:
    pages = rows.reshape(-1, page_size)
    if (pages != pages[:, :1] // page_size * page_size + np.arange(page_size)).any():
        yield "its rows are not whole pages"
