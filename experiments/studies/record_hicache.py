"""Record the decisions of SGLang's own tree with host pools (HiCache), request by request.

Tests compare the rebuilt cache with the record.

`PYTHONPATH=out/sglang python -m experiments.studies.record_hicache` writes
tests/lab/baselines/hicache_hits.json. Needs SGLang 0.5.23 (`make sglang`) but no device. Its tree,
allocators, host pools and controller run unchanged; only the copies are left out
(`experiments/system/sglang/hicache.py`). The record has the reused tokens after each request, and
the free KV rows and state slots on the device and in host memory.
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
    """Requests of a generator, and the sizes of the pools."""

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


def requests_of(name: str) -> Iterator[TraceRequest]:
    """Yield the requests of a load that take at most half of its device."""
    load = LOADS[name]
    for request in islice(GENERATORS[name](seed=0), load.requests):
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
    for name, load in tqdm(LOADS.items(), disable=None):
        pools = HostPools(load.num_kv_tokens, load.num_slots, load.ratio)
        host_tokens, host_slots = pools.host_free()
        served = [
            (pools.serve(request.tokens, request.output), *pools.free())
            for request in requests_of(name)
        ]
        pools.cache.sanity_check()
        records[name] = {"host_tokens": host_tokens, "host_slots": host_slots} | summary(served)
    RECORD.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
