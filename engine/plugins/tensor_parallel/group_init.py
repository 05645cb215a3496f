"""Construction of the group through which ranks exchange results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.layers.rank import Group
from engine.plugins.tensor_parallel.group import START_TIMEOUT_S, TorchGroup
from engine.plugins.tensor_parallel.rank_messages import Start
from engine.plugins.tensor_parallel.shared_memory import SharedGroup
from engine.runner.device import Device


def meet(start: Start, device: Device, lines: Sequence[int]) -> Group:
    """Return the group of the rank with the given ``start``.

    ``lines`` are descriptors of its connections to other ranks. Raises RunnerLost and ModelError as
    ``TorchGroup``.
    """
    if start.memory is not None:
        return SharedGroup(start.number, start.count, start.memory, lines, START_TIMEOUT_S)
    return TorchGroup(start.number, start.count, Path(start.meeting), device)
