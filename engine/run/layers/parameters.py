"""Where the tensors of the weight files go: layers declare it, the loader fills it in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from engine.run.backends import Kernels
from engine.run.model_config import ModelError

Role = Literal["matrix", "norm", "centred_norm", "log_decay", "time_bias", "skip"]
"""What a tensor is for: says how dummy weights are drawn. A centred norm's weight is around 0
(Gemma-style), a norm's 1, as is what a state space lets pass."""
Precision = Literal["int8", "fp8"]

FULL_PRECISION = (
    "lm_head",
    "gate",
    "shared_expert_gate",
    "router",
    "in_proj_ba",
    "in_proj_b",
    "in_proj_a",
    "b_proj",
    "a_proj",
    "x_proj",
    "dt_proj",
)
"""Parts of a dotted name whose weights stay as they are: where few numbers decide much."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the weight files and its destination."""

    target: torch.Tensor
    """The view to fill; its shape is the file's tensor's."""
    role: Role = "matrix"
    rows: torch.Tensor | None = None
    """Order in which the file's rows are taken: ``target = tensor[rows]``; None: as they are."""

    @torch.inference_mode()
    def fill(self, tensor: torch.Tensor) -> None:
        """Copy a file's tensor of the target's shape, in the target's dtype."""
        self.target.copy_(tensor if self.rows is None else tensor[self.rows])


class Layer(Protocol):
    """Anything with weights."""

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Full names in the weight files and where they go; only before ``seal``."""
        ...

    def seal(self) -> None:
        """Called once all weights are in: bring them into the form they are multiplied in."""
        ...


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Where and in what dtype weights live."""

    device: torch.device
    dtype: torch.dtype
    quantization: Precision | None = None
    """Format that the weights of large products are brought into when their layer is sealed."""

    def precision(self, name: str) -> Precision | None:
        """Of the module ``name`` (full, without ``.weight``); None: the dtype as it is."""
        if any(part in FULL_PRECISION for part in name.split(".")):
            return None
        return self.quantization

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Raises ModelError where there is no memory for it."""
        try:
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        except RuntimeError:  # All that torch's CPU allocator raises.
            sizes = " x ".join(map(str, shape))
            raise ModelError(
                f"the weights do not fit the memory of {self.device}: there was none left for one "
                f"of {sizes}."
            ) from None


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer is made with."""

    kernels: Kernels
    weights: WeightSpec
