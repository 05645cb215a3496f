"""Records of requests and of arena slabs. ``recorder.py`` makes the records of the cache."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from hybridcache.allocators.arena import ArenaAllocator
from hybridcache.api import Losses
from hybridcache.watch.recorder import Record, show_namespace

MAX_SLABS = 2048
"""Maximum number of slabs shown."""


class RequestShown(NamedTuple):
    """State of one request. Lengths are in tokens.

    Times are in seconds of the records' clock, or None if not reached.
    """

    id: str
    conversation: int | str
    namespace: Hashable
    state: str
    """``waiting``, ``prefill``, ``decode``, or the reason of its end."""
    prompt: int
    computed: int
    answer: int
    cached: int
    losses: Losses | None
    node: int | None
    """Id of the node it has reached, or would resume from."""
    preemptions: int
    arrived_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None

    def record(self) -> Record:
        shown = self._asdict()
        shown["namespace"] = show_namespace(self.namespace)
        shown["losses"] = None if self.losses is None else self.losses._asdict()
        return ["request", shown]


def slabs_record(arena: ArenaAllocator) -> Record:
    """Return the percentage of rows with KV of each slab, and the slabs with a state.

    O(slabs + holes).
    """
    percent = (100 * arena.occupancy()[:MAX_SLABS] / arena.slab_rows).round()
    states = sorted(slot for slot in arena.slots.states if slot < MAX_SLABS)
    return ["slabs", percent.astype(int).tolist(), states]
