"""The bytes below the device's: host memory, and the way to disk.

A state lies in a slab of the arena, which is rows, so whatever goes from one tier to another goes
row by row: ``[n, row_bytes]``. On an accelerator what is spilled is gathered on the device, in the
order of its work, and crosses in a stream of its own while the next steps compute; what is fetched
crosses there too, and only its last move, within the device, takes its turn among the steps. Host
memory is what was asked for and registered as it is: torch's own pinned memory comes in powers of
two, up to twice of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.run.device import Device
from engine.run.memory import allocate
from engine.run.model_config import ModelError
from engine.schedule.batch import KEPT, BytesLost
from engine.schedule.memory import MemorySizes
from engine.store.disk import Coming, Disk
from hybridcache.allocators.orders import DEVICE, DISK, HOST, Copy, Drop
from hybridcache.tokens import Indices
from kernels.upload import upload

MIN_RUN = 4
"""Rows that follow each other, on average, from which copying run by run is worth its calls."""
PROBE_BYTES = 1 << 26
"""Copied to find out how fast host memory reaches the device."""


class LowerRows:
    """Makes the orders between tiers, each as if it were complete before the next."""

    def __init__(
        self,
        rows: torch.Tensor | None,
        memory: MemorySizes,
        device: Device,
        num_host_rows: int,
        disk: Disk | None,
    ) -> None:
        """``rows``: the device's arena, uint8 ``[N, row_bytes]``, of ``memory``. ModelError: there
        is none, or no such host memory."""
        if rows is None or not memory.slab_rows:
            raise ModelError("host and disk tiers need one arena of KV and states: --cache-gib.")
        self._rows = rows
        self._slab_rows = memory.slab_rows
        self._device = device
        self.host = allocate((num_host_rows, rows.shape[1]), torch.uint8, Device.resolve("cpu"))
        self.is_pinned = device.register(self.host)
        self.disk = disk
        self._stream: Any = None if device.is_cpu else device.module.Stream()
        self.host_bytes_per_s = self._measure() if num_host_rows else None
        """To the device, measured; None: there is no host tier."""

    def make(self, order: Copy | Drop) -> None:
        """Make one order. BytesLost: what was to be fetched is not whole on disk."""
        if isinstance(order, Drop):
            if self.disk is not None and order.tier == DISK:
                self.disk.forget(order.rows)
            return
        src = self._rows_of(order, order.src_tier, order.src)
        if order.dst_tier in (DISK, KEPT):
            self._to_disk(order, src)
            return
        dst = self._rows_of(order, order.dst_tier, order.dst)
        if order.src_tier == DISK:
            assert self.disk is not None
            pieces = self.disk.take(src)
            if pieces is None:
                raise BytesLost("what was to be fetched is damaged on disk, and is computed again")
            for first, piece in pieces:
                data = torch.from_numpy(piece)
                self._write(order.dst_tier, dst[first : first + len(piece)], data)
        elif order.dst_tier == DEVICE and self._device.is_cpu:
            _copy(self._rows, dst, self.host, src)
        elif order.dst_tier == DEVICE:
            self._write(DEVICE, dst, self._bring(src))
        elif self._device.is_cpu:
            _copy(self.host, dst, self._rows, src)
        else:
            self._spill(src, dst)

    def _rows_of(self, order: Copy, tier: str, what: Indices) -> Indices:
        """``what``, or the rows of the slab that a slot of the device is."""
        if tier != DEVICE or order.kind == "kv":
            return what
        first = int(what[0]) * self._slab_rows
        return np.arange(first, first + self._slab_rows, dtype=np.int32)

    def _to_disk(self, order: Copy, src: Indices) -> None:
        assert self.disk is not None and order.path is not None

        def read(first: int, end: int) -> Coming:
            return self._coming(order.src_tier, src[first:end])

        if order.dst_tier == KEPT:
            self.disk.keep(order.kind, order.path, len(src), read)
        else:
            self.disk.put(order.kind, order.path, order.dst, read)

    def _coming(self, tier: str, src: Indices) -> Coming:
        """The bytes of ``src`` as they are now, in memory of their own once they have come."""
        if tier == HOST:
            self._wait()
            found = _gathered(self.host, src).numpy()
            return lambda: found
        if self._device.is_cpu:
            kept = _gathered(self._rows, src).numpy()
            return lambda: kept
        taken = self._rows[self._index(src)]
        out = torch.empty(taken.shape, dtype=torch.uint8, pin_memory=True)
        with self._aside():
            out.copy_(taken, non_blocking=True)
            taken.record_stream(self._stream)
            event = self._stream.record_event()

        def come() -> npt.NDArray[np.uint8]:
            event.synchronize()
            return out.numpy()

        return come

    def _spill(self, src: Indices, dst: Indices) -> None:
        taken = self._rows[self._index(src)]
        with self._aside():
            for first, end in _runs(dst):
                place = int(dst[first])
                self.host[place : place + end - first].copy_(taken[first:end], non_blocking=True)
            taken.record_stream(self._stream)

    def _bring(self, src: Indices) -> torch.Tensor:
        """Rows of the host, near the device."""
        if self._device.is_cpu:
            return _gathered(self.host, src)
        taken = torch.empty(
            (len(src), self.host.shape[1]), dtype=torch.uint8, device=self._rows.device
        )
        with self._aside():
            for first, end in _runs(src):
                place = int(src[first])
                taken[first:end].copy_(self.host[place : place + end - first], non_blocking=True)
            taken.record_stream(self._stream)
        self._device.module.current_stream().wait_stream(self._stream)
        return taken

    def _write(self, tier: str, dst: Indices, data: torch.Tensor) -> None:
        if tier == HOST or self._device.is_cpu:
            self._wait()
            _copy(
                self.host if tier == HOST else self._rows,
                dst,
                data,
                np.arange(len(dst), dtype=np.int32),
            )
        else:
            self._rows[self._index(dst)] = data.to(self._rows.device)

    def _aside(self) -> Any:
        """Work in the other stream, behind all that this one was told so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(self._device.module.current_stream())
        return self._device.module.stream(self._stream)

    def _wait(self) -> None:
        """Until the host's rows are what the orders so far made them."""
        if self._stream is not None:
            self._stream.synchronize()

    def _index(self, rows: Indices) -> torch.Tensor:
        return upload(rows.astype(np.int64), torch.int64, self._rows.device)

    def _measure(self) -> float:
        num_rows = max(1, min(len(self.host), PROBE_BYTES // self.host.shape[1], len(self._rows)))
        src = np.arange(num_rows, dtype=np.int32)
        best = min(self._time(lambda: self._bring(src)) for _ in range(3))
        return num_rows * self.host.shape[1] / max(best, 1e-9)

    def _time(self, work: Callable[[], object]) -> float:
        self._device.synchronize()
        start = time.perf_counter()
        work()
        self._device.synchronize()
        return time.perf_counter() - start


def _gathered(rows: torch.Tensor, src: Indices) -> torch.Tensor:
    """``rows[src]``, in memory of its own."""
    out = torch.empty((len(src), rows.shape[1]), dtype=torch.uint8)
    _copy(out, np.arange(len(src), dtype=np.int32), rows, src)
    return out


def _copy(to: torch.Tensor, dst: Indices, rows: torch.Tensor, src: Indices) -> None:
    """``to[dst] = rows[src]``, both in host memory: run by run, which reads and writes once, unless
    runs are short."""
    ends = [*(np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1).tolist(), len(src)]
    if len(ends) * MIN_RUN > len(src):
        to[_long(dst)] = rows[_long(src)]
        return
    first = 0
    for end in ends:
        place, origin, count = int(dst[first]), int(src[first]), end - first
        to[place : place + count].copy_(rows[origin : origin + count])
        first = end


def _long(rows: Indices) -> torch.Tensor:
    return torch.from_numpy(rows.astype(np.int64))


def _runs(rows: Indices) -> Iterator[tuple[int, int]]:
    """(first, end) of the places in ``rows`` between which each row follows the one before."""
    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    first = 0
    for end in ends:
        yield first, end
        first = end
