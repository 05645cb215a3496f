"""What the first rank and the others say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.schedule.batch import Batch


@dataclass(frozen=True, slots=True)
class Start:
    """The first order."""

    number: int
    count: int
    config: EngineConfig
    meeting: str
    """Path of the file in which the ranks find each other."""
    memory: int | None
    """Descriptor of the memory through which they exchange what they compute; None: they use
    ``torch.distributed``."""
    num_threads: int
    """On a CPU."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Compute a batch; see ``Runner.forward``."""

    batch: Batch
    num_drawn: int | None
    """Tokens that the step before drew, which the first rank hands out; None: none are wanted."""


@dataclass(frozen=True, slots=True)
class Commit:
    """See ``Runner.commit``."""

    batch: Batch
    taken: Sequence[int]


@dataclass(frozen=True, slots=True)
class Here:
    """The process runs: it can meet the others."""


@dataclass(frozen=True, slots=True)
class RankReady:
    """Its part of the model is loaded."""


@dataclass(frozen=True, slots=True)
class RankRefused:
    """The model is not served so; the process ends."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Another rank did not answer; the process ends."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The process ends of an error of its own."""

    sentence: str
