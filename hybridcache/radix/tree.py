"""The compressed radix tree over token ids: walk, split, grow, revive, detach.

Pure structure: one root per namespace, edges as byte views that a split shares, resident children
and ghost children apart so that "how deep does KV reach" and "how deep were the tokens seen" are
two plain walks. No recursion.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from hybridcache.namespaces import PLAIN, require_namespace
from hybridcache.radix.key import TOKEN_BYTES, child_key, edge_tokens, first_page
from hybridcache.radix.node import RadixNode, members, with_child, without_child
from hybridcache.tokens import Tokens, common_prefix_len

Walk = tuple[RadixNode, RadixNode | None, int]
"""How far a prompt follows the resident part of the tree:

- the deepest node whose edge, and all edges above, the prompt has whole;
- the child of it in whose edge the walk ended (the prompt leaves it there, or ends there), or None;
- tokens from the root to where it ended, whole pages.
"""


class RadixTree:
    """Nodes under one root per namespace. Every length given to it is a multiple of
    ``page_size``."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.roots: dict[Hashable, RadixNode] = {}
        self.num_nodes = 0
        """Resident and ghost nodes, roots not counted."""

    def root(self, namespace: Hashable) -> RadixNode:
        """Return the root of ``namespace``, made if it is not there. O(1). ValueError: no value
        for a namespace (``hybridcache.namespaces``)."""
        node = self.find_root(namespace)
        if node is None:
            node = self.roots[namespace] = RadixNode(None, namespace, b"", 0)
        return node

    def find_root(self, namespace: Hashable) -> RadixNode | None:
        """Return the root of ``namespace``, or None if nothing is known of it. O(1). ValueError: no
        value for a namespace."""
        if type(namespace) not in PLAIN:
            require_namespace(namespace)
        return self.roots.get(namespace)

    def walk(self, node: RadixNode, tokens: Tokens, ghosts: bool = False) -> Walk:
        """Follow ``tokens``, which start at ``node``'s end, through resident edges, or through
        ghosts only. Reads only. O(len(tokens)).

        A whole edge is compared by one ``memcmp``; where it differs is looked for once, at the end.
        An only child is compared unasked: its key need not be looked up.
        """
        base = end = node.end
        family = node.ghosts if ghosts else node.children
        if family is None:
            return node, None, base
        stop = base + len(tokens)
        starts_with, token = tokens.tobytes().startswith, tokens.item
        page_size = self.page_size
        child: RadixNode | None
        while family is not None:
            at = end - base
            if isinstance(family, dict):
                if end >= stop:
                    break
                key = token(at) if page_size == 1 else first_page(tokens, at, page_size)
                child = family.get(key)
                if child is None:
                    break
            else:
                child = family
            if not starts_with(child.edge, at * TOKEN_BYTES):
                if end >= stop or child.key != first_page(tokens, at, page_size):
                    break
                shared = common_prefix_len(edge_tokens(child.edge), tokens[at:], page_size)
                return node, child, end + shared
            node = child
            end = node.end
            family = node.ghosts if ghosts else node.children
        return node, None, end

    def grow(self, parent: RadixNode, tokens: Tokens) -> RadixNode:
        """Hang a new node with a copy of ``tokens`` under ``parent``, as a resident child.
        O(len(tokens))."""
        edge = tokens.tobytes()
        key = tokens.item(0) if self.page_size == 1 else child_key(edge, self.page_size)
        child = RadixNode(parent, key, edge, parent.end + len(tokens))
        parent.children = with_child(parent.children, child)
        self.num_nodes += 1
        return child

    def split(self, lower: RadixNode, position: int) -> RadixNode:
        """Cut ``lower``'s edge at ``position``; the new upper node is returned. Copies no tokens.
        O(page).

        ``lower`` keeps its identity: its end, checkpoint and locks. The upper half is a ghost if
        ``lower`` is one, else the caller owes it a segment.
        """
        parent = lower.parent
        assert parent is not None and parent.end < position < lower.end
        cut = (position - parent.end) * TOKEN_BYTES
        edge = memoryview(lower.edge)
        upper = RadixNode(parent, lower.key, edge[:cut], position)
        lower.edge = edge[cut:]
        lower.key = child_key(lower.edge, self.page_size)
        lower.parent = upper
        family = parent.ghosts if lower.kv is None else parent.children
        if isinstance(family, dict):
            family[upper.key] = upper
        elif lower.kv is None:
            parent.ghosts = upper
        else:
            parent.children = upper
        if lower.kv is None:
            upper.ghosts = lower
        else:
            upper.children = lower
        self.num_nodes += 1
        return upper

    def revive(self, ghost: RadixNode) -> None:
        """Make a ghost a resident child again; the caller owes it a segment. O(1)."""
        parent = ghost.parent
        assert parent is not None
        parent.ghosts = without_child(parent.ghosts, ghost)
        parent.children = with_child(parent.children, ghost)

    def fade(self, leaf: RadixNode) -> None:
        """Turn a resident node without resident children into a ghost. O(1)."""
        parent = leaf.parent
        assert parent is not None and leaf.children is None
        parent.children = without_child(parent.children, leaf)
        parent.ghosts = with_child(parent.ghosts, leaf)

    def forget(self, ghost: RadixNode) -> None:
        """Remove a ghost without children. O(1)."""
        parent = ghost.parent
        assert parent is not None and ghost.ghosts is None
        parent.ghosts = without_child(parent.ghosts, ghost)
        self.num_nodes -= 1

    def prune_root(self, namespace: Hashable) -> None:
        """Drop the root of ``namespace`` if nothing hangs on it. O(1)."""
        root = self.roots.get(namespace)
        if root is not None and not root.children and not root.ghosts:
            del self.roots[namespace]

    def nodes(self, start: RadixNode | None = None) -> Iterator[RadixNode]:
        """Every node below ``start`` (default: below all roots), parents before children. O(tree),
        no recursion."""
        stack = [start] if start is not None else list(self.roots.values())
        while stack:
            node = stack.pop()
            below = [*members(node.children), *members(node.ghosts)]
            yield from below
            stack += below
