"""Drawing of the tree as text."""

from __future__ import annotations

from hybridcache.radix.tree import RadixNode, RadixTree, members

MAX_LETTERS = 80
"""Maximum length of a drawn label or namespace; longer ones are shortened."""


def render_text(tree: RadixTree, max_nodes: int) -> str:
    """Return an outline with one line per node, depth first and ghosts last. An only child is not
    indented. ``*`` checkpoint, ``-`` tombstone, ``~`` ghost, ``v`` offloaded. O(nodes drawn)."""
    lines: list[str] = []
    num_drawn = num_namespaces = 0
    stack = [(root, "", "") for root in reversed(tree.roots.values())]
    while stack and num_drawn < max_nodes:
        node, branch, margin = stack.pop()
        if node.parent is None:
            num_namespaces += 1
            lines.append(f"namespace {_short(repr(node.key))}")
        else:
            num_drawn += 1
            lines.append(branch + _describe(node))
        children = [*members(node.children), *members(node.ghosts)]
        for child in reversed(children):
            if len(children) == 1 and node.parent is not None:
                stack.append((child, margin, margin))
            elif child is children[-1]:
                stack.append((child, margin + "`- ", margin + "   "))
            else:
                stack.append((child, margin + "|- ", margin + "|  "))
    if tree.num_nodes > num_drawn:
        left_out = f"... nodes left out: {tree.num_nodes - num_drawn}"
        if len(tree.roots) > num_namespaces:
            left_out += f", namespaces: {len(tree.roots) - num_namespaces}"
        lines.append(left_out)
    return "\n".join(lines)


def _describe(node: RadixNode) -> str:
    words = [f"{node.start}..{node.end}"]
    if node.kv is None:
        stored = node.offloaded is not None and node.offloaded.kv is not None
        words.append("v below" if stored else "~ ghost")
    if node.checkpoint is not None:
        superseded = " superseded" if node.checkpoint.superseded else ""
        title = node.checkpoint.title
        label = f" {_short(repr(title)[1:-1])}" if title else ""
        words.append(f"* slot {node.checkpoint.slot}{label}{superseded}")
    elif node.offloaded is not None and node.offloaded.state is not None:
        words.append("v checkpoint below")
    elif node.lost_checkpoint is not None:
        words.append("- checkpoint evicted")
    if node.locks:
        words.append(f"locked {node.locks}x")
    return " ".join(words)


def _short(text: str) -> str:
    """Return at most ``MAX_LETTERS`` letters of ``text``."""
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 3] + "..."
