"""Recorded coding-agent sessions: hashes of 64-token blocks, run-length coded
(callanjfox/kv-cache-tester, traces).

A line is a session. ``hash_ids`` is a list of runs: [first id, last id] or a single id. Ids are
local to the session, so two sessions never agree on an id even if their texts do.

Shared text is reconstructed from ``tool_tokens`` and ``system_tokens``. A prompt begins with that
many tokens of tool definitions, and then of system prompt. Sessions (or subagents) with the same
two counts are assumed to have the same text there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from hybridcache.lab.arrivals import Fixed, Starts
from hybridcache.lab.trace import FreshIds, TraceRequest, units
from hybridcache.lab.traces.dialects import STOP_REASONS
from hybridcache.lab.traces.frame import LONGEST, Record, SessionReader
from hybridcache.policies.boundaries import chat_boundaries
from hybridcache.tokens import Tokens, common_prefix_len


@dataclass(frozen=True, slots=True)
class CodingAgentReader(SessionReader):
    """Recorded sessions with their own pauses. The start times follow ``starts``, because the files
    do not contain them."""

    word: ClassVar[str] = "coding-agent"
    starts: Starts = field(default_factory=lambda: Fixed(1 / 300))
    duplicates: bool = False
    """True to include sessions marked ``dup`` (recorded twice)."""
    unit: int = 64

    @staticmethod
    def recognises(record: Record) -> bool:
        return record.get("hash_id_scope") == "local" and "requests" in record

    def parser(self) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        unit, fresh, num_ids = self.unit, FreshIds(), 0
        heads: dict[Hashable, Tokens] = {}

        def reserve(more: int) -> int:
            """Return the first of ``more`` new ids."""
            nonlocal num_ids
            if num_ids + more > FreshIds.FLOOR:
                raise OverflowError("more than 2**30 blocks in one trace")
            num_ids += more
            return num_ids - more

        def head_part(key: Hashable, size: int) -> Tokens:
            if key not in heads:
                heads[key] = np.arange(size, dtype=np.int32) + reserve(size)
            return heads[key]

        def walk(owner: Record, start_s: float, name: str, offset: int) -> Iterator[TraceRequest]:
            """Yield the requests of a session or subagent."""
            tools, system = owner.whole("tool_tokens"), owner.whole("system_tokens")
            sizes = tools // unit, (tools + system) // unit - tools // unit
            # The part of the tools agrees if its length does, and the rest if both lengths do.
            parts = (head_part(sizes[:1], sizes[0]), head_part(sizes, sizes[1]))
            head, own_head = np.concatenate(parts), None
            # All requests of the owner that carry the head begin with the same blocks. Others (a
            # title, a summary) keep their own ids.
            for request in owner.objects("requests"):
                when_s = start_s + request.seconds("t")
                if request["type"] == "subagent":
                    yield from walk(request, when_s, f"{name}/{request.key('agent_id')}", offset)
                    continue
                runs = [np.arange(first, last + 1) for first, last in spans(request)]
                if not runs:
                    continue
                tokens = (np.concatenate(runs) + offset).astype(np.int32)
                if own_head is None and len(tokens) >= len(head):
                    own_head = tokens[: len(head)].copy()
                shared = 0 if own_head is None else common_prefix_len(tokens, own_head)
                tokens[:shared] = head[:shared]
                length, answer, num_blocks = request.whole("in"), request.whole("out"), len(tokens)
                if length // unit != num_blocks:
                    raise ValueError(f"{num_blocks} blocks of {unit} do not cover {length} tokens")
                if length % unit:  # a rest without a hash is never shared
                    tokens = np.concatenate((tokens, fresh.take(1)))
                yield TraceRequest(
                    when_s,
                    name,
                    None,
                    tokens,
                    fresh.take(units(length + answer, unit) - len(tokens)),
                    chat_boundaries(len(tokens), (shared,), (num_blocks,)).positions,
                    length % unit or None,
                    answer_tokens=answer,
                    stop_reason=STOP_REASONS.get(str(request.get("stop")), ""),
                )

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            if self.duplicates or not record.get("dup"):
                most = max((last for _, last in all_spans(record)), default=0)
                found = list(walk(record, 0.0, str(record.key("id")), reserve(most + 1)))
                yield sorted(found, key=lambda request: request.timestamp_s)

        return parse


def all_spans(owner: Record) -> Iterator[tuple[int, int]]:
    """Yield the runs of ids of a session and of its subagents."""
    for request in owner.objects("requests"):
        is_subagent = request["type"] == "subagent"
        yield from all_spans(request) if is_subagent else spans(request)


def spans(request: Record) -> list[tuple[int, int]]:
    """Return (first, last) of every run; a run of one may be a bare id. Raises ValueError if the
    runs are invalid or contain more ids than a prompt can have."""
    pairs = [run if isinstance(run, list) else [run, run] for run in request.values_of("hash_ids")]
    for pair in pairs:
        if len(pair) != 2 or not all(type(end) is int and 0 <= end < 1 << 30 for end in pair):
            raise ValueError("hash_ids is not a list of ids and of runs [first id, last id]")
        if pair[1] < pair[0]:
            raise ValueError("a run of hash_ids ends before it begins")
    if sum(last - first + 1 for first, last in pairs) > LONGEST:
        raise ValueError(f"more than {LONGEST} hash_ids in one prompt")
    return [(first, last) for first, last in pairs]
