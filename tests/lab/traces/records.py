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
