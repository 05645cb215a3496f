"""Conversion of traces: our own format, and the hashes of Mooncake."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from typing import Any, TextIO

import numpy as np

from hybridcache.lab.trace import DistinctNames, Trace, TraceRequest
from hybridcache.lab.traces.jsonl import PLAIN
from hybridcache.tokens import Tokens, common_prefix_len


def write_own(trace: Trace, file: TextIO) -> int:
    """Write ``trace`` as ``jsonl`` and return the number of requests. Prompts that repeat their
    session are written as ``prefix``."""
    header: dict[str, Any] = {"format": "hybridcache", "version": 1, "unit": trace.unit}
    if trace.counted_by:
        header["counted_by"] = trace.counted_by
    file.write(json.dumps(header) + "\n")
    last: dict[Hashable, Tokens] = {}
    names, num_requests = DistinctNames(), 0
    for request in trace:
        num_requests += 1
        session = names.of(request.session, _plain(request.session))
        before = last.get(session)
        kept = 0 if before is None else common_prefix_len(before, request.tokens)
        ids = request.tokens[kept:].tolist()
        record = {
            "timestamp": round(request.timestamp_s, 6),
            "session": session,
            **({"prefix": [kept, *ids]} if kept else {"tokens": ids}),
            "output": request.output.tolist(),
        }
        if trace.unit > 1 and request.answer_tokens is not None:
            record["output_length"] = request.answer_tokens
        if request.boundaries:
            record["boundaries"] = list(request.boundaries)
        for name, (field, _) in PLAIN.items():
            value = getattr(request, field)
            if value != TraceRequest._field_defaults.get(field):
                record[name] = _plain(value) if name == "namespace" else value
        file.write(json.dumps(record, separators=(",", ":"), default=np.generic.item) + "\n")
        last[session] = np.concatenate((request.tokens, request.output))
    return num_requests


def _plain(value: Hashable) -> str | int:
    """Return a session or namespace as the readers accept it."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else str(value)


def write_mooncake(trace: Trace, file: TextIO, block_tokens: int = 512) -> int:
    """Write ``trace`` as ``mooncake`` and return the number of requests.

    Two numbers of blocks are equal if the blocks and all blocks before them are, as in Mooncake's
    own traces; the length of the last, partial block is part of its identity. The format has no
    boundaries or contents of answers. A prompt that repeats an answer is therefore new there, as
    for a server that generates its own answers. Namespaces share no block.

    Raises ValueError if ``block_tokens`` is not a multiple of the trace's unit.
    """
    unit = trace.unit
    if block_tokens < 1 or block_tokens % unit:
        raise ValueError(
            f"blocks of {block_tokens} tokens are not made of ids of {unit}: take a multiple"
        )
    numbers: dict[tuple[Hashable, int, bytes], int] = {}
    names, num_requests = DistinctNames(), 0
    for request in trace:
        num_requests += 1
        length, hashes = request.num_tokens(unit), list[int]()
        before: Hashable = (request.namespace,)
        for start in range(0, len(request.tokens), block_tokens // unit):
            block = np.ascontiguousarray(request.tokens[start : start + block_tokens // unit])
            size = min(block_tokens, length - start * unit)
            digest = hashlib.blake2b(block.tobytes(), digest_size=16).digest()
            hashes.append(numbers.setdefault((before, size, digest), len(numbers)))
            before = hashes[-1]
        record = {
            "timestamp": round(request.timestamp_s * 1000),
            "session_id": names.of(request.session, _plain(request.session)),
            "input_length": length,
            "output_length": max(1, request.num_answer_tokens(unit)),
            "hash_ids": hashes,
        }
        file.write(json.dumps(record) + "\n")
    return num_requests
