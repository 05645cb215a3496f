"""What must hold of lower tiers, recomputed from scratch."""

from __future__ import annotations

import numpy as np

from hybridcache.core.lower import LowerTiers, Tier
from hybridcache.radix.node import RadixNode, members
from hybridcache.radix.stored import StoredState

DEVICE = -1
"""The device, where tiers are numbered from the nearest, 0."""


def check_lower(lower: LowerTiers, nodes: list[RadixNode], roots: list[RadixNode]) -> None:
    """AssertionError names the first invariant that fails. O(tree + pools)."""
    num_tiers = len(lower.tiers)
    for node in (*roots, *nodes):
        _check_counts(node, num_tiers)
    for node in nodes:
        _check_node(node)
    for number, tier in enumerate(lower.tiers):
        states = [node.below.state for node in nodes if node.below is not None]
        held = [state for state in states if state is not None and state.tier == number]
        _check_rows(tier, number, nodes, held, lower.state_rows)
        listed = tier.policy.candidates()
        if listed is not None:
            known = list(listed)
            assert len(known) == len(held), f"{tier.word} orders {len(known)} of {len(held)} states"
            assert set(known) == set(held), f"{tier.word} orders other states than it holds"


def _place(node: RadixNode) -> int | None:
    """The tier in which the KV of ``node`` lies; None: in none."""
    if node.kv is not None or node.parent is None:
        return DEVICE
    return node.below.kv_tier if node.below is not None and node.below.kv is not None else None


def _check_counts(node: RadixNode, num_tiers: int) -> None:
    places = [_place(child) for child in members(node.ghosts)]
    counts = [places.count(number) for number in range(num_tiers)]
    below = node.below
    if below is None:
        assert not any(counts), f"{node} does not know of {counts} children below"
    else:
        assert below.num_children == counts, f"{node} counts {below.num_children}, not {counts}"
        assert not below.is_empty, f"{node} has an empty lower part"


def _check_node(node: RadixNode) -> None:
    below, parent = node.below, node.parent
    assert parent is not None
    if below is None:
        return
    place, above = _place(node), _place(parent)
    if below.kv is not None:
        assert node.kv is None, f"the KV of {node} is on the device and below"
        assert len(below.kv) == node.end - node.start, f"{node} has {len(below.kv)} rows below"
        assert above is not None and above <= below.kv_tier, f"{parent} lies further than {node}"
        nearest = below.nearest
        assert nearest is not None, f"nothing needs the KV of {node} below"
        assert nearest <= below.kv_tier, f"nothing needs the KV of {node} as near as it is"
    if below.state is not None:
        state = below.state
        assert node.checkpoint is None, f"the state of {node} is on the device and below"
        assert state.node is node, f"{state} belongs elsewhere"
        assert place is not None and place <= state.tier, f"{state} lies nearer than its KV"


def _check_rows(
    tier: Tier,
    number: int,
    nodes: list[RadixNode],
    held: list[StoredState],
    state_rows: int,
) -> None:
    pages = tier.pages
    pages.check()
    parts = [
        node.below.kv
        for node in nodes
        if node.below is not None and node.below.kv is not None and node.below.kv_tier == number
    ]
    for state in held:
        assert len(state.rows) == state_rows, f"{state} has {len(state.rows)} rows"
        parts.append(state.rows)
    both = np.concatenate([*parts, pages.free_rows()])
    assert len(np.unique(both)) == len(both), f"a row of {tier.word} is stored twice, or and free"
    assert len(both) == pages.capacity, (
        f"{len(both)} rows of {tier.word} are stored or free, not {pages.capacity}"
    )
