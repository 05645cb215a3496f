"""Records and files of traces, as tests of readers need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(path: Path, *records: Any) -> Path:
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


def _said(name: str, *turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": name, "conversations": [{"from": who, "value": said} for who, said in turns]}


SEGMENTS = [
    _said("x_0", ("human", "one"), ("gpt", "two")),
    _said("x_1", ("gpt", "two"), ("human", "three"), ("gpt", "four")),
    _said("y_0", ("human", "five"), ("bing", "six")),
]


def otel_span(start_ns: int, attributes: dict[str, Any], trace: str = "t") -> dict[str, Any]:
    """As OTLP writes it; attributes that are no text as arrays, objects and numbers."""
    listed = [{"key": name, "value": otel_value(value)} for name, value in attributes.items()]
    times = {"startTimeUnixNano": str(start_ns), "endTimeUnixNano": str(start_ns + 1)}
    return {"traceId": trace, "name": "chat m", **times, "attributes": listed}


def otel_value(value: Any) -> dict[str, Any]:
    """An ``AnyValue``."""
    if isinstance(value, dict):
        pairs = [{"key": name, "value": otel_value(each)} for name, each in value.items()]
        return {"kvlistValue": {"values": pairs}}
    if isinstance(value, list):
        return {"arrayValue": {"values": [otel_value(each) for each in value]}}
    return {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}


def otel_batch(*spans: dict[str, Any]) -> dict[str, Any]:
    """One export."""
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": list(spans)}]}]}


def otel_text(role: str, words: str) -> dict[str, Any]:
    """A message of one part."""
    return {"role": role, "parts": [{"type": "text", "content": words}]}
