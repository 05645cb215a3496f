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
    The CPU needs no copy.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
