"""The records that are not the cache's own: a request, and the slabs of an arena."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from hybridcache.allocators.arena import ArenaAllocator
from hybridcache.api import Losses
from hybridcache.watch.recorder import Record, show_namespace

MAX_SLABS = 2048
"""As many slabs are shown."""


class RequestShown(NamedTuple):
    """What is told of one request. Lengths are tokens; times are seconds of the records' clock,
    None: not reached."""

    id: str
    conversation: int | str
    namespace: Hashable
    state: str
    """waiting, prefill, decode, or why it ended."""
    prompt: int
    computed: int
    answer: int
    cached: int
    losses: Losses | None
    node: int | None
    """Where it stands, or would be resumed."""
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
    """How full each slab is of KV, and which have a state. O(slabs + holes)."""
    percent = (100 * arena.occupancy()[:MAX_SLABS] / arena.slab_rows).round()
    states = sorted(slot for slot in arena.slots.states if slot < MAX_SLABS)
    return ["slabs", percent.astype(int).tolist(), states]
