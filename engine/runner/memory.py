"""Sizes of the memory for KV and states that fit on a device, and its tensors: rows and states in
an arena, and checkpoints with fewer bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch

from engine.config import ConfigError, EngineConfig
from engine.layers.blocks import Pools
from engine.runner.device import Device, host_free_bytes
from engine.weights.model_config import ModelError
from engine.weights.ranks import ALONE, Rank
from hybridcache.allocators.pools import slab_rows
from hybridcache.geometry.checkpoints import CheckpointFormat, aligned
from hybridcache.geometry.sizes import ModelSizes, Spec
from hybridcache.geometry.units import GIB, format_bytes
from hybridcache.scheduling.cache_manager import SLOTS_OF_ONE, MemorySizes
from kernels.state_copy.reference import StateLayout
from kernels.upload import upload

CPU_SHARE = 0.25
CPU_MAX_BYTES = 4 * GIB
ACCELERATOR_SHARE = 0.9
"""Share of the memory after weights and graphs. The rest is for sampling and fragmentation."""
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
        self, device: Device, cache_bytes: int | None, reserved_bytes: int = 0, rank: Rank = ALONE
    ) -> MemoryPlan:
        """Return the sizes of this arena, the smallest one, enlarged to what fits on every rank;
        ``cache_bytes`` are for all ranks.

        The default on a CPU is a quarter of the memory that is free after ``reserved_bytes``, at
        most 4 GiB, and on a GPU 90 % of it. Raises ModelError with the number of bytes that are
        needed.
        """
        if cache_bytes is not None:
            cache_bytes //= rank.count
        elif device.is_cpu:  # Its ranks share it.
            free_bytes = device.free_bytes() - reserved_bytes
            cache_bytes = min(int(free_bytes * CPU_SHARE), CPU_MAX_BYTES) // rank.count
        else:
            free_bytes = device.unused_bytes() - reserved_bytes
            cache_bytes = max(0, int(free_bytes * ACCELERATOR_SHARE))
        num_rows = cache_bytes // self.row_bytes // self.page_size * self.page_size
        if num_rows < self.num_kv_tokens:
            states = f" and {SLOTS_OF_ONE} states" if self.is_stateful else ""
            least = math.ceil(self.total_bytes / GIB * 1000) / 1000  # It suffices as a setting.
            raise ModelError(
                f"{format_bytes(cache_bytes)} hold {num_rows} tokens of this model; at least "
                f"{MIN_KV_TOKENS} tokens{states}, {least} GiB, are needed."
            )
        if rank.group is not None:
            own = torch.tensor([num_rows], device=device.torch_device)
            num_rows = int(torch.cat(rank.group.gather(own)).min())
        num_slots = num_rows // self.slab_rows if self.is_stateful else 0
        return replace(self, num_kv_tokens=num_rows, num_slots=num_slots)


def check_sizes(config: EngineConfig, device: Device) -> None:
    """Raise ConfigError if the sizes of ``config`` exceed the memory that is available now."""
    own = {"cache_gib": config.cache_bytes or 0}
    host = {"host_gib": int(config.host_gib * GIB)} if config.host_gib is not None else {}
    checks = [(own | host, host_free_bytes(), "memory")]
    if not device.is_cpu:
        per_device = {name: size // config.tp for name, size in own.items()}
        checks = [
            (per_device, device.unused_bytes(), f"memory of {device.torch_device}"),
            (host, host_free_bytes(), "host memory"),
        ]
    for sizes, free_bytes, kind in checks:
        needed = sum(sizes.values())
        if needed > free_bytes:
            names = " and ".join(name for name, size in sizes.items() if size)
            raise ConfigError(
                f"{names}: {format_bytes(needed)} are needed, but {format_bytes(free_bytes)} of "
                f"{kind} are available: use less."
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
    """Return the bytes of one sequence's states in all layers, or of a checkpoint of them."""
    num_conv, num_recurrent = sizes.size_of("conv"), sizes.size_of("recurrent")
    if checkpoints is not None:
        return checkpoints.num_bytes(sizes, num_conv * dtype.itemsize)
    return aligned(num_conv * dtype.itemsize) + aligned(num_recurrent * state_dtype.itemsize)


STAGING_BYTES = GIB
"""Memory for states that prefills export, until they are narrowed. A step that exports more is
computed in pieces."""
CODES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Checkpoints with fewer bits than running states (``--checkpoint-dtype``).

    States are narrowed when they are saved and widened when they are restored. Running states then
    have separate slots outside the cache's memory, one per row of the request table. A slot of the
    cache holds the conv states unchanged, the codes of all recurrent states, and their scales.
    """

    slots: torch.Tensor
    """uint8 ``[S + 1, slot bytes]``, rows of any stride; the last row is for padding."""
    forms: Sequence[tuple[torch.Tensor, StateLayout]]
    """Running states ``[L, own slots, ...]``, each with its layout in a slot."""
    format: CheckpointFormat
    staging: range
    """Own slots for states that a prefill exports, until they are saved."""

    def save(self, copies: Sequence[tuple[int, int]], kernel: ModuleType) -> None:
        """Narrow states into checkpoints: (own slot, checkpoint slot)."""
        if copies:
            sources, targets = self._indices(copies)
            for pool, form in self.forms:
                kernel.narrow_states(pool, sources, self.slots, targets, form)

    def restore(self, copies: Sequence[tuple[int, int]], kernel: ModuleType) -> None:
        """Widen checkpoints into running states: (checkpoint slot, own slot)."""
        if copies:
            sources, targets = self._indices(copies)
            for pool, form in self.forms:
                kernel.widen_states(self.slots, sources, pool, targets, form)

    def _indices(self, copies: Sequence[tuple[int, int]]) -> torch.Tensor:
        pairs = np.array(copies, dtype=np.int64).T.copy()
        return upload(pairs, torch.int64, self.slots.device)


def _forms(
    states: Mapping[Spec, torch.Tensor], format: CheckpointFormat
) -> Iterator[tuple[torch.Tensor, StateLayout]]:
    """Yield the running states, each with its layout in a slot of ``Checkpoints``."""
    recurrent = [pool for spec, pool in states.items() if spec.kind == "recurrent"]
    codes, first = CODES[format.dtype], 0
    for pool in (pool for spec, pool in states.items() if spec.kind == "conv"):
        yield pool, StateLayout(pool.dtype, None, first, 0)
        first += pool[:, 0].nbytes
    first = aligned(first)
    num_codes = sum(pool[:, 0].numel() for pool in recurrent)
    first_scale = first + aligned(num_codes * codes.itemsize)
    for pool in recurrent:
        dims: tuple[int, ...] | None = None
        if format.per is not None:  # Dimensions along which scales differ.
            dims = (0, 1, *(2 + dim for dim in format.kept_dims(pool.dim() - 2)))
        yield pool, StateLayout(codes, dims, first, first_scale)
        first += pool[:, 0].numel() * codes.itemsize
        if dims is not None:
            first_scale += 4 * len(pool) * math.prod(pool.shape[dim] for dim in dims[2:])


@dataclass(frozen=True, slots=True)
class Memory:
    """Tensors of a ``MemoryPlan``. The padding row and slot share no byte with another one."""

    pools: tuple[Pools, ...]
    """Pools of each mixer."""
    padding_row: int
    padding_slot: int | None
    """Slot for padding, or None for an attention-only model."""
    step_slots: range
    """Slots outside the plan, for the states after each token of a verification."""
    states: Pools
    """All bytes of all states, as few tensors ``[L, S, ...]``, for copies of whole states."""
    rows: torch.Tensor
    """Rows of the arena as uint8 ``[N, row_bytes]``, for moves."""
    checkpoints: Checkpoints | None = None
    """Checkpoints in a separate format, or None if they are stored like other states."""

    @property
    def padding_checkpoint(self) -> int | None:
        """Slot for checkpoints that are not needed."""
        return self.padding_slot if self.checkpoints is None else len(self.checkpoints.slots) - 1

    @classmethod
    def allocate(
        cls,
        plan: MemorySizes,
        keeps: Sequence[tuple[Spec, ...]],
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: Device,
        *,
        num_step_states: int = 0,
        num_scratch_rows: int = 0,
        checkpoints: CheckpointFormat | None = None,
        num_own_states: int = 0,
        num_staged: int = 0,
    ) -> Memory:
        """Allocate zeros for mixers that declare ``keeps``. Raises ModelError.

        There is room for the states of ``num_step_states`` verified tokens. With ``checkpoints`` in
        a separate format, ``num_own_states`` running states and ``num_staged`` exported ones are
        allocated next to the arena.

        After the last row of the arena, the first whole slab is the padding slot, followed by the
        step slots, the padding row and the scratch rows. In a slot, all conv states come first.
        """
        dtypes = {"kv": dtype, "conv": dtype, "recurrent": state_dtype}
        slab = plan.slab_rows
        padding_slot = -(-plan.num_kv_tokens // slab) if slab else 0
        num_slots = padding_slot + 1 + (num_step_states if checkpoints is None else 0)
        padding_row = num_slots * slab if slab else plan.num_kv_tokens
        shape = padding_row + 1 + num_scratch_rows, plan.row_bytes
        rows = allocate(shape, torch.uint8, device)
        slots = rows[: num_slots * slab].view(num_slots, -1) if slab else rows[:0]
        own: dict[Spec, torch.Tensor] = {}
        if checkpoints is not None:
            # One tensor for each kind of state, so that few tensors hold all.
            num_own = num_own_states + 1 + num_step_states + num_staged
            counts = Counter(spec for specs in keeps for spec in specs if spec.kind != "kv")
            own = {
                spec: allocate((count, num_own, *spec.shape), dtypes[spec.kind], device)
                for spec, count in counts.items()
            }
        layers = {spec: iter(tensor) for spec, tensor in own.items()}
        num_conv = sum(spec.size for specs in keeps for spec in specs if spec.kind == "conv")
        first = {"kv": 0, "conv": 0, "recurrent": aligned(num_conv * dtype.itemsize)}

        def pool(spec: Spec) -> torch.Tensor:
            """Return a layer of ``own``, or the next view of the arena's rows or slots."""
            if spec in layers:
                return next(layers[spec])
            units, begin = rows if spec.kind == "kv" else slots, first[spec.kind]
            first[spec.kind] += spec.size * dtypes[spec.kind].itemsize
            part = units[:, begin : first[spec.kind]]
            return part.view(dtypes[spec.kind]).unflatten(1, spec.shape)

        pools = tuple(tuple(map(pool, specs)) for specs in keeps)
        if not slab:
            return Memory(pools, padding_row, None, range(0), (), rows)
        slots = slots[:, : plan.state_bytes]
        if checkpoints is None:
            steps = range(padding_slot + 1, num_slots)
            return Memory(pools, padding_row, padding_slot, steps, (slots[None],), rows)
        steps = range(num_own_states + 1, num_own_states + 1 + num_step_states)
        staging = range(steps.stop, steps.stop + num_staged)
        saved = Checkpoints(slots, tuple(_forms(own, checkpoints)), checkpoints, staging)
        return Memory(pools, padding_row, num_own_states, steps, tuple(own.values()), rows, saved)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Allocate zeros. On a CPU, pages take memory when they are written. Raises ModelError."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if not device.is_cpu:
            return torch.zeros(shape, dtype=dtype, device=device.torch_device)
        untouched = np.zeros(num_bytes, dtype=np.uint8)
    except (MemoryError, torch.OutOfMemoryError):
        raise ModelError(
            f"{format_bytes(num_bytes)} cannot be allocated on {device.torch_device} "
            f"({format_bytes(device.free_bytes())} are free): lower --cache-gib, --host-gib or "
            "--max-running."
        ) from None
    return torch.from_numpy(untouched).view(dtype).view(shape)
