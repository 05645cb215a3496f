"""Compare the bytes sent from a prefill to a decode engine with the bytes that were missing there.

    python -m experiments.benchmarks.count_transfer

Runs two processes with the built-in model. Its rows are small, so the overhead of messages is at
its largest. Each prompt finds the cache as earlier prompts left it. Nothing is timed. Writes
results/count_transfer.jsonl.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from engine import AsyncEngine, Engine, SamplingParams, engine_config
from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer
from experiments.provenance import RESULTS, write_json_lines

SETTINGS = {"device": "cpu", "cache_gib": 0.5}
GOAL = 1.05
PREFILL = """
import sys
from experiments.benchmarks.count_transfer import serve
serve()
"""
CASES = (
    ("a short prompt", 0, 150),
    ("a middling one", 1, 700),
    ("a long one", 2, 5000),
    ("4,096 tokens and the state after them are there", 2, 4096, 3, 904),
    ("KV of 600 tokens is there, no state at its end", 1, 600, 4, 100),
)
"""Cases: a name, and (seed, length) of each piece of the prompt."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts of one case."""

    case: str
    prompt_tokens: int
    sent_tokens: int
    needed_bytes: int
    """Bytes of the missing KV and of one state."""
    wire_bytes: int
    ratio: float
    goal: str
    reached: bool


def serve() -> None:
    """Run the prefill process until its input closes."""
    engine = Engine(engine_config(role="prefill", transfer_at="127.0.0.1:0", **SETTINGS))
    running = AsyncEngine(engine)
    running.start()
    assert engine.plugins["disaggregation"].server is not None
    print(engine.plugins["disaggregation"].server.address[1], flush=True)
    sys.stdin.read()
    running.stop()


@contextmanager
def prefill_engine() -> Iterator[int]:
    """Start a prefill engine and yield its port."""
    command = [sys.executable, "-c", PREFILL]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        yield int(process.stdout.readline())
        process.stdin.close()


def count(engine: Engine, name: str, *pieces: int) -> Counted:
    """Generate one token for a prompt of these pieces, and count the transferred bytes."""
    parts = [
        np.random.default_rng(seed).integers(97, 122, length)
        for seed, length in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    prompt = np.concatenate(parts).astype(np.int32)
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0))
    sent = output.transferred
    assert sent is not None and sent.tokens
    buffer = PrefixBuffer.of(engine.runner)  # type: ignore[attr-defined]
    needed = sent.tokens * buffer.row_bytes + buffer.state_bytes
    assert sent.needed_bytes == needed
    ratio = round(sent.wire_bytes / needed, 4)
    return Counted(
        name, len(prompt), sent.tokens, needed, sent.wire_bytes, ratio, f"<= {GOAL}", ratio <= GOAL
    )  # fmt: skip


def main() -> None:
    with prefill_engine() as port:
        address = f"127.0.0.1:{port}"
        config = engine_config(role="decode", prefill=(address,), fetch_above=64, **SETTINGS)
        engine = Engine(config)
        records = []
        for name, *pieces in CASES:
            records.append(count(engine, str(name), *map(int, pieces)))
            print(records[-1], flush=True)
    write_json_lines(RESULTS / "count_transfer.jsonl", [asdict(record) for record in records])


if __name__ == "__main__":
    main()
