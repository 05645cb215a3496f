"""What Triton compiles for, where a kernel's pipeline has to know."""

from __future__ import annotations

from triton import knobs
from triton.runtime import driver


def pipeline_stages(wanted: int) -> int:
    """``wanted`` stages where shared memory is roomy; 2 on AMD, which has 64 KiB. Changes no result."""
    if knobs.runtime.interpret:
        return 1
    return 2 if driver.active.get_current_target().backend == "hip" else wanted
