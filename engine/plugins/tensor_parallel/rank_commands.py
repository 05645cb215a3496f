"""Messages between rank 0 and the other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.schedule.batch import Batch


@dataclass(frozen=True, slots=True)
class Start:
    """First command to a rank."""

    number: int
    count: int
    config: EngineConfig
    meeting: str
    """Path of the file through which the ranks connect."""
    memory: int | None
    """Descriptor of the shared memory for exchanges, or None to use ``torch.distributed``."""
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


@dataclass(frozen=True, slots=True)
class Here:
    """The process runs and can connect to the others."""


@dataclass(frozen=True, slots=True)
class RankReady:
    """The part of the model is loaded."""


@dataclass(frozen=True, slots=True)
class RankRefused:
    """The model is not supported in this configuration; the process ends."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Another rank did not answer; the process ends."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The process ends because of an error."""

    sentence: str
