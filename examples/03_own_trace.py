"""Traces from a CSV file and from a source of your own.

    python examples/03_own_trace.py prompts.csv

Without a file, a small one is written and read. CSV files of prompts are read directly. For any
other source, yield ``TraceRequest`` objects: a time, a session, and token ids of prompt and answer.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hybridcache import Trace, TraceRequest, open_trace, simulate

CSV = """\
time,conversation,prompt,answer
0.0,a,You are a helpful assistant. What is a radix tree?,A tree of prefixes.
4.5,b,You are a helpful assistant. Name three colours.,
9.0,a,You are a helpful assistant. What is a radix tree? And a heap?,A tree of priorities.
"""

DATABASE = [
    {"at": 0.0, "chat": 1, "said": ["Be brief.", "Who are you?"], "reply": "A cache."},
    {"at": 2.5, "chat": 2, "said": ["Be brief.", "What is new?"], "reply": "Nothing."},
    {
        "at": 7.0,
        "chat": 1,
        "said": ["Be brief.", "Who are you?", "A cache.", "Of what?"],
        "reply": "",
    },
]
"""Rows as your own logs might have them."""


def requests() -> Iterator[TraceRequest]:
    """Yield the requests of ``DATABASE`` in order of time, with words as tokens.

    Equal prefixes must have equal ids. Use your model's tokenizer: sizes in GiB depend on it.
    """
    numbers: dict[str, int] = {}

    def token_ids(text: str) -> np.ndarray:
        return np.array([numbers.setdefault(word, len(numbers)) for word in text.split()], np.int32)

    for row in DATABASE:
        system = token_ids(row["said"][0])
        prompt = np.concatenate([system, token_ids(" ".join(row["said"][1:]))])
        answer = token_ids(row["reply"])
        yield TraceRequest(row["at"], row["chat"], None, prompt, answer, boundaries=(len(system),))


def main(arguments: list[str]) -> None:
    """Simulate both traces."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments[0]) if arguments else Path(folder) / "prompts.csv"
        if not arguments:
            path.write_text(CSV)
        # The real tokenizer is ?tokenizer=qwen3.5, or the path of a tokenizer.json.
        trace = open_trace(f"{path}?tokenizer=bytes")
        print(simulate(trace, gib=1, policy=["lru", "survival"], grid=16).table())
    own = Trace("database", 1, requests)
    print(simulate(own, gib=1, policy="lru", grid=1).table())


if __name__ == "__main__":
    main(sys.argv[1:])
