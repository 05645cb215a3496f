"""What every reader of traces shares: opening files, naming bad lines, fields of one sort, and the
reader's own small contract."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.tokens import Tokens

Record = Mapping[str, Any]
LONGEST = 1 << 24
"""Longest prompt or answer that a trace is believed to have, tokens."""
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
"""What reading a gzip file raises where it is cut or damaged."""

_BOM = b"\xef\xbb\xbf"
_R = TypeVar("_R")
_T = TypeVar("_T")


class Reader(Protocol):
    """One format. Instances carry the path and the options; iterating reads the file anew, a record
    at a time."""

    word: ClassVar[str]
    """What chooses it: ``--format word``, or ``word:path``."""

    @property
    def unit(self) -> int:
        """Tokens that one id stands for."""
        ...

    @staticmethod
    def recognises(record: Record) -> bool:
        """Whether ``record``, the first of a file, is of this format."""
        ...

    def __call__(self) -> Iterator[TraceRequest]:
        """The requests from the first on, in order of time. BadRecordError names what can not be
        read."""
        ...


@dataclass(frozen=True, slots=True)
class FileReader(Reader):
    """A reader of the one file at ``path``; what is bad in it is reported to ``bad``."""

    path: Path
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))


@contextmanager
def open_bytes(path: str | Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    """A file, plain or gzipped (by its first two bytes), behind its byte order mark where it has
    one.

    Reading raises one of ``DAMAGED`` where what was gzipped is damaged or cut.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if zipped else open(path, "rb") as opened:
        with suppress(*DAMAGED):  # whoever reads on says where
            if opened.peek(len(_BOM))[: len(_BOM)] == _BOM:
                opened.read(len(_BOM))
        yield opened


def json_lines(path: str | Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """(line number, object) for every line of a JSONL file; blank lines are passed over, bad ones
    reported.

    A gzip file that is cut ends with the last whole line before the cut, which is reported.
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


def csv_lines(path: str | Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """(line number, {column: text}) for every row of comma-separated values under a line of names;
    rows of another length are reported."""
    with open_bytes(path) as file:
        rows = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""))
        names: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except DAMAGED as error:
                bad.report(path, line, f"the gzip file is damaged from here on ({error})")
                return
            except UnicodeDecodeError:
                bad.report(path, line, "not UTF-8")
                return
            except csv.Error as error:
                bad.report(path, line, f"not comma-separated values ({error})")
                continue
            if row is None:
                return
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
    """What ``parse`` makes of each record; one whose fields are missing or of the wrong sort is
    reported and gives nothing."""
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
        yield from found


class Clock:
    """The times of a file's requests, which must not run backwards: a trace is read lazily and can
    not be sorted."""

    def __init__(self) -> None:
        self._now = -1.0

    def at(self, when_s: float | None) -> float:
        """``when_s``, or a second after the request before where None is said. ValueError where it
        is before that one."""
        now = self._now + 1.0 if when_s is None else when_s
        if now < self._now:
            raise ValueError(
                f"its time {now:g} s is before the last request's {self._now:g} s; sort the file "
                "by time"
            )
        self._now = now
        return now


def whole(record: Record, name: str, least: int = 0, most: int = LONGEST) -> int:
    """A whole number in [least, most]; 3.0 is one too. ValueError: it is none, as in the next
    five."""
    value = record[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, not a whole number in [{least}, {most}]")
    return value


def seconds(record: Record, name: str) -> float:
    """A finite number of at least 0."""
    value = record[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, not a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {shown(value)}, not a finite number of at least 0")
    return float(value)


def number(row: Record, name: str) -> float:
    """As ``seconds``, of a text that writes one."""
    try:
        value = float(row[name])
    except ValueError:
        raise ValueError(f"{name} is {shown(row[name])}, not a number") from None
    return seconds({name: value}, name)


def text(record: Record, name: str) -> str:
    """A text, perhaps an empty one."""
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}, not a text")
    return value


def key(record: Record, name: str) -> str | int:
    """What names a session or a namespace: a text or a whole number."""
    value = record[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, not a text or a whole number")
    return value


def objects(record: Record, name: str) -> list[Record]:
    """A list of JSON objects."""
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{name} is {shown(value)}, not a list of objects")
    return value


def read_ids(values: Any) -> Tokens:
    """int32[n] of a JSON list of ids. ValueError unless it is a flat list of whole numbers in [0,
    2**31). O(n)."""
    if not isinstance(values, list):
        raise ValueError(f"a list of ids was expected, not {type(values).__name__}")
    if not values:
        return np.zeros(0, np.int32)
    try:
        ids = np.asarray(values)
    except ValueError:  # lists of several lengths in it
        ids = np.zeros(0)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 1 << 31:
        raise ValueError("an id is not a whole number in [0, 2**31)")
    return ids.astype(np.int32)


def shown(value: object) -> str:
    """A value as an error message quotes it."""
    whole_text = repr(value)
    return whole_text if len(whole_text) <= 40 else whole_text[:37] + "..."
