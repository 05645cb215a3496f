"""Trie of the positions of a trace where keeping entries could be useful, with their visits.

A *position* is a node of the static trie over all sequences (prompt + output) of the trace: a
branch point, or a candidate for a checkpoint. The time between two of its consecutive visits is one
*interval*: keeping its KV segment or its checkpoint over that interval is one decision. Positions
that only one request visits can never be reused and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hybridcache.lab.prefix_tree import PrefixNode, grow, new_root, split, walk
from hybridcache.lab.trace import TraceRequest


@dataclass(slots=True)
class Position:
    """One node of the trie. ``visits`` are request numbers, ascending; ``parent`` is None at the
    top."""

    index: int
    depth: int
    parent: int | None
    visits: list[int]
    is_candidate: bool
    """True if a checkpoint may be saved here: its depth is on the grid."""

    @property
    def num_intervals(self) -> int:
        return len(self.visits) - 1


@dataclass(frozen=True, slots=True)
class VisitedTrie:
    """Positions and the paths of requests through them.

    In ``positions``, parents come first. ``paths[r]`` lists the positions that request r visits,
    top down. ``ordinals[r][i]`` is the index of that visit among the visits of ``paths[r][i]``.
    ``prompt_lens[r]`` is the length of its prompt in tokens.
    """

    positions: list[Position]
    paths: list[list[int]]
    ordinals: list[list[int]]
    prompt_lens: list[int]

    @property
    def num_requests(self) -> int:
        return len(self.paths)

    def span(self, position: Position) -> int:
        """Return the tokens of the segment that ends at ``position``."""
        above = 0 if position.parent is None else self.positions[position.parent].depth
        return position.depth - above

    def usable(self, request: int) -> list[tuple[int, int]]:
        """Return (position, interval) from which ``request`` could resume, top down: candidates
        visited before, at most one token short of its prompt."""
        limit = self.prompt_lens[request] - 1
        return [
            (index, ordinal - 1)
            for index, ordinal in zip(self.paths[request], self.ordinals[request], strict=True)
            if ordinal > 0
            and self.positions[index].is_candidate
            and self.positions[index].depth <= limit
        ]


def _cut(node: PrefixNode, depth: int) -> None:
    """Ensure that a node exists at ``depth`` on the path from the root to ``node``."""
    for above in node.path():
        assert above.parent is not None, "a path leaves out the root"
        if above.parent.depth < depth:
            if depth < above.depth:
                split(above, depth)
            return


def _cut_candidates(root: PrefixNode, ends: list[PrefixNode], lens: list[int], grid: int) -> None:
    """Insert a node at every depth where a checkpoint could be useful. These are the grid positions
    at or above each branch point and each end, and at or above the last position from which each
    prompt may resume."""
    below = [root]
    branch_points = []
    while below:
        node = below.pop()
        below.extend(node.children.values())
        if len(node.children) > 1:
            branch_points.append(node)
    for node in branch_points + ends:
        _cut(node, node.depth // grid * grid)
    for node, prompt_len in zip(ends, lens, strict=True):
        _cut(node, (prompt_len - 1) // grid * grid)


def build_trie(requests: Iterable[TraceRequest], *, grid: int = 1) -> VisitedTrie:
    """Read a trace into its visited positions. O(tokens).

    Checkpoints may be at the deepest position that a set of requests shares (branch points, ends,
    prompt ends, floored to ``grid``). This loses nothing but the option to keep part of a segment.
    """
    roots: dict[object, PrefixNode] = {}
    ends: list[PrefixNode] = []
    owners: list[PrefixNode] = []
    lens: list[int] = []
    for request in requests:
        sequence = np.concatenate((request.tokens, request.output)).astype(np.int32, copy=False)
        root = roots.setdefault(request.namespace, new_root())
        ends.append(grow(*walk(root, sequence), sequence)[0])
        owners.append(root)
        lens.append(len(request.tokens))
    for root in roots.values():
        mine = [number for number, owner in enumerate(owners) if owner is root]
        _cut_candidates(root, [ends[n] for n in mine], [lens[n] for n in mine], grid)
    return _number(ends, lens, grid)


def _number(ends: Sequence[PrefixNode], lens: list[int], grid: int) -> VisitedTrie:
    chains: list[list[PrefixNode]] = []
    visits: dict[int, list[int]] = {}
    for request, end in enumerate(ends):
        chain = [*end.path()][::-1]
        for node in chain:
            visits.setdefault(id(node), []).append(request)
        chains.append(chain)
    positions: list[Position] = []
    numbers: dict[int, int] = {}
    paths: list[list[int]] = []
    ordinals: list[list[int]] = []
    seen: list[int] = []
    for chain in chains:
        path: list[int] = []
        for node in chain:
            if len(visits[id(node)]) < 2:
                break
            index = numbers.get(id(node))
            if index is None:
                index = numbers[id(node)] = len(positions)
                parent = path[-1] if path else None
                positions.append(
                    Position(index, node.depth, parent, visits[id(node)], node.depth % grid == 0)
                )
                seen.append(0)
            path.append(index)
        paths.append(path)
        ordinals.append([seen[index] for index in path])
        for index in path:
            seen[index] += 1
    return VisitedTrie(positions, paths, ordinals, lens)
