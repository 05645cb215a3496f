"""What every reader of traces shares: opening files, naming bad lines, and the reader's own small contract."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

from hybridcache.trace import BadRecords, TraceRequest

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


def open_text(path: str | Path) -> TextIO:
    """A text file, plain or gzipped (by its first two bytes)."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if zipped:
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def json_lines(path: str | Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """(line number, object) for every line of a JSONL file; blank lines are passed over, bad ones reported."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                bad.report(path, number, f"not JSON ({error.msg} at column {error.colno})")
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
