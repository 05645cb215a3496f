"""The tensors behind the integers: KV rows, states, and which rows a running request has.

Allocators hand out rows and slots; nothing here knows who owns them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.run.device import Device
from engine.run.model_config import ModelConfig, ModelError
from engine.schedule.memory import SLOTS_OF_ONE, MemorySizes
from hybridcache.allocators.arena import slab_rows
from hybridcache.units import GIB
from kernels.upload import upload

CPU_SHARE = 0.25
CPU_MAX_BYTES = 4 * GIB
ACCELERATOR_SHARE = 0.9
"""Of what is free beside weights, graphs and the largest step; the rest is for sampling and for
gaps."""
MIN_KV_TOKENS = 256
MIN_SLOTS = 2
"""Of a pool: one for a running request, one for a checkpoint."""
ALIGNMENT = 16
"""Bytes. Rows, and what lies in a slot, begin at multiples of it."""


class MemoryPlan(MemorySizes):
    """``MemorySizes`` that fit. Beside them a row and a slot are allocated that padding writes
    to."""

    __slots__ = ()

    @classmethod
    def fit(
        cls,
        model: ModelConfig,
        dtype: torch.dtype,
        device: Device,
        *,
        kv_bytes: int | None,
        state_bytes: int | None,
        cache_bytes: int | None,
        page_size: int = 1,
        state_dtype: torch.dtype = torch.float32,
        reserved_bytes: int = 0,
    ) -> MemoryPlan:
        """The rule: one arena of ``cache_bytes``, or two pools where bytes are given for one of
        them; the other then has what is given for it, or half the default. The default is a quarter
        of the free memory, at most 4 GiB, on a CPU, and elsewhere 90 % of what is free without the
        ``reserved_bytes``. Raises ModelError naming the bytes a budget would need."""
        row, state = kv_row_bytes(model, dtype), state_slot_bytes(model, dtype, state_dtype)
        if kv_bytes is None and state_bytes is None:
            if cache_bytes is None:
                cache_bytes = default_cache_bytes(device, reserved_bytes)
            return cls._arena(cache_bytes, row, state, page_size)
        if kv_bytes is None or (state_bytes is None and state):
            other = default_cache_bytes(device, reserved_bytes) // (2 if state else 1)
            kv_bytes = other if kv_bytes is None else kv_bytes
            state_bytes = other if state_bytes is None else state_bytes
        return cls._pools(kv_bytes, state_bytes or 0, row, state, page_size)

    @classmethod
    def _arena(cls, num_bytes: int, row: int, state: int, page_size: int) -> MemoryPlan:
        slab = slab_rows(state, row, page_size) if state else 0
        num_rows = num_bytes // row // page_size * page_size
        least = MIN_KV_TOKENS + SLOTS_OF_ONE * slab
        if num_rows < least:
            states = f" and {SLOTS_OF_ONE} states" if state else ""
            raise ModelError(
                f"{_gib(num_bytes)} hold {num_rows} tokens of this model; at least {MIN_KV_TOKENS} "
                f"tokens{states}, "
                f"{_gib(least * row)}, are needed."
            )
        return cls("arena", num_rows, num_rows // slab if slab else 0, row, state, page_size)

    @classmethod
    def _pools(
        cls, kv_bytes: int, state_bytes: int, row: int, state: int, page_size: int
    ) -> MemoryPlan:
        num_rows = kv_bytes // row // page_size * page_size
        num_slots = state_bytes // state if state else 0
        if num_rows < MIN_KV_TOKENS:
            raise ModelError(
                f"{_gib(kv_bytes)} for KV hold {num_rows} tokens of this model; "
                f"at least {MIN_KV_TOKENS} tokens, {_gib(MIN_KV_TOKENS * row)}, are needed."
            )
        if state and num_slots < MIN_SLOTS:
            raise ModelError(
                f"{_gib(state_bytes)} for states hold {num_slots} of this model's; "
                f"at least {MIN_SLOTS}, {_gib(MIN_SLOTS * state)}, are needed."
            )
        return cls("pools", num_rows, num_slots, row, state, page_size)

    @classmethod
    def smallest(
        cls, model: ModelConfig, dtype: torch.dtype, state_dtype: torch.dtype
    ) -> MemoryPlan:
        """Enough to rehearse steps with."""
        row, state = kv_row_bytes(model, dtype), state_slot_bytes(model, dtype, state_dtype)
        slab = slab_rows(state, row) if state else 0
        return cls._arena((MIN_KV_TOKENS + SLOTS_OF_ONE * slab) * row, row, state, 1)


def kv_row_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Of one token in all full-attention layers."""
    side = model.num_kv_heads * model.head_dim
    return aligned(2 * model.num_full_layers * side * dtype.itemsize)


def state_slot_bytes(
    model: ModelConfig, dtype: torch.dtype, state_dtype: torch.dtype = torch.float32
) -> int:
    """Of one sequence's conv and recurrent state in all linear layers; 0 for an attention-only
    model."""
    if model.linear is None:
        return 0
    state = model.num_linear_layers * math.prod(model.linear.state_shape)
    return conv_bytes(model, dtype) + aligned(state * state_dtype.itemsize)


def conv_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Of the conv states among them: where the recurrent ones begin."""
    assert model.linear is not None
    windows = model.num_linear_layers * math.prod(model.linear.window_shape)
    return aligned(windows * dtype.itemsize)


def aligned(num_bytes: int) -> int:
    """Up to the next multiple of what a wide load takes at once."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def default_cache_bytes(device: Device, reserved_bytes: int = 0) -> int:
    """For KV and states together where nothing was asked for."""
    if device.is_cpu:
        return min(int(device.free_bytes() * CPU_SHARE), CPU_MAX_BYTES)
    return max(0, int((device.unused_bytes() - reserved_bytes) * ACCELERATOR_SHARE))


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys and values of the full-attention layers: ``[L, N, HKV, D]`` each, a row per KV index."""

    key: torch.Tensor
    value: torch.Tensor
    padding_row: int


@dataclass(frozen=True, slots=True)
class StatePool:
    """Conv states ``[L, S, C, W - 1]`` and recurrent states ``[L, S, HV, K, V]`` of the linear
    layers, a slot each for running requests and checkpoints alike."""

    conv: torch.Tensor
    recurrent: torch.Tensor
    padding_slot: int
    whole: tuple[torch.Tensor, ...]
    """The same bytes as few pools ``[L, S, ...]`` to copy whole states in: of an arena, one."""

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv, self.recurrent


@dataclass(frozen=True, slots=True)
class Memory:
    """The tensors behind a ``MemoryPlan``. What padding reads and writes shares no byte with a row
    or slot that is handed out, nor do its row and its slot with each other."""

    kv: KVPool
    states: StatePool | None
    """None: an attention-only model."""
    rows: torch.Tensor | None
    """uint8 ``[N, row_bytes]``: the rows of an arena, as they move; None: two pools, where none
    does."""

    @classmethod
    def allocate(
        cls,
        plan: MemorySizes,
        model: ModelConfig,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: Device,
    ) -> Memory:
        """Zeros. Raises ModelError where there is no memory."""
        make = _allocate_arena if plan.memory == "arena" else _allocate_pools
        return make(plan, model, dtype, state_dtype, device)


def _allocate_pools(
    plan: MemorySizes,
    model: ModelConfig,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    device: Device,
) -> Memory:
    shape = (model.num_full_layers, plan.num_kv_tokens + 1, model.num_kv_heads, model.head_dim)
    key, value = allocate(shape, dtype, device), allocate(shape, dtype, device)
    kv = KVPool(key, value, plan.num_kv_tokens)
    if model.linear is None:
        return Memory(kv, None, None)
    states = (model.num_linear_layers, plan.num_slots + 1)
    conv = allocate((*states, *model.linear.window_shape), dtype, device)
    recurrent = allocate((*states, *model.linear.state_shape), state_dtype, device)
    return Memory(kv, StatePool(conv, recurrent, plan.num_slots, (conv, recurrent)), None)


def _allocate_arena(
    plan: MemorySizes,
    model: ModelConfig,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    device: Device,
) -> Memory:
    """Rows side by side; behind the last, the first whole slab is padding's, and the row after
    that."""
    slab, row_bytes = plan.slab_rows, plan.row_bytes
    padding_slot = -(-plan.num_kv_tokens // slab) if slab else 0
    padding_row = (padding_slot + 1) * slab if slab else plan.num_kv_tokens
    rows = allocate((padding_row + 1, row_bytes), torch.uint8, device)
    side = (model.num_kv_heads, model.head_dim)
    layer = 2 * math.prod(side) * dtype.itemsize
    key, value = (
        _view(rows, dtype, (model.num_full_layers, len(rows), *side), layer, row_bytes, first)
        for first in (0, layer // 2)
    )
    kv = KVPool(key, value, padding_row)
    if model.linear is None:
        return Memory(kv, None, rows)
    states = (model.num_linear_layers, padding_slot + 1)
    window, state = model.linear.window_shape, model.linear.state_shape
    widths = math.prod(window) * dtype.itemsize, math.prod(state) * state_dtype.itemsize
    first = conv_bytes(model, dtype)
    conv = _view(rows, dtype, (*states, *window), widths[0], plan.slot_bytes)
    recurrent = _view(rows, state_dtype, (*states, *state), widths[1], plan.slot_bytes, first)
    whole = _view(rows, torch.uint8, (1, states[1], plan.state_bytes), 0, plan.slot_bytes)
    return Memory(kv, StatePool(conv, recurrent, padding_slot, (whole,)), rows)


def _view(
    rows: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layer_bytes: int,
    unit_bytes: int,
    first_byte: int = 0,
) -> torch.Tensor:
    """``[L, units, ...]`` of an arena: what begins at ``first_byte`` of every unit (a row, a slab),
    layer after layer."""
    inner = [math.prod(shape[i + 1 :]) for i in range(2, len(shape))]
    strides = (layer_bytes // dtype.itemsize, unit_bytes // dtype.itemsize, *inner)
    return rows.flatten().view(dtype).as_strided(shape, strides, first_byte // dtype.itemsize)


class RequestTable:
    """The KV indices of every running request: int32 ``[rows, max_model_len]``, on the host and on
    the device."""

    def __init__(self, num_rows: int, max_model_len: int, padding_index: int, device: Device):
        host = allocate((num_rows + 1, max_model_len), torch.int32, Device.resolve("cpu"))
        self.host: npt.NDArray[np.int32] = host.numpy()
        self.host[num_rows] = padding_index
        self.padding_row = num_rows
        self._is_shared = device.is_cpu
        self.device = host if self._is_shared else host.to(device.torch_device)

    def write(self, writes: Sequence[tuple[int, int, npt.NDArray[np.int32]]]) -> None:
        """Put KV indices at (row, start). One copy to the device per write."""
        for row, start, indices in writes:
            end = start + len(indices)
            self.host[row, start:end] = indices
            if not self._is_shared:
                self.device[row, start:end] = upload(indices, torch.int32, self.device.device)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Zeros. On a CPU the pages are only touched when they are written. Raises ModelError where
    there is no memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if not device.is_cpu:
            return torch.zeros(shape, dtype=dtype, device=device.torch_device)
        untouched = np.zeros(num_bytes, dtype=np.uint8)
    except (MemoryError, torch.OutOfMemoryError):
        raise ModelError(
            f"{device.describe()} has no {_gib(num_bytes)} left: give less memory, or have fewer "
            "requests run."
        ) from None
    return torch.from_numpy(untouched).view(dtype).view(shape)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB"
