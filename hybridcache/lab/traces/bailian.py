"""Alibaba's published traces of Qwen on Bailian: hashes of 16-token blocks with parent requests
(alibaba-edu/qwen-bailian-usagetraces-anon; "KVCache Cache in the Wild", ATC'25).

Fields and units are those of the repository's README. A hash covers the 16 tokens of its block
only. A prompt is the list of its hashes, so prompts agree exactly as far as their lists do.

The data files themselves were not available. Two assumptions: a request continues its parent, and
the last, partial block of a prompt may have a hash or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridcache.lab.trace import FreshIds, TraceRequest, units
from hybridcache.lab.traces.base import (
    FileReader,
    Record,
    TraceClock,
    in_order,
    json_lines,
    key,
    read_ids,
    seconds,
    whole,
)
from hybridcache.tokens import Tokens


@dataclass(frozen=True, slots=True)
class BailianReader(FileReader):
    """``chat_id``, ``parent_chat_id`` (-1 for none), ``timestamp`` (s), ``input_length``,
    ``output_length``, ``hash_ids``.

    A request continues the session of its parent. A second child of the same parent (another try at
    an answer) opens another session. Answers are lengths only.
    """

    word: ClassVar[str] = "bailian"
    unit: int = 16

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has ``hash_ids`` and a chat with a parent."""
        return "hash_ids" in record and "parent_chat_id" in record

    def __call__(self) -> Iterator[TraceRequest]:
        fresh, clock = FreshIds(), TraceClock()
        sessions: dict[str | int, str | int] = {}
        followed: set[str | int] = set()

        def parse(record: Record) -> Iterable[TraceRequest]:
            said_s = seconds(record, "timestamp")
            chat, parent = key(record, "chat_id"), key(record, "parent_chat_id")
            length = whole(record, "input_length", least=1)
            answer = whole(record, "output_length")
            tokens, partial = self._blocks(record, length)
            if len(tokens) < units(length, self.unit):  # a rest without a hash is never shared
                tokens = np.concatenate((tokens, fresh.take(1)))
            output = fresh.take(units(length + answer, self.unit) - len(tokens))
            now = clock.at(said_s)
            session = chat
            if parent in sessions and parent not in followed:
                session = sessions[parent]
                followed.add(parent)
            sessions[chat] = session
            yield TraceRequest(
                now, session, None, tokens, output, (), partial, answer_tokens=answer
            )

        return in_order(self.path, json_lines(self.path, self.bad), parse, self.bad)

    def _blocks(self, record: Record, length: int) -> tuple[Tokens, int | None]:
        """Return (hashes, tokens in the last block of the prompt if it is partial, else None)."""
        tokens = read_ids(record["hash_ids"])
        if len(tokens) not in (length // self.unit, units(length, self.unit)):
            raise ValueError(
                f"{len(tokens)} hash_ids do not cover input_length {length} in blocks of "
                f"{self.unit} tokens; say their size with ?unit="
            )
        if len(tokens) and int(tokens.max()) >= FreshIds.FLOOR:
            raise ValueError("a hash_id is not below 2**30")
        return tokens, length % self.unit or None
