"""The group through which ranks exchange results: nccl or, on a CPU, gloo of ``torch.distributed``.

The group is not global, so several engines in one process have separate groups. Ranks exchange
bytes and add them themselves (``Rank.sum``), so the order of a sum is the same on every backend.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed

from engine.interfaces import RunnerLost
from engine.layers.linear import Group
from engine.runner.device import Device
from engine.weights.model_config import ModelError

TIMEOUT_S = 120.0
"""Time after which a rank that does not answer counts as lost. The longest layer of a step is far
shorter, including compilation of kernels."""
START_TIMEOUT_S = 600.0
"""The same limit while ranks load their parts, which may take different times."""
HERE = "127.0.0.1"
"""Address of all ranks, which are processes of one machine."""


class TorchGroup(Group):
    """A ``Group`` of ``count`` processes that connect through the file ``meeting``."""

    def __init__(self, number: int, count: int, meeting: str, device: Device) -> None:
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
            store = FileStore(meeting, count)
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
