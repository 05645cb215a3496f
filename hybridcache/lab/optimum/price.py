"""Capacities and copy costs of tiers, from sizes and bandwidths."""

from __future__ import annotations

from hybridcache.geometry.exchange import tokens_per_byte
from hybridcache.geometry.model import ModelGeometry
from hybridcache.lab.optimum.plan import LowerBudget


def lower_budgets(geometry: ModelGeometry, *tiers: tuple[int, float]) -> tuple[LowerBudget, ...]:
    """Return the budgets of ``tiers``: (bytes, bytes per second to a device), the nearest first.
    Tiers of zero bytes are omitted."""
    return tuple(
        LowerBudget(num_bytes, tokens_per_byte(geometry, bytes_per_s))
        for num_bytes, bytes_per_s in tiers
        if num_bytes
    )
