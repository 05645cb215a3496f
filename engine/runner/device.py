"""The one table of devices: what each can do, and how it is asked. No other module names one."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch

from engine.weights.model_config import ModelError
from hybridcache.geometry.units import counted


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """What the engine may use on one kind of device."""

    has_triton: bool
    graph_class: str | None
    """Of the device's module, beside its context manager ``graph``; None: the device has no
    graphs."""
    default_dtype: torch.dtype


TRAITS = {
    "cpu": DeviceTraits(False, None, torch.float32),
    "cuda": DeviceTraits(True, "CUDAGraph", torch.bfloat16),
    "xpu": DeviceTraits(True, None, torch.bfloat16),
}
OTHER = DeviceTraits(False, None, torch.float32)


@dataclass(frozen=True, slots=True)
class Device:
    """One device and its traits."""

    torch_device: torch.device
    traits: DeviceTraits

    @classmethod
    def resolve(cls, name: str | None) -> Device:
        """By name (``cpu``, ``cuda``, ``cuda:1`` ...), or the accelerator found, or the CPU. Raises
        ModelError."""
        if name is None:
            found = torch.accelerator.current_accelerator(check_available=True)
            device = torch.device("cpu") if found is None or found.type not in TRAITS else found
        else:
            try:
                device = torch.device(name)
            except RuntimeError:
                raise ModelError(f"there is no device {name!r}; try cpu.") from None
        if device.type != "cpu":
            try:
                module = torch.get_device_module(device)
                count = module.device_count() if module.is_available() else 0
            except (RuntimeError, AttributeError):
                count = 0
            if (device.index or 0) >= count:
                raise ModelError(f"the device {name!r} is not available here; try cpu.")
            if device.index is None and hasattr(module, "current_device"):
                device = torch.device(device.type, module.current_device())
        return cls(device, TRAITS.get(device.type, OTHER))

    def of_rank(self, number: int) -> Device:
        """Where one of several ranks computes: each has a device of its own, but for the CPU, which
        they share. Raises ModelError."""
        if self.is_cpu:
            return self
        try:
            return Device.resolve(f"{self.torch_device.type}:{number}")
        except ModelError:
            raise ModelError(
                f"--tp needs a {self.torch_device.type} device for every rank, and there is none "
                f"for rank {number}: lower it, or take --device cpu."
            ) from None

    @property
    def is_cpu(self) -> bool:
        return self.torch_device.type == "cpu"

    @property
    def module(self) -> ModuleType:
        """``torch.cpu``, ``torch.cuda`` ...: streams, graphs, memory figures."""
        return cast(ModuleType, torch.get_device_module(self.torch_device))

    def make_current(self) -> None:
        """For the thread that calls: what is launched, pinned or recorded without naming a device
        means this one."""
        if not self.is_cpu and self.torch_device.index is not None:
            self.module.set_device(self.torch_device)

    def supports(self, quantization: str | None) -> bool:
        """Whether weights in this 8-bit format (None: in none) can be multiplied here."""
        if quantization != "fp8" or not self.traits.has_triton:
            return True
        capability = getattr(self.module, "get_device_capability", lambda device: (0, 0))
        return bool(capability(self.torch_device) >= (8, 9))

    def free_bytes(self) -> int:
        """Memory that could be had now."""
        if self.is_cpu:
            return _available_host_bytes()
        free, _ = self.module.mem_get_info(self.torch_device)
        return int(free)

    def unused_bytes(self) -> int:
        """Memory that could be had if torch kept none for itself: it hands it back first."""
        gc.collect()
        self.release()
        return self.free_bytes()

    def release(self) -> None:
        """Hand back the memory that torch keeps for itself."""
        if not self.is_cpu:
            self.module.empty_cache()

    def register(self, host: torch.Tensor) -> bool:
        """Have copies between ``host``, ordinary memory, and the device go by themselves; False:
        they make the host wait here."""
        if not hasattr(self.module, "cudart") or not host.numel():
            return False
        return int(self.module.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)) == 0

    def recorder(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """What captures graphs: it runs ``work`` once, then captures what it launches; its result
        launches that again, on the same memory. All graphs of one recorder work in one pool, each
        over what the others left: one is replayed at a time, and what it leaves is read before the
        next."""
        graph_class = self.traits.graph_class
        assert graph_class is not None
        pool = self.module.graph_pool_handle()

        def record(work: Callable[[], None]) -> Callable[[], None]:
            work()
            self.synchronize()
            graph = getattr(self.module, graph_class)()
            # Threads of tiers and transfers may call the device meanwhile.
            with self.module.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
            return cast(Callable[[], None], graph.replay)

        return record

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
        if not self.is_cpu:
            self.module.synchronize(self.torch_device)

    def describe(self) -> str:
        """As shown at start-up."""
        if self.is_cpu:
            return f"cpu, {counted(torch.get_num_threads(), 'thread')}"
        return f"{self.torch_device}, {self.module.get_device_name(self.torch_device)}"


def _available_host_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
