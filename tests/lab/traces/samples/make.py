"""Generator of the sample traces in this folder: synthetic, seeded, in published formats.

    python -m tests.lab.traces.samples.make

Only the format and the rough size follow published traces. Lengths, turns and shared prefixes are
random, so the samples contain no data of real users.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
Record = dict[str, Any]


def blocks_of_512(seed: int = 1, requests: int = 400) -> Iterator[Record]:
    """Yield requests of a chat service. One in four continues one of the latest fifty requests; the
    others share only the system prompt."""
    draw = np.random.default_rng(seed)
    system, next_id = [0], 1
    recent: list[list[int]] = []
    at_ms = 0.0
    for _ in range(requests):
        at_ms += float(draw.exponential(350))
        goes_on = bool(recent) and draw.random() < 0.25
        before = recent[int(draw.integers(len(recent)))] if goes_on else system
        new = max(1, int(draw.lognormal(2.0, 1.2)))
        ids = [*before, *range(next_id, next_id + new)]
        next_id += new
        length = (len(ids) - 1) * 512 + int(draw.integers(1, 513))
        # The last block is partial, so no later request continues it.
        recent = [*recent, ids[:-1]][-50:] if len(ids) > 2 else recent
        yield {
            "timestamp": int(at_ms // 1000 * 1000),
            "input_length": length,
            "output_length": int(draw.integers(1, 900)),
            "hash_ids": ids,
        }


def agent_sessions(seed: int = 2, sessions: int = 12) -> Iterator[Record]:
    """Yield sessions of a coding agent, with three kinds of tools and system prompt.

    Histories grow, and sometimes shrink because they are summarized. Two sessions have a subagent.
    """
    draw = np.random.default_rng(seed)
    heads = [(9100, 2100), (10_800, 2300), (12_400, 2900)]
    for number in range(sessions):
        tools, system = heads[int(draw.integers(3))]
        requests = list(_requests(draw, tools + system, 6 + int(draw.geometric(0.12))))
        if number % 6 == 5:
            inner = list(_requests(draw, 3200, 4, first_id=100_000))
            helper = {"t": 30.0, "type": "subagent", "agent_id": f"made-up-{number}"}
            requests.insert(
                2, {**helper, "tool_tokens": 2400, "system_tokens": 800, "requests": inner}
            )
        yield {
            "id": f"made-up-{number:04}",
            "models": ["none"],
            "block_size": 64,
            "hash_id_scope": "local",
            "tool_tokens": tools,
            "system_tokens": system,
            "requests": requests,
            "dup": False,
        }


def _requests(
    draw: np.random.Generator, head: int, count: int, first_id: int = 1
) -> Iterator[Record]:
    length, next_id, at_s = head + int(draw.lognormal(9, 1.5)), first_id, 0.0
    runs: list[list[int]] = []
    for turn in range(count):
        if turn and draw.random() < 0.06:  # summarized: the head stays, the rest is new
            length = head + int(draw.integers(500, 6000))
            runs = [[first_id, first_id + head // 64 - 1]]
        held = sum(last - first + 1 for first, last in runs)
        missing = length // 64 - held
        if missing > 0:
            if runs and runs[-1][1] == next_id - 1:
                runs[-1] = [runs[-1][0], next_id + missing - 1]
            else:
                runs = [*runs, [next_id, next_id + missing - 1]]
            next_id += missing
        answer = int(draw.lognormal(5.6, 0.8))
        yield {
            "t": round(at_s, 1),
            "type": "n",
            "model": "none",
            "in": length,
            "out": answer,
            "hash_ids": [list(run) for run in runs],
        }
        at_s += float(draw.exponential(20))
        length += answer + int(draw.lognormal(6, 1.3))


SAMPLES = {"mooncake.jsonl.gz": blocks_of_512, "coding_agent.jsonl.gz": agent_sessions}


def packed(records: Iterable[Record]) -> bytes:
    """Return the records as gzipped JSON lines, without a time stamp in the header."""
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    return gzip.compress(lines.encode(), mtime=0)


if __name__ == "__main__":
    for name, make in SAMPLES.items():
        (FOLDER / name).write_bytes(packed(make()))
