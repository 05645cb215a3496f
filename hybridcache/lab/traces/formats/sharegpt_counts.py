"""ShareGPT as numbers: ``{"id", "turns": [["u", 39], ["a", 257]], "first_msg_blocks16": [0]}``.

Turns are lengths of messages. First messages agree in equal blocks of 16 tokens. Messages are
framed as in ChatML (nine ids), and prompts end in a thought that the next does not keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

import numpy as np

from hybridcache.lab.traces.arrivals import Pauses
from hybridcache.lab.traces.frame import Notes, Record, SessionReader
from hybridcache.lab.traces.trace import UNNAMED, FreshIds, TraceRequest
from hybridcache.radix.protocol import chat_boundaries
from hybridcache.radix.tokens import Tokens


@dataclass(frozen=True, slots=True)
class ShareGPTCountsReader(SessionReader):
    """Conversations of which only the lengths are known."""

    word: ClassVar[str] = "sharegpt-counts"
    cap: int = 8192
    pause: Pauses = field(default_factory=Pauses)

    @staticmethod
    def recognises(record: Record) -> bool:
        return "turns" in record and "first_msg_blocks16" in record

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        fresh, empty, end, thought = FreshIds(), *map(_ids, ([], [5, 6], [7, 8]))
        numbers = count(1)
        headers = {role: _ids([0, number, 4]) for number, role in enumerate("uas", 1)}

        def parse(record: Record) -> Iterator[TraceRequest]:
            name = record.key("id") if "id" in record else f"{UNNAMED}{next(numbers)}"
            blocks = record.ids("first_msg_blocks16")
            if len(blocks) and blocks.max() >= 1 << 20:
                raise ValueError("first_msg_blocks16 holds a block that is not below 2**20")
            shared = (9 + 16 * blocks[:, None] + np.arange(16, dtype=np.int32)).reshape(-1)
            history, asked = empty, False
            for role, length in record.values_of("turns"):
                size = Record(turns=length).whole("turns")
                opened, words = np.concatenate((history, headers[role])), fresh.take(size)
                words[: len(shared)], shared = shared[:size], shared[:0]
                prompt = np.concatenate((opened, thought))
                if role == "a" and asked:
                    known, survives = chat_boundaries(len(prompt), kept=(len(opened),))
                    answer = np.concatenate((words, end[:1]))
                    one = TraceRequest(0.0, name, None, prompt, answer, known)
                    yield one._replace(answer_survives=survives)
                history, asked = np.concatenate((opened, words, end)), role == "u"

        return parse


def _ids(values: list[int]) -> Tokens:
    return np.asarray(values, np.int32)
