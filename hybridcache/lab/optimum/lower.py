"""Lower tiers in the linear program: where an interval is kept, and what its copy costs.

Beside the columns of ``program``, for each tier l below the device:

- ``XL[v, k]``, ``YL[v, k]``: of what is kept, what l keeps; their sum over the tiers is at most
  ``X[v, k]``, ``Y[v, k]``, and what is left is on the device;
- ``G[r, v]``: request r copies the KV segment that ends at v from l, at most ``XL``; ``H[r, v]``:
  the state at v, at most ``YL``. Both cost their bytes times ``tokens_per_byte``;
- a hit needs what it uses on the device or copied: ``S <= X - sum of XL + sum of G``, and so
  ``S[r, v] - S[r, next] <= Y - sum of YL + sum of H`` of states.

The relaxation bounds every plan in which an interval stays in one tier; a cache that moves a thing
down in the middle of an interval has the better of both for a while, and is not bounded by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridcache.lab.optimum.plan import Interval

if TYPE_CHECKING:
    from hybridcache.lab.optimum.program import Program

Kept = tuple[dict[Interval, int], dict[Interval, int]]
"""Columns of the KV and of the checkpoints that are kept."""


def add_lower(program: Program) -> list[Kept]:
    """The columns and rows of all lower tiers; by tier, the columns of what it keeps."""
    tiers: list[Kept] = []
    for _ in program.budget.lower:
        kv = {item: program.column() for item in program.kv}
        tiers.append((kv, {item: program.column() for item in program.checkpoint}))
    for place, columns in enumerate((program.kv, program.checkpoint)):
        for item, column in columns.items():
            below = [(tier[place][item], 1.0) for tier in tiers]
            program.row([*below, (column, -1.0)], 0)
    for request in range(program.trie.num_requests):
        _add_copies(program, tiers, request)
    return tiers


def _add_copies(program: Program, tiers: list[Kept], request: int) -> None:
    trie, budget = program.trie, program.budget
    usable = dict(trie.usable(request))
    following: int | None = None
    for index, ordinal in zip(
        reversed(trie.paths[request]), reversed(trie.ordinals[request]), strict=True
    ):
        if ordinal == 0:
            continue
        interval = (index, ordinal - 1)
        mine = program.resume.get((request, index)) if index in usable else following
        if mine is None:
            continue  # no position from here on can be resumed from
        size = trie.span(trie.positions[index]) * budget.kv_bytes_per_token
        _need(program, tiers, 0, interval, [(mine, 1.0)], size)
        if index in usable:
            only = [(mine, 1.0)] if following is None else [(mine, 1.0), (following, -1.0)]
            _need(program, tiers, 1, interval, only, budget.state_bytes)
            following = mine


def _need(
    program: Program,
    tiers: list[Kept],
    place: int,
    interval: Interval,
    wanted: list[tuple[int, float]],
    size_bytes: int,
) -> None:
    """``wanted`` needs ``interval`` on the device, or its copy. ``place``: 0 KV, 1 a state."""
    kept = (program.kv, program.checkpoint)[place][interval]
    row = [*wanted, (kept, -1.0)]
    for tier, budget in zip(tiers, program.budget.lower, strict=True):
        below = tier[place][interval]
        copy = program.column(-size_bytes * budget.tokens_per_byte)
        program.row([(copy, 1.0), (below, -1.0)], 0)
        row += [(below, 1.0), (copy, -1.0)]
    program.row(row, 0)
