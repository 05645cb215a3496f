"""Common parts of trace readers: opening files, reporting bad lines, typed fields, and the protocol
of a reader."""

from __future__ import annotations

import csv
import gzip
import heapq
import io
import json
import math
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.tokens import Tokens

Record = Mapping[str, Any]
LONGEST = 1 << 24
"""Longest plausible prompt or answer in a trace, in tokens."""
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
"""Errors raised when reading a truncated or damaged gzip file."""

COUNTS_ALONE = (
    'Counts of tokens do not tell which prompts agree: the tutorial "Your own trace" turns them '
    "into a trace"
)
"""End of errors about files that hold counts instead of texts or ids."""

_BOM = b"\xef\xbb\xbf"
_R = TypeVar("_R")
_T = TypeVar("_T")


class TraceReader(Protocol):
    """Reader of one format. Instances carry the path and the options. Each iteration reads the file
    again, one record at a time."""

    word: ClassVar[str]
    """Name of the format, as in ``word:path``."""
    is_csv: ClassVar[bool] = False
    """True if the file has comma-separated values, false if it has JSON."""

    @property
    def unit(self) -> int:
        """Tokens per id."""
        ...

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether ``record``, the first of a file, is of this format."""
        ...

    def __call__(self) -> Iterator[TraceRequest]:
        """Yield the requests in order of time. Raises BadRecordError, which names the record, if
        one cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class FileReader(TraceReader):
    """Reader of the one file at ``path``; invalid records are reported to ``bad``."""

    path: Path
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))


@contextmanager
def open_bytes(path: str | Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    """Open a file, plain or gzipped (by its first two bytes), and skip its byte order mark if
    present.

    Reading raises one of ``DAMAGED`` if a gzipped file is damaged or truncated.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if zipped else open(path, "rb") as opened:
        with suppress(*DAMAGED):  # the next read reports the line
            if opened.peek(len(_BOM))[: len(_BOM)] == _BOM:
                opened.read(len(_BOM))
        yield opened


def json_lines(path: str | Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """Yield (line number, object) for every line of a JSONL file. Blank lines are skipped, bad ones
    reported.

    A truncated gzip file ends with the last whole line before the cut, which is reported.
    """
    with open_bytes(path) as file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline()
            except DAMAGED as error:
                bad.report(path, number, f"the gzip file is damaged from here on ({error})")
                return
            if not line:
                return
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode().rstrip())
            except json.JSONDecodeError as error:
                bad.report(path, number, f"not JSON ({error.msg} at column {error.colno})")
                continue
            except UnicodeDecodeError:
                bad.report(path, number, "not UTF-8")
                continue
            except (ValueError, RecursionError) as error:
                bad.report(path, number, f"not JSON that can be read ({error})")
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                bad.report(path, number, f"a JSON object was expected, not {type(record).__name__}")


def callers_level() -> int:
    """Return the ``stacklevel`` of a warning for the code that called this package. O(depth)."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level


def looks_like_csv(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` has a header line of column names."""
    first = head.partition(b"\n")[0].strip()
    return re.fullmatch(rb'"?[A-Za-z][^{}\[\]:]*,[^{}\[\]:]*|prompt', first) is not None


def csv_lines(path: str | Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """Yield (line number, {column: text}) for every row of comma-separated values under a header
    line. Rows of another length, with a quote that is not closed, or not in UTF-8 are reported."""
    with open_bytes(path) as file:
        # Bytes that are not UTF-8 become surrogates, so that the row with them can be named.
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        rows = csv.reader(text, strict=True)
        names: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except DAMAGED as error:
                bad.report(path, line, f"the gzip file is damaged from here on ({error})")
                return
            except csv.Error as error:
                bad.report(path, line, f"not comma-separated values ({error})")
                continue
            if row is None:
                return
            try:
                joined = ",".join(row)
                if not joined.isascii():
                    joined.encode()
            except UnicodeEncodeError as error:
                bad.report(path, line + joined.count("\n", 0, error.start), "not UTF-8")
                if not names:
                    return
                continue
            if not names:
                names = row
            elif row and len(row) != len(names):
                bad.report(path, line, f"{len(row)} fields under {len(names)} names")
            elif row:
                yield line, dict(zip(names, row, strict=True))


def parsed(
    path: str | Path,
    records: Iterable[tuple[int, _R]],
    parse: Callable[[_R], Iterable[_T]],
    bad: BadRecords,
) -> Iterator[_T]:
    """Yield the result of ``parse`` for each record. A record with missing fields, or fields of the
    wrong type, is reported and skipped."""
    return (one for _, one in _parsed(path, records, parse, bad))


def _parsed(
    path: str | Path,
    records: Iterable[tuple[int, _R]],
    parse: Callable[[_R], Iterable[_T]],
    bad: BadRecords,
) -> Iterator[tuple[int, _T]]:
    """Yield (line, result) as ``parsed`` yields results."""
    for number, record in records:
        try:
            found = list(parse(record))
        except KeyError as error:
            bad.report(path, number, f"field {error} is missing")
            continue
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):04X}"
            bad.report(path, number, f"a text holds {half}, half of a character")
            continue
        except (ValueError, OverflowError) as error:
            bad.report(path, number, str(error))
            continue
        yield from ((number, one) for one in found)


WINDOW, WINDOW_IDS = 1024, 1 << 24
"""Requests read ahead of the one that is yielded, and ids in their prompts and answers. A request
can be moved before at most that many others."""


class TraceFieldsWarning(UserWarning):
    """Warning that a trace file has data that is not used."""


class TraceOrderWarning(UserWarning):
    """Warning that some lines of a trace file were not in order of time, and were sorted."""


def in_order(
    path: str | Path,
    records: Iterable[tuple[int, _R]],
    parse: Callable[[_R], Iterable[TraceRequest]],
    bad: BadRecords,
) -> Iterator[TraceRequest]:
    """Yield the results of ``parse``, as ``parsed`` does, in order of time.

    Logs that are written at the end of each request are slightly out of order. They are sorted,
    with one TraceOrderWarning per file. A request that should precede more than ``WINDOW`` requests
    (or ``WINDOW_IDS`` ids) already read is reported as a bad record: a file is read lazily and
    cannot be sorted whole. Requests of the same time keep the order of their lines. O(log WINDOW)
    per request.
    """
    waiting: list[tuple[float, int, TraceRequest]] = []
    newest_s = given_s = -math.inf
    num_read = num_ids = 0
    is_sorted = True
    failure: Exception | None = None

    def take() -> TraceRequest:
        nonlocal given_s, num_ids
        given_s, _, request = heapq.heappop(waiting)
        num_ids -= len(request.tokens) + len(request.output)
        return request

    # An error is raised after the requests above it, as if nothing were read ahead.
    try:
        for line, request in _parsed(path, records, parse, bad):
            now_s = request.timestamp_s
            if now_s < given_s:
                problem = (
                    f"its time {now_s:g} s is before {given_s:g} s, the time of a request more "
                    f"than {len(waiting):,} requests above, and no more are read ahead: sort the "
                    "file by time"
                )
                bad.report(path, line, problem)
                continue
            if now_s < newest_s and is_sorted:
                is_sorted = False
                message = (
                    f"{path}: lines are not in order of time (the first is line {line}); requests "
                    f"are sorted, each before at most {WINDOW:,} others"
                )
                warnings.warn(TraceOrderWarning(message), stacklevel=callers_level())
            newest_s = max(newest_s, now_s)
            heapq.heappush(waiting, (now_s, num_read, request))
            num_read += 1
            num_ids += len(request.tokens) + len(request.output)
            while len(waiting) > WINDOW or (num_ids > WINDOW_IDS and len(waiting) > 1):
                yield take()
    except Exception as error:
        failure = error
    while waiting:
        yield take()
    if failure is not None:
        raise failure


class TraceClock:
    """Times of a file's lines: all have one, or none."""

    def __init__(self) -> None:
        self._now = -1.0
        self._has_times: bool | None = None
        """Whether the first line has a time; None before it."""

    def at(self, when_s: float | None) -> float:
        """Return ``when_s``, or a second after the line before if no line has a time. Raises
        ValueError if only some have one."""
        has_time = when_s is not None
        if self._has_times is None:
            self._has_times = has_time
        elif self._has_times != has_time:
            here, above = ("a time", "no time") if has_time else ("no time", "one")
            raise ValueError(f"it has {here}, but the records above have {above}")
        self._now = self._now + 1.0 if when_s is None else when_s
        return self._now


def whole(record: Record, name: str, least: int = 0, most: int = LONGEST) -> int:
    """Return a whole number in [least, most]; 3.0 is accepted. Raises ValueError, as do the next
    five functions, if the value is invalid."""
    value = record[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, not a whole number in [{least}, {most}]")
    return value


def seconds(record: Record, name: str) -> float:
    """Return a finite number of at least 0."""
    value = record[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, not a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {shown(value)}, not a finite number of at least 0")
    return float(value)


def moment(record: Record, name: str) -> float:
    """Return a time in seconds: a number, or a date in ISO 8601 as seconds since 1970 (UTC if it
    names no zone)."""
    value = record[name]
    if not isinstance(value, str):
        return seconds(record, name)
    try:
        when = datetime.fromisoformat(value)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(
            f"{name} is {shown(value)}, not a number and not a time in ISO 8601"
        ) from None


def text(record: Record, name: str) -> str:
    """Return a text, possibly empty."""
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}, not a text")
    return value


def key(record: Record, name: str) -> str | int:
    """Return the name of a session or namespace: a text or a whole number."""
    value = record[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, not a text or a whole number")
    return value


def objects(record: Record, name: str) -> list[Record]:
    """Return a list of JSON objects."""
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{name} is {shown(value)}, not a list of objects")
    return value


def decoded(value: Any) -> Any:
    """Return ``value``, decoded if it is JSON text; other texts are unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def first_named(record: Record, names: Iterable[str]) -> str | None:
    """Return the first of ``names`` with a value other than null in the record, or None."""
    return next((name for name in names if record.get(name) is not None), None)


def read_ids(values: Any) -> Tokens:
    """Return a JSON list of ids as int32[n]. Raises ValueError unless it is a flat list of whole
    numbers in [0, 2**31). O(n)."""
    if not isinstance(values, list):
        raise ValueError(f"a list of ids was expected, not {type(values).__name__}")
    if not values:
        return np.zeros(0, np.int32)
    try:
        ids = np.asarray(values)
    except ValueError:  # nested lists of several lengths
        ids = np.zeros(0)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 1 << 31:
        raise ValueError("an id is not a whole number in [0, 2**31)")
    return ids.astype(np.int32)


def shown(value: object) -> str:
    """Return a value in the form quoted by error messages."""
    whole_text = repr(value)
    return whole_text if len(whole_text) <= 40 else whole_text[:37] + "..."
