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
from hybridcache.units import GIB
from kernels.upload import upload

CPU_SHARE = 0.25
CPU_MAX_BYTES = 4 * GIB
ACCELERATOR_SHARE = 0.9
"""Of what is free beside weights, graphs and the largest step; the rest is for sampling and for gaps."""
MIN_KV_TOKENS = 256
MIN_SLOTS = 2
"""One for a running request, one for a checkpoint."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How many KV rows and state slots fit. One row or slot more is allocated than counted: padding writes there."""

    num_kv_tokens: int
    num_slots: int
    kv_bytes: int
    state_bytes: int

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
        """The rule: KV and states get what is asked for each; one budget for both is halved, and an attention-only model's
        goes to KV whole. With no budget given it is a quarter of the free memory, at most 4 GiB, on a CPU, and elsewhere 90 %
        of what is free without the ``reserved_bytes``. Raises ModelError naming the bytes a budget would need."""
        row_bytes = kv_row_bytes(model, dtype)
        slot_bytes = state_slot_bytes(model, dtype, state_dtype)
        if cache_bytes is None and (kv_bytes is None or (state_bytes is None and slot_bytes)):
            cache_bytes = default_cache_bytes(device, reserved_bytes)
        half = (cache_bytes or 0) // 2 if slot_bytes else cache_bytes or 0
        kv_bytes = half if kv_bytes is None else kv_bytes
        state_bytes = (half if state_bytes is None else state_bytes) if slot_bytes else 0
        plan = cls(
            num_kv_tokens=kv_bytes // row_bytes // page_size * page_size,
            num_slots=state_bytes // slot_bytes if slot_bytes else 0,
            kv_bytes=kv_bytes,
            state_bytes=state_bytes,
        )
        if plan.num_kv_tokens < MIN_KV_TOKENS:
            raise ModelError(
                f"{_gib(kv_bytes)} for KV hold {plan.num_kv_tokens} tokens of this model; "
                f"at least {MIN_KV_TOKENS} tokens, {_gib(MIN_KV_TOKENS * row_bytes)}, are needed."
            )
        if slot_bytes and plan.num_slots < MIN_SLOTS:
            raise ModelError(
                f"{_gib(state_bytes)} for states hold {plan.num_slots} of this model's; "
                f"at least {MIN_SLOTS}, {_gib(MIN_SLOTS * slot_bytes)}, are needed."
            )
        return plan

    @classmethod
    def smallest(cls, model: ModelConfig) -> MemoryPlan:
        """Enough to rehearse steps with."""
        slots = MIN_SLOTS if model.linear is not None else 0
        return cls(MIN_KV_TOKENS, slots, kv_bytes=0, state_bytes=0)


def kv_row_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Of one token in all full-attention layers."""
    return 2 * model.num_full_layers * model.num_kv_heads * model.head_dim * dtype.itemsize


def state_slot_bytes(
    model: ModelConfig, dtype: torch.dtype, state_dtype: torch.dtype = torch.float32
) -> int:
    """Of one sequence's conv and recurrent state in all linear layers; 0 for an attention-only model."""
    if model.linear is None:
        return 0
    shape = model.linear
    conv = shape.conv_channels * (shape.conv_width - 1) * dtype.itemsize
    recurrent = shape.num_value_heads * shape.key_dim * shape.value_dim * state_dtype.itemsize
    return model.num_linear_layers * (conv + recurrent)


def default_cache_bytes(device: Device, reserved_bytes: int = 0) -> int:
    """For KV and states together where nothing was asked for."""
    if device.is_cpu:
        return min(int(device.free_bytes() * CPU_SHARE), CPU_MAX_BYTES)
    return max(0, int((device.unused_bytes() - reserved_bytes) * ACCELERATOR_SHARE))


class KVPool:
    """Keys and values of the full-attention layers: ``[L, N, HKV, D]`` each, a row per KV index."""

    def __init__(
        self, model: ModelConfig, num_tokens: int, dtype: torch.dtype, device: Device
    ) -> None:
        shape = (model.num_full_layers, num_tokens + 1, model.num_kv_heads, model.head_dim)
        self.key = allocate(shape, dtype, device)
        self.value = allocate(shape, dtype, device)
        self.padding_row = num_tokens


class StatePool:
    """Conv states ``[L, S, C, W - 1]`` and recurrent states ``[L, S, HV, K, V]`` of the linear layers, a slot each for running
    requests and checkpoints alike."""

    def __init__(
        self,
        model: ModelConfig,
        num_slots: int,
        dtype: torch.dtype,
        device: Device,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        assert model.linear is not None
        shape, layers = model.linear, model.num_linear_layers
        slots = num_slots + 1
        window = (shape.conv_channels, shape.conv_width - 1)
        state = (shape.num_value_heads, shape.key_dim, shape.value_dim)
        self.conv = allocate((layers, slots, *window), dtype, device)
        self.recurrent = allocate((layers, slots, *state), state_dtype, device)
        self.padding_slot = num_slots

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv, self.recurrent


class RequestTable:
    """The KV indices of every running request: int32 ``[rows, max_model_len]``, on the host and on the device."""

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
    """Zeros. On a CPU the pages are only touched when they are written. Raises ModelError where there is no memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if not device.is_cpu:
            return torch.zeros(shape, dtype=dtype, device=device.torch_device)
        untouched = np.zeros(num_bytes, dtype=np.uint8)
    except (MemoryError, torch.OutOfMemoryError):
        raise ModelError(
            f"{device.describe()} has no {_gib(num_bytes)} left: give less memory, or have fewer requests run."
        ) from None
    return torch.from_numpy(untouched).view(dtype).view(shape)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB"
