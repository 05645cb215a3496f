"""Devices, their memory and graphs, and copies from them to the host."""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from engine.weights.model_config import ModelError
from hybridcache.geometry.units import counted


@dataclass(frozen=True, slots=True)
class Device:
    """The CPU, or a GPU with Triton and graphs."""

    torch_device: torch.device

    @classmethod
    def resolve(cls, name: str | None) -> Device:
        """Return the device ``name`` (``cpu``, ``cuda:1`` ...), by default a GPU if there is one.
        Raises ModelError."""
        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ModelError(f"unknown device {name!r}; use cpu, for example.")
        if device.type == "cuda":
            if (device.index or 0) >= torch.cuda.device_count():
                raise ModelError(f"the device {name!r} is not available; use cpu, for example.")
            if device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
        return cls(device)

    def of_rank(self, number: int) -> Device:
        """Return the device of one of several ranks, which share a CPU. Raises ModelError."""
        return self if self.is_cpu else Device.resolve(f"{self.torch_device.type}:{number}")

    @property
    def is_cpu(self) -> bool:
        return self.torch_device.type == "cpu"

    @property
    def module(self) -> ModuleType:
        """Module of the device, ``torch.cpu`` or ``torch.cuda``."""
        return cast(ModuleType, torch.get_device_module(self.torch_device))

    def make_current(self) -> None:
        """Select this device in the calling thread, for operations that do not name a device."""
        if self.torch_device.index is not None and not self.is_cpu:
            self.module.set_device(self.torch_device)

    def supports(self, quantization: str | None) -> bool:
        """Return True if weights in this format can be multiplied on the device."""
        if quantization != "fp8" or self.is_cpu:
            return True
        return bool(self.module.get_device_capability(self.torch_device) >= (8, 9))

    def free_bytes(self) -> int:
        if self.is_cpu:
            return host_free_bytes()
        free, _ = self.module.mem_get_info(self.torch_device)
        return int(free)

    def unused_bytes(self) -> int:
        """Return the available bytes after torch has released its cached memory."""
        gc.collect()
        self.release()
        return self.free_bytes()

    def release(self) -> None:
        if not self.is_cpu:
            self.module.empty_cache()

    def register(self, host: torch.Tensor) -> bool:
        """Page-lock ``host`` until its end, so that copies to and from the device are asynchronous.
        Returns False if that is not possible."""
        if not hasattr(self.module, "cudart") or not host.numel():
            return False
        runtime = self.module.cudart()
        if int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)):
            with suppress(RuntimeError):  # The next launch reports the error of the last call.
                torch.zeros(1, device=self.torch_device)
            return False
        # Otherwise, memory that is allocated at this address later could not be registered.
        weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr()).atexit = False
        return True

    def recorder(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """Return a function that runs work once, captures its launches, and returns a function that
        repeats them on the same memory. Graphs of one recorder overwrite each other's memory."""
        pool = self.module.graph_pool_handle()
        # By default, all graphs of a process share a stream, of the device with the first one.
        stream = self.module.Stream(self.torch_device)

        def record(work: Callable[[], None]) -> Callable[[], None]:
            work()
            self.synchronize()
            graph = self.module.CUDAGraph()
            # Threads of tiers and transfers may call the device at the same time.
            options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
            with self.module.graph(graph, **options):
                work()
            return partial(_replay, graph, work)

        return record

    def synchronize(self) -> None:
        if not self.is_cpu:
            self.module.synchronize(self.torch_device)

    def describe(self) -> str:
        if self.is_cpu:
            return f"cpu, {counted(torch.get_num_threads(), 'thread')}"
        return f"{self.torch_device}, {self.module.get_device_name(self.torch_device)}"


def _replay(graph: Any, work: Callable[[], None]) -> None:
    """Repeat ``graph``, the captured launches of ``work``. The tensors of ``work`` live as long as
    this partial function."""
    graph.replay()


class HostCopy:
    """Tensors of one device, possibly still being copied to the host."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """Start to copy ``tensors``, after the present work of the current stream."""
        self._event = None
        self._copies = tensors
        device = tensors[0].device
        if device.type != "cpu":
            self._copies = tuple(
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in tensors
            )
            self._event = torch.get_device_module(device).Event()
            self._event.record()

    @property
    def num_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies)

    @property
    def is_done(self) -> bool:
        """True if ``wait`` does not wait."""
        return self._event is None or self._event.query()

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Wait for the copies; on a CPU, return the tensors themselves. Safe in any thread."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


SYSTEM = Path("/")
"""Folder with ``proc`` and ``sys``."""


def host_free_bytes() -> int:
    """Return the memory that the system, and the limits of this process's container, leave."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError):  # Not Linux.
        found = re.search(r"MemAvailable: +(\d+) kB", (SYSTEM / "proc/meminfo").read_text())
        free = free if found is None else int(found[1]) * 1024
    return max(0, min([free, *_group_rooms()]))


def _group_rooms() -> Iterator[int]:
    """Yield the bytes that the limits of this process's control groups (version 2) leave. A
    container may see its own group as the root."""
    root, groups = SYSTEM / "sys/fs/cgroup", ""
    with suppress(OSError):
        groups = (SYSTEM / "proc/self/cgroup").read_text(errors="surrogateescape")
    for path in re.findall("^0::/(.*)$", groups, re.MULTILINE):
        group = root / path
        for folder in (one for one in (group, *group.parents) if one.is_relative_to(root)):
            for name in ("memory.max", "memory.high"):
                with suppress(OSError, ValueError, KeyError):  # "max" is no limit.
                    limit = int((folder / name).read_text())
                    stat = (folder / "memory.stat").read_text().splitlines()
                    reclaimable = int(dict(line.split() for line in stat)["inactive_file"])
                    yield limit - int((folder / "memory.current").read_text()) + reclaimable
