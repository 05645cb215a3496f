"""Expected contents of event streams, computed from the tree, and a checking block subscriber."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybridcache.export.blocks import chain_hash, namespace_hash
from hybridcache.export.namespaces import write_namespace
from hybridcache.hybrid import HybridRadixCache


class BlockFollower:
    """Sink for ``BlockEvents`` that checks every hash, and that no block is stored twice or removed
    before it was stored."""

    def __init__(self) -> None:
        self.blocks: set[int] = set()
        self.states: set[tuple[int, int]] = set()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["type"] == "BlockStored":
            size, parent = event["block_size"], event["parent_block_hash"]
            assert len(event["token_ids"]) == size * len(event["block_hashes"])
            for number, block in enumerate(event["block_hashes"]):
                tokens = tuple(event["token_ids"][number * size : (number + 1) * size])
                assert block == chain_hash(parent, tokens)
                assert block not in self.blocks
                self.blocks.add(block)
                parent = block
        elif event["type"] == "BlockRemoved":
            for block in event["block_hashes"]:
                self.blocks.remove(block)
        elif event["type"] == "CheckpointStored":
            self.states.add((event["position"], event["prefix_hash"]))
        else:
            self.states.remove((event["position"], event["prefix_hash"]))


def blocks_of(cache: HybridRadixCache, block_size: int) -> tuple[set[int], set[tuple[int, int]]]:
    """Return the hashes of all resident blocks, and (position, hash) of all checkpoints.

    Each hash is computed from the root.
    """
    blocks, states = set(), set()
    for node in cache._tree.nodes():
        if node.kv is None:
            continue
        parts, above = [], node
        while above.parent is not None:
            parts.append(above.tokens)
            above = above.parent
        path = np.concatenate(parts[::-1]).tolist()
        parent = namespace_hash(write_namespace(above.key))
        whole = len(path) - len(path) % block_size
        for first in range(0, whole, block_size):
            parent = chain_hash(parent, tuple(path[first : first + block_size]))
            blocks.add(parent)
        if node.checkpoint is not None:
            rest = tuple(path[whole:])
            states.add((node.end, chain_hash(parent, rest) if rest else parent))
    return blocks, states
