"""Application of watch records to a set of nodes, as ``model.js`` does it in the page."""

from __future__ import annotations

from typing import Any

from hybridcache.radix.tree import RadixNode, members


def follow(nodes: dict[int, dict[str, Any]], records: list[list[Any]]) -> None:
    """Apply ``records`` to ``nodes``. Raises KeyError if a record names an unknown node."""
    for kind, *rest in records:
        match kind:
            case "kv":
                id_, parent, namespace, start, end, *_ = rest
                assert parent is None or nodes[parent]["end"] == start
                nodes[id_] = {
                    "parent": parent,
                    "namespace": namespace,
                    "start": start,
                    "end": end,
                    "slot": None,
                    "label": None,
                }
            case "split":
                id_, upper, position, _ = rest
                lower = nodes[id_]
                nodes[upper] = lower | {"end": position, "slot": None, "label": None}
                lower |= {"start": position, "parent": upper}
            case "kv-gone":
                assert nodes.pop(rest[0])["slot"] is None
            case "checkpoint":
                nodes[rest[0]] |= {"slot": rest[1], "label": rest[2]}
            case "checkpoint-gone":
                assert nodes[rest[0]]["slot"] is not None
                nodes[rest[0]] |= {"slot": None, "label": None}
            case _:
                assert kind in ("time", "memory", "slabs", "request")


def truth(cache: Any) -> dict[int, dict[str, Any]]:
    """Return the resident nodes of ``cache`` by id."""
    found = {}
    waiting: list[RadixNode] = [
        child for root in cache._tree.roots.values() for child in members(root.children)
    ]
    while waiting:
        node = waiting.pop()
        waiting += members(node.children)
        assert node.kv is not None and node.parent is not None
        root = node
        while root.parent is not None:
            root = root.parent
        found[node.kv.serial] = {
            "parent": None if node.parent.kv is None else node.parent.kv.serial,
            "namespace": None if root.key is None else str(root.key)[:80],
            "start": node.start,
            "end": node.end,
            "slot": None if node.checkpoint is None else node.checkpoint.slot,
            "label": None if node.checkpoint is None else node.checkpoint.title[:80],
        }
    return found
