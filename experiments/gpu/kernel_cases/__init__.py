"""Cases of `experiments.gpu.kernels`: a module per kernel folder, each with ``cases(setup)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Setup:
    """Device and sizes of the cases."""

    device: str
    is_dry: bool
    """True for tiny shapes, which only check that every case runs. Times are then meaningless."""

    is_float32: bool = False
    """True for float32 activations at full shapes."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format of activations. Triton's interpreter cannot multiply bfloat16."""
        return torch.float32 if self.is_dry or self.is_float32 else torch.bfloat16

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return normal numbers, by default in the activations' dtype."""
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def int32(self, values: Any) -> torch.Tensor:
        """Return an int32 table for a kernel."""
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one shape. The first call of each contender is compared, later ones are
    timed."""

    name: str
    run: Callable[[], torch.Tensor]
    """Runs our kernel. The returned tensor is compared with ``expected``."""
    expected: Callable[[], torch.Tensor]
    """Returns the correct result. It is called once, on any device."""
    num_bytes: int
    """Minimum number of bytes to read and write."""
    num_flops: int = 0
    """Minimum number of operations to compute."""
    rivals: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    """Other implementations of the same work, also compared."""
    tolerance: float = 2e-2
    """Root mean square error over the root mean square of ``expected``."""
    rival_tolerance: float | None = None
    """Tolerance of rivals that round more than ours, or None for ``tolerance``."""
    moved_bytes: int | None = None
    """Bytes of all loads and stores of our kernel with its own launch parameters. The excess over
    ``num_bytes`` is read twice."""
    reset: Callable[[], object] | None = None
    """Restores the tensors that calls of ours changed, or None if there are none."""
