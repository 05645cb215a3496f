"""Conversion of a prefix between memory and bytes: the KV of its tokens, by layer, and the state at
its end.

The layout follows the mixers' declarations, so it includes the rows and the hidden vector of a
multi-token head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.config import ConfigError, EngineConfig
from engine.interfaces import Runner
from engine.runner.backends import digest_of
from engine.runner.memory import Memory
from engine.runner.model_runner import ModelRunner
from hybridcache.geometry.sizes import KVSpec, Spec
from hybridcache.tokens import Indices
from kernels.upload import upload

PROTOCOL = "3"
"""Version of the messages between two engines."""
PIECE_BYTES = 4 << 20
"""Maximum size of one piece, except for a state and the KV of a single token."""


def identity(config: EngineConfig, runner: Runner) -> dict[str, str]:
    """Describe all properties that two engines must share. O(bytes of the weights)."""
    return {
        "transfer protocol": PROTOCOL,
        **{name: str(value) for name, value in runner.identity().items()},
        "layout of memory": digest_of(PrefixBuffer.of(runner).layout.encode()),
        "page size": str(config.page_size),
        "checkpoint grid": str(config.grid),
        "exact": str(config.exact),
    }


def difference(own: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Return the differing properties and the remedy as the end of a sentence, or None if there are
    none."""
    names = ", ".join(name for name in own if own[name] != other.get(name))
    return f"{names}: configure both the same" if names else None


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes that may still be on their way to the host."""

    data: torch.Tensor
    """uint8, contiguous, on the host."""
    event: torch.Event | None

    def wait(self) -> torch.Tensor:
        """Wait for the bytes and return them. Safe to call from any thread."""
        if self.event is not None:
            self.event.synchronize()
        return self.data


class PrefixBuffer:
    """Reads and writes the memory of one runner. For the thread that computes, between two
    steps."""

    def __init__(
        self,
        tensors: Memory,
        keeps: Sequence[tuple[Spec, ...]],
        settle: Callable[[], None],
    ) -> None:
        """``keeps``: declared tensors of each entry of ``tensors.pools``. After ``settle``, rows
        and states are in the places of their owners."""
        self._tensors, self._settle = tensors, settle
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self.part_of: dict[int, int] = {}
        """Part of each mixer that stores KV."""
        layout = []
        for rank, (pools, specs) in enumerate(zip(tensors.pools, keeps, strict=True)):
            both = list(zip(pools, specs, strict=True))
            kept = [pool for pool, spec in both if isinstance(spec, KVSpec)]
            layout += [f"{spec.name}{spec.shape}{pool.dtype}" for pool, spec in both]
            if kept:
                self.part_of[rank] = len(self._parts)
                self._parts.append(tuple(kept))
        self.part_bytes = tuple(sum(map(_unit_bytes, pools)) for pools in self._parts)
        """Bytes per token, by part."""
        self.state_bytes = sum(one.numel() * one.itemsize for one in self._state(0))
        form = "" if tensors.checkpoints is None else tensors.checkpoints.format
        kind = "pools" if tensors.rows is None else "arena"
        self.layout = f"{kind} {form} {' '.join(layout)}"
        """Layout as text. Two memories with the same layout can exchange prefixes."""

    @classmethod
    def of(cls, runner: Runner) -> PrefixBuffer:
        """Return the buffer of a runner's memory. Raises ConfigError for a runner without memory
        that can be read and written between two steps."""
        if not isinstance(runner, ModelRunner):
            raise ConfigError("a role requires a ModelRunner, because its memory is read.")
        return cls(runner.tensors, runner.pool_specs, runner.return_states)

    @property
    def row_bytes(self) -> int:
        """Bytes per token, all parts together."""
        return sum(self.part_bytes)

    def _state(self, slot: int) -> list[torch.Tensor]:
        """Return views of all tensors in a checkpoint's slot."""
        tensors = self._tensors
        if not tensors.states:
            return []
        if tensors.checkpoints is not None:
            return [tensors.checkpoints.slots[slot]]
        return [states[:, slot] for states in tensors.states]

    @torch.inference_mode()
    def read_rows(self, part: int, rows: Indices) -> Copied:
        """Read a part of the KV rows ``rows``, int32[n]: uint8 ``[n, part_bytes]``."""
        self._settle()
        pools = self._parts[part]
        index = upload(rows.astype(np.int64), torch.int64, pools[0].device)
        return _to_host([pool[index].reshape(len(rows), -1).view(torch.uint8) for pool in pools], 1)

    @torch.inference_mode()
    def write_rows(self, part: int, rows: Indices, data: torch.Tensor) -> None:
        """Write the result of ``read_rows`` to other rows."""
        self._settle()
        pools = self._parts[part]
        index = upload(rows.astype(np.int64), torch.int64, pools[0].device)
        columns = data.split([_unit_bytes(pool) for pool in pools], 1)
        for pool, column in zip(pools, columns, strict=True):
            values = column.contiguous().view(pool.dtype).view(len(rows), *pool.shape[1:])
            pool[index] = _to_device(values, pool.device)

    @torch.inference_mode()
    def read_state(self, slot: int) -> Copied:
        """Read the checkpoint in ``slot``: uint8 ``[state_bytes]``."""
        self._settle()
        views = [view.contiguous().view(-1).view(torch.uint8) for view in self._state(slot)]
        return _to_host(views, 0)

    @torch.inference_mode()
    def write_state(self, slot: int, data: torch.Tensor) -> None:
        """Write the result of ``read_state`` to another slot."""
        self._settle()
        first = 0
        for view in self._state(slot):
            num_bytes = view.numel() * view.itemsize
            piece = data[first : first + num_bytes].contiguous().view(view.dtype)
            view.copy_(_to_device(piece.view(view.shape), view.device))
            first += num_bytes


def _unit_bytes(pool: torch.Tensor) -> int:
    return math.prod(pool.shape[1:]) * pool.itemsize


def _to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device like ``upload``, without waiting for the device's earlier work."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def _to_host(pieces: Sequence[torch.Tensor], dim: int) -> Copied:
    """Copy all ``pieces``, concatenated, to the host."""
    data = torch.cat(tuple(pieces), dim) if len(pieces) > 1 else pieces[0].clone()
    if data.device.type == "cpu":
        return Copied(data.contiguous(), None)
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    host.copy_(data, non_blocking=True)
    event = torch.Event(data.device)
    event.record()
    return Copied(host, event)
