"""What a waiting request would fetch from disk is read before it is let in: no step waits for a
disk."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from engine.plugins.tiers.disk import Disk
from engine.requests.request import Request
from engine.schedule.fetching import Fetch, Fetcher
from hybridcache.allocators.moves import DISK
from hybridcache.api import PrefixMatch, Resumable
from hybridcache.policies.protocol import FetchRule
from hybridcache.radix.tree import RadixNode
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.tokens import Indices

MAX_READS = 4
"""Requests that are read for at a time; others wait for their turn."""


@dataclass(eq=False, slots=True)
class Read(Fetch):
    """The records of one request."""

    request: Request
    position: int
    num_tokens: int
    records: tuple[int, ...]
    has_ended: bool = False
    is_wanted: bool = True
    key: Hashable = field(default=None)

    @property
    def end(self) -> int:
        return self.position

    @property
    def num_fetched(self) -> int:
        return self.num_tokens if self.has_ended else 0

    @property
    def transferred(self) -> None:
        return None

    def cancel(self) -> None:
        self.is_wanted = False


class Staging(Fetcher):
    """Reads ahead from one disk."""

    def __init__(self, manager: CacheManager, disk: Disk, exchange: FetchRule) -> None:
        self._manager, self._disk, self._exchange = manager, disk, exchange
        self._reads: list[Read] = []

    @property
    def has_room(self) -> bool:
        return sum(not read.has_ended for read in self._reads) < MAX_READS

    def wants(self, request: Request, match: PrefixMatch) -> bool:
        return self._best(match) is not None

    def begin(self, request: Request, match: PrefixMatch) -> Fetch | None:
        best = self._best(match)
        assert best is not None, "a load is begun only if it is wanted"
        records = self._disk.stage(_disk_rows(best.node, self._tier))
        read = Read(request, best.position, best.position - match.cached_len, records)
        self._reads.append(read)
        return read

    def advance(self) -> None:
        for read in self._reads:
            read.has_ended = read.has_ended or self._disk.is_staged(read.records)
        left = [read for read in self._reads if _needs_its_records(read)]
        if len(left) < len(self._reads):
            kept = {number for read in left for number in read.records}
            gone = {number for read in self._reads for number in read.records} - kept
            self._disk.unstage(gone)
            self._reads = left

    def wait(self, timeout_s: float) -> None:
        for read in self._reads:
            if not read.has_ended:
                self._disk.wait(read.records, timeout_s)
                return

    def close(self) -> None:
        pass

    @property
    def _tier(self) -> int:
        lower = self._manager.cache.offload
        assert lower is not None
        return lower.names.index(DISK)

    def _best(self, match: PrefixMatch) -> Resumable | None:
        """What a lease would fetch, where some of it is on disk."""
        lower = self._manager.cache.offload
        assert lower is not None
        best, most = None, 0.0
        for one in match.loadable:
            num_bytes = {
                word: rows * lower.row_bytes
                for word, rows in zip(lower.names, one.rows, strict=True)
            }
            saved = self._exchange.seconds_saved(
                match.cached_len, one.position, match.num_tokens, num_bytes
            )
            if saved > most:
                best, most = one, saved
        return best if best is not None and best.rows[self._tier] else None


def _needs_its_records(read: Read) -> bool:
    """Whether ``read`` was not made use of yet, and will be."""
    request = read.request
    is_waiting = request.lease is None and request.finish_reason is None
    return read.is_wanted and is_waiting


def _disk_rows(target: RadixNode, tier: int) -> Indices:
    """The rows of tier number ``tier`` that resuming at the end of ``target`` would bring."""
    found: list[Indices] = []
    below = target.offloaded
    if below is not None and below.state is not None and below.state.tier == tier:
        found.append(below.state.rows)
    node: RadixNode | None = target
    while node is not None and node.kv is None and node.offloaded is not None:
        if node.offloaded.kv is not None and node.offloaded.kv_tier == tier:
            found.append(node.offloaded.kv)
        node = node.parent
    return np.concatenate(found)
