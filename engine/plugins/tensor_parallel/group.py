"""Collectives over ``torch.distributed``: nccl, and gloo on a CPU without a compiler.

The group is no global one: several engines of one process have theirs. Bytes are exchanged and
added by whoever has them (``Rank.sum``), so the order of a sum is ours on every backend.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from engine.interfaces import RunnerLost
from engine.layers.rank import Group
from engine.runner.device import Device
from engine.weights.model_config import ModelError

TIMEOUT_S = 120.0
"""After which a rank that does not answer counts as lost: a step's longest layer is far shorter,
compilation of kernels included."""
START_TIMEOUT_S = 600.0
"""The same while ranks load their parts, which one may do faster than another."""
HERE = "127.0.0.1"
"""All ranks are processes of one machine."""


class TorchGroup(Group):
    """A ``Group`` of ``count`` processes that meet in the file ``meeting``."""

    def __init__(self, number: int, count: int, meeting: Path, device: Device) -> None:
        """Waits for all ranks. RunnerLost: one did not come; ModelError: this build of PyTorch
        has no backend for the device."""
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
                options = made._Options()
                options._devices = [made.create_device(hostname=HERE)]
                options._timeout = timeout
            else:
                options = made.Options()
                options._timeout = timeout
            self._group = made(store, number, count, options)
        except RuntimeError as error:
            raise RunnerLost(f"the ranks did not find each other: {error}") from None

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See ``Group``. RunnerLost: a rank has gone, or did not answer in time."""
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
        self._timeout = timedelta(seconds=seconds)
