"""Small host tables on their way to the device, without waiting for what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch


def upload(
    values: Sequence[float] | Sequence[Sequence[int]] | npt.NDArray[Any],
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """``values`` as a tensor on ``device``. A copy from ordinary memory would make the host wait
    until the device has done all it was told before; from pinned memory it takes its turn. The CPU
    needs no copy."""
    host = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
