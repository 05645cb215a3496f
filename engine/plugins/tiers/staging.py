"""What a waiting request would fetch from disk is read before it is let in: no step waits for a
disk."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np

from engine.plugins.tiers.disk import Disk
from engine.requests.request import Request
from engine.schedule.fetching import Fetch, Fetcher
from engine.schedule.plan import Plan
from hybridcache.allocators.moves import DISK
from hybridcache.api import PrefixMatch, Resumable
from hybridcache.geometry.model import ModelGeometry
from hybridcache.policies.protocol import FetchRule
from hybridcache.radix.tree import RadixNode
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.tokens import Indices

FADING = 0.95
"""What a step says counts for so much less after the next."""
UNIT = 1e9
SPREAD = 0.1
"""Steps that differ by less in their operations, of the mean, show no line."""


class MeasuredExchange:
    """A ``FetchRule`` that learns while the engine serves.

    A step's operations are the model's geometry; what a step costs here beside them, and what one
    operation costs, is the line through the prefill steps so far, the latest most of all. Only the
    operations are saved by a fetch. What is not measured yet is taken to be worth trying.
    """

    def __init__(
        self, geometry: ModelGeometry, bytes_per_s: Callable[[], Mapping[str, float | None]]
    ) -> None:
        """``bytes_per_s``: from each tier to the device, as measured so far."""
        self._geometry = geometry
        self._bytes_per_s = bytes_per_s
        self._sums = np.zeros(5)
        """Over steps: 1, x, y, xx, xy of operations x, in units of ``UNIT``, and seconds y."""
        self.after_reading = AfterReading(self)
        """For a request whose part of the disk was read while it waited: that is paid."""

    @property
    def seconds_per_operation(self) -> float | None:
        """None: no prefill was measured."""
        count, x, y, xx, xy = self._sums.tolist()
        if not x:
            return None
        variance = xx / count - (x / count) ** 2
        if variance > (SPREAD * x / count) ** 2:
            slope = (xy / count - x * y / count**2) / variance
            if slope > 0:
                return float(slope / UNIT)
        return float(y / x / UNIT)

    def learn(self, plan: Plan, seconds: float) -> None:
        """A step was computed in ``seconds``; what mixes prefills with decoding says little."""
        if not plan.tasks or plan.num_decode_tokens:
            return
        x = sum(self._geometry.flops(task.start, task.end) for task in plan.tasks) / UNIT
        self._sums = FADING * self._sums + (1, x, seconds, x * x, x * seconds)

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """See ``policies.protocol.FetchRule``."""
        each_s = self.seconds_per_operation
        if each_s is None:
            return position - cached_len  # The most is tried.
        rates = self._bytes_per_s()
        copy_s = 0.0
        for tier, size in num_bytes.items():
            rate = rates.get(tier)
            copy_s += size / rate if size and rate else 0.0
        return each_s * self._geometry.flops(cached_len, position) - copy_s


class AfterReading:
    """A ``FetchRule`` by which what is on disk costs nothing more."""

    def __init__(self, exchange: MeasuredExchange) -> None:
        self._exchange = exchange

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """See ``policies.protocol.FetchRule``."""
        rest = {tier: size for tier, size in num_bytes.items() if tier != DISK}
        return self._exchange.seconds_saved(cached_len, position, prompt_len, rest)


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
