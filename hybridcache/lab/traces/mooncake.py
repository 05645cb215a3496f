"""Published traces of hashes of blocks: Mooncake's of 512 tokens (FAST'25, kvcache-ai/Mooncake),
and those of Bailian of 16 tokens (alibaba-edu/qwen-bailian-usagetraces-anon, ATC'25).

Prompts agree exactly as far as their lists of hashes do. The last, partial block of a prompt may
have a hash or none. Bailian's data files were not available: that a request continues its parent is
an assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np

from hybridcache.lab.trace import FreshIds, TraceRequest, units
from hybridcache.lab.traces.frame import FileReader, Notes, Record, request_of_blocks


@dataclass(frozen=True, slots=True)
class MooncakeReader(FileReader):
    """``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``, and a session if there
    is one. Otherwise each request is a session of its own."""

    word: ClassVar[str] = "mooncake"
    times_per_s: ClassVar[int] = 1000
    unit: int = 512

    @staticmethod
    def recognises(record: Record) -> bool:
        return {"hash_ids", "input_length"} <= record.keys()

    def sessions(self) -> Callable[[Record], Hashable]:
        """Return the function that gives the session of the next record."""
        numbers = count(1)

        def session(record: Record) -> Hashable:
            name = record.first(("session_id", "session", "conversation_id"))
            return record.key(name) if name else f"unnamed {next(numbers)}"

        return session

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        unit, fresh, session = self.unit, FreshIds(), self.sessions()
        numbers: dict[str | int, int] = {}

        def parse(record: Record) -> Iterator[TraceRequest]:
            time = record.seconds("timestamp")
            length, answer = record.whole("input_length", least=1), record.whole("output_length")
            hashes = record.values_of("hash_ids")
            if any(type(one) not in (str, int) for one in hashes):
                raise ValueError("hash_ids holds more than whole numbers and texts")
            if len(hashes) not in (length // unit, units(length, unit)):
                raise ValueError(
                    f"{len(hashes)} hash_ids do not cover input_length {length} in blocks of "
                    f"{unit} tokens; say their size with ?unit="
                )
            name = session(record)
            blocks = np.asarray([numbers.setdefault(one, len(numbers)) for one in hashes], np.int32)
            yield request_of_blocks(
                time / self.times_per_s, name, blocks, (length, answer), unit, fresh
            )

        return parse


@dataclass(frozen=True, slots=True)
class BailianReader(MooncakeReader):
    """Mooncake's fields, ``timestamp`` in seconds, with ``chat_id`` and ``parent_chat_id``. A
    request continues the session of its parent; a second child opens another session."""

    word: ClassVar[str] = "bailian"
    times_per_s: ClassVar[int] = 1
    unit: int = 16

    @staticmethod
    def recognises(record: Record) -> bool:
        return {"hash_ids", "parent_chat_id"} <= record.keys()

    def sessions(self) -> Callable[[Record], Hashable]:
        sessions: dict[str | int, str | int] = {}
        followed: set[str | int] = set()

        def session(record: Record) -> str | int:
            chat, parent = record.key("chat_id"), record.key("parent_chat_id")
            continues = parent in sessions and parent not in followed
            followed.add(parent)
            sessions[chat] = sessions[parent] if continues else chat
            return sessions[chat]

        return session
