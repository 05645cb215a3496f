"""Trace records and files for tests of readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(path: Path, *records: Any) -> Path:
    """Write ``records`` as JSON lines to ``path``, and return it."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def agent_session(
    name: str, tools: int, system: int, requests: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "id": name,
        "hash_id_scope": "local",
        "tool_tokens": tools,
        "system_tokens": system,
        "requests": requests,
        "dup": False,
    }


def agent_request(when: float, length: int, *runs: Any) -> dict[str, Any]:
    return {"t": when, "type": "n", "in": length, "out": 64, "hash_ids": list(runs)}


def _conversation(name: str, *turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": name, "conversations": [{"from": role, "value": text} for role, text in turns]}


SEGMENTS = [
    _conversation("x_0", ("human", "one"), ("gpt", "two")),
    _conversation("x_1", ("gpt", "two"), ("human", "three"), ("gpt", "four")),
    _conversation("y_0", ("human", "five"), ("bing", "six")),
]


def otel_span(start_ns: int, attributes: dict[str, Any], trace: str = "t") -> dict[str, Any]:
    """Return a span in OTLP's format. Attributes may be texts, arrays, objects and numbers."""
    listed = [{"key": name, "value": otel_value(value)} for name, value in attributes.items()]
    times = {"startTimeUnixNano": str(start_ns), "endTimeUnixNano": str(start_ns + 1)}
    return {"traceId": trace, "name": "chat m", **times, "attributes": listed}


def otel_value(value: Any) -> dict[str, Any]:
    """Return the ``AnyValue`` of a value."""
    if isinstance(value, dict):
        pairs = [{"key": name, "value": otel_value(each)} for name, each in value.items()]
        return {"kvlistValue": {"values": pairs}}
    if isinstance(value, list):
        return {"arrayValue": {"values": [otel_value(each) for each in value]}}
    return {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}


def otel_batch(*spans: dict[str, Any]) -> dict[str, Any]:
    """Return one exported batch of spans."""
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": list(spans)}]}]}


def otel_text(role: str, words: str) -> dict[str, Any]:
    """Return a message of one part."""
    return {"role": role, "parts": [{"type": "text", "content": words}]}
