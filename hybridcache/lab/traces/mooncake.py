"""Mooncake's published traces: hashes of 512-token blocks (FAST'25, kvcache-ai/Mooncake,
FAST25-release/traces).

``hash_ids`` lists every block of the prompt, including the last, partial one. Answers are lengths
only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TextIO

import numpy as np

from hybridcache.lab.trace import (
    FreshIds,
    Trace,
    TraceRequest,
    units,
)
from hybridcache.lab.traces.base import (
    FileReader,
    Record,
    TraceClock,
    in_order,
    json_lines,
    read_ids,
    seconds,
    whole,
)
from hybridcache.tokens import Tokens


@dataclass(frozen=True, slots=True)
class MooncakeReader(FileReader):
    """``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``. Every request is a
    separate session."""

    word: ClassVar[str] = "mooncake"
    unit: int = 512

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has ``hash_ids`` and an ``input_length``."""
        return "hash_ids" in record and "input_length" in record

    def __call__(self) -> Iterator[TraceRequest]:
        fresh, clock = FreshIds(), TraceClock()
        number = 0

        def parse(record: Record) -> Iterable[TraceRequest]:
            nonlocal number
            said_s = seconds(record, "timestamp") / 1000
            length = whole(record, "input_length", least=1)
            tokens = read_ids(record["hash_ids"])
            if len(tokens) != units(length, self.unit):
                raise ValueError(
                    f"{len(tokens)} hash_ids do not cover input_length {length} in blocks of "
                    f"{self.unit} tokens; "
                    "say their size with ?unit="
                )
            # The answer fills the prompt's partial block first.
            answer = whole(record, "output_length")
            total = units(length + answer, self.unit)
            output = fresh.take(total - len(tokens))
            partial = length - (len(tokens) - 1) * self.unit
            number += 1
            when = clock.at(said_s)
            yield TraceRequest(
                when, number, None, tokens, output, (), partial, answer_tokens=answer
            )

        return in_order(self.path, json_lines(self.path, self.bad), parse, self.bad)


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

    The format has no sessions, boundaries or contents of answers. A prompt that repeats an answer
    is therefore new there, as for a server that generates its own answers. Namespaces share no
    block.
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
