"""What Triton compiles for, where a kernel's pipeline and tiles have to know."""

from __future__ import annotations

from functools import cache

from triton import knobs
from triton.runtime import driver

ROOMY_BYTES = 163 * 1024
"""Shared memory of one program on the smallest device that pipelines are laid out for: sm_80.
Others have less: sm_86 and sm_89 99 KiB, AMD's gfx942 64."""


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


def max_recurrence_warps() -> int:
    """Warps that a program may have whose loop carries the accumulator of a product.

    4, and 2 on NVIDIA's Blackwell, where Triton up to 3.8 compiles such a loop into a race with 4
    (flash-linear-attention, issue 945: other numbers at every run). That project keeps 8 from
    Hopper too, where it met wrong products of 64 rows.
    """
    if knobs.runtime.interpret:
        return 4
    return 2 if _is_blackwell(driver.active.get_current_device()) else 4


@cache
def _is_blackwell(device: int) -> bool:
    target = driver.active.get_current_target()
    return isinstance(target.arch, int) and target.arch >= 100  # a name elsewhere


@cache
def _shared_bytes(device: int) -> int:
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])
