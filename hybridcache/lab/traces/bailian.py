"""Bailian's published traces: hashes of blocks of 16 tokens, as in ``mooncake.py``
(alibaba-edu/qwen-bailian-usagetraces-anon, ATC'25).

The data files were not available: that a request continues its parent is an assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar

from hybridcache.lab.traces.frame import Record
from hybridcache.lab.traces.mooncake import MooncakeReader


@dataclass(frozen=True, slots=True)
class BailianReader(MooncakeReader):
    """Mooncake's fields, ``timestamp`` in seconds, with ``chat_id`` and ``parent_chat_id`` (-1 for
    none).

    A request continues the session of its parent. A second child of the same parent (another try at
    an answer) opens another session.
    """

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
