"""Recorded coding-agent sessions: hashes of 64-token blocks, run-length coded
(callanjfox/kv-cache-tester, traces).

A line is a session, with ids of its own: two sessions never agree on an id even if their texts do.
Shared text is reconstructed from ``tool_tokens`` and ``system_tokens``. A prompt begins with that
many tokens of tool definitions, and then of system prompt. Sessions (or subagents) with the same
two counts are assumed to have the same text there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import numpy as np

from hybridcache.lab.arrivals import Starts
from hybridcache.lab.trace import FreshIds, KnownIds, TraceRequest, distinct
from hybridcache.lab.traces.dialects import STOP_REASONS
from hybridcache.lab.traces.frame import Notes, Record, SessionReader, request_of_blocks
from hybridcache.policies.protocol import chat_boundaries
from hybridcache.tokens import Tokens, common_prefix_len


@dataclass(frozen=True, slots=True)
class CodingAgentReader(SessionReader):
    """Recorded sessions with their own pauses. ``starts`` sets the times of their starts."""

    word: ClassVar[str] = "coding-agent"
    starts: Starts = field(default_factory=lambda: Starts("fixed", 1 / 300))
    unit: int = 64

    @staticmethod
    def recognises(record: Record) -> bool:
        return record.get("hash_id_scope") == "local" and "requests" in record

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        unit, fresh, known = self.unit, FreshIds(), KnownIds()
        taken = Counter[str]()

        @cache
        def blocks(*sizes: int) -> Tokens:
            """Return as many blocks as the last of ``sizes``, which agree if all sizes do."""
            return np.arange(sizes[-1], dtype=np.int32) + np.int32(known.reserve(sizes[-1]))

        def head_of(owner: Record) -> Tokens:
            """Return the blocks of tools and system prompt, each agreeing if its lengths do."""
            tools, system = owner.whole("tool_tokens"), owner.whole("system_tokens")
            sizes = tools // unit, (tools + system) // unit - tools // unit
            return np.concatenate((blocks(sizes[0]), blocks(*sizes)))

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            if record.get("dup"):  # recorded twice
                return
            found, own_heads = list[TraceRequest](), dict[int, Tokens]()
            name = distinct(str(record.key("id")), taken)
            rows = [row for row in requests_of(record, name) if len(row[-1])]
            agents = dict.fromkeys(row[2] for row in rows if row[2] != name)
            names = {name: name} | {agent: distinct(agent, taken) for agent in agents}
            offset = known.reserve(1 + max((int(ids.max()) for *_, ids in rows), default=0))
            for owner, when_s, name, request, ids in rows:
                head, tokens = head_of(owner), ids + np.int32(offset)
                # All requests of the owner that carry the head begin with the same blocks. Others
                # (a title, a summary) keep their own ids.
                if len(tokens) >= len(head):
                    own_heads.setdefault(id(owner), tokens[: len(head)].copy())
                shared = common_prefix_len(tokens, own_heads.get(id(owner), tokens[:0]))
                tokens[:shared] = head[:shared]
                lengths, num_blocks = (request.whole("in"), request.whole("out")), len(tokens)
                if lengths[0] // unit != num_blocks:
                    raise ValueError(f"{num_blocks} blocks of {unit} are not {lengths[0]} tokens")
                one = request_of_blocks(when_s, names[name], tokens, lengths, unit, fresh)
                kept = chat_boundaries(len(one.tokens), (shared,), (num_blocks,)).positions
                reason = STOP_REASONS.get(str(request.get("stop")), "")
                found.append(one._replace(boundaries=kept, stop_reason=reason))
            yield sorted(found, key=lambda request: request.timestamp_s)

        return parse


def requests_of(
    owner: Record, name: str, start_s: float = 0.0
) -> Iterator[tuple[Record, float, str, Record, Tokens]]:
    """Yield (owner, time, name, request, ids) of a session and of its subagents. A name has that of
    the session, and the id of each agent down to the owner."""
    for request in owner.objects("requests"):
        when_s = start_s + request.seconds("t")
        if request["type"] == "subagent":
            yield from requests_of(request, f"{name}/{request.key('agent_id')}", when_s)
        else:
            yield owner, when_s, name, request, request.id_runs("hash_ids")
