"""Recorded sessions of coding agents in blocks of 64 tokens (callanjfox/kv-cache-tester, traces).

A record is a session, with ids of its own. Its prompts begin with ``tool_tokens`` of tools, and
``system_tokens`` of system prompt. Equal numbers of both are assumed to be the same text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np

from hybridcache.lab.traces.arrivals import Starts
from hybridcache.lab.traces.dialects import STOP_REASONS
from hybridcache.lab.traces.frame import BLOCKS, Notes, Record, SessionReader, request_of_blocks
from hybridcache.lab.traces.trace import FreshIds, KnownIds, TraceRequest, distinct
from hybridcache.radix.protocol import chat_boundaries
from hybridcache.radix.tokens import Tokens, common_prefix_len


@dataclass(frozen=True, slots=True)
class CodingAgentReader(SessionReader):
    """Recorded sessions with their own pauses. ``starts`` sets the times of their starts."""

    word: ClassVar[str] = "coding-agent"
    usual_times: ClassVar[str] = "s"
    limits: ClassVar[str] = BLOCKS
    starts: Starts = field(default_factory=lambda: Starts("fixed", 1 / 300))
    unit: int = 64

    @staticmethod
    def recognises(record: Record) -> bool:
        return record.get("hash_id_scope") == "local" and "requests" in record

    @staticmethod
    def is_left_out(record: Record) -> bool:
        return bool(record.get("dup"))  # recorded twice

    def times_of(self, record: Record) -> Iterator[tuple[str, object]]:
        yield from (("t", request.number("t")) for request in record.objects("requests"))

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        unit, fresh, known, taken = self.unit, FreshIds(), KnownIds(), Counter[str]()
        per_s = self.time_unit().per_s

        @cache
        def blocks(*sizes: int) -> Tokens:
            """Return as many blocks as the last of ``sizes``, which agree if all sizes do."""
            return np.arange(sizes[-1], dtype=np.int32) + np.int32(known.reserve(sizes[-1]))

        def parse(record: Record) -> Iterator[TraceRequest]:
            name = distinct(str(record.get("id", "session")), taken)
            names, rows = {name: name}, list(requests_of(record, name, unit, notes, 0))
            offset = known.reserve(1 + max((int(ids.max()) for *_, ids in rows), default=0))
            for sizes, shared, when_s, agent, request, ids in rows:
                if agent not in names:
                    names[agent] = distinct(agent, taken)
                tokens = ids + np.int32(offset)
                tokens[:shared] = np.concatenate((blocks(sizes[0]), blocks(*sizes)))[:shared]
                one = request_of_blocks(request, tokens, unit, fresh, notes, ("in", "out"))
                kept = chat_boundaries(len(one.tokens), (shared,), (len(tokens),)).positions
                one = one._replace(
                    timestamp_s=when_s / per_s, session=names[agent], boundaries=kept
                )
                yield one._replace(stop_reason=STOP_REASONS.get(str(request.get("stop")), ""))

        return parse


def requests_of(owner: Record, name: str, unit: int, notes: Notes, at_s: float) -> Iterator[Any]:
    """Yield (blocks of tools and system prompt, number of shared ones, time, name, request, ids) of
    a session, and of its subagents, whose names are the session's with their ids. Requests that do
    not begin as the first one (a title, a summary) keep their own ids."""
    names = "tool_tokens", "system_tokens"
    tools, system = (owner.optional(owner.whole, name, 0, notes) for name in names)
    sizes = tools // unit, (tools + system) // unit - tools // unit
    head = np.zeros(0, np.int32)
    for request in owner.objects("requests"):
        when_s = at_s + request.seconds("t")
        if request.get("type") == "subagent":
            agent = f"{name}/{request.key('agent_id')}"
            yield from requests_of(request, agent, unit, notes, when_s)
        elif len(ids := request.id_runs("hash_ids")):
            if not len(head) and len(ids) >= sum(sizes):
                head = ids[: sum(sizes)]
            yield sizes, common_prefix_len(ids, head), when_s, name, request, ids
