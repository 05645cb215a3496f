"""What every reader of traces shares: opening files, naming bad lines, and the reader's own small contract."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

import numpy as np

from hybridcache.trace import BadRecordError, BadRecords, Ids, TraceRequest

Record = Mapping[str, Any]


class Reader(Protocol):
    """One format. Instances carry the path and the options; iterating reads the file anew, a record at a time."""

    word: ClassVar[str]
    """What chooses it: ``--format word``, or ``word:path``."""
    unit: int
    """Tokens that one id stands for."""

    @staticmethod
    def recognises(record: Record) -> bool:
        """Whether ``record``, the first of a file, is of this format."""
        ...

    def __call__(self) -> Iterator[TraceRequest]: ...


@contextmanager
def open_bytes(path: str | Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    """A file, plain or gzipped (by its first two bytes). BadRecordError where what was gzipped is damaged or cut."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if zipped else open(path, "rb") as opened:
            yield opened
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadRecordError(f"{path}: a damaged gzip file ({error})") from error


@contextmanager
def open_text(path: str | Path) -> Iterator[TextIO]:
    """The same, decoded as UTF-8; BadRecordError where it is none."""
    try:
        with open_bytes(path) as file, TextIOWrapper(file, encoding="utf-8") as text:
            yield text
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{path}: not UTF-8") from error


def read_ids(values: Any) -> Ids:
    """int32[n] of a JSON list of ids. ValueError unless it is a flat list of whole numbers in [0, 2**31). O(n)."""
    if not isinstance(values, list):
        raise ValueError(f"a list of ids was expected, not {type(values).__name__}")
    if not values:
        return np.zeros(0, np.int32)
    ids = np.asarray(values)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 1 << 31:
        raise ValueError("an id is not a whole number in [0, 2**31)")
    return ids.astype(np.int32)


def json_lines(path: str | Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """(line number, object) for every line of a JSONL file; blank lines are passed over, bad ones reported."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
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
            if isinstance(record, dict):
                yield number, record
            else:
                bad.report(path, number, f"a JSON object was expected, not {type(record).__name__}")


def parsed(
    path: str | Path,
    records: Iterable[tuple[int, Record]],
    parse: Callable[[Record], Iterable[TraceRequest]],
    bad: BadRecords,
) -> Iterator[TraceRequest]:
    """Requests of each record; a record whose fields are missing or of the wrong sort is reported and gives none."""
    for number, record in records:
        try:
            requests = list(parse(record))
        except KeyError as error:
            bad.report(path, number, f"field {error} is missing")
            continue
        except (TypeError, ValueError, OverflowError) as error:
            bad.report(path, number, str(error))
            continue
        yield from requests
