"""Hashes of blocks: Mooncake's of 512 tokens (FAST'25, kvcache-ai/Mooncake), and Bailian's of 16
(alibaba-edu/qwen-bailian-usagetraces-anon, ATC'25).

Prompts agree exactly as far as their hashes do. Bailian's data files were not available: that a
request continues its parent is an assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hybridcache.lab.traces.frame import BLOCKS, FileReader, Notes, Record, request_of_blocks
from hybridcache.lab.traces.named import NAMES
from hybridcache.lab.traces.trace import FreshIds, TraceRequest

PARTIAL = "partial in one request and whole in another: give it two ids, or hits are not true"


@dataclass(frozen=True, slots=True)
class MooncakeReader(FileReader):
    """Times in milliseconds. A request without a session is a session of its own."""

    word: ClassVar[str] = "mooncake"
    usual_times: ClassVar[str] = "ms"
    limits: ClassVar[str] = BLOCKS
    hashes: ClassVar[str] = "hash_ids"
    unit: int = 512

    @staticmethod
    def recognises(record: Record) -> bool:
        return {"hash_ids", "input_length"} <= record.keys()

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        fresh, clock, session = FreshIds(), self.clock(notes), self.sessions(notes)
        numbers, whole, partial = dict[str | int, int](), set[str | int](), set[str | int]()

        def parse(record: Record) -> Iterator[TraceRequest]:
            hashes = record.values_of(self.hashes)
            if not {*map(type, hashes)} <= {int, str}:
                raise ValueError(f"{self.hashes} holds more than whole numbers and texts")
            blocks = np.asarray([numbers.setdefault(one, len(numbers)) for one in hashes], np.int32)
            request = request_of_blocks(record, blocks, self.unit, fresh, notes)
            facts, when_s = self.facts(record) | {"session": session(record)}, clock(record)
            num_whole = record.whole("input_length") // self.unit
            whole.update(hashes[:num_whole])
            partial.update(hashes[num_whole:])
            notes.count(PARTIAL, "block", len(whole.intersection(hashes[num_whole:])))
            notes.count(PARTIAL, "block", len(partial.intersection(hashes[:num_whole])))
            yield request._replace(timestamp_s=when_s, **facts)

        return parse

    def facts(self, record: Record) -> dict[str, Any]:
        """Return other fields of the request."""
        return {}

    def sessions(self, notes: Notes) -> Callable[[Record], Hashable]:
        """Return the function that gives the session of the next record."""
        known = NAMES["session"]
        return lambda one: one.key(name) if (name := one.first(known)) else notes.unnamed()


@dataclass(frozen=True, slots=True)
class BailianReader(MooncakeReader):
    """Mooncake's fields, ``timestamp`` in seconds, with ``chat_id`` and ``parent_chat_id``. A
    request continues the session of its parent; a second child opens another session."""

    word: ClassVar[str] = "bailian"
    usual_times: ClassVar[str] = "s"
    unit: int = 16

    @staticmethod
    def recognises(record: Record) -> bool:
        return {"hash_ids", "parent_chat_id"} <= record.keys()

    def sessions(self, notes: Notes) -> Callable[[Record], Hashable]:
        by_last_chat: dict[str | int, str | int] = {}

        def session(record: Record) -> str | int:
            chat = record.key("chat_id")
            by_last_chat[chat] = by_last_chat.pop(record.key("parent_chat_id"), chat)
            return by_last_chat[chat]

        return session
