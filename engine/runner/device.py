"""Table of devices and their features. No other module names a device."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import torch

from engine.weights.model_config import ModelError
from hybridcache.geometry.units import counted


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """Features of one kind of device."""

    has_triton: bool
    graph_class: str | None
    """Name of the graph class in the device's module, which also has a context manager ``graph``.
    None if the device has no graphs."""
    default_dtype: torch.dtype


TRAITS = {
    "cpu": DeviceTraits(False, None, torch.float32),
    "cuda": DeviceTraits(True, "CUDAGraph", torch.bfloat16),
    "xpu": DeviceTraits(True, None, torch.bfloat16),
}
CGROUP = Path("/sys/fs/cgroup")
OTHER = DeviceTraits(False, None, torch.float32)


@dataclass(frozen=True, slots=True)
class Device:
    """One device and its traits."""

    torch_device: torch.device
    traits: DeviceTraits

    @classmethod
    def resolve(cls, name: str | None) -> Device:
        """Return the device of the given name (``cpu``, ``cuda``, ``cuda:1`` ...), else the
        accelerator found, else the CPU. Raises ModelError."""
        if name is None:
            found = torch.accelerator.current_accelerator(check_available=True)
            device = torch.device("cpu") if found is None or found.type not in TRAITS else found
        else:
            try:
                device = torch.device(name)
            except RuntimeError:
                raise ModelError(f"unknown device {name!r}; use cpu, for example.") from None
        if device.type != "cpu":
            try:
                module = torch.get_device_module(device)
                count = module.device_count() if module.is_available() else 0
            except (RuntimeError, AttributeError):
                count = 0
            if (device.index or 0) >= count:
                raise ModelError(f"the device {name!r} is not available; use cpu, for example.")
            if device.index is None and hasattr(module, "current_device"):
                device = torch.device(device.type, module.current_device())
        return cls(device, TRAITS.get(device.type, OTHER))

    def of_rank(self, number: int) -> Device:
        """Return the device of one of several ranks. Each rank has a separate device, except that
        all share a CPU. Raises ModelError."""
        if self.is_cpu:
            return self
        try:
            return Device.resolve(f"{self.torch_device.type}:{number}")
        except ModelError:
            raise ModelError(
                f"--tp needs one {self.torch_device.type} device per rank, and there is none "
                f"for rank {number}: lower --tp, or use --device cpu."
            ) from None

    @property
    def is_cpu(self) -> bool:
        return self.torch_device.type == "cpu"

    @property
    def module(self) -> ModuleType:
        """Module of the device (``torch.cpu``, ``torch.cuda`` ...) with streams, graphs and memory
        figures."""
        return cast(ModuleType, torch.get_device_module(self.torch_device))

    def make_current(self) -> None:
        """Select this device in the calling thread, for operations that do not name a device."""
        if not self.is_cpu and self.torch_device.index is not None:
            self.module.set_device(self.torch_device)

    def supports(self, quantization: str | None) -> bool:
        """Return True if weights in this 8-bit format can be multiplied on the device, or if it is
        None."""
        if quantization != "fp8" or not self.traits.has_triton:
            return True
        capability = getattr(self.module, "get_device_capability", lambda device: (0, 0))
        return bool(capability(self.torch_device) >= (8, 9))

    def free_bytes(self) -> int:
        """Return the available memory in bytes."""
        if self.is_cpu:
            return host_free_bytes()
        free, _ = self.module.mem_get_info(self.torch_device)
        return int(free)

    def unused_bytes(self) -> int:
        """Return the memory in bytes that is available after torch has released its cached
        memory."""
        gc.collect()
        self.release()
        return self.free_bytes()

    def release(self) -> None:
        """Release the memory that torch caches."""
        if not self.is_cpu:
            self.module.empty_cache()

    def register(self, host: torch.Tensor) -> bool:
        """Page-lock ``host``, ordinary memory, so that copies to and from the device are
        asynchronous. Returns False if that is not possible, so that copies block the host."""
        if not hasattr(self.module, "cudart") or not host.numel():
            return False
        return int(self.module.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)) == 0

    def recorder(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """Return a function that captures graphs, all with one memory pool.

        It runs ``work`` once, then captures its launches, and returns a function that repeats them
        on the same memory. Graphs of one recorder overwrite each other's memory: one graph is
        replayed at a time, and its results are read before the next replay.
        """
        graph_class = self.traits.graph_class
        assert graph_class is not None
        pool = self.module.graph_pool_handle()

        def record(work: Callable[[], None]) -> Callable[[], None]:
            work()
            self.synchronize()
            graph = getattr(self.module, graph_class)()
            # Threads of tiers and transfers may call the device at the same time.
            with self.module.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
            return cast(Callable[[], None], graph.replay)

        return record

    def synchronize(self) -> None:
        """Wait until all operations of the device are done."""
        if not self.is_cpu:
            self.module.synchronize(self.torch_device)

    def describe(self) -> str:
        """Return the description shown at start-up."""
        if self.is_cpu:
            return f"cpu, {counted(torch.get_num_threads(), 'thread')}"
        return f"{self.torch_device}, {self.module.get_device_name(self.torch_device)}"


def host_free_bytes() -> int:
    """Return the memory that the system, and the limit of this process's container, leave."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        [line] = (line for line in lines if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # Version 2 of control groups, as containers see them.
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, max(0, limit - used + int(stat["inactive_file"])))
    return free
