"""A cache's structure in a file: every node, ghost, row, slot and recency, for debugging and
studies. No tensors.

The file is a numpy archive of flat arrays, one entry a node, parents before children; it holds no
code and loading runs none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from hybridcache.api import introduce
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
    """Write ``cache`` to exactly ``path``. Locks, what requests hold, a policy's memory and the
    order of what is free are not part of it. O(tree).

    OSError: the disk is full, say; what ``path`` held before is there still, beside which the new
    file is written. ValueError, and nothing written: a namespace is not made of None, numbers,
    texts, bytes and tuples of them, a token is below 0, or ``cache`` keeps nothing.
    """
    _check_keeps(cache)
    residency = cache._residency
    ordered = list(residency.tree.nodes())
    place = {node: index for index, node in enumerate(ordered)}
    forgotten = {node: index for index, node in enumerate(residency.ghosts.oldest_first())}
    namespaces = [write_namespace(root.key) for root in residency.tree.roots.values()]
    for index, root in enumerate(residency.tree.roots.values()):
        place[root] = -1 - index
    header = {
        "form": FORM,
        "page_size": cache.page_size,
        "grid": cache.grid,
        "now": residency.now,
        "num_items": residency.num_items,
        "namespaces": namespaces,
        "labels": [_label(node.checkpoint) for node in ordered],
        "lost_labels": [_label(node.lost_checkpoint) for node in ordered],
    }
    parts = [node.kv.indices for node in ordered if node.kv is not None]
    tokens = np.concatenate([np.empty(0, np.int32), *(node.tokens for node in ordered)])
    if (tokens < 0).any():
        raise ValueError("a cached prompt has a token below 0, which no snapshot can hold")
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
    """All of it to ``path``, or what was there before stays. OSError: it can not be written."""
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
    """Fill ``cache``, which must be empty and of the same page size and grid, with what ``path``
    holds. O(tree + pools).

    Rows and slots are taken from its allocators under their old numbers; the policy is notified of
    every candidate, oldest first, and so are subscribers; what is loaded counts as inserted; ghosts
    past the cache's own limit are forgotten. The file may come from anybody: it is read whole,
    within bounds, and checked before the cache is touched. No item has a ``memo``. ValueError, and
    the cache as it was: no snapshot or a damaged one, another geometry, a pool that is too small,
    or a cache that is not empty. FileNotFoundError: nothing is there.
    """
    _check_keeps(cache)
    header, arrays = read_snapshot(path)
    _check_fits(cache, header, path)
    residency = cache._residency
    if (arrays["slot"] >= 0).any() and not residency.item_bytes.state:
        raise ValueError(f"{path} holds checkpoints, and this cache can keep none")
    tree = RadixTree(cache.page_size)
    clock = (residency.num_items, residency.now)
    nodes = _build(tree, header, arrays, residency.item_bytes, clock, path)
    slots = [slot for slot in arrays["slot"].tolist() if slot >= 0]
    try:
        residency.pages.reserve(arrays["rows"])
        try:
            residency.slots.reserve(slots)
        except ValueError:
            residency.pages.free(arrays["rows"])
            raise
    except ValueError as error:
        raise ValueError(f"{path} does not fit into this cache: {error}") from error
    residency.tree.roots.update(tree.roots)
    residency.tree.num_nodes = tree.num_nodes
    residency.num_items += header["num_items"]
    residency.now += header["now"]
    residency.cached_tokens, residency.num_checkpoints = len(arrays["rows"]), len(slots)
    residency.stats.inserted_tokens += len(arrays["rows"])
    residency.stats.inserted_slots += len(slots)
    ghosts = [(int(order), node) for order, node in zip(arrays["ghost"], nodes, strict=True)]
    for order, node in sorted(ghosts, key=lambda pair: pair[0]):
        if order >= 0:
            residency.ghosts.add(node)
    residency.ghosts.trim()
    if residency.owners is not None:
        for node in nodes:
            if node.kv is not None:
                residency.owners.add(node.kv.indices)
    residency.mark_superseded()
    for item in sorted(residency.candidates(), key=lambda item: (item.last_used, item.serial)):
        residency.policy.add(item)
    if residency.listener is not None:
        introduce(residency.listener, residency.tree.nodes())


def _build(
    tree: RadixTree,
    header: Header,
    arrays: Arrays,
    item_bytes: ItemBytes,
    clock: tuple[int, int],
    path: str | Path,
) -> list[RadixNode]:
    """Make the nodes, parents first, with their KV and checkpoints. ``clock``: (serials, requests)
    that the cache has had; no serial may come twice, and no time may run back."""
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
            raise ValueError(f"{path} is a damaged snapshot: two children begin the same")
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
    """(serial, created, last_used, uses) after what the cache has had; serial None: nothing was
    there."""
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
        raise ValueError(f"a {type(cache).__name__} has no tree: there is nothing to save or load")


def _check_fits(cache: HybridRadixCache, header: Header, path: str | Path) -> None:
    if (header["page_size"], header["grid"]) != (cache.page_size, cache.grid):
        raise ValueError(
            f"{path} was saved with page size {header['page_size']} and grid {header['grid']}, "
            f"the cache has {cache.page_size} and {cache.grid}"
        )
    if cache.num_nodes:
        raise ValueError("a snapshot can only be loaded into an empty cache")


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
