"""Record the contents of vLLM's own store of offloaded blocks, as a reference for the rebuilt one.

`python -m experiments.studies.record_vllm_store` writes tests/lab/baselines/vllm_store.json. Run it
in a separate environment with `vllm==0.33.0` and this project. No device is needed, because only
`CPUOffloadingManager` runs. Random requests that share prefixes look up and store blocks as in
vLLM's scheduler, and copies complete at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

RECORD = Path(__file__).parents[2] / "tests" / "lab" / "baselines" / "vllm_store.json"
NUM_GROUPS = 4
SIZES = (12, 40, 90)
"""Sizes of the store, in chunks."""


class Blocks(NamedTuple):
    """Random request. Its branch and a position determine the contents of a block."""

    fetched: int
    """Attention blocks to load first, with the states at their end, if all are available."""
    passes: tuple[tuple[int, bool], ...]
    """(Blocks computed at the end of a pass, True if its states are stored.)"""
    branch: int

    def key(self, group: int, position: int) -> bytes:
        """Return the key of block number ``position``, counted from 1."""
        branch = self.branch if position > 2 else self.branch // 3
        return hashlib.blake2b(f"{branch} {position}".encode(), digest_size=8).digest() + bytes(
            (0, 0, 0, group)
        )


def random_requests(num_requests: int = 400, seed: int = 0) -> Iterator[Blocks]:
    """Yield random blocks to store and to look up."""
    rng = np.random.default_rng(seed)
    for _ in range(num_requests):
        length = int(rng.integers(1, 9))
        ends = sorted({length, *rng.integers(1, length + 1, 2).tolist()})
        passes = tuple((int(end), bool(rng.integers(2))) for end in ends)
        yield Blocks(int(rng.integers(0, length + 1)), passes, int(rng.integers(9)))


def digest(contents: Iterable[Iterable[bytes]]) -> str:
    """Return a digest of the contents after each request."""
    found = hashlib.blake2b(digest_size=8)
    for keys in contents:
        found.update(b"".join(sorted(keys)) + b"|")
    return found.hexdigest()


def of_vllm(num_chunks: int) -> list[set[bytes]]:
    """Return the contents of vLLM's manager after each of ``random_requests``."""
    from vllm.v1.kv_offload.base import LookupResult, ReqContext
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    manager = CPUOffloadingManager(num_chunks)
    contents = []
    for number, request in enumerate(random_requests()):
        context = ReqContext(str(number))
        manager.on_new_request(context)
        ends = {
            request.key(group, position): position
            for position in range(1, request.passes[-1][0] + 1)
            for group in range(NUM_GROUPS)
        }
        for key, position in ends.items():
            context.set_offload_key_position(key, position)
        done = request.fetched
        loaded = [request.key(0, position) for position in range(1, done + 1)]
        loaded += [request.key(group, done) for group in range(1, NUM_GROUPS)] if done else []
        if any(manager.lookup(key, context) is not LookupResult.HIT for key in loaded):
            loaded, done = [], 0
        if loaded:
            manager.prepare_load(loaded, context)
            manager.complete_load(loaded, context)
        for end, stores_states in request.passes:
            states = [request.key(group, end) for group in range(1, NUM_GROUPS)]
            new = [request.key(0, position) for position in range(done + 1, end + 1)]
            for keys in (*([state] for state in states if stores_states and end > done), new):
                if not keys:
                    continue
                output = manager.prepare_store(keys, context)
                if output is not None:
                    manager.complete_store(output.keys_to_store, context)
                    done = max(done, end) if keys is new else done
        manager.on_request_finished(context)
        contents.append(set(manager._policy.chunks))
    return contents


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    records = {str(size): digest(of_vllm(size)) for size in SIZES}
    RECORD.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
