"""Recorded coding-agent sessions: hashes of 64-token blocks, run-length coded
(callanjfox/kv-cache-tester, traces).

A line is a session. ``hash_ids`` is a list of runs: [first id, last id] or a single id. Ids are
local to the session, so two sessions never agree on an id even if their texts do.

Shared text is reconstructed from ``tool_tokens`` and ``system_tokens``. A prompt begins with that
many tokens of tool definitions, and then of system prompt. Sessions (or subagents) with the same
two counts are assumed to have the same text there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from hybridcache.lab.arrivals import Fixed, Starts, interleave
from hybridcache.lab.trace import (
    FreshIds,
    TraceRequest,
    units,
)
from hybridcache.lab.traces.base import (
    LONGEST,
    FileReader,
    Record,
    json_lines,
    key,
    objects,
    parsed,
    seconds,
    text,
    whole,
)
from hybridcache.policies.boundaries import chat_boundaries
from hybridcache.tokens import Tokens, common_prefix_len


@dataclass(frozen=True, slots=True)
class CodingAgentReader(FileReader):
    """Recorded sessions with their own pauses. The start times follow ``starts``, because the files
    do not contain them."""

    word: ClassVar[str] = "coding-agent"
    starts: Starts = field(default_factory=lambda: Fixed(1 / 300))
    seed: int = 0
    duplicates: bool = False
    """True to include sessions marked ``dup`` (recorded twice)."""
    unit: int = 64

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has session-local ids and requests."""
        return record.get("hash_id_scope") == "local" and "requests" in record

    def __call__(self) -> Iterator[TraceRequest]:
        return interleave(self._sessions(), self.starts, unit=self.unit, seed=self.seed)

    def _sessions(self) -> Iterator[list[TraceRequest]]:
        ids = _Ids()

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            if self.duplicates or not record.get("dup"):
                yield _Session(record, ids, self.unit).requests()

        return parsed(self.path, json_lines(self.path, self.bad), parse, self.bad)


class _Ids:
    """Token ids of the whole trace: shared heads, blocks of sessions, unknown answers."""

    def __init__(self) -> None:
        self.fresh = FreshIds()
        self._next = 0
        self._heads: dict[Hashable, Tokens] = {}

    def reserve(self, num_ids: int) -> int:
        """Return the first of ``num_ids`` new ids."""
        first = self._next
        if first + num_ids > FreshIds.FLOOR:
            raise OverflowError("more than 2**30 blocks in one trace")
        self._next += num_ids
        return first

    def head(self, tool_blocks: int, system_blocks: int, key: Hashable) -> Tokens:
        """Return the tokens of a shared head. The part of the tools agrees if its length does, and
        the rest if both lengths do."""
        parts = []
        for kind, num_blocks in (((key,), tool_blocks), ((key, tool_blocks), system_blocks)):
            name = (*kind, num_blocks)
            if name not in self._heads:
                first = self.reserve(num_blocks)
                self._heads[name] = np.arange(first, first + num_blocks, dtype=np.int32)
            parts.append(self._heads[name])
        return np.concatenate(parts)


class _Session:
    """One line of the file, subagents included; requests in order of time."""

    def __init__(self, record: Record, ids: _Ids, unit: int) -> None:
        self._record, self._ids, self._unit = record, ids, unit
        most = max((last for _, last in _runs(record)), default=0)
        self._offset = ids.reserve(most + 1)

    def requests(self) -> list[TraceRequest]:
        """Return all requests. Raises ValueError, OverflowError or KeyError if one cannot be
        read."""
        found = list(self._walk(self._record, 0.0, str(key(self._record, "id"))))
        return sorted(found, key=lambda request: request.timestamp_s)

    def _walk(self, owner: Record, start_s: float, name: str) -> Iterator[TraceRequest]:
        tools, system = whole(owner, "tool_tokens"), whole(owner, "system_tokens")
        tool_blocks = tools // self._unit
        system_blocks = (tools + system) // self._unit - tool_blocks
        head = self._ids.head(tool_blocks, system_blocks, "heads")
        # All requests of the owner that carry the head begin with the same blocks. Others (a title,
        # a summary) keep their own ids.
        own_head: Tokens | None = None
        for request in objects(owner, "requests"):
            when = start_s + seconds(request, "t")
            if request["type"] == "subagent":
                yield from self._walk(request, when, f"{name}/{key(request, 'agent_id')}")
                continue
            tokens = self._tokens(request)
            if not len(tokens):
                continue
            if own_head is None and len(tokens) >= len(head):
                own_head = tokens[: len(head)].copy()
            shared = 0 if own_head is None else common_prefix_len(tokens, own_head)
            tokens[:shared] = head[:shared]
            yield self._request(request, when, name, tokens, shared)

    def _tokens(self, request: Record) -> Tokens:
        parts = [np.arange(first, last + 1, dtype=np.int32) for first, last in _spans(request)]
        return np.concatenate(parts) + np.int32(self._offset) if parts else np.zeros(0, np.int32)

    def _request(
        self, request: Record, when: float, name: str, tokens: Tokens, shared: int
    ) -> TraceRequest:
        length = whole(request, "in")
        blocks = len(tokens)
        if not blocks * self._unit <= length < (blocks + 1) * self._unit:
            raise ValueError(f"{blocks} blocks of {self._unit} do not cover {length} tokens")
        partial = length - blocks * self._unit
        if partial:  # a rest without a hash is never shared
            tokens = np.concatenate((tokens, self._ids.fresh.take(1)))
        answer = whole(request, "out")
        total = units(length + answer, self._unit)
        output = self._ids.fresh.take(total - len(tokens))
        boundaries = chat_boundaries(len(tokens), (shared,), (blocks,)).positions
        return TraceRequest(
            when,
            name,
            None,
            tokens,
            output,
            boundaries,
            partial or None,
            answer_tokens=answer,
            stop_reason=text(request, "stop") if request.get("stop") else "",
        )


def _runs(record: Record) -> Iterator[tuple[int, int]]:
    for request in objects(record, "requests"):
        if request["type"] == "subagent":
            yield from _runs(request)
        else:
            yield from _spans(request)


def _spans(request: Record) -> list[tuple[int, int]]:
    """Return (first, last) of every run; a run of one may be a bare id. Raises ValueError if the
    runs are invalid or contain more ids than a prompt can have."""
    runs = request["hash_ids"]
    if not isinstance(runs, list):
        raise ValueError("hash_ids is not a list of ids and runs of ids")
    spans, num_ids = [], 0
    for run in runs:
        pair = run if isinstance(run, list) else [run, run]
        if len(pair) != 2 or not all(type(end) is int and 0 <= end < 1 << 30 for end in pair):
            raise ValueError("a run of hash_ids is neither an id nor [first id, last id]")
        first, last = pair
        if last < first:
            raise ValueError("a run of hash_ids ends before it begins")
        num_ids += last - first + 1
        if num_ids > LONGEST:
            raise ValueError(f"more than {LONGEST} hash_ids in one prompt")
        spans.append((first, last))
    return spans
