"""Writes steps and requests as a Chrome trace, for https://ui.perfetto.dev and chrome://tracing.

The format is the JSON array of the Trace Event Format. Steps and their phases are complete events
("X"), and counters are "C". Requests overlap, so they are nestable asynchronous events ("b", "e").
The trace has no tokens and no text.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.interfaces import EngineCore, StepReport
    from engine.requests.request import Ended

MAX_BYTES = 1 << 30
"""Maximum size of the file; the trace ends there."""
PHASES = ("schedule", "forward", "sample", "wait", "commit")
logger = logging.getLogger(__name__)


class Trace:
    """Writes one file. ``step`` is an observer of an engine, ``request`` a listener of its
    ``RecentRequests``. A full disk ends the trace, without an effect on requests."""

    def __init__(
        self,
        path: str | Path,
        clock: Callable[[], float] = time.perf_counter,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """``clock`` is the engine's. Raises OSError if ``path`` cannot be written."""
        self._path, self._clock, self._max_bytes = Path(path), clock, max_bytes
        self._file = self._path.open("w", encoding="utf-8")
        self._num_bytes = self._file.write("[\n")
        self._started_s = clock()
        self._is_open = True
        names = (("process_name", 0, "hybridcache engine"), ("thread_name", 1, "steps"))
        self._write(
            {"name": name, "ph": "M", "pid": 1, "tid": thread, "args": {"name": said}}
            for name, thread, said in names
        )

    def step(self, report: StepReport) -> None:
        """Write a step that was just committed. Steps that computed nothing are omitted. O(1)."""
        num_tokens = report.num_prefill_tokens + report.num_decode_tokens
        if not (self._is_open and num_tokens):
            return
        spent = [getattr(report, f"{phase}_s") for phase in PHASES]
        start_s = at_s = self._clock() - sum(spent)
        counted = {"prefill": report.num_prefill_tokens, "decode": report.num_decode_tokens}
        events = [self._span("step", start_s, sum(spent), counted)]
        for phase, duration_s in zip(PHASES, spent, strict=True):
            events.append(self._span(phase, at_s, duration_s))
            at_s += duration_s
        queues = {"running": report.num_running, "waiting": report.num_waiting}
        for name, values in (("tokens a step", counted), ("requests", queues)):
            events.append(self._event(name, "C", start_s, args=values))
        self._write(events)

    def request(self, ended: Ended) -> None:
        """Write a request that has ended. O(1)."""
        if not self._is_open:
            return
        lost = {} if ended.losses is None else ended.losses._asdict()
        told = {
            "prompt tokens": ended.prompt_len,
            "cached tokens": ended.cached_len,
            "answer tokens": len(ended.tokens) - ended.prompt_len,
            "ended by": ended.reason,
            "preemptions": ended.num_preemptions,
        } | {f"lost: {cause}": tokens for cause, tokens in lost.items() if tokens}
        moments = [
            ("queue", ended.arrival_s, ended.scheduled_s),
            ("prefill", ended.scheduled_s, ended.first_token_s),
            ("decode", ended.first_token_s, ended.finished_s),
        ]
        events = self._pair(ended.request_id, ended.request_id, ended.arrival_s, ended.finished_s)
        events[0]["args"] = told
        for name, start_s, end_s in moments:
            if start_s is not None:
                end_s = ended.finished_s if end_s is None else end_s
                events[-1:-1] = self._pair(name, ended.request_id, start_s, end_s)
        self._write(events)

    def close(self) -> None:
        """Write the end of the file, which makes it valid JSON. Viewers also read a file without
        it."""
        if not self._is_open:
            return
        self._is_open = False
        end = self._event("the trace ends here", "i", self._clock())
        try:
            self._file.write(json.dumps(end) + "\n]\n")
            self._file.close()
        except OSError:
            logger.exception("The trace %s could not be completed.", self._path)

    def _event(self, name: str, kind: str, at_s: float, **more: Any) -> dict[str, Any]:
        at_us = round(1e6 * (at_s - self._started_s), 1)
        return {"name": name, "ph": kind, "ts": at_us, "pid": 1, "tid": 1, **more}

    def _span(
        self, name: str, start_s: float, duration_s: float, args: dict[str, int] | None = None
    ) -> dict[str, Any]:
        more = {} if args is None else {"args": args}
        return self._event(name, "X", start_s, dur=round(1e6 * duration_s, 1), **more)

    def _pair(self, name: str, id_: str, start_s: float, end_s: float) -> list[dict[str, Any]]:
        more = {"cat": "request", "id": id_}
        return [
            self._event(name, "b", start_s, **more),
            self._event(name, "e", end_s, **more),
        ]

    def _write(self, events: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(event, separators=(",", ":")) + ",\n" for event in events)
        try:
            self._num_bytes += self._file.write(text)
        except OSError:
            self._is_open = False
            logger.exception("The trace %s ends here: it could not be written.", self._path)
            return
        if self._num_bytes > self._max_bytes:
            logger.warning("The trace %s ends here: it has %d bytes.", self._path, self._num_bytes)
            self.close()


def start_trace(engine: EngineCore, path: str) -> Trace:
    """Start a trace of ``engine`` and return it. Raises ValueError if ``path`` cannot be
    written."""
    try:
        trace = Trace(path, engine.clock)
    except OSError as error:
        raise ValueError(f"--trace {path} cannot be written ({error.strerror}).") from error
    engine.observe(trace.step)
    engine.recent.listeners.append(trace.request)
    return trace
