"""Convert a CSV file of prompts into a trace.

    python examples/traces/from_csv.py requests.csv requests.jsonl
    hybridcache simulate --trace requests.jsonl --model qwen3-next --gib 1

The CSV has the columns ``seconds``, ``user``, ``prompt`` and ``answer``. A tokenizer turns text
into integers; this example numbers words, so that it needs no tokenizer. Use the tokenizer of your
model instead if you have one: hit rates depend on token counts.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from hybridcache import Trace, TraceRequest
from hybridcache.lab.traces.jsonl import write


def read_csv(path: Path) -> Trace:
    """Return the trace of ``path``, one request per row, in order of time."""
    numbers: dict[str, int] = {}

    def token_ids(text: str) -> np.ndarray:
        ids = [numbers.setdefault(word, len(numbers)) for word in text.split()]
        return np.array(ids, np.int32)

    requests = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            requests.append(
                TraceRequest(
                    timestamp_s=float(row["seconds"]),
                    session=row["user"],
                    namespace=None,  # or the tenant: namespaces never share
                    tokens=token_ids(row["prompt"]),
                    output=token_ids(row["answer"]),
                )
            )
    requests.sort(key=lambda request: request.timestamp_s)
    return Trace(path.stem, 1, requests.__iter__)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    with target.open("w", encoding="utf-8") as out:
        print(f"{target}: {write(read_csv(source), out)} requests")
