"""tau-bench trajectories: a tool agent and a simulated customer, one shared policy prompt
(sierra-research/tau-bench).

A JSON array of ``{"task_id", "trial", "traj": [messages]}``. Every message of the assistant is a
request; calls of tools are rendered as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from hybridcache.lab.arrivals import (
    Pauses,
    Poisson,
    Starts,
    interleave,
)
from hybridcache.lab.trace import TraceRequest
from hybridcache.lab.traces.base import (
    FileReader,
    Record,
    key,
    objects,
    parsed,
)
from hybridcache.lab.traces.sharegpt import json_array
from hybridcache.lab.traces.text import load_chat_text
from hybridcache.lab.traces.texts import answered


@dataclass(frozen=True, slots=True)
class TauBenchReader(FileReader):
    """Trajectories as sessions; customers and tools answer within a few seconds."""

    word: ClassVar[str] = "taubench"
    tokenizer: str = ""
    template: str = "chatml"
    starts: Starts = field(default_factory=lambda: Poisson(0.2))
    pauses: Pauses = field(default_factory=lambda: Pauses(median_s=5.0))
    seed: int = 0
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has a trajectory."""
        return "traj" in record

    def __call__(self) -> Iterator[TraceRequest]:
        return interleave(self._sessions(), self.starts, self.pauses, seed=self.seed)

    def _sessions(self) -> Iterator[list[TraceRequest]]:
        chat = load_chat_text(self.tokenizer, self.template)

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            name = f"task {key(record, 'task_id')}, trial {key(record, 'trial')}"
            yield answered(objects(record, "traj"), name, chat)

        return parsed(self.path, json_array(self.path, self.bad, "task_id"), parse, self.bad)
