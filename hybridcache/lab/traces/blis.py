"""Workloads of BLIS (inference-sim/inference-sim) as comma-separated values, in two formats.

The older format has ``arrival_time`` (s), ``request_id``, ``model``, and ``prefill_tokens`` and
``decode_tokens``: ids as a JSON list. Files with counts instead (its ``traces.csv``) are refused,
because counts do not show which prompts agree.

The newer format, "trace v2", contains lengths. The first ``prefix_length`` tokens agree among the
members of a ``prefix_group``, and ``input_tokens`` more are unique to each request. Requests in no
group use ``server_input_tokens`` if the server counted them. Times are ``arrival_time_us``.

The rounds of a ``session_id`` are independent by default. If the header file (YAML, not read)
contains ``session_context_growth: accumulate``, pass ``growth=accumulate``. Each round then
continues the previous round and its answer, unless ``input_tokens_reset`` marks a new context.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridcache.lab.trace import FreshIds, TextIds, TraceRequest
from hybridcache.lab.traces.base import (
    COUNTS_ALONE,
    LONGEST,
    FileReader,
    Record,
    TraceClock,
    csv_lines,
    in_order,
    number,
    read_ids,
)
from hybridcache.policies.boundaries import chat_boundaries
from hybridcache.tokens import Tokens

GROWTHS = ("none", "accumulate")


@dataclass(frozen=True, slots=True)
class BlisReader(FileReader):
    """One request per row. Models and tenants share nothing, as in BLIS's routing."""

    word: ClassVar[str] = "blis"
    is_csv: ClassVar[bool] = True
    growth: str = "none"
    """Growth of sessions' prompts in a trace v2: ``none`` or ``accumulate``."""
    unit: int = 1

    def __post_init__(self) -> None:
        if self.growth not in GROWTHS:
            raise ValueError(f"option 'growth' is one of {', '.join(GROWTHS)}, not {self.growth!r}")

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the columns required by either format are present."""
        return "prefill_tokens" in record or {"arrival_time_us", "input_tokens"} <= record.keys()

    def __call__(self) -> Iterator[TraceRequest]:
        rows = _Rows(self.growth == "accumulate")
        return in_order(self.path, csv_lines(self.path, self.bad), rows.parse, self.bad)


class _Rows:
    """Converts rows to requests. Keeps the prefixes of groups and the contexts of sessions."""

    def __init__(self, accumulates: bool) -> None:
        self._accumulates = accumulates
        self._fresh, self._clock = FreshIds(), TraceClock()
        self._number = 0
        self._ids = TextIds()
        self._groups: dict[str, Tokens] = {}
        self._contexts: dict[str, Tokens] = {}

    def parse(self, row: Record) -> Iterable[TraceRequest]:
        """Return the request of the row. Raises ValueError or KeyError, without any other effect,
        if the row is invalid."""
        self._number += 1
        return [self._by_ids(row) if "prefill_tokens" in row else self._by_lengths(row)]

    def _by_ids(self, row: Record) -> TraceRequest:
        when = number(row, "arrival_time" if "arrival_time" in row else "arrived_at")
        prompt, answer = _ids(row, "prefill_tokens"), _ids(row, "decode_tokens")
        if not len(prompt):
            raise ValueError("the prompt is empty")
        now = self._clock.at(when)
        return TraceRequest(now, self._number, row.get("model") or None, prompt, answer)

    def _by_lengths(self, row: Record) -> TraceRequest:
        if "input_tokens" not in row:
            raise KeyError("input_tokens")
        group, session = row.get("prefix_group"), row.get("session_id")
        own, shared = _length(row, "input_tokens"), _length(row, "prefix_length")
        own = own if group else _length(row, "server_input_tokens") or own
        num_answer, reset = _length(row, "output_tokens"), row.get("input_tokens_reset")
        before = self._contexts.get(session) if session and self._accumulates else None
        if before is not None and reset:
            before, own = before[:0], _length(row, "input_tokens_reset")
        if before is None:
            before = self._prefix(group, shared) if group else np.zeros(0, np.int32)
        if not len(before) + own:
            raise ValueError("the prompt is empty")
        now = self._clock.at(number(row, "arrival_time_us") / 1e6)
        prompt = np.concatenate((before, self._ids.take(own)))
        # Later rounds repeat the answer, so its ids are the trace's own there.
        answer = self._ids.take(num_answer) if self._accumulates else self._fresh.take(num_answer)
        if session:
            self._contexts[session] = np.concatenate((prompt, answer))
        shared = 0 if session else len(before)
        boundaries = chat_boundaries(len(prompt), (shared,), (len(prompt),)).positions
        named = [row[name] for name in ("model", "tenant_id") if row.get(name)]
        namespace = ", ".join(named) or None
        return TraceRequest(now, session or self._number, namespace, prompt, answer, boundaries)

    def _prefix(self, group: str, length: int) -> Tokens:
        """Return the first ``length`` ids of the group's text."""
        known = self._groups.get(group, np.zeros(0, np.int32))
        if len(known) < length:
            known = np.concatenate((known, self._ids.take(length - len(known))))
            self._groups[group] = known
        return known[:length]


def _length(row: Record, name: str) -> int:
    """Return a length in tokens; 0 if the column is missing or empty."""
    said = row.get(name) or "0"
    if not said.isdecimal() or int(said) > LONGEST:
        raise ValueError(f"{name} is {said!r}, not a whole number in [0, {LONGEST}]")
    return int(said)


def _ids(row: Record, name: str) -> Tokens:
    try:
        listed = json.loads(row[name])
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is {row[name]!r:.40}, not a JSON list of ids") from None
    if isinstance(listed, int):
        raise ValueError(
            f"{name} is a count, {listed}, and a list of ids is needed. {COUNTS_ALONE}"
        )
    return read_ids(listed)
