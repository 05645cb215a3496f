"""Asynchronous upload of host tables to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def upload(
    values: Sequence[float] | Sequence[Sequence[float]] | npt.NDArray[np.generic] | torch.Tensor,
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
    # Not `host.pin_memory()`: that does not copy memory that is pinned already, whose owner may
    # write to it again before the device has read it.
    pinned = torch.empty(host.shape, dtype=dtype, pin_memory=True).copy_(host)
    return pinned.to(device, non_blocking=True)
