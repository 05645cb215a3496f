"""The group through which ranks exchange results: ``torch.distributed`` with nccl, or gloo on a CPU
without a compiler, and otherwise memory that ranks of one CPU share, with the bits of gloo.

The group is not global, so several engines in one process have separate groups. Ranks exchange
bytes and add them themselves (``Rank.sum``), so the order of a sum is the same on every backend.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from engine.config import num_cores
from engine.interfaces import RunnerLost
from engine.layers.linear import Group
from engine.plugins.tensor_parallel.rank_messages import Start
from engine.runner.device import Device
from engine.weights.model_config import ModelError
from kernels.exchange import Exchange, shared_bytes

TIMEOUT_S = 120.0
"""Time after which a rank that does not answer counts as lost. The longest layer of a step is far
shorter, including compilation of kernels."""
START_TIMEOUT_S = 600.0
"""The same limit while ranks load their parts, which may take different times."""
HERE = "127.0.0.1"
"""Address of all ranks, which are processes of one machine."""


class TorchGroup(Group):
    """A ``Group`` of ``count`` processes that connect through the file ``meeting``."""

    def __init__(self, number: int, count: int, meeting: Path, device: Device) -> None:
        """Wait for all ranks. Raises RunnerLost if one does not arrive, and ModelError if this
        build of PyTorch has no backend for the device."""
        super().__init__(count)
        self._timeout = timeout = timedelta(seconds=START_TIMEOUT_S)
        backend = "ProcessGroupGloo" if device.is_cpu else "ProcessGroupNCCL"
        made = getattr(torch.distributed, backend, None)
        if made is None:
            raise ModelError(f"--tp needs {backend}, which this build of PyTorch does not have.")
        from torch._C._distributed_c10d import AllgatherOptions, FileStore

        self._make_options = AllgatherOptions
        try:
            store = FileStore(str(meeting), count)
            store.set_timeout(timeout)
            if device.is_cpu:
                self._options = made._Options()
                self._options._devices = [made.create_device(hostname=HERE)]
            else:
                self._options = made.Options()
            self._options._timeout = timeout
            self._group = made(store, number, count, self._options)
        except RuntimeError as error:
            raise RunnerLost(f"the ranks could not connect: {error}") from None

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See ``Group``. Raises RunnerLost if a rank has gone, or did not answer in time."""
        parts = [torch.empty_like(x) for _ in range(self.count)]
        places = [part.view(-1).view(torch.uint8) for part in parts]
        options = self._make_options()
        options.timeout = self._timeout
        try:
            self._group.allgather([places], [x.view(-1).view(torch.uint8)], options).wait()
        except RuntimeError as error:
            raise RunnerLost(f"an exchange between ranks broke off: {error}") from None
        return parts

    def set_timeout(self, seconds: float) -> None:
        # nccl reads that of the group, and ignores that of a call.
        self._timeout = self._options._timeout = timedelta(seconds=seconds)


SPIN_S = 1e-3
"""Time that a rank polls before it sleeps, if each of its threads has a core. It exceeds the usual
wait between ranks of one step, because waking up takes 100 us and delays the other rank too."""


def make_memory(count: int) -> int:
    """Make shared memory for ``count`` ranks and return its descriptor. It has no name, so it is
    released when the last process ends in any way."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("hybridcache-ranks")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, shared_bytes(count))
    return descriptor


class SharedGroup(Group):
    """A ``Group`` of processes that share one memory."""

    def __init__(
        self, number: int, count: int, descriptor: int, lines: Sequence[int], timeout_s: float
    ) -> None:
        """``lines``: descriptors of sockets that close when another rank ends. The descriptor of
        the memory stays open; the caller closes it."""
        has_cores = num_cores() >= count * torch.get_num_threads()
        super().__init__(count, SPIN_S if has_cores else 0.0)
        memory = mmap.mmap(descriptor, shared_bytes(count))
        self.exchange = Exchange(
            memory, number, count, lines=lines, timeout_s=timeout_s, spin_s=self.spin_s
        )

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See ``Group``. Raises RunnerLost if a rank has gone, or did not answer in time."""
        own = x.contiguous().view(1, -1)
        parts = own.new_empty(1, self.count * own.shape[1])
        self.exchange.join(own, parts)
        self.check()
        return list(parts.view(self.count, *x.shape))

    def sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if self.exchange.can_sum(x):
            self.exchange.sum(x, out)
        else:
            super().sum(x, out)

    def join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if x.is_contiguous():
            self.exchange.join(x, out)
        else:
            super().join(x, out)

    def check(self) -> None:
        failure = self.exchange.failure
        if failure is not None:
            raise RunnerLost(f"an exchange between ranks broke off: {failure}")

    def set_timeout(self, seconds: float) -> None:
        self.exchange.set_timeout(seconds)


def meet(start: Start, device: Device, lines: Sequence[int]) -> Group:
    """Return the group of the rank with the given ``start``.

    ``lines`` are descriptors of its connections to other ranks. Raises RunnerLost and ModelError as
    ``TorchGroup``.
    """
    if start.memory is not None:
        return SharedGroup(start.number, start.count, start.memory, lines, START_TIMEOUT_S)
    return TorchGroup(start.number, start.count, Path(start.meeting), device)
