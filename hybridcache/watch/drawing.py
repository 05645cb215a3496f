"""Drawing of the tree as text.

It shows of each node its token range, whether its KV is resident, in a tier or a ghost, its
checkpoint or tombstone, and its locks. O(nodes drawn), without recursion.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

from hybridcache.radix.tree import RadixNode, RadixTree, members

MAX_LETTERS = 80
"""Maximum length of a drawn label or namespace; longer ones are shortened."""


class Drawn(NamedTuple):
    """Node to be drawn."""

    node: RadixNode
    depth: int
    last: bool
    """True for the last of its siblings."""
    only: bool
    """True if it has no siblings."""


class Drawing(NamedTuple):
    """Contents of a drawing: namespaces in order of creation, nodes depth first, ghosts last."""

    namespaces: list[tuple[str, list[Drawn]]]
    left_out: str | None
    """Sentence about the parts that are not drawn, or None."""


def drawing_of(tree: RadixTree, max_nodes: int) -> Drawing:
    """Return the first ``max_nodes`` nodes with their namespaces. O(nodes drawn)."""
    namespaces: list[tuple[str, list[Drawn]]] = []
    room = max_nodes
    for root in tree.roots.values():
        if room <= 0:
            break
        drawn = list(islice(_walk(root), room))
        room -= len(drawn)
        namespaces.append((f"namespace {printable(repr(root.key))}", drawn))
    num_nodes = tree.num_nodes - sum(len(drawn) for _, drawn in namespaces)
    num_namespaces = len(tree.roots) - len(namespaces)
    if not num_nodes:
        return Drawing(namespaces, None)
    left_out = f"... {_count(num_nodes, 'node')}"
    if num_namespaces:
        left_out += f" and {_count(num_namespaces, 'namespace')}"
    return Drawing(namespaces, left_out)


def describe(node: RadixNode) -> str:
    """Return one line of printable letters about a node."""
    words = [f"{node.start}..{node.end}"]
    if node.kv is None:
        stored = node.offloaded is not None and node.offloaded.kv is not None
        words.append("v below" if stored else "~ ghost")
    if node.checkpoint is not None:
        superseded = " superseded" if node.checkpoint.superseded else ""
        label = f" {printable(node.checkpoint.label)}" if node.checkpoint.label else ""
        words.append(f"* slot {node.checkpoint.slot}{label}{superseded}")
    elif node.offloaded is not None and node.offloaded.state is not None:
        words.append("v checkpoint below")
    elif node.lost_checkpoint is not None:
        words.append("- checkpoint evicted")
    if node.locks:
        words.append(f"locked {node.locks}x")
    return " ".join(words)


def printable(text: str) -> str:
    """Return ``text`` in one printable line of at most ``MAX_LETTERS`` letters.

    Unprintable letters are escaped as in Python.
    """
    if len(text) > MAX_LETTERS:
        text = text[: MAX_LETTERS - 3] + "..."
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def render_text(tree: RadixTree, max_nodes: int) -> str:
    """Return an outline with one line per node. An only child is not indented.

    ``*`` checkpoint, ``-`` tombstone, ``~`` ghost, ``v`` offloaded. The last line counts omitted
    nodes.
    """
    plan = drawing_of(tree, max_nodes)
    lines: list[str] = []
    for namespace, nodes in plan.namespaces:
        lines.append(namespace)
        margins = [""]
        for drawn in nodes:
            del margins[drawn.depth + 1 :]
            margin = margins[-1]
            if drawn.only and drawn.depth:
                lines.append(margin + describe(drawn.node))
                margins.append(margin)
            else:
                branch, rail = ("`- ", "   ") if drawn.last else ("|- ", "|  ")
                lines.append(margin + branch + describe(drawn.node))
                margins.append(margin + rail)
    if plan.left_out is not None:
        lines.append(plan.left_out)
    return "\n".join(lines)


def _walk(root: RadixNode) -> Iterator[Drawn]:
    """Iterate lazily over the nodes below ``root``, depth first."""
    stack = [_children(root)]
    while stack:
        child = next(stack[-1], None)
        if child is None:
            stack.pop()
            continue
        node, last, only = child
        yield Drawn(node, len(stack) - 1, last, only)
        stack.append(_children(node))


def _children(node: RadixNode) -> Iterator[tuple[RadixNode, bool, bool]]:
    """Iterate over (child, whether it is the last, whether it is the only one)."""
    resident, ghosts = members(node.children), members(node.ghosts)
    num_children = len(resident) + len(ghosts)
    for number, child in enumerate(chain(resident, ghosts), 1):
        yield child, number == num_children, num_children == 1


def _count(number: int, noun: str) -> str:
    return f"{number} more {noun}{'' if number == 1 else 's'}"
