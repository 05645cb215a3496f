"""Fields and header of this project's own format, and its writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TextIO

import numpy as np

from hybridcache.lab.traces.frame import TIMES, Record, records_of
from hybridcache.lab.traces.trace import BadRecordError, BadRecords, Trace, TraceRequest, plain_name
from hybridcache.radix.tokens import Tokens, common_prefix_len

FIELDS: dict[str, tuple[str, Callable[[Record, str], object]]] = {
    "session": ("session", Record.key),
    "output": ("output", Record.ids),
    "output_length": ("answer_tokens", Record.whole),
    "boundaries": ("boundaries", Record.ids),
    "namespace": ("namespace", Record.key),
    "partial": ("partial_tokens", Record.whole),
    "answer_survives": ("answer_survives", Record.flag),
    "service": ("service_s", Record.seconds),
    "stop_reason": ("stop_reason", Record.text),
    "returns_within": ("returns_within_s", Record.seconds),
}
"""Fields of a line that are a field of a request, with their types."""
READ = {*TIMES, "tokens", "prefix", *FIELDS, "request", "answer"}
"""Known fields. ``engine record`` adds the last two if it keeps the text."""
OTHER_NAMES = {"token_ids": "tokens", "input_ids": "tokens", "prompt_token_ids": "tokens"}
OTHER_NAMES |= {"output_ids": "output", "output_token_ids": "output", "session_id": "session"}
"""Names of fields in the files of other programs."""


def usual(record: Record) -> Record:
    """Return ``record`` with the names of our own format for ``OTHER_NAMES``."""
    return Record((OTHER_NAMES.get(name, name), value) for name, value in record.items())


def header_of(path: Path) -> tuple[int, str, bool]:
    """Return unit and tokenizer of a file's first line, by default 1 and "", and True if it is the
    line that ``write_own`` writes. BadRecordError."""
    line, values = next(records_of(path, BadRecords(skip=True)), (1, {}))
    record = Record(values if "format" in values else {})
    try:
        record.optional(lambda name: record.whole(name, 1, 1), "version", 1)
        unit = record.optional(lambda name: record.whole(name, least=1), "unit", 1)
        is_own = record.get("format") == "hybridcache"
        return unit, record.optional(record.text, "counted_by", ""), is_own
    except ValueError as error:
        raise BadRecordError(f"{path}, line {line}: {error}") from error


def write_own(trace: Trace, file: TextIO) -> int:
    """Write ``trace`` as ``jsonl`` and return the number of requests. Prompts that repeat their
    session are written as ``prefix``."""
    header: dict[str, object] = {"format": "hybridcache", "version": 1, "unit": trace.unit}
    if trace.counted_by:
        header["counted_by"] = trace.counted_by
    file.write(json.dumps(header) + "\n")
    last: dict[Hashable, Tokens] = {}
    num_requests = 0
    for request in trace:
        num_requests += 1
        session = plain_name(request.session)
        before = last.get(session, request.tokens[:0])
        kept = common_prefix_len(before, request.tokens)
        ids = request.tokens[kept:].tolist()
        record = {
            "timestamp": round(request.timestamp_s, 6),
            "session": session,
            **({"prefix": [kept, *ids]} if kept else {"tokens": ids}),
            "output": request.output.tolist(),
        }
        if trace.unit == 1:  # the ids of the answer tell its length
            request = request._replace(answer_tokens=None)
        for name, (field, _) in FIELDS.items():
            value = getattr(request, field)
            if name not in record and value != TraceRequest._field_defaults.get(field):
                record[name] = plain_name(value) if name == "namespace" else value
        file.write(json.dumps(record, separators=(",", ":"), default=np.generic.item) + "\n")
        last[session] = np.concatenate((request.tokens, request.output))
    return num_requests
