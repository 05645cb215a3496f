"""Record what vLLM's own store of offloaded blocks keeps: what tests hold our rebuilt one to.

`python -m experiments.studies.record_vllm_store` writes tests/lab/baselines/vllm_store.json. Run it
in an environment of its own that has `vllm==0.33.0` and this project; no device is needed: its
`CPUOffloadingManager` alone, offered and asked for the blocks of random requests that share
prefixes, as its scheduler would, with copies done at once.
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
"""Chunks."""


class Blocks(NamedTuple):
    """A random request: the text of a block is told by its branch and place."""

    fetched: int
    """Blocks of attention fetched first, if all are there, with the states at their end."""
    passes: tuple[tuple[int, bool], ...]
    """(Blocks computed when a pass ended, whether its states are kept.)"""
    branch: int

    def key(self, group: int, place: int) -> bytes:
        """Return the key of the block that ends the first ``place`` blocks."""
        branch = self.branch if place > 2 else self.branch // 3
        return hashlib.blake2b(f"{branch} {place}".encode(), digest_size=8).digest() + bytes(
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
            request.key(group, place): place
            for place in range(1, request.passes[-1][0] + 1)
            for group in range(NUM_GROUPS)
        }
        for key, place in ends.items():
            context.set_offload_key_position(key, place)
        done = request.fetched
        wanted = [request.key(0, place) for place in range(1, done + 1)]
        wanted += [request.key(group, done) for group in range(1, NUM_GROUPS)] if done else []
        if any(manager.lookup(key, context) is not LookupResult.HIT for key in wanted):
            wanted, done = [], 0
        if wanted:
            manager.prepare_load(wanted, context)
            manager.complete_load(wanted, context)
        for end, keeps in request.passes:
            states = [request.key(group, end) for group in range(1, NUM_GROUPS)]
            fresh = [request.key(0, place) for place in range(done + 1, end + 1)]
            for offer in (*([one] for one in states if keeps and end > done), fresh):
                if not offer:
                    continue
                output = manager.prepare_store(offer, context)
                if output is not None:
                    manager.complete_store(output.keys_to_store, context)
                    done = max(done, end) if offer is fresh else done
        manager.on_request_finished(context)
        contents.append(set(manager._policy.chunks))
    return contents


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    records = {str(size): digest(of_vllm(size)) for size in SIZES}
    RECORD.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
