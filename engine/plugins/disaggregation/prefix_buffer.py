"""What travels of a prefix between two memories: the KV of its tokens, a layer at a time, and the
state at its end, as bytes. The layout is that of the mixers' declarations, so what a head that
drafts keeps (its rows, its hidden vector) is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.config import EngineConfig
from engine.runner.identity import digest_of
from engine.runner.memory import Memory
from engine.runner.model_runner import ModelRunner
from hybridcache.geometry.sizes import KVSpec, Spec
from hybridcache.tokens import Indices
from kernels.upload import upload

PROTOCOL = "2"
"""Version of the messages between two engines; changes with them."""


def identity(config: EngineConfig, runner: ModelRunner) -> dict[str, str]:
    """Describe everything that two engines must have in common. O(bytes of the weights)."""
    return {
        "transfer protocol": PROTOCOL,
        **runner.identity(),
        "layout of memory": digest_of(PrefixBuffer.of(runner).layout.encode()),
        "page size": str(config.page_size),
        "checkpoint grid": str(config.grid),
        "exact": str(config.exact),
    }


def difference(own: Mapping[str, str], other: object) -> str | None:
    """What differs and what to do, the end of a sentence; None: nothing."""
    if not isinstance(other, dict):
        return "all, for it says nothing of itself"
    names = ", ".join(name for name in own if own[name] != other.get(name))
    return f"{names}: give both the same" if names else None


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes on their way to the host."""

    data: torch.Tensor
    """uint8, contiguous, on the host."""
    event: torch.Event | None

    def wait(self) -> torch.Tensor:
        """The bytes, as soon as they are there. From any thread."""
        if self.event is not None:
            self.event.synchronize()
        return self.data


class PrefixBuffer:
    """Reads and writes one memory. For the thread that computes, between two steps."""

    def __init__(
        self,
        tensors: Memory,
        keeps: Sequence[tuple[Spec, ...]],
        settle: Callable[[], None],
    ) -> None:
        """``keeps``: of each entry of ``tensors.pools``. Rows and states are where their owners
        know them after ``settle``."""
        self._tensors, self._settle = tensors, settle
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self.part_of: dict[int, int] = {}
        """Mixer to its part, of those that keep KV."""
        layout = []
        for rank, (pools, specs) in enumerate(zip(tensors.pools, keeps, strict=True)):
            kept = [pool for pool, spec in zip(pools, specs, strict=True) if _is_kv(spec)]
            layout += [f"{s.name}{s.shape}{p.dtype}" for p, s in zip(pools, specs, strict=True)]
            if kept:
                self.part_of[rank] = len(self._parts)
                self._parts.append(tuple(kept))
        self.part_bytes = tuple(sum(map(_unit_bytes, pools)) for pools in self._parts)
        """Of one token, by part."""
        self.state_bytes = sum(one.numel() * one.itemsize for one in self._state(0))
        form = "" if tensors.checkpoints is None else tensors.checkpoints.format
        kind = "pools" if tensors.rows is None else "arena"
        self.layout = f"{kind} {form} {' '.join(layout)}"
        """In words: two memories with the same can exchange units."""

    @classmethod
    def of(cls, runner: ModelRunner) -> PrefixBuffer:
        """Return the buffer of a runner's memory."""
        return cls(runner.tensors, runner.pool_specs, runner.flush_pending)

    @property
    def row_bytes(self) -> int:
        """Of one token, all parts."""
        return sum(self.part_bytes)

    def _state(self, slot: int) -> list[torch.Tensor]:
        """Views of all that a checkpoint's slot holds."""
        tensors = self._tensors
        if not tensors.states:
            return []
        if tensors.checkpoints is not None:
            return [tensors.checkpoints.slots[slot]]
        return [states[:, slot] for states in tensors.states]

    @torch.inference_mode()
    def read_rows(self, part: int, rows: Indices) -> Copied:
        """uint8 ``[n, part_bytes]``: what the KV rows ``rows``, int32[n], have of a part."""
        self._settle()
        pools = self._parts[part]
        index = upload(rows.astype(np.int64), torch.int64, pools[0].device)
        return _to_host([pool[index].reshape(len(rows), -1).view(torch.uint8) for pool in pools], 1)

    @torch.inference_mode()
    def write_rows(self, part: int, rows: Indices, data: torch.Tensor) -> None:
        """Write what ``read_rows`` gave into other rows."""
        self._settle()
        pools = self._parts[part]
        index = upload(rows.astype(np.int64), torch.int64, pools[0].device)
        columns = data.split([_unit_bytes(pool) for pool in pools], 1)
        for pool, column in zip(pools, columns, strict=True):
            values = column.contiguous().view(pool.dtype).view(len(rows), *pool.shape[1:])
            pool[index] = _to_device(values, pool.device)

    @torch.inference_mode()
    def read_state(self, slot: int) -> Copied:
        """uint8 ``[state_bytes]``: the checkpoint in ``slot``."""
        self._settle()
        views = [view.contiguous().view(-1).view(torch.uint8) for view in self._state(slot)]
        return _to_host(views, 0)

    @torch.inference_mode()
    def write_state(self, slot: int, data: torch.Tensor) -> None:
        """Write what ``read_state`` gave into another slot."""
        self._settle()
        first = 0
        for view in self._state(slot):
            num_bytes = view.numel() * view.itemsize
            piece = data[first : first + num_bytes].contiguous().view(view.dtype)
            view.copy_(_to_device(piece.view(view.shape), view.device))
            first += num_bytes


def _is_kv(spec: Spec) -> bool:
    return isinstance(spec, KVSpec)


def _unit_bytes(pool: torch.Tensor) -> int:
    return math.prod(pool.shape[1:]) * pool.itemsize


def _to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As ``upload``: the host does not wait for what the device was told before."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def _to_host(pieces: Sequence[torch.Tensor], dim: int) -> Copied:
    """A copy on the host of all ``pieces``, side by side."""
    data = torch.cat(tuple(pieces), dim) if len(pieces) > 1 else pieces[0].clone()
    if data.device.type == "cpu":
        return Copied(data.contiguous(), None)
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    host.copy_(data, non_blocking=True)
    event = torch.Event(data.device)
    event.record()
    return Copied(host, event)
