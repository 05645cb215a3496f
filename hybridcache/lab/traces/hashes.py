"""Published traces as hashes of blocks: Mooncake's (512 tokens, FAST'25, kvcache-ai/Mooncake) and
Bailian's (16 tokens, alibaba-edu/qwen-bailian-usagetraces-anon, ATC'25).

A prompt is the list of its hashes, so prompts agree exactly as far as their lists do. Hashes may be
any whole numbers or texts: they are renumbered. Answers are lengths only, and fill the prompt's
last block first. The last, partial block of a prompt may have a hash or none.

Bailian's data files were not available: that a request continues its parent is an assumption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TextIO

import numpy as np

from hybridcache.lab.trace import FreshIds, Trace, TraceRequest, units
from hybridcache.lab.traces.base import (
    FileReader,
    Record,
    TraceClock,
    first_named,
    in_order,
    json_lines,
    key,
    seconds,
    whole,
)
from hybridcache.tokens import Tokens

SESSIONS = ("session_id", "session", "conversation_id")


@dataclass(frozen=True, slots=True)
class MooncakeReader(FileReader):
    """``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``, and a session if there
    is one. Otherwise each request is a session of its own."""

    word: ClassVar[str] = "mooncake"
    unit: int = 512

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has ``hash_ids`` and an ``input_length``."""
        return "hash_ids" in record and "input_length" in record

    def __call__(self) -> Iterator[TraceRequest]:
        blocks, number = _Blocks(self.unit), 0

        def parse(record: Record) -> Iterable[TraceRequest]:
            nonlocal number
            request = blocks.request(record, 1000)
            number += 1
            name = first_named(record, SESSIONS)
            yield request._replace(session=key(record, name) if name else number)

        return in_order(self.path, json_lines(self.path, self.bad), parse, self.bad)


@dataclass(frozen=True, slots=True)
class BailianReader(FileReader):
    """``chat_id``, ``parent_chat_id`` (-1 for none), ``timestamp`` (s), ``input_length``,
    ``output_length``, ``hash_ids``.

    A request continues the session of its parent. A second child of the same parent (another try at
    an answer) opens another session.
    """

    word: ClassVar[str] = "bailian"
    unit: int = 16

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has ``hash_ids`` and a chat with a parent."""
        return "hash_ids" in record and "parent_chat_id" in record

    def __call__(self) -> Iterator[TraceRequest]:
        blocks = _Blocks(self.unit)
        sessions: dict[str | int, str | int] = {}
        followed: set[str | int] = set()

        def parse(record: Record) -> Iterable[TraceRequest]:
            chat, parent = key(record, "chat_id"), key(record, "parent_chat_id")
            request = blocks.request(record, 1)
            session = chat
            if parent in sessions and parent not in followed:
                session = sessions[parent]
                followed.add(parent)
            sessions[chat] = session
            yield request._replace(session=session)

        return in_order(self.path, json_lines(self.path, self.bad), parse, self.bad)


class _Blocks:
    """Numbers of the hashes of a file, and ids of blocks without one."""

    def __init__(self, unit: int) -> None:
        self._unit, self._fresh, self._clock = unit, FreshIds(), TraceClock()
        self._numbers: dict[str | int, int] = {}

    def request(self, record: Record, times_a_second: int) -> TraceRequest:
        """Return the request of a record, without a session. ValueError if it is invalid."""
        said_s = seconds(record, "timestamp") / times_a_second
        length, answer = whole(record, "input_length", least=1), whole(record, "output_length")
        hashes = record["hash_ids"]
        if not isinstance(hashes, list) or not all(
            isinstance(one, str | int) and not isinstance(one, bool) for one in hashes
        ):
            raise ValueError("hash_ids is not a list of whole numbers or texts")
        if len(hashes) not in (length // self._unit, units(length, self._unit)):
            raise ValueError(
                f"{len(hashes)} hash_ids do not cover input_length {length} in blocks of "
                f"{self._unit} tokens; say their size with ?unit="
            )
        now = self._clock.at(said_s)
        numbers = [self._numbers.setdefault(one, len(self._numbers)) for one in hashes]
        tokens = np.asarray(numbers, np.int32)
        if len(tokens) < units(length, self._unit):  # a rest without a hash is never shared
            tokens = np.concatenate((tokens, self._fresh.take(1)))
        output = self._fresh.take(units(length + answer, self._unit) - len(tokens))
        partial = length % self._unit or None
        return TraceRequest(now, 0, None, tokens, output, (), partial, answer_tokens=answer)


class BlockIds:
    """Numbers of blocks, from 0. Two are equal if the blocks and all blocks before them are, as in
    Mooncake's own traces."""

    def __init__(self, unit: int, block_tokens: int) -> None:
        """Raises ValueError if ``block_tokens`` is not a multiple of ``unit``."""
        if block_tokens < 1 or block_tokens % unit:
            raise ValueError(
                f"blocks of {block_tokens} tokens are not made of ids of {unit}: take a multiple"
            )
        self._unit, self._block_tokens = unit, block_tokens
        self._numbers: dict[tuple[Hashable, int, bytes], int] = {}

    def of(self, owner: Hashable, tokens: Tokens, num_tokens: int) -> list[int]:
        """Return one number per block of a text of ``num_tokens``, including the last, partial one
        (its length is part of its identity). Texts of different owners share none.
        O(len(tokens))."""
        ids_a_block = self._block_tokens // self._unit
        before: Hashable = (owner,)
        found = []
        for start in range(0, len(tokens), ids_a_block):
            size = min(self._block_tokens, num_tokens - start * self._unit)
            raw = np.ascontiguousarray(tokens[start : start + ids_a_block])
            digest = hashlib.blake2b(raw.tobytes(), digest_size=16).digest()
            before = self._numbers.setdefault((before, size, digest), len(self._numbers))
            found.append(before)
        return found


def write(trace: Trace, file: TextIO, block_tokens: int = 512) -> int:
    """Write ``trace`` as Mooncake's JSON lines; returns the number of requests.

    The format has no boundaries or contents of answers. A prompt that repeats an answer is
    therefore new there, as for a server that generates its own answers. Namespaces share no block.
    """
    blocks = BlockIds(trace.unit, block_tokens)
    num_requests = 0
    for request in trace:
        num_requests += 1
        length = request.num_tokens(trace.unit)
        record = {
            "timestamp": round(request.timestamp_s * 1000),
            "input_length": length,
            "output_length": max(1, request.num_answer_tokens(trace.unit)),
            "hash_ids": blocks.of(request.namespace, request.tokens, length),
        }
        file.write(json.dumps(record) + "\n")
    return num_requests
