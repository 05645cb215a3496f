"""Invariants of the tree, recomputed from scratch."""

from __future__ import annotations

from hybridcache.radix.tree import (
    GHOST_NODE_BYTES,
    TOKEN_BYTES,
    GhostList,
    RadixNode,
    RadixTree,
    first_page,
    members,
)


def check_tree(tree: RadixTree, ghosts: GhostList) -> None:
    """Recompute the invariants of ``tree`` and its ghosts. O(tree).

    Raises:
        AssertionError: an invariant fails; the message names the first.
    """
    num_nodes = num_stored = 0
    ghost_bytes = 0
    listed = {ghost: place for place, ghost in enumerate(ghosts.oldest_first())}
    for namespace, root in tree.roots.items():
        assert root.parent is None and root.end == 0 and root.kv is None, f"bad root {root}"
        assert root.key == namespace, f"root of {namespace!r} calls itself {root.key!r}"
        assert root.children or root.ghosts, f"empty root of {namespace!r} was not dropped"
        assert root.locks == 0, "a root is locked"
    for node in tree.nodes():
        num_nodes += 1
        _check_node(node, tree.page_size)
        if node.kv is None and node.offloaded is not None and node.offloaded.kv is not None:
            assert node not in listed, f"{node} is in the ghost list, and its KV is in a tier"
            num_stored += 1
        elif node.kv is None:
            assert node in listed, f"ghost {node} is not in the ghost list"
            ghost_bytes += len(node.edge) + GHOST_NODE_BYTES
            for child in members(node.ghosts):
                assert listed[child] < listed[node], f"ghost {child} outlives its parent {node}"
    assert num_nodes == tree.num_nodes, f"{num_nodes} nodes, counted {tree.num_nodes}"
    num_ghosts = sum(node.kv is None for node in tree.nodes()) - num_stored
    assert num_ghosts == len(listed), f"{len(listed)} ghosts listed, {num_ghosts} in the tree"
    assert ghost_bytes == ghosts.num_bytes, f"ghosts take {ghost_bytes}, counted {ghosts.num_bytes}"
    assert ghosts.num_bytes <= ghosts.limit_bytes, "ghosts are over their limit"


def _check_node(node: RadixNode, page_size: int) -> None:
    parent = node.parent
    assert parent is not None, f"{node} hangs on nothing"
    family = parent.children if node.kv is not None else parent.ghosts
    if isinstance(family, dict):
        assert len(family) > 1, f"{parent} keeps a dict for {len(family)} children"
        assert family.get(node.key) is node, f"{node} is not under its key"
    else:
        assert family is node, f"{node} is not the child of its parent"
    other = parent.ghosts if node.kv is not None else parent.children
    keys = other if isinstance(other, dict) else [child.key for child in members(other)]
    assert node.key not in keys, f"{node} has a twin that is resident and a ghost"
    length = node.end - parent.end
    assert length > 0 and length * TOKEN_BYTES == len(node.edge), (
        f"edge of {node} has the wrong length"
    )
    assert length % page_size == 0, f"{node} does not end on a page"
    assert node.key == first_page(node.tokens, 0, page_size), f"{node} is under the wrong key"
    assert node.locks >= 0, f"{node} was unlocked too often"
    if node.kv is None:
        assert not node.children, f"ghost {node} has resident children"
        assert node.checkpoint is None, f"ghost {node} has a checkpoint"
        assert node.locks == 0, f"ghost {node} is locked"
    else:
        assert len(node.kv.rows) == length, f"{node} has {len(node.kv.rows)} rows"
        assert node.kv.node is node, f"the rows of {node} belong to {node.kv.node}"
    if node.checkpoint is not None:
        assert node.checkpoint.node is node, f"checkpoint of {node} belongs elsewhere"
        assert node.lost_checkpoint is None, f"{node} has a checkpoint and a tombstone"
