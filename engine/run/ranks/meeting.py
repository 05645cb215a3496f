"""How ranks come to exchange what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.run.device import Device
from engine.run.ranks.group import START_TIMEOUT_S, TorchGroup
from engine.run.ranks.orders import Start
from engine.run.ranks.rank import Group
from engine.run.ranks.shared import SharedGroup


def meet(start: Start, device: Device, lines: Sequence[int]) -> Group:
    """The group of the rank that was started so. ``lines``: descriptors of its lines to others.
    RunnerLost, ModelError: see ``TorchGroup``."""
    if start.memory is not None:
        return SharedGroup(start.number, start.count, start.memory, lines, START_TIMEOUT_S)
    return TorchGroup(start.number, start.count, Path(start.meeting), device)
