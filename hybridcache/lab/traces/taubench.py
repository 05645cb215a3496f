"""Trajectories of tau-bench (sierra-research/tau-bench): an array of ``{"task_id", "trial", "traj":
[messages]}``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from hybridcache.lab.arrivals import Pauses, Poisson, Starts
from hybridcache.lab.trace import BadRecords
from hybridcache.lab.traces.conversations import ConversationsReader
from hybridcache.lab.traces.frame import Line, Record, json_array


@dataclass(frozen=True, slots=True)
class TauBenchReader(ConversationsReader):
    """Trajectories of a tool agent; customers and tools answer within a few seconds."""

    word: ClassVar[str] = "taubench"
    starts: Starts = field(default_factory=lambda: Poisson(0.2))
    pause: Pauses = field(default_factory=lambda: Pauses(median_s=5.0))

    @staticmethod
    def recognises(record: Record) -> bool:
        return "traj" in record

    def records(self, bad: BadRecords) -> Iterator[tuple[Line, Record]]:
        return json_array(self.path, bad)

    def conversation(self, record: Record, number: int) -> tuple[str | int, list[Record]]:
        name = f"task {record.key('task_id')}, trial {record.key('trial')}"
        return name, record.objects("traj")

    def unread(self, record: Record, messages: list[Record], has_times: bool) -> Iterator[str]:
        return iter(())  # A customer has the last word.
