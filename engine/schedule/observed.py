"""What whoever observes an engine learns of each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepReport:
    """Where one step's time went, and what it did."""

    schedule_s: float
    forward_s: float
    sample_s: float
    wait_s: float
    """For the device: all that its work takes beyond the host's."""
    commit_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int


Observer = Callable[[StepReport], None]
