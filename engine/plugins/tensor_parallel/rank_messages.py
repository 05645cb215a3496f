"""Messages between rank 0 and another rank on the same machine. They are pickled by
``multiprocessing.connection``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig
from engine.schedule.scheduler import Batch


@dataclass(frozen=True, slots=True)
class Start:
    """First command to a rank."""

    number: int
    count: int
    config: EngineConfig
    meeting: str
    """Path of the file through which the ranks connect."""
    num_threads: int
    """Number of threads on a CPU."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Compute a batch; see ``Runner.forward``."""

    batch: Batch
    num_drawn: int | None
    """Number of tokens drawn by the previous step, which rank 0 distributes, or None if none are
    needed."""


@dataclass(frozen=True, slots=True)
class Commit:
    """See ``Runner.commit``."""

    batch: Batch
    taken: Sequence[int]


RankEvent = Literal["here", "ready", "refused", "lost", "failed"]
"""``here``: the process runs and can connect to the others; ``ready``: its part of the model is
loaded. With the others it ends: ``refused``: the model is not supported in this configuration;
``lost``: another rank did not answer; ``failed``: there was another error."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """Message of a rank to rank 0."""

    event: RankEvent
    sentence: str = ""
    """Reason why the process ends."""

    @property
    def is_last(self) -> bool:
        """True if the process ends."""
        return self.event not in ("here", "ready")
