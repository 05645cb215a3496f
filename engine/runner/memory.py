"""Tensors of a ``MemoryPlan``: KV rows and states, in an arena or in pools.

Allocators assign rows and slots. This module does not use the assignment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.layers.inputs import Pools
from engine.runner.checkpoints import Checkpoints
from engine.runner.device import Device
from engine.runner.memory_plan import gib_words
from engine.weights.model_config import ModelError
from hybridcache.geometry.checkpoints import CheckpointFormat, aligned
from hybridcache.geometry.sizes import KVSpec, Spec
from hybridcache.scheduling.memory_sizes import MemorySizes


@dataclass(frozen=True, slots=True)
class Memory:
    """Tensors of a ``MemoryPlan``.

    The padding row and the padding slot share no byte with an allocated row or slot, nor with each
    other.
    """

    pools: tuple[Pools, ...]
    """Pools of each mixer."""
    padding_row: int
    padding_slot: int | None
    """Slot for padding, or None for an attention-only model."""
    step_slots: range
    """Slots outside the plan, for the states after each token of a verification."""
    states: Pools
    """All bytes of all states, as few tensors ``[L, S, ...]`` for copies of whole states; one
    tensor in an arena."""
    rows: torch.Tensor | None
    """Rows of an arena as uint8 ``[N, row_bytes]``, for moves. None for two pools, in which rows do
    not move."""
    checkpoints: Checkpoints | None = None
    """Checkpoints in a separate format, or None if checkpoints are stored like any other state."""

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
        """Allocate zeros for mixers that declare ``keeps``.

        There is room for the states of ``num_step_states`` verified tokens, and for
        ``num_scratch_rows`` after the padding row. With ``checkpoints`` in a separate format,
        ``num_own_states`` running states and ``num_staged`` exported ones are allocated next to
        them. Raises ModelError if there is not enough memory.
        """
        kept = [
            [_Kept(spec, state_dtype if _kind(spec) == "recurrent" else dtype) for spec in specs]
            for specs in keeps
        ]
        make = _allocate_arena if plan.memory == "arena" else _allocate_pools
        if checkpoints is None or not plan.owns_states:
            return make(plan, kept, device, num_step_states, num_scratch_rows)
        cached = make(plan, _part(kept, of_tokens=True), device, 0, num_scratch_rows)
        own = _allocate_pools(
            replace(plan, num_slots=num_own_states),
            _part(kept, of_tokens=False),
            device,
            num_step_states + num_staged,
            0,
        )
        slots = cached.states[0][0] if cached.states else None
        if slots is None:
            slots = allocate((plan.num_slots + 1, plan.state_bytes), torch.uint8, device)
        kinds = [_kind(one.spec) for one in dict.fromkeys(k for mixer in kept for k in mixer)]
        recurrent = [kind == "recurrent" for kind in kinds if kind != "kv"]
        steps = own.step_slots
        return Memory(
            tuple(
                _in_order(mixer, *both)
                for mixer, *both in zip(kept, cached.pools, own.pools, strict=True)
            ),
            cached.padding_row,
            own.padding_slot,
            steps[:num_step_states],
            own.states,
            cached.rows,
            Checkpoints(
                slots,
                tuple(zip(own.states, recurrent, strict=True)),
                checkpoints,
                steps[num_step_states:],
            ),
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """One declared tensor of a mixer, with its dtype."""

    spec: Spec
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes for one token or sequence."""
        return self.spec.size * self.dtype.itemsize


def _part(mixers: Sequence[Sequence[_Kept]], *, of_tokens: bool) -> list[list[_Kept]]:
    """Select the tensors that mixers declare per token, or per sequence."""
    return [[k for k in mixer if isinstance(k.spec, KVSpec) == of_tokens] for mixer in mixers]


def _in_order(mixer: Sequence[_Kept], of_tokens: Pools, of_sequences: Pools) -> Pools:
    parts = {True: iter(of_tokens), False: iter(of_sequences)}
    return tuple(next(parts[isinstance(kept.spec, KVSpec)]) for kept in mixer)


def _kind(spec: Spec) -> str:
    return "kv" if isinstance(spec, KVSpec) else spec.dtype


def _allocate_pools(
    plan: MemorySizes,
    mixers: Sequence[Sequence[_Kept]],
    device: Device,
    num_step_states: int,
    num_scratch_rows: int,
) -> Memory:
    """Allocate pools. Tensors of one name, shape and dtype are adjacent, so that few tensors hold
    all states."""
    groups = Counter(kept for mixer in mixers for kept in mixer)
    num_rows = plan.num_kv_tokens + 1 + num_scratch_rows
    units = {True: num_rows, False: plan.num_slots + 1 + num_step_states}
    made = {
        kept: allocate(
            (count, units[isinstance(kept.spec, KVSpec)], *kept.spec.shape), kept.dtype, device
        )
        for kept, count in groups.items()
    }
    layers = {kept: iter(tensor) for kept, tensor in made.items()}
    pools = tuple(tuple(next(layers[kept]) for kept in mixer) for mixer in mixers)
    states = tuple(tensor for kept, tensor in made.items() if not isinstance(kept.spec, KVSpec))
    if not states:
        return Memory(pools, plan.num_kv_tokens, None, range(0), (), None)
    first = plan.num_slots + 1
    steps = range(first, first + num_step_states)
    return Memory(pools, plan.num_kv_tokens, plan.num_slots, steps, states, None)


def _allocate_arena(
    plan: MemorySizes,
    mixers: Sequence[Sequence[_Kept]],
    device: Device,
    num_step_states: int,
    num_scratch_rows: int,
) -> Memory:
    """Allocate an arena: all rows, then padding and step slots, then scratch rows.

    After the last row, the first whole slab is the padding slot, followed by the step slots, the
    padding row and the scratch rows. In a slot, all conv states come first.
    """
    slab, row_bytes = plan.slab_rows, plan.row_bytes
    padding_slot = -(-plan.num_kv_tokens // slab) if slab else 0
    num_slots = padding_slot + 1 + num_step_states
    padding_row = num_slots * slab if slab else plan.num_kv_tokens
    rows = allocate((padding_row + 1 + num_scratch_rows, row_bytes), torch.uint8, device)
    sizes = Counter[str]()
    for kept in (kept for mixer in mixers for kept in mixer):
        sizes[_kind(kept.spec)] += kept.num_bytes
    place = {"kv": 0, "conv": 0, "recurrent": aligned(sizes["conv"])}

    def view(kept: _Kept) -> torch.Tensor:
        kind = _kind(kept.spec)
        first = place[kind]
        place[kind] += kept.num_bytes
        unit, count = (row_bytes, len(rows)) if kind == "kv" else (plan.slot_bytes, num_slots)
        return _view(rows, kept.dtype, (count, *kept.spec.shape), unit, first)

    pools = tuple(tuple(view(kept) for kept in mixer) for mixer in mixers)
    if not slab:
        return Memory(pools, padding_row, None, range(0), (), rows)
    states = _view(rows, torch.uint8, (num_slots, plan.state_bytes), plan.slot_bytes)[None]
    steps = range(padding_slot + 1, num_slots)
    return Memory(pools, padding_row, padding_slot, steps, (states,), rows)


def _view(
    rows: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    unit_bytes: int,
    first_byte: int = 0,
) -> torch.Tensor:
    """Return a view ``[units, ...]`` of an arena, starting at ``first_byte`` of every unit (a row
    or a slab)."""
    inner = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
    strides = (unit_bytes // dtype.itemsize, *inner)
    return rows.flatten().view(dtype).as_strided(shape, strides, first_byte // dtype.itemsize)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Allocate zeros. On a CPU, pages take memory only when they are written. Raises ModelError if
    there is not enough memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if not device.is_cpu:
            return torch.zeros(shape, dtype=dtype, device=device.torch_device)
        untouched = np.zeros(num_bytes, dtype=np.uint8)
    except (MemoryError, torch.OutOfMemoryError):
        raise ModelError(
            f"{gib_words(num_bytes)} cannot be allocated on {device.torch_device} "
            f"({gib_words(device.free_bytes())} are free): lower --cache-gib, --host-gib or "
            "--max-running."
        ) from None
    return torch.from_numpy(untouched).view(dtype).view(shape)
