"""Asynchronous upload of host tables to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch


def upload(
    values: Sequence[float] | Sequence[Sequence[float]] | npt.NDArray[Any] | torch.Tensor,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """Return ``values`` as a tensor on ``device``.

    The copy starts from pinned memory, so the host does not wait for earlier work of the device.
    ``values`` may change as soon as this returns. The CPU needs no copy: the result shares their
    memory.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cpu":
        return host
    pinned = host.pin_memory()
    if pinned.data_ptr() == host.data_ptr():
        # It was pinned already. torch may reuse that memory before it is read, because it looks up
        # its allocations by their first byte, and this may be a part of one.
        pinned = host.clone().pin_memory()
    return pinned.to(device, non_blocking=True)
