"""A cache's structure in a file: every node, ghost, row, slot and recency, for debugging and studies. No tensors.

The file is a numpy archive of flat arrays, one entry a node, parents before children; it holds no code and loading runs none.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from hybridcache.hybrid import HybridRadixCache
from hybridcache.radix.node import Checkpoint, RadixNode
from hybridcache.residency import Residency

FORM = "hybridcache snapshot 1"


def save_snapshot(cache: HybridRadixCache, path: str | Path) -> None:
    """Write ``cache`` to ``path`` (.npz). Locks and what requests hold are not part of it. O(tree).

    ValueError: a namespace is not made of None, numbers, texts, bytes and tuples of them.
    """
    residency = cache._residency
    ordered = list(residency.tree.nodes())
    place = {node: index for index, node in enumerate(ordered)}
    forgotten = {node: index for index, node in enumerate(residency.ghosts.oldest_first())}
    namespaces = [_write_namespace(root.key) for root in residency.tree.roots.values()]
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
    np.savez_compressed(
        path,
        header=np.array(json.dumps(header)),
        parent=np.array([place[_parent(node)] for node in ordered], np.int64),
        end=np.array([node.end for node in ordered], np.int64),
        tokens=np.concatenate([np.empty(0, np.int32), *(node.tokens for node in ordered)]),
        rows=np.concatenate([np.empty(0, np.int32), *parts]),
        kv=np.array([_numbers(node.kv) for node in ordered], np.int64).reshape(-1, 4),
        slot=np.array([node.checkpoint.slot if node.checkpoint else -1 for node in ordered], int),
        checkpoint=_table([node.checkpoint for node in ordered]),
        lost=_table([node.lost_checkpoint for node in ordered]),
        ghost=np.array([forgotten.get(node, -1) for node in ordered], np.int64),
    )


def load_snapshot(cache: HybridRadixCache, path: str | Path) -> None:
    """Fill ``cache``, which must be empty and of the same page size and grid, with what ``path`` holds. O(tree + pools).

    Rows and slots are taken from its allocators under their old numbers; the policy is told of every candidate, oldest
    first. ValueError: another form, another geometry, a pool that is too small, or a cache that is not empty.
    """
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if "header" not in arrays:
        raise ValueError(f"{path} is no cache snapshot")
    header = json.loads(str(arrays["header"]))
    _check_fits(cache, header, path)
    residency = cache._residency
    residency.pages.reserve(arrays["rows"])
    residency.slots.reserve([slot for slot in arrays["slot"].tolist() if slot >= 0])
    nodes = _build(residency, header, arrays)
    residency.now, residency.num_items = header["now"], header["num_items"]
    ghosts = [(order, node) for order, node in zip(arrays["ghost"], nodes, strict=True)]
    for order, node in sorted(ghosts, key=lambda pair: int(pair[0])):
        if order >= 0:
            residency.ghosts.add(node)
    residency.ghosts.trim()
    residency.mark_superseded()
    for item in sorted(residency.candidates(), key=lambda item: (item.last_used, item.serial)):
        residency.policy.add(item)


def _build(residency: Residency, header: dict[str, Any], arrays: Any) -> list[RadixNode]:
    """Make the nodes, parents first, with their KV and checkpoints."""
    tree = residency.tree
    roots = [tree.root(ast.literal_eval(text)) for text in header["namespaces"]]
    nodes: list[RadixNode] = []
    token_at = row_at = 0
    for index, end in enumerate(arrays["end"].tolist()):
        above = int(arrays["parent"][index])
        parent = nodes[above] if above >= 0 else roots[-1 - above]
        length = end - parent.end
        node = tree.grow(parent, arrays["tokens"][token_at : token_at + length])
        token_at += length
        nodes.append(node)
        serial, created, last_used, uses = arrays["kv"][index].tolist()
        if serial >= 0:
            residency.store_rows(node, arrays["rows"][row_at : row_at + length].copy())
            row_at += length
            kv = node.kv
            assert kv is not None
            kv.serial, kv.created, kv.last_used, kv.uses = serial, created, last_used, uses
        else:
            tree.fade(node)
        slot = int(arrays["slot"][index])
        node.checkpoint = _checkpoint(
            residency, node, slot, arrays["checkpoint"][index], header["labels"][index]
        )
        node.lost_checkpoint = _checkpoint(
            residency, node, -1, arrays["lost"][index], header["lost_labels"][index]
        )
        residency.num_checkpoints += node.checkpoint is not None
    return nodes


def _checkpoint(
    residency: Residency, node: RadixNode, slot: int, numbers: Any, label: str
) -> Checkpoint | None:
    serial, created, last_used, uses = numbers.tolist()
    if serial < 0:
        return None
    checkpoint = Checkpoint(node, slot, created, serial, residency.item_bytes, label)
    checkpoint.last_used, checkpoint.uses = last_used, uses
    return checkpoint


def _check_fits(cache: HybridRadixCache, header: dict[str, Any], path: str | Path) -> None:
    if header.get("form") != FORM:
        raise ValueError(f"{path} is no cache snapshot of this version")
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


def _write_namespace(namespace: Hashable) -> str:
    text = repr(namespace)
    try:
        same = ast.literal_eval(text) == namespace
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise ValueError(f"namespace {namespace!r} can not be written to a snapshot")
    return text
