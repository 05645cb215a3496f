"""A picture of the tree for people: an outline in text, and a Graphviz source; ``radix.icicle``
draws an SVG.

One way of seeing a node, in every form: its token range, whether its KV is resident, in a lower
tier or a ghost, its checkpoint or the tombstone of one, its locks. All are O(nodes drawn) and go no
deeper than a stack on the heap.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

from hybridcache.radix.node import RadixNode, members
from hybridcache.radix.tree import RadixTree

MAX_LETTERS = 80
"""Of a label or a namespace; what is longer is cut."""


class Drawn(NamedTuple):
    """One node on its way to a picture."""

    node: RadixNode
    depth: int
    last: bool
    """The last among its siblings."""
    only: bool
    """It has no siblings."""


class Plan(NamedTuple):
    """What a picture shows: namespaces in the order in which they came, nodes depth first, resident
    ones before ghosts."""

    namespaces: list[tuple[str, list[Drawn]]]
    left_out: str | None
    """What it does not show, in words; None: nothing."""


def plan_of(tree: RadixTree, max_nodes: int) -> Plan:
    """The first ``max_nodes`` nodes and the namespaces they are in. O(nodes drawn)."""
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
        return Plan(namespaces, None)
    left_out = f"... {_count(num_nodes, 'node')}"
    if num_namespaces:
        left_out += f" and {_count(num_namespaces, 'namespace')}"
    return Plan(namespaces, left_out)


def describe(node: RadixNode) -> str:
    """One node in one line of printable letters."""
    words = [f"{node.start}..{node.end}"]
    if node.kv is None:
        stored = node.below is not None and node.below.kv is not None
        words.append("v below" if stored else "~ ghost")
    if node.checkpoint is not None:
        superseded = " superseded" if node.checkpoint.superseded else ""
        label = f" {printable(node.checkpoint.label)}" if node.checkpoint.label else ""
        words.append(f"* slot {node.checkpoint.slot}{label}{superseded}")
    elif node.below is not None and node.below.state is not None:
        words.append("v checkpoint below")
    elif node.lost_checkpoint is not None:
        words.append("- checkpoint evicted")
    if node.locks:
        words.append(f"locked {node.locks}x")
    return " ".join(words)


def printable(text: str) -> str:
    """``text`` in one line that any picture can hold: what does not print is escaped, as Python
    does, and no more than ``MAX_LETTERS`` are kept."""
    if len(text) > MAX_LETTERS:
        text = text[: MAX_LETTERS - 3] + "..."
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def render_text(tree: RadixTree, max_nodes: int) -> str:
    """An outline, a line a node. An only child stands below its parent, no deeper; what was left
    out is counted at the end.

    ``*`` checkpoint, ``-`` tombstone, ``~`` ghost, ``v`` in a lower tier.
    """
    plan = plan_of(tree, max_nodes)
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


def render_graphviz(tree: RadixTree, max_nodes: int) -> str:
    """Source for ``dot``: boxes for resident nodes, dashed for ghosts, filled where a checkpoint
    stands."""
    plan = plan_of(tree, max_nodes)
    lines = ["digraph cache {", "  rankdir=LR; node [shape=box, fontname=monospace];"]
    names: dict[RadixNode, str] = {}
    for number, (namespace, nodes) in enumerate(plan.namespaces):
        lines.append(f"  r{number} [label={_quoted(namespace)}, shape=ellipse];")
        for drawn in nodes:
            node = drawn.node
            names[node] = name = f"n{len(names)}"
            style = "dashed" if node.kv is None else "filled" if node.checkpoint else "solid"
            lines.append(f"  {name} [label={_quoted(describe(node))}, style={style}];")
            assert node.parent is not None
            lines.append(f"  {names.get(node.parent, f'r{number}')} -> {name};")
    if plan.left_out is not None:
        lines.append(f"  more [label={_quoted(plan.left_out)}, shape=plaintext];")
    return "\n".join([*lines, "}"])


def _walk(root: RadixNode) -> Iterator[Drawn]:
    """Nodes below ``root``, depth first. Looks at no node before it is asked for it."""
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
    """(child, is it the last, is it the only one)."""
    resident, ghosts = members(node.children), members(node.ghosts)
    num_children = len(resident) + len(ghosts)
    for number, child in enumerate(chain(resident, ghosts), 1):
        yield child, number == num_children, num_children == 1


def _count(number: int, noun: str) -> str:
    return f"{number} more {noun}{'' if number == 1 else 's'}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
