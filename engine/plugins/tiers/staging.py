"""Reads of records on disk before the request that needs them is admitted, so that no step waits
for a disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import wait
from itertools import starmap

import numpy as np

from engine.plugins.tiers.disk import Disk, Read
from engine.plugins.tiers.tier_copies import KEPT
from engine.requests.request import Request
from engine.schedule.report import StepReport
from hybridcache.allocators.moves import DISK, Copy, Indices, Transfer
from hybridcache.geometry.model import ModelGeometry
from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.offload import OffloadTiers
from hybridcache.radix.protocol import LoadRule
from hybridcache.radix.tree import RadixNode
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.loading import IDLE_S, Loader, PrefixLoad

FADING = 0.95
"""Weight of each measurement relative to the following one."""
UNIT = 1e9
SPREAD = 0.1
"""Minimum relative spread of operations for fitting a line through the steps."""


class MeasuredExchange:
    """``LoadRule`` that is measured while the engine serves.

    The fixed cost of a step and the cost of one operation are those of the line through the prefill
    steps so far, recent ones weighted most. A load saves only the operations.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        bytes_per_s: Callable[[], Mapping[str, float | None]],
    ) -> None:
        """``bytes_per_s``: measured bandwidth from each tier to the device; loads from other tiers
        are free."""
        self._geometry = geometry
        self._bytes_per_s = bytes_per_s
        self.sums = np.zeros(5)
        """Sums over steps of 1, x, y, xx, xy: operations x, in units of ``UNIT``, and seconds y."""

    @property
    def seconds_per_operation(self) -> float | None:
        """Seconds per operation, or None before the first prefill."""
        count, x, y, xx, xy = self.sums.tolist()
        if not x:
            return None
        variance = xx / count - (x / count) ** 2
        if variance > (SPREAD * x / count) ** 2:
            slope = (xy / count - x * y / count**2) / variance
            if slope > 0:
                return float(slope / UNIT)
        return float(y / x / UNIT)

    def learn(self, report: StepReport) -> None:
        """Record a computed step. Steps with decodes are ignored."""
        if not report.prefilled or report.num_decode_tokens:
            return
        x = sum(starmap(self._geometry.flops, report.prefilled)) / UNIT
        seconds = report.forward_s + report.sample_s + report.wait_s
        self.sums *= FADING
        self.sums += (1, x, seconds, x * x, x * seconds)

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """See ``radix.protocol.LoadRule``."""
        each_s = self.seconds_per_operation
        if each_s is None:
            return position - cached_len  # Before the first measurement, the longest load is tried.
        rates = self._bytes_per_s()
        copy_s = 0.0
        for tier, size in num_bytes.items():
            rate = rates.get(tier)
            copy_s += size / rate if size and rate else 0.0
        return each_s * self._geometry.flops(cached_len, position) - copy_s


class Reading(PrefixLoad):
    """The records of one request, which are kept in memory until it has begun."""

    def __init__(self, request: Request, end: int, num_tokens: int, reads: list[Read]) -> None:
        super().__init__(end)
        self.request, self.num_tokens, self.reads = request, num_tokens, reads

    def cancel(self) -> None:
        self.reads = []


class Staging(Loader[Request]):
    """Loader that reads ahead from one disk."""

    max_loads = 4

    def __init__(self, manager: CacheManager, disk: Disk, exchange: LoadRule) -> None:
        super().__init__(manager)
        self._disk, self._exchange = disk, exchange
        self._readings: list[Reading] = []

    @property
    def _offload(self) -> OffloadTiers:
        offload = self.manager.cache.offload
        assert offload is not None, "the cache was made with tiers"
        return offload

    def wants(self, request: Request, match: PrefixMatch) -> bool:
        best = match.best_load(self._exchange)
        return best is not None and best.num_bytes[DISK] > 0

    def begin(self, request: Request, match: PrefixMatch) -> Reading | None:
        best = match.best_load(self._exchange)
        assert best is not None, "a load is begun only if it is wanted"
        reads = self._disk.stage(_disk_rows(best.node, self._offload.names.index(DISK)))
        reading = Reading(request, best.position, best.position - match.cached_len, reads)
        self._readings.append(reading)
        return reading

    def advance(self) -> None:
        """See ``Loader``. Entries that cannot be read are dropped from the tree first, so that no
        request waits for them again."""
        done = [one for one in self._readings if all(read.done() for read in one.reads)]
        disk, offload, steps = self._disk, self._offload, self.manager.cache.steps
        disk.settle()
        if disk.is_off:
            offload.closed.add(offload.names.index(DISK))
            done = self._readings
        if disk.has_lost_rows:
            if not all(map(is_kept, steps.transfers)):
                return  # Rows that a transfer is about to fill are not lost.
            offload.drop_lost(DISK, disk.is_lost)
            disk.has_lost_rows = False
        for reading in done:
            reading.has_ended, reading.num_loaded = True, reading.num_tokens
        self._readings = [
            one
            for one in self._readings
            if one.reads and one.request.lease is None and one.request.finish_reason is None
        ]

    def wait_for_data(self) -> None:
        for reading in self._readings:
            if not reading.has_ended:
                wait(reading.reads, IDLE_S)
                return


def _disk_rows(target: RadixNode, tier: int) -> Indices:
    """Return the rows of tier number ``tier`` that a resume at the end of ``target`` would load."""
    found: list[Indices] = []
    entry = target.offloaded
    if entry is not None and entry.state is not None and entry.state.tier == tier:
        found.append(entry.state.rows)
    node: RadixNode | None = target
    while node is not None and node.kv is None and node.offloaded is not None:
        if node.offloaded.kv is not None and node.offloaded.kv_tier == tier:
            found.append(node.offloaded.kv)
        node = node.parent
    return np.concatenate(found)


def is_kept(transfer: Transfer) -> bool:
    """Return True for a write-through copy."""
    return isinstance(transfer, Copy) and transfer.dst_tier == KEPT
