"""Draw the match, resumption and checkpoints of a prompt in four steps, from a run of the cache.

`make docs` calls ``draw``. By hand: ``python docs/match_figure.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache, parse_placement
from hybridcache.lab.results.figures import COLOURS, LOSSES, panels, save
from hybridcache.radix.api import Losses
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.tree import RadixNode

GRID = 64
KV, CHECKPOINT, NEW, REUSED = COLOURS[0], COLOURS[6], COLOURS[7], COLOURS[2]
THEMES = {"light": "#1b1f24", "dark": "#e6e6e6"}
"""Colour of text and lines for each theme of the site."""


def tokens(*parts: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return a prompt of (text number, length) parts. Equal numbers are equal texts."""
    return np.concatenate([np.arange(n, dtype=np.int32) + 1000 * text for text, n in parts])


FIRST = tokens((1, 192), (2, 256))
"""A system prompt of 192 tokens and a long question."""
SECOND = tokens((1, 192), (3, 150))
"""The same system prompt and another question."""
THIRD = tokens((1, 192), (2, 108), (4, 110))
"""The beginning of the first prompt, up to token 300, and then another text."""
FOURTH = tokens((1, 192), (2, 108), (5, 100))
"""The same beginning, and then a further text."""


@dataclass(frozen=True)
class Edge:
    """Edge of the tree with its place in the drawing."""

    start: int
    end: int
    y: float
    parent_y: float
    has_checkpoint: bool
    tokens: tuple[int, ...]
    """All tokens from the root to the end."""


@dataclass(frozen=True)
class Steps:
    """Numbers of the drawing, all read from the cache."""

    before: list[Edge]
    after: list[Edge]
    kv_match_len: int
    cached_len: int
    losses: Losses
    saved: tuple[int, ...]
    """Positions at which the third prompt saved checkpoints."""
    next_cached_len: int
    """Tokens that the fourth prompt reuses."""


def run() -> Steps:
    """Serve three prompts, and match a fourth one."""
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=4000, num_slots=16, grid=GRID))
    serve(cache, FIRST)
    serve(cache, SECOND)
    before = edges(cache)
    match = cache.match(THIRD)
    saved = serve(cache, THIRD)
    return Steps(
        before,
        edges(cache),
        match.kv_match_len,
        match.cached_len,
        match.losses,
        saved,
        cache.match(FOURTH).cached_len,
    )


def serve(cache: HybridRadixCache, prompt: np.ndarray[Any, np.dtype[np.int32]]) -> tuple[int, ...]:
    """Compute a prompt, and return the positions of its new checkpoints."""
    lease = Lease.begin(cache, parse_placement("branch,backoff"), LeaseRequest(prompt))
    assert lease is not None and lease.extend(len(prompt))
    saved = lease.take_checkpoint_slots(lease.cached_len, len(prompt))
    cache.take_step().done()
    lease.publish(prompt, len(prompt))
    lease.finish(prompt, len(prompt))
    return tuple(position for position, _ in saved)


def edges(cache: HybridRadixCache) -> list[Edge]:
    """Lay out the tree: a row for each leaf, and an inner edge in the middle of its leaves."""
    children: dict[RadixNode | None, list[RadixNode]] = {}
    for node in sorted(cache.iter_nodes(), key=lambda node: tuple(node.tokens)):
        children.setdefault(node.parent, []).append(node)
    found: list[Edge] = []
    num_leaves = 0

    def place(node: RadixNode, path: tuple[int, ...]) -> float:
        nonlocal num_leaves
        path += tuple(node.tokens.tolist())
        number = len(found)
        below = [place(child, path) for child in children.get(node, ())]
        if below:
            y = (below[0] + below[-1]) / 2
        else:
            num_leaves += 1
            y = -float(num_leaves)
        for index in range(number, len(found)):
            if found[index].start == node.end:
                found[index] = Edge(**{**vars(found[index]), "parent_y": y})
        found.append(Edge(node.start, node.end, y, y, node.checkpoint is not None, path))
        return y

    for root in children[cache.root()]:
        place(root, ())
    return found


def draw(folder: Path) -> list[Path]:
    """Write the figure for each theme into ``folder``, and return the files."""
    import matplotlib

    steps = run()
    written = []
    for theme, colour in THEMES.items():
        look = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), colour)
        look |= {"xtick.color": colour, "font.size": 9, "svg.hashsalt": "match"}
        with matplotlib.rc_context({**look, "savefig.transparent": True}):
            path = folder / f"match_{theme}.svg"
            draw_steps(steps, path, colour)
            written.append(path)
    return written


def draw_steps(steps: Steps, path: Path, ink: str) -> None:
    """Draw the four panels into a file, with text and lines in the colour ``ink``."""
    figure, axes = panels(4, columns=2, panel=(4.4, 2.6))
    for axis in axes:
        axis.grid(False)
        axis.spines["left"].set_visible(False)
        axis.set_yticks([])
        axis.set_xlim(-8, 470)
        axis.set_xticks(range(0, 449, GRID))
        axis.set_xlabel("position, tokens", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylim(-5.6, -0.4)
        for position in range(GRID, 449, GRID):
            axis.axvline(position, color=ink, linewidth=0.4, alpha=0.25, zorder=0)
    tree, walk, resume, after = axes
    kv_len, cached_len = steps.kv_match_len, steps.cached_len
    draw_tree(tree, steps.before, ink)
    explain(
        tree,
        "1. Two prompts share a system prompt",
        "States were saved where the second prompt left the first,\n"
        "and at the last grid position inside each prompt.",
    )
    draw_tree(walk, steps.before, ink, on_path=tuple(THIRD))
    draw_prompt(walk, [("", kv_len, KV), ("", len(THIRD), LOSSES["never_seen"])])
    mark(walk, kv_len, ink)
    explain(
        walk,
        "2. A third prompt walks down the tree",
        f"Its KV matches up to token {kv_len}.\nA model with attention alone would resume there.",
    )
    draw_tree(resume, steps.before, ink, on_path=tuple(THIRD[:cached_len]))
    draw_prompt(resume, parts_of(steps))
    mark(resume, cached_len, ink)
    explain(
        resume,
        f"3. It resumes at token {cached_len}",
        f"That is the deepest checkpoint before token {kv_len}.\n"
        f"The {kv_len - cached_len} tokens between are computed again.",
    )
    draw_tree(after, steps.after, ink, new=tuple(THIRD), saved=steps.saved)
    explain(
        after,
        f"4. It saves states at {' and '.join(map(str, steps.saved))}",
        f"A fourth prompt with the same first {kv_len} tokens\nreuses {steps.next_cached_len}.",
    )
    save(figure, axes, path, "Vertical lines: positions of the grid, where a state can be saved.")


def explain(axis: Any, title: str, text: str) -> None:
    """Write the title of a panel, and its explanation below the drawing."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.text(0, -5.5, text, fontsize=8.5, va="bottom")


def parts_of(steps: Steps) -> list[tuple[str, int, str]]:
    """Return (label, end, colour) of the parts of the third prompt, in order."""
    lost = {cause: number for cause, number in steps.losses._asdict().items() if number}
    order = ("checkpoint_evicted", "never_checkpointed", "below_grid", "kv_evicted", "never_seen")
    end = steps.cached_len
    parts = [(f"reused: {end}", end, REUSED)]
    for cause in sorted(lost, key=order.index):
        end += lost[cause]
        words = cause.replace("_", " ")
        parts.append((f"{words}: {lost[cause]}", end, LOSSES[cause]))
    assert end == len(THIRD)
    return parts


def draw_tree(
    axis: Any,
    shown: Sequence[Edge],
    ink: str,
    *,
    on_path: tuple[int, ...] | None = None,
    new: tuple[int, ...] = (),
    saved: Sequence[int] = (),
) -> None:
    """Draw edges as bars and checkpoints as diamonds.

    With ``on_path``, the rest of the tree is faded. Checkpoints of the prompt ``new`` at ``saved``
    are emphasised.
    """
    for edge in shown:
        common = edge.end - edge.start
        if on_path is not None:
            same = np.array(edge.tokens[: len(on_path)]) == np.array(on_path[: edge.end])
            common = max(0, int(same.argmin() if not same.all() else len(same)) - edge.start)
        if edge.parent_y != edge.y:
            xs, ys = [edge.start, edge.start], [edge.parent_y, edge.y]
            axis.plot(xs, ys, color=KV, linewidth=1.2, alpha=1.0 if common else 0.25, zorder=1)
        height = 0.34
        axis.barh(edge.y, edge.end - edge.start, height, edge.start, color=KV, alpha=0.25)
        axis.barh(edge.y, common, height, edge.start, color=KV, label="KV in the cache")
        if edge.has_checkpoint:
            is_new = edge.end in saved and edge.tokens == new[: edge.end]
            is_kept = common == edge.end - edge.start
            axis.plot(
                edge.end,
                edge.y,
                "D",
                color=NEW if is_new else CHECKPOINT,
                markeredgecolor=ink,
                markersize=9 if is_new else 7,
                alpha=1.0 if is_kept else 0.35,
                linestyle="none",
                label="new checkpoint" if is_new else "checkpoint: a saved state",
                zorder=3,
            )
            forks = any(o.start == edge.end and o.parent_y == edge.y != o.y for o in shown)
            side, gap = ("right", -7) if forks else ("left", 7)
            axis.text(edge.end + gap, edge.y + 0.2, edge.end, ha=side, va="bottom", fontsize=8)


def draw_prompt(axis: Any, parts: Sequence[tuple[str, int, str]]) -> None:
    """Draw the third prompt below the tree, in parts (label, end, colour)."""
    start = 0
    axis.text(0, -3.0, "third prompt", fontsize=8, va="bottom")
    for label, end, colour in parts:
        axis.barh(-3.4, end - start, 0.6, start, color=colour, label=label or None)
        start = end


def mark(axis: Any, position: int, ink: str) -> None:
    """Draw a dashed line from the tree through the prompt at ``position``."""
    axis.plot([position, position], [-3.9, -0.6], "--", color=ink, linewidth=1)
    axis.text(position, -3.95, position, ha="center", va="top", fontsize=8)


if __name__ == "__main__":
    for file in draw(Path(__file__).parent / "figures"):
        print(file)
