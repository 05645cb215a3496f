"""Device that computes nothing, and counts compilations, captures and memory."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.runner.device import Device

FREE_BYTES = 2**30
signature = functools.cache(inspect.signature)


class StubMemory:
    """Memory of a graph or of a pool of graphs."""

    num_mib = 0


@dataclass(frozen=True, slots=True)
class StubDevice(Device):
    """Stand-in for an accelerator with graphs and Triton. Its tensors are on the CPU."""

    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    counts: Counter[str] = field(default_factory=Counter)
    threads: set[int] = field(default_factory=set)
    """Threads that made it their current device."""

    @property
    def is_cpu(self) -> bool:
        return False

    def make_current(self) -> None:
        self.threads.add(threading.get_ident())

    def free_bytes(self) -> int:
        """Return the free memory.

        Each live graph takes 1 MiB, and the first of each pool 64 MiB more. Memory of dead graphs
        counts as "cached MiB", which torch holds until ``release``.
        """
        return FREE_BYTES - 2**20 * (self.counts["used MiB"] + self.counts["cached MiB"])

    def release(self) -> None:
        self.counts["cached MiB"] = 0

    def recorder(self):
        self.counts["pools"] += 1
        pool = StubMemory()

        def record(work):
            self.release()  # Like torch's context manager before a capture.
            self.counts["graphs"] += 1
            if not pool.num_mib:
                self._take(pool, 64)
            graph = StubMemory()
            self._take(graph, 1)
            work()

            def replay():
                assert graph.num_mib  # The closure keeps the graph alive.
                work()

            return replay

        return record

    def _take(self, memory, num_mib):
        memory.num_mib = num_mib
        self.counts["used MiB"] += num_mib
        weakref.finalize(memory, self.counts.update, {"used MiB": -num_mib, "cached MiB": num_mib})

    def synchronize(self) -> None:
        self.counts["waits"] += 1

    def describe(self) -> str:
        return "stub"


class Launches:
    """Record of the kernels that Triton would have compiled.

    The key of a kernel is its function, the types, and Triton's specialisation of the values.
    """

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.num_launches = 0

    def record(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        from triton._C.libtriton import native_specialize_impl
        from triton.backends.compiler import BaseBackend

        bound = signature(executor.fn).bind(
            *args, **{k: v for k, v in kwargs.items() if k in executor.arg_names}
        )
        options = executor.fn.__globals__[executor.fn.__name__].kwargs
        any_value = options.get("do_not_specialize") or ()
        any_address = options.get("do_not_specialize_on_alignment") or ()
        key = tuple(
            (name, value)
            if name in executor.constexprs
            else native_specialize_impl(
                BaseBackend, value, False, name not in any_value, name not in any_address
            )
            for name, value in bound.arguments.items()
        )
        self.num_launches += 1
        self.seen.add((executor.fn.__name__, key, kwargs.get("num_warps")))


def zeroed(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return ``allocate`` with zeroed memory."""
    return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()


@contextlib.contextmanager
def stubbed(monkeypatch):
    """Replace all devices by the stub and yield (device, launches).

    Triton launches are recorded, not run. New memory is zero, because no kernel writes it and
    logits must be finite.
    """
    from triton.runtime.interpreter import GridExecutor

    device, launches = StubDevice(), Launches()
    with monkeypatch.context() as patch:
        patch.setattr(Device, "resolve", classmethod(lambda cls, name: device))
        patch.setattr(
            GridExecutor,
            "__call__",
            lambda self, *args, **kwargs: launches.record(self, *args, **kwargs),
        )
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, zeroed(getattr(owner, name)))
        yield device, launches
