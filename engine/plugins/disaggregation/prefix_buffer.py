"""Conversion of a prefix between memory and bytes: the KV of its tokens, by layer, and the state at
its end.

The layout follows the mixers' declarations, so it includes the rows and the hidden vector of a
multi-token head.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from engine.config import ConfigError, EngineConfig
from engine.interfaces import Runner
from engine.runner.backends import digest_of
from engine.runner.device import HostCopy
from engine.runner.model_runner import ModelRunner
from hybridcache.geometry.sizes import KVSpec
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
        "layout of memory": digest_of(PrefixBuffer(runner).layout.encode()),
        "page size": str(config.page_size),
        "checkpoint grid": str(config.grid),
        "exact": str(config.exact),
    }


def difference(own: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Return the differing properties and the remedy as the end of a sentence, or None if there are
    none."""
    names = ", ".join(name for name in own if own[name] != other.get(name))
    return f"{names}: configure both the same" if names else None


class PrefixBuffer:
    """Reads and writes the memory of one runner. For the thread that computes, between two
    steps."""

    def __init__(self, runner: Runner) -> None:
        """Raises ConfigError for a runner without memory that can be read and written between two
        steps."""
        if not isinstance(runner, ModelRunner):
            raise ConfigError("a role requires a ModelRunner, because its memory is read.")
        memory, self._settle = runner.tensors, runner.return_states
        self._rows = memory.rows.view(runner.dtype)
        self._slots: torch.Tensor | None = None
        """Checkpoints: uint8 ``[S, state_bytes]``, or None for an attention-only model."""
        if memory.states:
            saved = memory.checkpoints
            self._slots = memory.states[0][0] if saved is None else saved.slots
        self._columns: list[slice] = []
        """Columns of ``_rows`` of each part."""
        self.part_of: dict[int, int] = {}
        """Part of each mixer that stores KV."""
        layout, end = [], 0
        for rank, (pools, specs) in enumerate(zip(memory.pools, runner.pool_specs, strict=True)):
            both = zip(pools, specs, strict=True)
            layout += [f"{spec.name}{spec.shape}{pool.dtype}" for pool, spec in both]
            first = end
            end += sum(spec.size for spec in specs if isinstance(spec, KVSpec))
            if first < end:
                self.part_of[rank] = len(self._columns)
                self._columns.append(slice(first, end))
        form = "" if memory.checkpoints is None else memory.checkpoints.format
        self.layout = f"{form} {' '.join(layout)}"
        """Layout as text. Two memories with the same layout can exchange prefixes."""
        size = runner.dtype.itemsize
        self.part_bytes = tuple(size * (part.stop - part.start) for part in self._columns)
        """Bytes per token, by part."""
        self.row_bytes = sum(self.part_bytes)
        """Bytes per token, all parts together."""
        self.state_bytes = 0 if self._slots is None else self._slots.shape[1]

    @torch.inference_mode()
    def read_rows(self, part: int, rows: Indices) -> HostCopy:
        """Read a part of the KV rows ``rows``, int32[n]: uint8 ``[n, part_bytes]``."""
        self._settle()
        return HostCopy(self._rows[self._index(rows), self._columns[part]].view(torch.uint8))

    @torch.inference_mode()
    def write_rows(self, part: int, rows: Indices, data: torch.Tensor) -> None:
        """Write the result of ``read_rows`` to other rows."""
        self._settle()
        values = _to_device(data.view(self._rows.dtype), self._rows.device)
        self._rows[self._index(rows), self._columns[part]] = values

    @torch.inference_mode()
    def read_state(self, slot: int) -> HostCopy:
        """Read the checkpoint in ``slot``: uint8 ``[state_bytes]``."""
        self._settle()
        assert self._slots is not None
        return HostCopy(self._slots[slot].clone())

    @torch.inference_mode()
    def write_state(self, slot: int, data: torch.Tensor) -> None:
        """Write the result of ``read_state`` to another slot."""
        self._settle()
        assert self._slots is not None
        self._slots[slot] = _to_device(data, self._slots.device)

    def _index(self, rows: Indices) -> torch.Tensor:
        return upload(rows.astype(np.int64), torch.int64, self._rows.device)


def _to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device like ``upload``, without waiting for the device's earlier work."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
