"""Snapshots: a cache's structure in a file, for debugging and studies, without tensors.

A snapshot has all nodes, ghosts, rows, slots and use times. The file is a numpy archive of flat
arrays with one entry per node, parents before children. Loading executes no code from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from hybridcache.export.snapshot_file import (
    FORM,
    Arrays,
    Header,
    read_snapshot,
)
from hybridcache.hybrid import HybridRadixCache
from hybridcache.radix.tree import Checkpoint, ItemBytes, RadixNode, RadixTree, Segment
from hybridcache.tokens import read_namespace, write_namespace


def save_snapshot(cache: HybridRadixCache, path: str | Path) -> None:
    """Write ``cache`` to exactly ``path``. O(tree).

    Not saved: locks, rows and slots held by requests, policy state and the order of free lists.

    Raises:
        OSError: writing failed, for example on a full disk. The old file at ``path`` is intact,
            because the new one is written next to it and then renamed.
        ValueError: a namespace is not made of None, numbers, strings, bytes and tuples of them, or
            a token is negative, or ``cache`` stores nothing. No file is written.
    """
    _check_keeps(cache)
    ordered = list(cache.iter_nodes())
    roots = cache.roots()
    place = {node: index for index, node in enumerate(ordered)}
    forgotten = {node: index for index, node in enumerate(cache.ghosts.oldest_first())}
    namespaces = [write_namespace(root.key) for root in roots]
    for index, root in enumerate(roots):
        place[root] = -1 - index
    header = {
        "form": FORM,
        "page_size": cache.page_size,
        "grid": cache.grid,
        "now": cache.now,
        "num_items": cache.num_items,
        "namespaces": namespaces,
        "labels": [_label(node.checkpoint) for node in ordered],
        "lost_labels": [_label(node.lost_checkpoint) for node in ordered],
    }
    parts = [node.kv.indices for node in ordered if node.kv is not None]
    tokens = np.concatenate([np.empty(0, np.int32), *(node.tokens for node in ordered)])
    if (tokens < 0).any():
        raise ValueError("A cached prompt has a token below 0, which a snapshot cannot store.")
    arrays = {
        "header": np.array(json.dumps(header)),
        "parent": np.array([place[_parent(node)] for node in ordered], np.int64),
        "end": np.array([node.end for node in ordered], np.int64),
        "tokens": tokens,
        "rows": np.concatenate([np.empty(0, np.int32), *parts]),
        "kv": np.array([_numbers(node.kv) for node in ordered], np.int64).reshape(-1, 4),
        "slot": np.array(
            [node.checkpoint.slot if node.checkpoint else -1 for node in ordered], int
        ),
        "checkpoint": _table([node.checkpoint for node in ordered]),
        "lost": _table([node.lost_checkpoint for node in ordered]),
        "ghost": np.array([forgotten.get(node, -1) for node in ordered], np.int64),
    }
    _write_whole(Path(path).resolve(), arrays)


def _write_whole(path: Path, arrays: dict[str, Any]) -> None:
    """Write to ``path`` atomically. Raises OSError if writing fails; the old file remains."""
    is_device = path.exists() and not path.is_file()
    part = path if is_device else path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)
        if not is_device:
            part.replace(path)
    except BaseException:
        if not is_device:
            part.unlink(missing_ok=True)
        raise


def load_snapshot(cache: HybridRadixCache, path: str | Path) -> None:
    """Fill an empty ``cache`` of the same page size and grid from the file at ``path``.

    Rows and slots keep their numbers and are taken from the cache's allocators. All candidates are
    added to the policy, oldest first, and reported to subscribers. Loaded contents count as
    inserted. Ghosts beyond the cache's limit are dropped, and no item has a ``memo``. Untrusted
    files are safe: the file is read within bounds and checked before the cache is changed.
    O(tree + pools).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a valid snapshot, its geometry differs, a pool is too small, or
            the cache is not empty. The cache is unchanged.
    """
    _check_keeps(cache)
    header, arrays = read_snapshot(path)
    _check_fits(cache, header, path)
    if (arrays["slot"] >= 0).any() and not cache.item_bytes.state:
        raise ValueError(f"{path} has checkpoints, which this cache cannot store.")
    tree = RadixTree(cache.page_size)
    nodes = _build(tree, header, arrays, cache.item_bytes, (cache.num_items, cache.now), path)
    orders = zip(arrays["ghost"].tolist(), nodes, strict=True)
    ghosts = sorted((pair for pair in orders if pair[0] >= 0), key=lambda pair: pair[0])
    try:
        cache.install(
            tree,
            [node for _, node in ghosts],
            now=header["now"],
            num_items=header["num_items"],
        )
    except ValueError as error:
        raise ValueError(f"{path} does not fit into this cache: {error}") from error
    cache.ghosts.trim()


def _build(
    tree: RadixTree,
    header: Header,
    arrays: Arrays,
    item_bytes: ItemBytes,
    clock: tuple[int, int],
    path: str | Path,
) -> list[RadixNode]:
    """Build the nodes, parents first, with their KV and checkpoints.

    ``clock`` is the cache's present (serials, requests). Serials and times are shifted by it,
    because serials must stay unique and time must not run backwards.
    """
    roots = [tree.root(read_namespace(text)) for text in header["namespaces"]]
    nodes: list[RadixNode] = []
    token_at = row_at = 0
    siblings: set[tuple[int, Hashable]] = set()
    for index, (end, above) in enumerate(
        zip(arrays["end"].tolist(), arrays["parent"].tolist(), strict=True)
    ):
        parent = nodes[above] if above >= 0 else roots[-1 - above]
        length = end - parent.end
        tokens = arrays["tokens"][token_at : token_at + length].astype(np.int32)
        node = tree.grow(parent, tokens)
        if (above, node.key) in siblings:
            raise ValueError(f"{path} is a damaged snapshot: two children begin with equal tokens")
        siblings.add((above, node.key))
        token_at += length
        nodes.append(node)
        serial, created, last_used, uses = _shifted(arrays["kv"][index], clock)
        if serial is None:
            tree.fade(node)
        else:
            rows = arrays["rows"][row_at : row_at + length].astype(np.int32)
            node.kv = Segment(node, rows, created, serial, item_bytes)
            node.kv.last_used, node.kv.uses = last_used, uses
            row_at += length
        slot = int(arrays["slot"][index])
        numbers = _shifted(arrays["checkpoint"][index], clock)
        node.checkpoint = _checkpoint(node, slot, numbers, header["labels"][index], item_bytes)
        numbers = _shifted(arrays["lost"][index], clock)
        node.lost_checkpoint = _checkpoint(
            node, -1, numbers, header["lost_labels"][index], item_bytes
        )
    return nodes


def _shifted(numbers: Any, clock: tuple[int, int]) -> tuple[int | None, int, int, int]:
    """Return (serial, created, last_used, uses) shifted by ``clock``; serial None if absent."""
    serial, created, last_used, uses = numbers.tolist()
    if serial < 0:
        return None, 0, 0, 0
    return serial + clock[0], created + clock[1], last_used + clock[1], uses


def _checkpoint(
    node: RadixNode,
    slot: int,
    numbers: tuple[int | None, int, int, int],
    label: str,
    item_bytes: ItemBytes,
) -> Checkpoint | None:
    serial, created, last_used, uses = numbers
    if serial is None:
        return None
    checkpoint = Checkpoint(node, slot, created, serial, item_bytes, label)
    checkpoint.last_used, checkpoint.uses = last_used, uses
    return checkpoint


def _check_keeps(cache: HybridRadixCache) -> None:
    if not isinstance(cache, HybridRadixCache):
        raise ValueError(f"A {type(cache).__name__} has no tree to save or load.")


def _check_fits(cache: HybridRadixCache, header: Header, path: str | Path) -> None:
    if (header["page_size"], header["grid"]) != (cache.page_size, cache.grid):
        raise ValueError(
            f"{path} has page size {header['page_size']} and grid {header['grid']}, but "
            f"the cache has {cache.page_size} and {cache.grid}."
        )
    if cache.num_nodes:
        raise ValueError("A snapshot can only be loaded into an empty cache.")


def _parent(node: RadixNode) -> RadixNode:
    assert node.parent is not None
    return node.parent


def _numbers(item: Any) -> tuple[int, int, int, int]:
    if item is None:
        return -1, 0, 0, 0
    return item.serial, item.created, item.last_used, item.uses


def _table(items: list[Checkpoint | None]) -> Any:
    return np.array([_numbers(item) for item in items], np.int64).reshape(-1, 4)


def _label(item: Checkpoint | None) -> str:
    return "" if item is None else item.label
