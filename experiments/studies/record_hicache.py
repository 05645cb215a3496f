"""Record the decisions of SGLang's own tree with host pools (HiCache), request by request.

Tests compare the rebuilt cache with the record.

`PYTHONPATH=out/sglang python -m experiments.studies.record_hicache` writes
tests/lab/baselines/hicache_hits.json. Needs SGLang 0.5.23 (`make sglang`) but no device: its
tree, allocators, host pools and controller run unchanged, and only the copies are left out
(`experiments/system/sglang/hicache.py`). After each request: tokens reused, and the KV rows and
state slots that are free on the device and in host memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from hybridcache import TraceRequest
from hybridcache.lab.generators import GENERATORS

RECORD = Path(__file__).parents[2] / "tests" / "lab" / "baselines" / "hicache_hits.json"


class Load(NamedTuple):
    """Requests of a generator, and the pools they are served with."""

    requests: int
    num_kv_tokens: int
    num_slots: int
    ratio: float
    """Host memory divided by that of the device."""


LOADS = {
    "chat": Load(300, 20_000, 8, 2.0),
    "agent": Load(200, 60_000, 10, 1.5),
    "branch": Load(160, 20_000, 6, 3.0),
    "short": Load(120, 8_000, 6, 2.0),
    "conversations": Load(300, 20_000, 8, 1.2),
}


def requests_of(word: str) -> Iterator[TraceRequest]:
    """Yield the requests of a load that take at most half of its device."""
    load = LOADS[word]
    for request in islice(GENERATORS[word](seed=0), load.requests):
        if len(request.tokens) + len(request.output) <= load.num_kv_tokens // 2:
            yield request


def summary(served: Iterable[tuple[int, ...]]) -> dict[str, Any]:
    """Summarise (tokens reused, free rows, slots, host rows, host slots) of every request."""
    rows = list(served)
    lines = "\n".join(" ".join(map(str, row)) for row in rows)
    return {
        "requests": len(rows),
        "reused": sum(row[0] for row in rows),
        "digest": hashlib.blake2b(lines.encode(), digest_size=8).hexdigest(),
    }


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    from experiments.system.sglang import cpu

    cpu.stand_in()
    from experiments.system.sglang.hicache import HostPools, copy_nothing

    copy_nothing()
    records = {}
    for word, load in tqdm(LOADS.items(), disable=None):
        pools = HostPools(load.num_kv_tokens, load.num_slots, load.ratio)
        host_tokens, host_slots = pools.host_free()
        served = [(pools.serve(one.tokens, one.output), *pools.free()) for one in requests_of(word)]
        pools.cache.sanity_check()
        records[word] = {"host_tokens": host_tokens, "host_slots": host_slots} | summary(served)
    RECORD.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
