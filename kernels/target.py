"""Properties of Triton's compilation target that determine pipelines and tiles."""

from __future__ import annotations

from functools import cache

from triton import knobs
from triton.runtime import driver

ROOMY_BYTES = 163 * 1024
"""Shared memory per program of sm_80, the smallest device with full pipelines. Others have less:
99 KiB on sm_86 and sm_89, 64 KiB on AMD's gfx942."""


def pipeline_stages(wanted: int) -> int:
    """Return ``wanted`` stages if shared memory suffices, else 2. Does not change results."""
    if knobs.runtime.interpret:
        return 1
    return wanted if has_roomy_memory() else 2


def fitting_stages(wanted: int, stage_bytes: int, other_bytes: int) -> int:
    """Return the largest number of stages up to ``wanted`` that fits the shared memory, at least 1.

    ``stage_bytes``: loads of one iteration of the pipelined loop; ``other_bytes``: operands that
    are stored besides. Hopper's products read their operands while the next ones arrive, so they
    take one more buffer. Does not change results.
    """
    if knobs.runtime.interpret:
        return 1
    device = driver.active.get_current_device()
    buffers = 0 if is_hopper() else 1
    fitting = (_shared_bytes(device) - other_bytes) // stage_bytes + buffers
    return max(1, min(wanted, fitting))


def has_roomy_memory() -> bool:
    """Return True if programs on this device have at least ``ROOMY_BYTES`` of shared memory."""
    return (
        knobs.runtime.interpret or _shared_bytes(driver.active.get_current_device()) >= ROOMY_BYTES
    )


def is_hopper() -> bool:
    """Return True if products of four warps run asynchronously, on registers that they own."""
    return not knobs.runtime.interpret and _architecture(driver.active.get_current_device()) == 90


def has_tensor_memory() -> bool:
    """Return True if products of 128 rows have their sums in a memory of their own (Blackwell)."""
    return not knobs.runtime.interpret and _architecture(driver.active.get_current_device()) >= 100


def max_recurrence_warps() -> int:
    """Maximum warps of a program with a loop that carries the accumulator of a product.

    4, or 2 on NVIDIA's Blackwell. There, Triton up to 3.8 compiles such a loop with 4 warps into a
    race (flash-linear-attention, issue 945: different numbers in every run). That project also
    avoids 8 warps from Hopper on, because of wrong products of 64 rows.
    """
    if knobs.runtime.interpret:
        return 4
    return 2 if _architecture(driver.active.get_current_device()) >= 100 else 4


@cache
def _architecture(device: int) -> int:
    """Return the compute capability times 10, or 0 if the device is not NVIDIA's."""
    arch = driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 0  # other backends use a name


@cache
def _shared_bytes(device: int) -> int:
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])
