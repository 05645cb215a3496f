"""Making room: whether eviction could free enough, and if so, evicting until it did. A refusal
evicts nothing."""

from __future__ import annotations

from hybridcache.core.residency import Residency
from hybridcache.policies.protocol import Kind


def make_room_for_kv(residency: Residency, num_tokens: int) -> bool:
    """Evict until ``num_tokens``, whole pages, are free. False, and nothing evicted, if they can
    not be.

    O(log of the tree) an evicted item, and, where locks may stand in the way, O(1) a node that came
    under locks or from under them since that was last asked.
    """
    pages = residency.pages
    if not _possible(residency, num_tokens * pages.unit_bytes, num_tokens - pages.num_free):
        return False
    kind: Kind | None = "kv" if pages.budget is None else None
    while pages.num_free < num_tokens and residency.evict_one(kind):
        pass
    return pages.num_free >= num_tokens


def make_room_for_slot(residency: Residency) -> bool:
    """Evict until a slot is free. False, and nothing evicted, if none can be. Costs as
    ``make_room_for_kv``."""
    slots = residency.slots
    budget = slots.budget
    if budget is None or not slots.num_unused:
        residency.evict_one("checkpoint")
        return slots.num_free > 0
    if not _possible(residency, slots.unit_bytes, 0):
        return False
    while budget.free_bytes < slots.unit_bytes and residency.evict_one(None):
        pass
    return budget.free_bytes >= slots.unit_bytes


def _possible(residency: Residency, wanted_bytes: int, short_tokens: int) -> bool:
    """Whether eviction could free that much: bytes in all under a shared budget, else tokens beyond
    the free ones."""
    budget = residency.pages.budget
    if budget is None:
        if short_tokens <= residency.cached_tokens - residency.locked_path_tokens:
            return True
        protected = residency.locked_paths.protected()
        return short_tokens <= residency.cached_tokens - protected.num_tokens
    token_bytes, slot_bytes = residency.pages.unit_bytes, residency.slots.unit_bytes
    short_bytes = wanted_bytes - budget.free_bytes
    tokens = residency.cached_tokens - residency.locked_path_tokens
    num_slots = residency.num_checkpoints - len(residency.locked)
    if short_bytes <= tokens * token_bytes + num_slots * slot_bytes:
        return True
    protected = residency.locked_paths.protected()
    tokens = residency.cached_tokens - protected.num_tokens
    num_slots = residency.num_checkpoints - protected.num_checkpoints
    return short_bytes <= tokens * token_bytes + num_slots * slot_bytes
