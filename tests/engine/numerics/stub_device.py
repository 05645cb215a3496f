"""A device that computes nothing: it keeps count of what it was told to compile, capture and
remember."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.runner.device import TRAITS, Device

FREE_BYTES = 2**30


class Memory:
    """Of a graph, or of a pool of them."""

    num_mib = 0


@dataclass(frozen=True, slots=True)
class StubDevice(Device):
    """Looks like an accelerator with graphs and Triton; its tensors are the CPU's."""

    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    traits: Any = TRAITS["cuda"]
    counts: Counter[str] = field(default_factory=Counter)
    threads: set[int] = field(default_factory=set)
    """Those that made it their current device."""

    @property
    def is_cpu(self) -> bool:
        return False

    def make_current(self) -> None:
        self.threads.add(threading.get_ident())

    def free_bytes(self) -> int:
        """Every graph that lives takes one MiB, and the first of each pool of graphs 64 MiB more;
        what dead ones had, as what else is "cached MiB", is torch's until it is released."""
        return FREE_BYTES - 2**20 * (self.counts["taken MiB"] + self.counts["cached MiB"])

    def release(self) -> None:
        self.counts["cached MiB"] = 0

    def recorder(self):
        self.counts["pools"] += 1
        pool = Memory()

        def record(work):
            self.release()  # as torch's context manager does before it captures
            self.counts["graphs"] += 1
            if not pool.num_mib:
                self._take(pool, 64)
            graph = Memory()
            self._take(graph, 1)
            work()

            def replay():
                assert graph.num_mib  # it lives as long as its replay
                work()

            return replay

        return record

    def _take(self, memory, num_mib):
        memory.num_mib = num_mib
        self.counts["taken MiB"] += num_mib
        weakref.finalize(memory, self.counts.update, {"taken MiB": -num_mib, "cached MiB": num_mib})

    def synchronize(self) -> None:
        self.counts["waits"] += 1

    def describe(self) -> str:
        return "stub"


class Launches:
    """The kernels that Triton would have compiled by now: by function, types, and what it tells
    apart in the numbers."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.num_launches = 0

    def record(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        from triton._C.libtriton import native_specialize_impl
        from triton.backends.compiler import BaseBackend

        bound = inspect.signature(executor.fn).bind(
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
    """Return ``allocate`` with zeros for what is in the memory."""
    return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()


@contextlib.contextmanager
def stubbed(monkeypatch):
    """Make every device the stub, and note Triton launches instead of running them: (device,
    launches). New memory is zero, because no kernel writes it and logits must be finite."""
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
