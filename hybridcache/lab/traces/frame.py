"""Frame of all trace readers: files, typed fields, errors with file and line, and order of time.

A format is a small class: ``recognises`` looks at the first record, and ``parser`` returns the
function that converts a record to requests: of any sessions (``FileReader``), or of one session
without an arrival time (``SessionReader``).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import heapq
import io
import json
import lzma
import math
import re
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate, count, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from hybridcache.geometry.units import counted
from hybridcache.lab.traces.arrivals import Pauses, Starts, interleave
from hybridcache.lab.traces.trace import UNNAMED, BadRecords, FreshIds, TraceRequest, as_ids, units
from hybridcache.radix.tokens import Tokens

LONGEST = 1 << 24
"""Longest plausible prompt or answer in a trace, in tokens."""
WINDOW, WINDOW_IDS = 1024, 1 << 24
"""Requests read ahead of the one that is yielded, and ids in their prompts and answers. A request
can be moved before at most that many others."""
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError, zipfile.BadZipFile, UnicodeDecodeError)
"""Errors raised when reading a truncated or damaged file, or a text that is not UTF-8."""
DAMAGE = "damaged, or not UTF-8: everything from this line on is lost ({})"
UNANSWERED = "left out, because no answer follows a question"
CUT = "cut before the first prompt of more than {:,} tokens: cap=N sets another limit"
UNTIMED = "without a time: one second between records"
FEWEST, SAMPLED = 10, 1000
"""Least number of times, and largest of records, by which the unit of times is judged."""
FASTEST_S, FASTEST_DELAY_S = 0.01, 0.1
"""Least plausible median of the distances between times, and of the delays in a session."""
SLOW_S, SLOWEST_S = 60.0, 3600.0
"""Median distances above which milliseconds are in doubt, and no unit is plausible."""
OF_FORMAT = "the usual unit, as the file names none"
BLOCKS = "answers have no ids, so that no prompt reuses one; the grid is a block of {0.unit} tokens"
"""Limits of formats with hashes of blocks."""
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
"""Parts of a second, by the names of units."""
SINCE_1970 = ((9e17, "ns"), (9e14, "us"), (9e11, "ms"))
"""Numbers above the first value are times since 1998 or later, counted from 1970 in the unit."""
_TIMES = (
    "timestamp ts time seconds arrival_time start_time created created_at started_at "
    "request_received"
)
TIMES = tuple(f"{name}{end}" for end in ("", "_ms", "_us", "_ns") for name in _TIMES.split())
"""Names of the time of a record. An ending of ``UNITS`` is the unit."""
_CHUNK, _HEAD = 1 << 16, 1 << 12
_OPENING, _BLANK = re.compile(r"[\s\[]*"), re.compile(r"[\s,]*")
Line = int | str
"""Line of a record; "7, record 3" in an array, in which others may begin on the same line."""
Records = Iterator[tuple[Line, dict[str, object]]]
"""Records of a file, each with its line."""
_T = TypeVar("_T")


class TraceWarning(UserWarning):
    """Warning that a file has data that is not used, or lines that were sorted by time."""


def warn(message: str) -> None:
    """Issue a warning."""
    warnings.warn(TraceWarning(message), stacklevel=2)


# --- Fields -------------------------------------------------------------------------------------


class Record(dict[str, object]):
    """An object of a trace file. Its methods return a field of one type. KeyError if it is missing,
    ValueError, which names it, if it is invalid."""

    def optional(
        self, read: Callable[[str], _T], name: str, default: _T, notes: Notes | None = None
    ) -> _T:
        """Return ``read(name)``, or ``default`` without such a field, which ``notes`` count."""
        if self.get(name) is not None:
            return read(name)
        if notes is not None:
            notes.count(f"without {name}: {default} is assumed", "record")
        return default

    def first(self, names: Iterable[str]) -> str | None:
        """Return the first of ``names`` with a value other than null, or None."""
        return next((name for name in names if self.get(name) is not None), None)

    def number(self, name: str) -> object:
        """Return a value; a number for the text of one, as in CSV files."""
        value = self[name]
        with suppress(ValueError):
            return float(value) if isinstance(value, str) else value
        return value

    def whole(self, name: str, least: int = 0, most: int = LONGEST) -> int:
        """Return a whole number in [least, most]; 3.0 and "3" are accepted."""
        value = self.number(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            wanted = f"a whole number in [{least}, {most}]"
            raise ValueError(f"{name} is {shown(self[name])}, not {wanted}")
        return value

    def seconds(self, name: str) -> float:
        """Return a finite number of at least 0; "0.5" is accepted."""
        value = self.number(name)
        if isinstance(value, int | float) and type(value) is not bool and 0 <= value < math.inf:
            return float(value)
        raise ValueError(f"{name} is {shown(self[name])}, not a finite number of at least 0")

    def time(self, name: str, per_s: float) -> tuple[str, float]:
        """Return the kind of a time, and its seconds: of a number of ``1 / per_s`` s, or of a date
        in ISO 8601."""
        if not isinstance(self.number(name), str):
            return "a number as its time", self.seconds(name) / per_s
        try:
            when = datetime.fromisoformat(self.text(name))
            when_s = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            problem = f"{name} is {shown(self[name])}, not a number and not a time in ISO 8601"
            raise ValueError(problem) from None
        return "a date with a zone" if when.tzinfo else "a date without a zone", when_s

    def _one(self, name: str, kind: type[_T], words: str) -> _T:
        value = self[name]
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {shown(value)}, not {words}")
        return value

    def text(self, name: str) -> str:
        """Return a text, possibly empty."""
        return self._one(name, str, "a text")

    def flag(self, name: str) -> bool:
        """Return true or false."""
        return self._one(name, bool, "true or false")

    def key(self, name: str) -> str | int:
        """Return the name of a session or namespace: a text or a whole number."""
        value = self[name]
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise ValueError(f"{name} is {shown(value)}, not a text or a whole number")
        return value

    def values_of(self, name: str) -> list[Any]:
        """Return a list, which may be written as JSON text."""
        if isinstance(value := self[name], str):
            with suppress(ValueError, RecursionError):
                self[name] = json.loads(value)
        return self._one(name, list, "a list")

    def objects(self, name: str) -> list[Record]:
        """Return a list of JSON objects."""
        values = self.values_of(name)
        if not all(isinstance(each, dict) for each in values):
            raise ValueError(f"{name} is {shown(values)}, not a list of objects")
        return [Record(each) for each in values]

    def ids(self, name: str) -> Tokens:
        """Return a flat list of whole numbers in [0, 2**31) as int32[n]. O(n)."""
        return as_ids(self.values_of(name), name)

    def id_runs(self, name: str) -> Tokens:
        """Return a list of ids and of runs [first id, last id] as int32[n]. O(n)."""
        runs = [run if isinstance(run, list) else [run, run] for run in self.values_of(name)]
        for run in runs:
            are_ids = len(run) == 2 and all(type(end) is int for end in run)
            if not are_ids or not 0 <= run[0] <= run[1] < 1 << 30:
                raise ValueError(f"{name} is not a list of ids and of runs [first id, last id]")
        if sum(last - first + 1 for first, last in runs) > LONGEST:
            raise ValueError(f"more than {LONGEST} {name} in one prompt")
        ids = [np.arange(first, last + 1, dtype=np.int32) for first, last in runs]
        return np.concatenate(ids) if ids else np.zeros(0, np.int32)


def shown(value: object) -> str:
    """Return a value in the form quoted by error messages."""
    return text if len(text := repr(value)) <= 40 else text[:37] + "..."


class TimeUnit(NamedTuple):
    """Unit of a file's times."""

    name: str
    """A name of ``UNITS``."""
    because: str
    """Reason of the choice."""
    is_odd: bool = False
    """True if the times suggest another unit than the format's, or than the chosen one."""

    @property
    def per_s(self) -> float:
        """Parts of a second."""
        return UNITS[self.name]


def unit_of_times(
    times: Sequence[float], usual: str, asked: str = "", name: str = "time"
) -> TimeUnit:
    """Return the unit of ``times``, which is ``usual`` in their format, and ``asked`` if the user
    has named one. ``name`` is their field, empty without one: ``delay`` has the distances of two
    times. ValueError for a unit that is none of ``UNITS``. O(n log n).

    >>> unit_of_times([1.5 * n for n in range(20)], "ms").name
    's'
    >>> unit_of_times([2e9 * n for n in range(20)], "ms").name
    'ns'
    """
    if asked not in ("", *UNITS):
        raise ValueError(f"option 'times' is one of {', '.join(UNITS)}, not {asked!r}")
    if asked:
        return TimeUnit(asked, "as ?times= says")
    if not times:
        none = "no record has a time: one second between records"
        return TimeUnit("s", "dates in ISO 8601" if name else none)
    if (ending := name.rpartition("_")[2]) in UNITS:
        return TimeUnit(ending, f"as the name {name} says")
    fastest_s = FASTEST_S
    if name == "delay":
        times, fastest_s = [*accumulate(times)], FASTEST_DELAY_S
    largest = max(times, default=0.0)
    for above, name in SINCE_1970:
        if largest > above:
            return TimeUnit(name, f"numbers of {largest:.3g} are times since 1970")
    distinct = sorted(set(times))
    if len(times) < FEWEST or len(distinct) < 2:
        return TimeUnit(usual, OF_FORMAT)
    median = float(np.median(np.diff(distinct))) * (1 + 1e-9)
    likely = min(UNITS, key=lambda one: abs(math.log(median / UNITS[one])))
    gap_s, reasons = median / UNITS[usual], []
    if not fastest_s <= gap_s <= (SLOW_S if usual == "ms" else SLOWEST_S):
        reasons.append(f"the median distance would be {gap_s:.3g} s")
    if usual == "s" and all(time % 1000 == 0 for time in distinct):
        reasons.append("all are multiples of 1,000")
    is_doubted = usual == "ms" and SLOW_S < gap_s <= SLOWEST_S
    is_other = bool(reasons) and likely != usual and not is_doubted
    average_s = max(gap_s, (largest - distinct[0]) / (len(times) - 1) / UNITS[usual])
    is_whole = all(abs(time - round(time)) < 1e-3 for time in distinct)
    if usual == "ms" and not is_whole:
        reasons.append("milliseconds with fractions are rare")
    if usual == "s" and is_whole and average_s > SLOW_S and not reasons:
        reasons.append(f"whole numbers {average_s:.3g} s apart on average may be milliseconds")
    said = " and ".join(reasons)
    if is_other:
        return TimeUnit(likely, f"in {usual} {said}", True)
    return TimeUnit(usual, OF_FORMAT + f", although {said}" * bool(said), bool(said))


def request_of_blocks(
    record: Record,
    blocks: Tokens,
    unit: int,
    fresh: FreshIds,
    notes: Notes,
    lengths: tuple[str, str] = ("input_length", "output_length"),
) -> TraceRequest:
    """Return the request, without session and time, of a prompt known in ``blocks`` of ``unit``
    tokens. ``lengths`` are the fields with the tokens of prompt and answer. The prompt's last,
    partial block may be missing, and is then never shared. The answer fills it first."""
    length = record.whole(lengths[0], least=1)
    if len(blocks) not in (length // unit, units(length, unit)):
        raise ValueError(
            f"{len(blocks)} hash_ids do not cover {lengths[0]} {length} in blocks of {unit} "
            "tokens; say their size with ?unit="
        )
    answer = record.optional(record.whole, lengths[1], 0, notes)
    if len(blocks) < units(length, unit):
        blocks = np.concatenate((blocks, fresh.take(1)))
    output = fresh.take(units(length + answer, unit) - len(blocks))
    rest = length % unit or None
    return TraceRequest(0.0, "", None, blocks, output, (), rest, answer_tokens=answer)


class Notes:
    """Counts of one pass over the file at ``path``, which are warnings at its end."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._counts = Counter[tuple[str, str]]()
        self.at_end: Callable[[], None] = lambda: None
        """Function that gives the notes on the whole pass."""

    def count(self, message: str, unit: str = "conversation", number: int = 1) -> int:
        """Count a conversation, or several of another ``unit``, for the warning ``message``. Return
        their number so far."""
        self._counts[unit, message] += number
        return self._counts[unit, message]

    def unnamed(self) -> str:
        """Return the name of the session of a record that names none, and count it."""
        return f"{UNNAMED}{self.count('without a session: each is a session of its own', 'record')}"

    def say(self, message: str) -> None:
        """Issue a warning about the file."""
        warn(f"{self._path}: {message}")

    def end(self) -> None:
        """Issue the warnings of the pass."""
        self.at_end()
        for (unit, message), number in self._counts.items():
            if number:
                self.say(f"{counted(number, unit)} {message}")


# --- Files --------------------------------------------------------------------------------------


def make_folder(path: Path) -> Path:
    """Make the folder of a file that will be written, and return its path. ValueError if
    impossible."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file: name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path}: {error.filename} cannot be a folder: name another") from None
    return path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Make the folder of a file that is written inside of the ``with``, unless it exists and may be
    a device. ValueError with its path if that fails; a new file is then removed."""
    is_new = not path.exists()
    try:
        yield make_folder(path) if is_new else path
    except BaseException as error:
        if is_new:
            path.resolve().unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.filename or isinstance(error, BrokenPipeError):
            raise
        why = f"{path} cannot be written ({error.strerror}): free space, or name another place"
        raise ValueError(why) from None


@contextmanager
def open_bytes(path: str | Path) -> Iterator[Any]:
    """Open a file, plain or compressed (``OPENERS``), and skip its byte order mark. Reading may
    raise one of ``DAMAGED``. ValueError without a library, or for several files in an archive."""
    with open(path, "rb") as file:
        head = file.read(6)
    opener = next((one for magic, one in OPENERS.items() if head.startswith(magic)), open)
    with opener(path, "rb") as opened:
        with suppress(*DAMAGED):  # the next read reports the line
            if opened.peek(3)[:3] == b"\xef\xbb\xbf":
                opened.read(3)
        yield opened


def _open_zstd(path: str | Path, _: str) -> Any:
    try:
        import zstandard  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: it is compressed with Zstandard: install the package zstandard, or unpack it "
            "with `zstd -d`"
        ) from None

    class ZstdFrames(io.RawIOBase):
        """Decompressed bytes of all frames; a truncated or damaged file is ``DAMAGED``."""

        def __init__(self) -> None:
            self._file = open(path, "rb")  # noqa: SIM115 (closed with the source)
            self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._left = b""
            """Decompressed bytes that were not read yet."""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._left:
                more = self._frame.unused_data if self._frame.eof else b""
                more = more or self._file.read(1 << 13)
                if not more:
                    if self._frame.eof:
                        return 0
                    raise EOFError("the last frame is truncated")
                if self._frame.eof:
                    self._frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    self._left = self._frame.decompress(more)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
            read, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
            buffer[: len(read)] = read
            return len(read)

        def close(self) -> None:
            self._file.close()
            super().close()

    return io.BufferedReader(ZstdFrames(), 1 << 16)


def _open_zip(path: str | Path, _: str) -> Any:
    try:
        archive = zipfile.ZipFile(path)
        names = [one.filename for one in archive.infolist() if not one.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: it is not a readable zip archive ({error})") from None
    if len(names) != 1:
        raise ValueError(
            f"{path}: a zip archive of {counted(len(names), 'file')}: unpack it, and name one of "
            f"{', '.join(names[:5]) or 'them'}"
        )
    return archive.open(names[0])


OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    b"\x50\x2a\x4d\x18": _open_zstd,  # a skippable frame, as pzstd begins with
    b"PK\x03\x04": _open_zip,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
"""Functions that open compressed files, by their first bytes."""


def head_of(path: str | Path) -> bytes:
    """Return the first 4,096 bytes of a file, without blanks before them."""
    head = b""
    with open_bytes(path) as file, suppress(*DAMAGED):
        while len(head) < 4096 and (more := file.read1(4096)):
            head += more
    return head.lstrip()


def records_of(path: Path, bad: BadRecords) -> Records:
    """Yield (line, object) for every record of JSON lines, of a JSON array, of a CSV file or of a
    Parquet file, one at a time. Bad records are reported."""
    head = head_of(path)
    if head.startswith(b"PAR1"):
        yield from _parquet(path)
        return
    if is_csv(path):
        yield from _table(path, bad)
        return
    read = _array if head.startswith(b"[") else _lines
    for line, value in read(path, bad):
        if isinstance(value, dict):
            yield line, value
        else:
            bad.report(path, line, f"a JSON object was expected, not {type(value).__name__}")


def _parquet(path: str | Path) -> Records:
    """Yield (row, object) for every row. ValueError without a library or for a damaged file."""
    try:
        import pyarrow  # type: ignore[import-not-found,unused-ignore]
        from pyarrow import parquet  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: a Parquet file: install the package pyarrow, or write it as JSON lines"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _plain(row)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: it is not a readable Parquet file ({error})") from None


def _plain(value: Any) -> Any:
    """Return a value of Parquet as one of JSON, without fields that are null in a structure."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.isoformat() if isinstance(value, datetime) else value


def _lines(path: str | Path, bad: BadRecords) -> Iterator[tuple[Line, object]]:
    """Yield (line, value) for every line. A truncated gzip file ends with its last whole line."""
    with open_bytes(path) as file:
        for number in count(1):
            try:
                line = file.readline()
            except DAMAGED as error:
                bad.report(path, number, DAMAGE.format(error))
                return
            if not line:
                return
            if line.strip():
                try:
                    value = json.loads(line.decode().rstrip())
                except UnicodeDecodeError:
                    bad.report(path, number, "not UTF-8")
                except (ValueError, RecursionError) as error:
                    bad.report(path, number, f"not JSON ({error})")
                else:
                    yield number, value


def _array(path: str | Path, bad: BadRecords) -> Iterator[tuple[Line, object]]:
    """Yield (line and number, value) for every value of an array. Those after a syntax error are
    lost. Holds one value and as many characters again. O(characters)."""
    decoder, text, line, blank = json.JSONDecoder(), "", 1, _OPENING
    with open_bytes(path) as opened:
        file = io.TextIOWrapper(opened, "utf-8", newline="")
        for number in count(1):
            while True:
                start = len(blank.match(text).group())  # type: ignore[union-attr]
                first_line = line + text.count("\n", 0, start)
                try:
                    value, end = decoder.raw_decode(text, start)
                    break
                except (ValueError, RecursionError) as error:
                    if text.startswith("]", start):
                        if text[start + 1 :].strip():
                            bad.report(path, first_line, "the text after the array is lost")
                        return
                    message = getattr(error, "msg", error)
                    problem = f"not JSON, or cut ({message}); the records after it are lost"
                try:
                    more = file.read(max(_CHUNK, len(text)))  # A long record is tried seldom.
                except DAMAGED as damage:
                    more, problem = "", DAMAGE.format(damage)
                if not more:
                    bad.report(path, f"{first_line}, record {number}", problem)
                    return
                text += more
            yield f"{first_line}, record {number}", value
            line += text.count("\n", 0, end)
            text, blank = text[end:], _BLANK


SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}


def _table(path: Path, bad: BadRecords) -> Records:
    """Yield (line, row). Rows of another length, or with an open quote, are reported."""
    csv.field_size_limit(LONGEST)  # of the whole process: 128 KiB of text are its default
    with open_bytes(path) as file:
        between = delimiter_of(file.peek(_HEAD)[:_HEAD])
        rows = csv.reader((line.decode() for line in file), strict=True, delimiter=between)
        names: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except DAMAGED as error:
                bad.report(path, line, DAMAGE.format(error))
                return
            except csv.Error as error:
                kind = SEPARATORS[between]
                problem = f"not {kind}-separated values ({error}), up to line {rows.line_num}"
                bad.report(path, line, problem)
                continue
            if row is None:
                return
            if not names:
                names = row
            elif row and len(row) != len(names):
                bad.report(path, line, f"{len(row)} fields under {len(names)} names")
            elif row:
                fields = zip(names, row, strict=True)
                yield line, {name: value or None for name, value in fields if name}


def delimiter_of(head: bytes) -> str:
    """Return the sign between the names of the first line: the most frequent of comma, semicolon
    and tab, quoted ones not counted."""
    names = re.sub(rb'"[^"]*"', b"", head.partition(b"\n")[0])
    return max(SEPARATORS, key=lambda sign: names.count(sign.encode()))


def is_csv(path: Path) -> bool:
    """Return whether a file begins with a line of names, or has the ending of CSV and no JSON."""
    head = head_of(path)
    names = rb',*("?[A-Za-z][^{}\[\]:]*[,;\t][^{}\[\]:]*|prompt)'
    has_names = re.fullmatch(names, head.partition(b"\n")[0].strip()) is not None
    return has_names or (".csv" in path.suffixes and head[:1] not in b"{[")


# --- Readers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileReader:
    """Reader of the file at ``path``. Each iteration reads it again, one record at a time."""

    path: Path
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    times: str = ""
    """Unit of the times, of ``UNITS``; ``unit_of_times`` decides if it is empty."""
    word: ClassVar[str]
    """Name of the format, as in ``word:path``."""
    usual_times: ClassVar[str] = ""
    """Unit of the times in this format; empty if it has none."""
    limits: ClassVar[str] = ""
    """Sentence on reuse that the format cannot show, with fields of the reader; or empty."""

    @property
    def unit(self) -> int:
        """Tokens per id."""
        return 1

    @property
    def counted_by(self) -> str:
        """Tokenizer of the texts, or empty."""
        return getattr(self, "tokenizer", "")

    def describe(self) -> str:
        """Return the names that are read for each field, in a file of texts; else empty."""
        return ""

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether ``record``, the first of a file, is of this format."""
        raise NotImplementedError

    @staticmethod
    def is_left_out(record: Record) -> bool:
        """Return whether ``record`` holds no request: a header, or a copy of another."""
        return False

    def records(self, bad: BadRecords) -> Records:
        """Yield (line, record). Records that cannot be read are reported to ``bad``."""
        return records_of(self.path, bad)

    def time_unit(self) -> TimeUnit:
        """Return the unit of the times, judged by the first ``SAMPLED`` records."""
        found = defaultdict[str, list[float]](list)
        most = SAMPLED if self.usual_times and not self.times else 0
        for _, values in islice(self.records(BadRecords(skip=True)), most):
            with suppress(KeyError, ValueError, TypeError, AttributeError):
                for name, one in self.times_of(Record(values)):
                    is_number = isinstance(one, int | float) and 0 <= one < math.inf
                    found[name] += [float(one)] * is_number  # type: ignore[arg-type]
        name, times = max(found.items(), key=lambda one: len(one[1]), default=("", ()))
        return unit_of_times(times, self.usual_times or "s", self.times, name)

    def time_of(self, record: Record) -> tuple[Record, str | None]:
        """Return the record with its time, and the name of that field; None if it has no time."""
        return record, record.first(TIMES)

    def times_of(self, record: Record) -> Iterable[tuple[str, object]]:
        """Return the times in ``record`` with the names of their fields."""
        record, name = self.time_of(record)
        return ((one, record.number(one)) for one in (name,) if one)

    def clock(self, notes: Notes) -> Callable[[Record], float]:
        """Return the function that gives the time of the next record, in seconds; without times,
        its number, which is noted. ValueError for another kind of time than the first record's."""
        per_s, first = self.time_unit().per_s, list[tuple[str, str | None]]()

        def time_s(record: Record) -> float:
            record, name = self.time_of(record)
            kind, when_s = record.time(name, per_s) if name else ("no time", 0.0)
            if first and kind != first[0][0]:
                problem = f"but the records above have {first[0][0]} ({first[0][1] or name})"
                raise ValueError(f"it has {kind}, {problem}")
            first[:] = first or [(kind, name)]
            return when_s if name else notes.count(UNTIMED, "record") - 1.0

        return time_s

    def parser(self, notes: Notes) -> Callable[[Record], Iterable[TraceRequest]]:
        """Return the function that converts the next record to requests. It raises KeyError,
        ValueError or OverflowError, without any other effect, if the record is invalid."""
        raise NotImplementedError

    def __call__(self) -> Iterator[TraceRequest]:
        """Yield the requests in order of time. BadRecordError for one that cannot be read."""
        notes, unit = Notes(self.path), self.time_unit()
        if unit.is_odd:
            said = f"times are read in {unit.name}: {unit.because}"
            notes.say(f"{said}; ?times=s, ms, us or ns decides")
        yield from self.requests(notes)
        notes.end()

    def requests(self, notes: Notes) -> Iterator[TraceRequest]:
        """Yield the requests of one pass."""
        return self.ordered(self.parsed(self.records(self.bad), self.parser(notes)))

    def parsed(
        self, records: Records, parse: Callable[[Record], Iterable[_T]]
    ) -> Iterator[tuple[Line, _T]]:
        """Yield (line, result of ``parse``). Invalid records are reported and skipped."""
        for number, values in records:
            record = Record(values)
            if self.is_left_out(record):
                continue
            try:
                found = list(parse(record))
            except KeyError as error:
                self.bad.report(self.path, number, f"field {error} is missing")
            except UnicodeEncodeError as error:
                half = f"U+{ord(error.object[error.start]):04X}"
                self.bad.report(self.path, number, f"a text holds {half}, half of a character")
            except (ValueError, OverflowError, TypeError, AttributeError) as error:
                self.bad.report(self.path, number, str(error))
            else:
                yield from ((number, one) for one in found)

    def ordered(self, found: Iterator[tuple[Line, TraceRequest]]) -> Iterator[TraceRequest]:
        """Yield the requests of ``found``, (line, result of the parser), in order of time.

        Logs that are written at the end of each request are slightly out of order: they are sorted,
        with one warning unless the times of the answers explain it. A request that should
        precede more than ``WINDOW`` requests (or ``WINDOW_IDS`` ids) already read is a bad record.
        O(log WINDOW) each.
        """
        waiting: list[tuple[float, int, TraceRequest]] = []
        newest_s = given_s = -math.inf
        num_read = num_ids = 0
        is_sorted = True
        failure: Exception | None = None
        # An error is raised after the requests above it, as if nothing were read ahead.
        try:
            for line, request in found:
                now_s = request.timestamp_s
                if now_s < given_s:
                    problem = (
                        f"its time is {given_s - now_s:g} s before that of a request more than "
                        f"{len(waiting):,} requests above, and no more are read ahead: sort the "
                        "file by time"
                    )
                    self.bad.report(self.path, line, problem)
                    continue
                if now_s + (request.service_s or 0.0) < newest_s and is_sorted:
                    is_sorted = False
                    message = (
                        f"{self.path}: lines are not in order of time (the first is line {line}, "
                        f"{newest_s - now_s:g} s before one above it); requests are sorted, each "
                        f"before at most {WINDOW:,} others"
                    )
                    warn(message)
                newest_s = max(newest_s, now_s)
                heapq.heappush(waiting, (now_s, num_read, request))
                num_read += 1
                num_ids += len(request.tokens) + len(request.output)
                while len(waiting) > WINDOW or (num_ids > WINDOW_IDS and len(waiting) > 1):
                    given_s, _, request = heapq.heappop(waiting)
                    num_ids -= len(request.tokens) + len(request.output)
                    yield request
        except Exception as error:
            failure = error
        while waiting:
            yield heapq.heappop(waiting)[2]
        if failure is not None:
            raise failure


@dataclass(frozen=True, slots=True)
class SessionReader(FileReader):
    """Reader of sessions without arrival times, one per record. ``starts`` sets the times."""

    starts: Starts = field(default_factory=lambda: Starts("poisson", 1.0))
    seed: int = 0

    @property
    def pause(self) -> Pauses | None:
        """Pauses between turns; None if the file tells them."""
        return None

    @property
    def arrivals(self) -> str:
        """Description of the times that ``seed`` draws."""
        starts = f"{self.starts.kind}:{self.starts.per_s:g}"
        pauses = "as in the file" if self.pause is None else f"{self.pause.median_s:g} s (median)"
        times = f"{starts} sessions a second, pauses {pauses}"
        return f"drawn, {self.unread_time() or 'not recorded'}: {times}"

    def unread_time(self) -> str:
        """Return a remark on times of the first record that are not read; empty without any."""
        _, first = next(self.records(BadRecords(skip=True)), (0, {}))
        turns = (one[0] for one in first.values() if isinstance(one, list) and one)
        parts = [Record(one) for one in (first, *turns) if isinstance(one, dict)]
        names = (part.first(TIMES) for part in parts if not self.usual_times)
        return next((f"{name} of the file is not read" for name in names if name), "")

    @property
    def cap(self) -> int:
        """Longest prompt. A session ends before the first that is longer."""
        return LONGEST

    def requests(self, notes: Notes) -> Iterator[TraceRequest]:
        parse = self.parser(notes)

        def session(record: Record) -> Iterator[list[TraceRequest]]:
            found = list[TraceRequest]()
            for request in parse(record):
                if len(request.tokens) > self.cap:
                    notes.count(CUT.format(self.cap))
                    break
                found.append(request)
            else:
                if not found:
                    notes.count(UNANSWERED)
            yield sorted(found, key=lambda request: request.timestamp_s)

        sessions = (found for _, found in self.parsed(self.records(self.bad), session))
        return interleave(sessions, self.starts, self.pause, unit=self.unit, seed=self.seed)
