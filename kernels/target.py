"""What Triton compiles for, where a kernel's pipeline and tiles have to know."""

from __future__ import annotations

from functools import cache

from triton import knobs
from triton.runtime import driver

ROOMY_BYTES = 163 * 1024
"""Shared memory of one program on the smallest device that pipelines are laid out for: sm_80. Others have less: sm_86 and
sm_89 99 KiB, AMD's gfx942 64."""


def pipeline_stages(wanted: int) -> int:
    """``wanted`` stages where shared memory is roomy, else 2. Changes no result."""
    if knobs.runtime.interpret:
        return 1
    return wanted if has_roomy_memory() else 2


def has_roomy_memory() -> bool:
    """Whether this device's programs have at least ``ROOMY_BYTES`` of shared memory."""
    return (
        knobs.runtime.interpret or _shared_bytes(driver.active.get_current_device()) >= ROOMY_BYTES
    )


@cache
def _shared_bytes(device: int) -> int:
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])
