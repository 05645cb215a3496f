"""Drawings of the tree: text, a Graphviz source, or an SVG made without another program.

Every form shows the same facts of a node: its token range, whether its KV is resident, in a tier or
a ghost, its checkpoint or tombstone, and its locks. In the SVG a node is a bar from its start to
its end in tokens, as high as the leaves below it, and namespaces are stacked over one axis. All
forms are O(nodes drawn), without recursion.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
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


def render_graphviz(tree: RadixTree, max_nodes: int) -> str:
    """Return source for ``dot``. Ghosts are dashed; nodes with a checkpoint are filled."""
    plan = drawing_of(tree, max_nodes)
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


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


WIDTH, MARGIN, LANE, TITLE, LETTER = 1000, 16, 20, 24, 6.1
"""Lengths in pixels: drawing, its margin, lane of a leaf, title of a namespace, letter of a label.
"""
FILLS = {"resident": "#9ecae1", "dead": "#fdd0a2", "ghost": "#e8e8e8"}
INK, FAINT, DARK, RED = "#333", "#d9d9d9", "#08306b", "#c00"
LEGEND = (
    ("resident", "KV"),
    ("dead", "KV past the last checkpoint"),
    ("ghost", "ghost: tokens only"),
    ("checkpoint", "checkpoint"),
    ("superseded", "superseded"),
    ("tombstone", "checkpoint evicted"),
    ("locked", "locked"),
)


class _Place(NamedTuple):
    """Position and size of a bar, pixels."""

    x: float
    y: float
    width: float
    height: float


def render_svg(tree: RadixTree, max_nodes: int) -> str:
    """Return a drawing with a legend, an axis of tokens, and a note about omitted nodes.

    Each bar has a tooltip that describes its node.
    """
    plan = drawing_of(tree, max_nodes)
    deepest = max((drawn.node.end for _, nodes in plan.namespaces for drawn in nodes), default=1)
    scale = (WIDTH - 2 * MARGIN) / deepest
    legend, top = _legend()
    bars: list[str] = []
    spans: list[tuple[int, int]] = []
    bottom = top
    for namespace, nodes in plan.namespaces:
        bars.append(_words(MARGIN, bottom + TITLE - 8, namespace, weight="bold"))
        bottom += TITLE
        lanes = _lanes(nodes)
        for drawn in nodes:
            node = drawn.node
            first, last = lanes[node]
            x, width = MARGIN + node.start * scale, (node.end - node.start) * scale
            height = (last - first + 1) * LANE - 2
            bars += _bar(node, _Place(x, bottom + first * LANE, width, height))
        spans.append((bottom, bottom + LANE * (1 + max(last for _, last in lanes.values()))))
        bottom = spans[-1][1]
    axis = _axis(deepest, scale, spans, bottom)
    bottom += 36
    note = []
    if plan.left_out is not None:
        note.append(_words(MARGIN, bottom + 10, plan.left_out))
        bottom += 16
    height = bottom + MARGIN // 2
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    return "\n".join([*head, *legend, *axis, *bars, *note, "</svg>"])


def _bar(node: RadixNode, place: _Place) -> Iterator[str]:
    kind = "ghost" if node.kv is None else "dead" if node.kv.dead else "resident"
    x, y, width, height = place
    locked = f' stroke="{RED}" stroke-width="1.5"' if node.locks else ""
    yield (
        f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(width - 1, 1):.1f}" height="{height}" '
        'rx="2" '
        f'fill="{FILLS[kind]}"{locked}><title>{escape(describe(node))}</title></rect>'
    )
    middle = y + height / 2
    mark = _mark_of(node)
    if mark is not None and width >= 4:
        yield _mark(mark, x + width - min(8, width / 2), middle)
    text = f"{node.start}..{node.end}"
    if width >= len(text) * LETTER + 20:
        yield _words(x + 5, middle + 4, text)


def _mark_of(node: RadixNode) -> str | None:
    if node.checkpoint is not None:
        return "superseded" if node.checkpoint.superseded else "checkpoint"
    return None if node.lost_checkpoint is None else "tombstone"


def _mark(kind: str, x: float, y: float) -> str:
    """Return a dot for a checkpoint, hollow if superseded, or a cross for a tombstone."""
    if kind == "tombstone":
        cross = f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
        return f'<path d="{cross}" stroke="{RED}" stroke-width="1.5" fill="none"/>'
    fill = DARK if kind == "checkpoint" else "white"
    place, line = f'cx="{x:.1f}" cy="{y:.1f}" r="3.5"', f'stroke="{DARK}" stroke-width="1.2"'
    return f'<circle {place} fill="{fill}" {line}/>'


def _legend() -> tuple[list[str], int]:
    """Return a row that explains the colours and marks, and its lower edge."""
    parts, x, y = [], float(MARGIN), MARGIN
    for kind, words in LEGEND:
        if kind in FILLS or kind == "locked":
            style = f'fill="{FILLS.get(kind, "white")}"'
            style += f' stroke="{RED}" stroke-width="1.5"' if kind == "locked" else ""
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="14" height="10" rx="2" {style}/>')
        else:
            parts.append(_mark(kind, x + 7, y + 5))
        parts.append(_words(x + 19, y + 9, words))
        x += 19 + len(words) * LETTER + 18
    return parts, y + 20


def _axis(deepest: int, scale: float, spans: list[tuple[int, int]], bottom: int) -> list[str]:
    """Return lines through ``spans``, and numbers below them at up to a dozen round positions."""
    step = next(
        step
        for power in range(20)
        for step in (10**power, 2 * 10**power, 5 * 10**power)
        if step * 12 >= deepest
    )
    parts = []
    for position in range(0, deepest + 1, step):
        x = MARGIN + position * scale
        line = "".join(f"M{x:.1f} {first - 4}V{last + 2}" for first, last in spans)
        parts.append(f'<path d="{line}" stroke="{FAINT}" stroke-width="0.7"/>')
        anchor = "start" if position == 0 else "end" if x > WIDTH - 2 * MARGIN else "middle"
        parts.append(_words(x, bottom + 16, f"{position:,}", anchor=anchor))
    parts.append(_words(MARGIN, bottom + 31, "tokens from the start of the prompt"))
    return parts


def _words(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _lanes(nodes: list[Drawn]) -> dict[RadixNode, tuple[int, int]]:
    """Return the first and last lane of each node: its own, or those of all its drawn children."""
    lanes: dict[RadixNode, tuple[int, int]] = {}
    num_leaves = 0
    for drawn, following in zip(nodes, [*nodes[1:], None], strict=True):
        if following is None or following.depth <= drawn.depth:
            lanes[drawn.node] = (num_leaves, num_leaves)
            num_leaves += 1
    for drawn in reversed(nodes):
        parent = drawn.node.parent
        assert parent is not None
        if drawn.depth:
            first, last = lanes[drawn.node]
            known = lanes.get(parent, (first, last))
            lanes[parent] = (min(known[0], first), max(known[1], last))
    return lanes
