"""Copies between the device, host memory and disk.

All transfers copy rows, ``[n, row_bytes]``; a state consists of the rows of a slab. On an
accelerator, offloaded rows are gathered on the device, in order with its other work, and copied to
the host in a separate stream while the next steps compute. Loaded rows are copied in that stream
too; only their last move, within the device, is in order with the steps. Host memory is allocated
and then page-locked, because torch's own pinned memory comes in powers of two.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from engine.plugins.tiers.disk import Disk, FutureRows, Rows
from engine.runner.device import Device, HostCopy
from engine.runner.memory import allocate
from engine.schedule.scheduler import BytesLost
from hybridcache.allocators.moves import DEVICE, DISK, HOST, Copy, Drop, Indices
from hybridcache.scheduling.cache_manager import MemorySizes
from kernels.upload import upload

KEPT = "kept"
"""Target of write-through copies to disk: the entry also stays in its tier."""
MIN_RUN_BYTES = 1 << 14
"""Minimum average length of runs of consecutive rows for which copying run by run pays off."""
MOST_COPIES = 32
"""Maximum number of copies from host memory for one load. More runs of consecutive rows are
gathered by a kernel, because submitting each copy takes the host some microseconds."""
BLOCK_BYTES = 1 << 18
"""Size of single rows that are gathered before they are scattered, so that they stay in cache."""
PROBE_BYTES = 1 << 26
"""Size of the copy that measures the bandwidth from host memory to the device."""

GatherRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""See ``kernels.cache_write.reference.gather_rows``."""


class TierCopier:
    """Executes transfers between tiers, each as if it were complete before the next."""

    def __init__(
        self,
        rows: torch.Tensor,
        memory: MemorySizes,
        device: Device,
        num_host_rows: int,
        disk: Disk | None,
    ) -> None:
        """Prepare copies to and from ``rows``, the device's arena (uint8 ``[N, row_bytes]``) with
        the sizes ``memory``. Raises ModelError if there is not enough host memory."""
        self._rows = rows
        self._slab_rows = memory.slab_rows
        self._device = device
        self.host = allocate((num_host_rows, rows.shape[1]), torch.uint8, Device.resolve("cpu"))
        is_locked = device.register(self.host)
        self.disk = disk
        self._stream: Any = None if device.is_cpu else device.module.Stream()
        self._gather = self._find_gather() if is_locked else None
        self.host_bytes_per_s = self._measure() if num_host_rows else None
        """Measured bandwidth to the device, or None if there is no host tier."""

    def make(self, order: Copy | Drop) -> None:
        """Execute one transfer. Raises BytesLost if the data to load is not complete on disk."""
        if isinstance(order, Drop):
            if self.disk is not None and order.tier == DISK:
                self.disk.prefixes.unbind(order.rows)
            return
        src = self._rows_of(order, order.src_tier, order.src)
        if order.dst_tier in (DISK, KEPT):
            self._to_disk(order, src)
            return
        dst = self._rows_of(order, order.dst_tier, order.dst)
        if order.src_tier == DISK:
            assert self.disk is not None
            pieces = self.disk.load(src)
            if pieces is None:
                raise BytesLost("records on disk cannot be read: they are computed again")
            for first, piece in pieces:
                self._write(order.dst_tier, dst[first : first + len(piece)], piece)
        elif self._device.is_cpu:
            copy_rows(self._near(order.dst_tier), dst, self._near(order.src_tier), src)
        elif order.dst_tier == DEVICE:
            self._rows[self._index(dst)] = self._load(src)
        else:
            self._offload(src, dst)

    def _near(self, tier: str) -> Rows:
        """Return the rows of ``tier``, which are in this process's memory."""
        return (self.host if tier == HOST else self._rows).numpy()

    def _rows_of(self, order: Copy, tier: str, what: Indices) -> Indices:
        """Return ``what``, or the rows of the slab of a slot on the device."""
        if tier != DEVICE or order.kind == "kv":
            return what
        first = int(what[0]) * self._slab_rows
        return np.arange(first, first + self._slab_rows, dtype=np.int32)

    def _to_disk(self, order: Copy, src: Indices) -> None:
        assert self.disk is not None and order.path is not None

        def read(first: int, end: int) -> FutureRows:
            return self._future_rows(order.src_tier, src[first:end])

        if order.dst_tier == KEPT:
            self.disk.write_through(order.kind, order.path, len(src), read)
        else:
            self.disk.offload(order.kind, order.path, order.dst, read)

    def _future_rows(self, tier: str, src: Indices) -> FutureRows:
        """Return the current bytes of ``src``, in a separate copy, when they have arrived."""
        if tier == HOST or self._device.is_cpu:
            self._wait()
            kept = _gathered(self._near(tier), src)
            return lambda: kept
        taken = self._rows[self._index(src)]
        with self._aside():
            copy = HostCopy(taken)
            taken.record_stream(self._stream)
        return lambda: copy.wait()[0].numpy()

    def _offload(self, src: Indices, dst: Indices) -> None:
        taken = self._rows[self._index(src)]
        with self._aside():
            for first, end in _runs(dst):
                place = int(dst[first])
                self.host[place : place + end - first].copy_(taken[first:end], non_blocking=True)
            taken.record_stream(self._stream)

    def _load(self, src: Indices) -> torch.Tensor:
        """Copy rows of the host to the device."""
        if self._device.is_cpu:
            return torch.from_numpy(_gathered(self.host.numpy(), src))
        shape, main = (len(src), self.host.shape[1]), self._device.module.current_stream()
        # Memory of the other stream: the copy begins while earlier steps are still computed. Rows
        # of the host are only written on the same stream, or after `_wait`.
        with self._device.module.stream(self._stream):
            taken = torch.empty(shape, dtype=torch.uint8, device=self._rows.device)
            runs = list(_runs(src))
            if self._gather is not None and len(runs) > MOST_COPIES:
                self._gather(self.host, upload(src, torch.int32, taken.device), taken)
                runs = []
            for first, end in runs:
                place = int(src[first])
                taken[first:end].copy_(self.host[place : place + end - first], non_blocking=True)
        main.wait_stream(self._stream)
        taken.record_stream(main)
        return taken

    def _find_gather(self) -> GatherRows | None:
        """Return the kernel that gathers rows of the host's page-locked memory, or None if the
        device cannot run it or cannot read that memory."""
        if self._device.is_cpu or importlib.util.find_spec("triton") is None:
            return None
        gather_rows: GatherRows = importlib.import_module("kernels.cache_write.fused").gather_rows
        num_rows = min(2, len(self.host))
        self.host[:num_rows] = torch.arange(num_rows, dtype=torch.uint8)[:, None]
        found = self._rows.new_empty(num_rows, self.host.shape[1])
        try:
            gather_rows(self.host, upload(range(num_rows), torch.int32, found.device), found)
        except (RuntimeError, ValueError):  # Triton refuses addresses that the device cannot read.
            return None
        return gather_rows if torch.equal(found.cpu(), self.host[:num_rows]) else None

    def _write(self, tier: str, dst: Indices, data: Rows) -> None:
        if tier == HOST or self._device.is_cpu:
            self._wait()
            copy_rows(self._near(tier), dst, data, np.arange(len(dst), dtype=np.int32))
        else:
            self._rows[self._index(dst)] = upload(data, torch.uint8, self._rows.device)

    def _aside(self) -> AbstractContextManager[object]:
        """Select the other stream, after all work submitted to this stream so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(self._device.module.current_stream())
        return self._device.module.stream(self._stream)

    def _wait(self) -> None:
        """Wait until the transfers so far have updated the host's rows."""
        if self._stream is not None:
            self._stream.synchronize()

    def _index(self, rows: Indices) -> torch.Tensor:
        return upload(rows.astype(np.int64), torch.int64, self._rows.device)

    def _measure(self) -> float:
        num_rows = max(1, min(len(self.host), PROBE_BYTES // self.host.shape[1], len(self._rows)))
        src = np.arange(num_rows, dtype=np.int32)
        times_s = []
        for _ in range(3):
            self._device.synchronize()
            start = time.perf_counter()
            self._load(src)
            self._device.synchronize()
            times_s.append(time.perf_counter() - start)
        return num_rows * self.host.shape[1] / max(min(times_s), 1e-9)


def _gathered(rows: Rows, src: Indices) -> Rows:
    """Return a copy of ``rows[src]``."""
    out = np.empty((len(src), rows.shape[1]), np.uint8)
    copy_rows(out, np.arange(len(src), dtype=np.int32), rows, src)
    return out


def copy_rows(to: Rows, dst: Indices, rows: Rows, src: Indices) -> None:
    """Compute ``to[dst] = rows[src]``, run by run unless runs are short.

    Single rows are copied as items of one type: indexing by bytes costs ten times as much.
    """
    whole = np.dtype((np.void, rows.shape[1]))
    target, source = to.view(whole)[:, 0], rows.view(whole)[:, 0]
    runs = list(_runs(src, dst))
    if len(runs) * MIN_RUN_BYTES > len(src) * rows.shape[1]:
        step = max(1, BLOCK_BYTES // rows.shape[1])
        for first in range(0, len(src), step):
            target[dst[first : first + step]] = source[src[first : first + step]]
        return
    for first, end in runs:
        place, origin, count = int(dst[first]), int(src[first]), end - first
        target[place : place + count] = source[origin : origin + count]


def _runs(*indices: Indices) -> Iterator[tuple[int, int]]:
    """Return (first, end) of the places between which the rows in each of ``indices`` are
    consecutive."""
    breaks = np.any([np.diff(rows) != 1 for rows in indices], axis=0)
    ends = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(indices[0])]
    return pairwise(ends)
