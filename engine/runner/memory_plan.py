"""Sizes of the memory for KV and states that fit on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from engine.config import ConfigError, EngineConfig
from engine.layers.linear import Rank
from engine.runner.device import Device, host_free_bytes
from engine.weights.model_config import ModelError
from hybridcache.allocators.arena import slab_rows
from hybridcache.geometry.checkpoints import CheckpointFormat, aligned
from hybridcache.geometry.sizes import ModelSizes
from hybridcache.geometry.units import GIB
from hybridcache.scheduling.memory_sizes import SLOTS_OF_ONE, MemorySizes

CPU_SHARE = 0.25
CPU_MAX_BYTES = 4 * GIB
ACCELERATOR_SHARE = 0.9
"""Share of the memory that remains after weights, graphs and the largest step. The rest is for
sampling and fragmentation."""
MIN_KV_TOKENS = 256


class MemoryPlan(MemorySizes):
    """``MemorySizes`` that fit on a device. One more row and slot are allocated for padding."""

    __slots__ = ()

    @classmethod
    def of(
        cls,
        num_tokens: int,
        num_states: int,
        row_bytes: int,
        state_bytes: int,
        page_size: int = 1,
        *,
        owns_states: bool = False,
    ) -> MemoryPlan:
        """Return the sizes of an arena for ``num_tokens`` tokens next to ``num_states`` states."""
        slab = slab_rows(state_bytes, row_bytes, page_size) if state_bytes else 0
        num_rows = num_tokens + num_states * slab
        num_slots = num_rows // slab if slab else 0
        return cls("arena", num_rows, num_slots, row_bytes, state_bytes, page_size, owns_states)

    def fit(
        self,
        device: Device,
        cache_bytes: int | None,
        *,
        reserved_bytes: int = 0,
        num_ranks: int = 1,
    ) -> MemoryPlan:
        """Return the sizes of this arena, the smallest one, enlarged for one rank on ``device``;
        ``cache_bytes`` are for all ``num_ranks``.

        The default on a CPU is a quarter of the memory that is free after ``reserved_bytes``, at
        most 4 GiB, and on other devices 90 % of it. Raises ModelError with the number of bytes that
        are needed.
        """
        if cache_bytes is not None:
            cache_bytes //= num_ranks
        elif device.is_cpu:  # Its ranks share it.
            free_bytes = device.free_bytes() - reserved_bytes
            cache_bytes = min(int(free_bytes * CPU_SHARE), CPU_MAX_BYTES) // num_ranks
        else:
            free_bytes = device.unused_bytes() - reserved_bytes
            cache_bytes = max(0, int(free_bytes * ACCELERATOR_SHARE))
        num_rows = cache_bytes // self.row_bytes // self.page_size * self.page_size
        if num_rows < self.num_kv_tokens:
            states = f" and {SLOTS_OF_ONE} states" if self.is_stateful else ""
            raise ModelError(
                f"{gib_words(cache_bytes)} hold {num_rows} tokens of this model; at least "
                f"{MIN_KV_TOKENS} tokens{states}, {gib_words(self.total_bytes)}, are needed."
            )
        num_slots = num_rows // self.slab_rows if self.is_stateful else 0
        return replace(self, num_kv_tokens=num_rows, num_slots=num_slots)

    def agreed(self, rank: Rank, device: Device) -> MemoryPlan:
        """Return sizes that fit on every rank: those of the rank with the least memory."""
        if rank.group is None:
            return self
        own = [self.num_kv_tokens, self.num_slots]
        counts = torch.tensor(own, dtype=torch.int64, device=device.torch_device)
        tokens, slots = torch.stack(rank.group.gather(counts)).amin(0).tolist()
        return replace(self, num_kv_tokens=tokens, num_slots=slots)


def check_sizes(config: EngineConfig, device: Device) -> None:
    """Raise ConfigError if the sizes of ``config`` exceed the memory that is available now.

    Called before the weights are read, and again when they have taken their part.
    """
    own, host = config.cache_bytes, config.host_bytes
    if device.is_cpu:
        _check_available(own | host, host_free_bytes(), "memory")
        return
    per_device = {name: size // config.num_ranks for name, size in own.items()}
    _check_available(per_device, device.unused_bytes(), f"memory of {device.torch_device}")
    _check_available(host, host_free_bytes(), "host memory")


def _check_available(sizes: Mapping[str, int], free_bytes: int, kind: str) -> None:
    needed = sum(sizes.values())
    if needed > free_bytes:
        names = " and ".join(name for name, size in sizes.items() if size)
        verb = "takes" if len(sizes) == 1 else "take"
        raise ConfigError(
            f"{names} {verb} {gib_words(needed)}, but {gib_words(free_bytes)} of {kind} are "
            "available: use less."
        )


def kv_row_bytes(sizes: ModelSizes, dtype: torch.dtype) -> int:
    """Return the bytes of one token in all layers."""
    return aligned(sizes.row_size * dtype.itemsize)


def state_slot_bytes(
    sizes: ModelSizes,
    dtype: torch.dtype,
    state_dtype: torch.dtype = torch.float32,
    checkpoints: CheckpointFormat | None = None,
) -> int:
    """Return the bytes of one sequence's conv and recurrent states in all layers, or of a
    checkpoint in the format ``checkpoints``. 0 for an attention-only model."""
    num_conv, num_recurrent = sizes.state_size("conv"), sizes.state_size("recurrent")
    if checkpoints is not None:
        return checkpoints.num_bytes(sizes, num_conv * dtype.itemsize)
    return aligned(num_conv * dtype.itemsize) + aligned(num_recurrent * state_dtype.itemsize)


def gib_words(num_bytes: int) -> str:
    gib = num_bytes / GIB
    return f"{gib:.3g} GiB" if gib < 1000 else f"{gib:,.0f} GiB"
