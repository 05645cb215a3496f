"""Conversations for AIPerf (ai-dynamo/aiperf, ``--custom-dataset-type mooncake_trace``).

Each turn contains only its new text, so that a server's own answers become part of the next prompt.
Rows are Mooncake's with a ``session_id``: the first of a session has a ``timestamp`` (ms), later
ones a ``delay`` (ms after the previous answer). ``input_length`` and ``hash_ids`` describe the new
text alone.

AIPerf makes a text for each hash and keeps history and answers itself. Checked against the source
of aiperf 0.13.0, and its loader reads files written here. ``type`` in a row distinguishes this
format from Mooncake's.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TextIO

import numpy as np

from hybridcache.lab.trace import FreshIds, TextIds, Trace, TraceRequest, units
from hybridcache.lab.traces.base import (
    FileReader,
    Record,
    json_lines,
    key,
    parsed,
    read_ids,
    seconds,
    whole,
)
from hybridcache.lab.traces.mooncake import BlockIds
from hybridcache.tokens import Tokens

TYPE = "mooncake_trace"


@dataclass(frozen=True, slots=True)
class AIPerfReader(FileReader):
    """Turns as whole prompts, in tokens. Each hash becomes a text of ``block`` tokens, and each
    answer a separate text. Answers take no time. Holds the file in memory, because sessions may be
    stored one after the other."""

    word: ClassVar[str] = "aiperf"
    block: int = 512
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has the format's ``type`` and a length."""
        return record.get("type") == TYPE and "input_length" in record

    def __call__(self) -> Iterator[TraceRequest]:
        turns = _Turns(max(1, self.block))
        found = parsed(self.path, json_lines(self.path, self.bad), turns.parse, self.bad)
        return iter(sorted(found, key=lambda request: request.timestamp_s))


class _Turns:
    """Converts rows to requests. Keeps the time and text of each session."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._ids = TextIds()
        self._texts: dict[int, Tokens] = {}
        self._sessions: dict[str | int, tuple[float, Tokens]] = {}

    def parse(self, record: Record) -> list[TraceRequest]:
        """Return the request of the row. Raises ValueError or KeyError, without any other effect,
        if the row is invalid."""
        name = key(record, "session_id") if "session_id" in record else f"row {self._ids.num_taken}"
        length, answer = whole(record, "input_length", 1), whole(record, "output_length")
        hashes = read_ids(record.get("hash_ids") or []).tolist()
        if hashes and len(hashes) != units(length, self._block):
            raise ValueError(
                f"{len(hashes)} hash_ids do not cover input_length {length} in blocks of "
                f"{self._block} tokens; say their size with ?block="
            )
        begun_s, history = self._sessions.get(name, (0.0, np.zeros(0, np.int32)))
        when_s = seconds(record, "timestamp") / 1000 if "timestamp" in record else begun_s
        when_s += seconds(record, "delay") / 1000 if "delay" in record else 0.0
        new = [self._text(one) for one in hashes] or [self._ids.take(length)]
        prompt = np.concatenate((history, np.concatenate(new)[:length]))
        output = self._ids.take(answer)
        self._sessions[name] = (when_s, np.concatenate((prompt, output)))
        return [TraceRequest(when_s, name, None, prompt, output)]

    def _text(self, hash_id: int) -> Tokens:
        if hash_id not in self._texts:
            self._texts[hash_id] = self._ids.take(self._block)
        return self._texts[hash_id]


class _Open(NamedTuple):
    """State of a session after its last row."""

    name: str
    namespace: Hashable
    when_s: float
    prompt: Tokens
    answer: Tokens


def write(trace: Trace, file: TextIO, block_tokens: int = 512) -> int:
    """Write ``trace`` as AIPerf's multi-turn rows; returns the number of requests.

    A prompt that continues its session's last prompt and answer becomes a turn, with the time since
    then as its delay. Any other prompt (a template dropped the thoughts, an agent went back) begins
    another session with all its text. An answer without ids counts by its length.

    Raises ValueError if an id stands for several tokens, because the start of a turn's own text is
    then unknown.
    """
    if trace.unit != 1:
        raise ValueError(
            f"an id of {trace.name} stands for {trace.unit} tokens, so where a turn's own text "
            "begins is not known; export it --to mooncake, which AIPerf replays too"
        )
    blocks = BlockIds(1, block_tokens)
    sessions: dict[Hashable, _Open] = {}
    num_requests = 0
    for num_requests, request in enumerate(trace, start=1):
        before = sessions.get(request.session)
        kept = 0 if before is None else _continued(before, request)
        record: dict[str, Any] = {"type": TYPE}
        if before is not None and kept:
            record["session_id"] = before.name
            record["delay"] = round((request.timestamp_s - before.when_s) * 1000)
        else:
            record["session_id"] = f"{request.session}/{num_requests}"
            record["timestamp"] = round(request.timestamp_s * 1000)
        owner = (bool(kept), request.namespace)
        new = request.tokens[kept:]
        record["input_length"] = len(new)
        record["output_length"] = max(1, len(request.output))
        record["hash_ids"] = blocks.of(owner, new, len(new))
        file.write(json.dumps(record) + "\n")
        sessions[request.session] = _Open(
            record["session_id"],
            request.namespace,
            request.timestamp_s,
            request.tokens,
            request.output,
        )
    return num_requests


def _continued(before: _Open, request: TraceRequest) -> int:
    """Return how many tokens of the prompt are the session's last prompt and answer; 0 if it does
    not continue them."""
    told = len(before.answer) and before.answer[0] < FreshIds.FLOOR
    known = np.concatenate((before.prompt, before.answer)) if told else before.prompt
    end = len(before.prompt) + len(before.answer)
    same = np.array_equal(request.tokens[: len(known)], known)
    goes_on = same and len(request.tokens) > end and request.namespace == before.namespace
    return end if goes_on else 0
