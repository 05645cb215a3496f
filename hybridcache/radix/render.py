"""A picture of the tree for people: an outline in text, a Graphviz source, and an SVG drawn without any program.

One way of seeing a node, in every form: its token range, whether its KV is resident or a ghost, its checkpoint or the
tombstone of one, its locks. All are O(nodes drawn) and go no deeper than a stack on the heap.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from hybridcache.radix.family import members
from hybridcache.radix.node import RadixNode
from hybridcache.radix.tree import RadixTree


class Drawn(NamedTuple):
    """One node on its way to a picture."""

    node: RadixNode
    depth: int
    last: bool
    """The last among its siblings."""


def render_text(tree: RadixTree, max_nodes: int = 1000) -> str:
    """An outline, a line a node; children that were left out are counted at the end.

    ``*`` checkpoint, ``-`` tombstone, ``~`` ghost.
    """
    lines: list[str] = []
    num_drawn = 0
    for root in tree.roots.values():
        lines.append(f"namespace {root.key!r}")
        rails: list[str] = []
        for drawn in _walk(root):
            if num_drawn == max_nodes:
                lines.append(f"... {tree.num_nodes - num_drawn} more")
                return "\n".join(lines)
            num_drawn += 1
            del rails[drawn.depth :]
            branch = "`-" if drawn.last else "|-"
            lines.append("".join(rails) + f"{branch} {describe(drawn.node)}")
            rails.append("   " if drawn.last else "|  ")
    return "\n".join(lines)


def describe(node: RadixNode) -> str:
    """One node in one line."""
    words = [f"{node.start}..{node.end}"]
    if node.kv is None:
        words.append("~ ghost")
    if node.checkpoint is not None:
        superseded = " superseded" if node.checkpoint.superseded else ""
        label = f" {node.checkpoint.label}" if node.checkpoint.label else ""
        words.append(f"* slot {node.checkpoint.slot}{label}{superseded}")
    elif node.lost_checkpoint is not None:
        words.append("- checkpoint evicted")
    if node.locks:
        words.append(f"locked {node.locks}x")
    return " ".join(words)


def render_graphviz(tree: RadixTree, max_nodes: int = 1000) -> str:
    """Source for ``dot``: boxes for resident nodes, dashed for ghosts, filled where a checkpoint stands."""
    lines = ["digraph cache {", "  rankdir=LR; node [shape=box, fontname=monospace];"]
    names: dict[RadixNode, str] = {}
    for root in tree.roots.values():
        names[root] = f"n{len(names)}"
        lines.append(f"  {names[root]} [label={_quoted(repr(root.key))}, shape=ellipse];")
        for drawn in _walk(root):
            if len(names) - len(tree.roots) >= max_nodes:
                break
            node = drawn.node
            names[node] = name = f"n{len(names)}"
            style = "dashed" if node.kv is None else "filled" if node.checkpoint else "solid"
            lines.append(f"  {name} [label={_quoted(describe(node))}, style={style}];")
            if node.parent is not None:
                lines.append(f"  {names[node.parent]} -> {name};")
    return "\n".join([*lines, "}"])


COLOURS = {"resident": "#9ecae1", "dead": "#fdd0a2", "ghost": "#eeeeee"}
LANE, WIDTH, MARGIN = 18, 1000, 10
"""Height of a leaf's lane, width of the drawing, and what is left around it; pixels."""


def render_svg(tree: RadixTree, max_nodes: int = 2000) -> str:
    """An icicle: a node is a bar from its start to its end in tokens, as high as the leaves below it.

    Blue: KV that can be resumed through; orange: a leaf nothing resumes from; grey: ghosts. Dots: checkpoints (hollow:
    superseded); crosses: tombstones.
    """
    nodes: list[RadixNode] = []
    for root in tree.roots.values():
        for drawn in _walk(root):
            if len(nodes) < max_nodes:
                nodes.append(drawn.node)
    lanes = _lanes(nodes)
    deepest = max((node.end for node in nodes), default=1)
    scale = (WIDTH - 2 * MARGIN) / deepest
    height = 2 * MARGIN + LANE * max((last + 1 for _, last in lanes.values()), default=1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="9">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for node in nodes:
        first, last = lanes[node]
        x, y = MARGIN + node.start * scale, MARGIN + first * LANE
        w, h = (node.end - node.start) * scale, (last - first + 1) * LANE - 2
        kind = "ghost" if node.kv is None else "dead" if node.kv.dead else "resident"
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{max(w - 1, 1):.1f}" height="{h}" '
            f'fill="{COLOURS[kind]}" stroke="{"#d62728" if node.locks else "none"}">'
            f"<title>{escape(describe(node))}</title></rect>"
        )
        parts.append(_mark(node, x + w - 5, y + h / 2))
    return "\n".join([*parts, "</svg>"])


def _mark(node: RadixNode, x: float, y: float) -> str:
    if node.checkpoint is not None:
        fill = "white" if node.checkpoint.superseded else "#08306b"
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="#08306b"/>'
    if node.lost_checkpoint is not None:
        return f'<text x="{x - 3:.1f}" y="{y + 3:.1f}" fill="#a50f15">x</text>'
    return ""


def _lanes(nodes: list[RadixNode]) -> dict[RadixNode, tuple[int, int]]:
    """First and last lane of each node. ``nodes``: parents before children, depth first."""
    lanes: dict[RadixNode, tuple[int, int]] = {}
    drawn = set(nodes)
    with_children = {node.parent for node in nodes}
    num_leaves = 0
    for node in nodes:
        if node not in with_children:
            lanes[node] = (num_leaves, num_leaves)
            num_leaves += 1
    for node in reversed(nodes):
        parent = node.parent
        if parent in drawn and parent is not None:
            first, last = lanes[node]
            known = lanes.get(parent, (first, last))
            lanes[parent] = (min(known[0], first), max(known[1], last))
    return lanes


def _walk(root: RadixNode) -> Iterator[Drawn]:
    """Nodes below ``root``, depth first, resident children before ghosts."""
    stack = _children(root, 0)
    while stack:
        drawn = stack.pop()
        yield drawn
        stack += _children(drawn.node, drawn.depth + 1)


def _children(node: RadixNode, depth: int) -> list[Drawn]:
    """In reverse, for a stack."""
    below = [*members(node.children), *members(node.ghosts)]
    return [Drawn(child, depth, child is below[-1]) for child in reversed(below)]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
