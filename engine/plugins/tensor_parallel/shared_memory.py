"""Collectives through memory that ranks of one CPU share, with the bits of gloo."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

import torch

from engine.config import num_cores
from engine.interfaces import RunnerLost
from engine.layers.rank import Group
from kernels.exchange import Exchange, shared_bytes

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
