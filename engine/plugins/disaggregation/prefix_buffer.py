"""Conversion of a prefix between memory and bytes: the arena rows of its tokens, and the state at
its end, both with the parts of a multi-token head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from engine.config import ConfigError, EngineConfig
from engine.interfaces import Runner
from engine.runner.backends import digest_of
from engine.runner.device import HostCopy
from engine.runner.model_runner import ModelRunner
from hybridcache.tokens import Indices
from kernels.upload import upload

PROTOCOL = "4"
"""Version of the messages between two engines."""
PIECE_BYTES = 4 << 20
"""Maximum size of one message, except for a state and the KV of a single token."""


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
        self.row_bytes = memory.rows.shape[1]
        self.state_bytes = 0 if self._slots is None else self._slots.shape[1]
        layout = ["" if memory.checkpoints is None else str(memory.checkpoints.format)]
        for pools, specs in zip(memory.pools, runner.pool_specs, strict=True):
            both = zip(pools, specs, strict=True)
            layout += [f"{spec.name}{spec.shape}{pool.dtype}" for pool, spec in both]
        self.layout = " ".join(layout)
        """Layout as text. Two memories with the same layout can exchange prefixes."""

    @torch.inference_mode()
    def read_rows(self, rows: Indices) -> HostCopy:
        """Read the KV rows ``rows``, int32[n]."""
        self._settle()
        return HostCopy(self._rows[self._index(rows)])

    @torch.inference_mode()
    def write_rows(self, rows: Indices, data: torch.Tensor) -> None:
        """Write the bytes of ``read_rows``, uint8, to other rows."""
        self._settle()
        values = data.view(self._rows.dtype).view(len(rows), -1)
        self._rows[self._index(rows)] = upload(values, values.dtype, self._rows.device)

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
        self._slots[slot] = upload(data, torch.uint8, self._slots.device)

    def _index(self, rows: Indices) -> torch.Tensor:
        return upload(rows.astype(np.int64), torch.int64, self._rows.device)
