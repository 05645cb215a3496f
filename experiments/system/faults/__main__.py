"""Inject faults into a server, and check that all of its memory is accounted for afterwards.

Starts ``engine serve`` with the built-in model. Faults of clients, sockets, memory, clock and disk
follow one after the other, then faults that end the server. After every survived fault, ``free +
cached + held == total`` is read from /metrics for KV rows, state slots and bytes. After a fault
that ends the server, a new server must have all memory. Loopback only.

    python -m experiments.system.faults
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.provenance import RESULTS, write_json_lines
from experiments.system.faults.ends import ENDS
from experiments.system.faults.live import LIVE
from experiments.system.faults.server import Broken, broken_server, memory_of
from hybridcache.command.parser import Parser

FLAGS = ("--body-timeout-s", "2", "--trace", "/dev/full", "--max-running", "8")
"""Flags of the server. The disk of its trace is full from the start."""
SETTLE_S = 120.0


def settled(server: Broken) -> dict[str, dict[str, float]]:
    """Return the memory of an idle server. Raises AssertionError if memory is still held or
    lost."""
    deadline = time.monotonic() + SETTLE_S
    while (report := server.report())["num_running"] + report["num_waiting"]:
        assert time.monotonic() < deadline, f"requests still run: {report}"
        time.sleep(0.05)
    pools = memory_of(server.get("/metrics"))
    for name, pool in pools.items():
        assert pool["held"] == 0, f"{name}: {pool}"
    assert report["bytes"]["total"] == sum(pools["engine_memory_bytes"].values())
    return pools


def survived(server: Broken, name: str, fault: Callable[[Broken], None]) -> dict[str, Any]:
    """Apply ``fault`` and check the server. Returns a record."""
    started = time.monotonic()
    fault(server)
    pools = settled(server)
    assert server.answer()[0] == 200
    seconds = round(time.monotonic() - started, 2)
    return {"fault": name, "seconds": seconds, "memory": pools["engine_memory_bytes"]}


def live_faults(names: Sequence[str] = tuple(LIVE)) -> Iterator[dict[str, Any]]:
    """Yield one record per fault, all on one server. Raises AssertionError if the server does not
    survive one."""
    with tempfile.TemporaryDirectory() as folder, broken_server(Path(folder), *FLAGS) as server:
        total = sum(settled(server)["engine_memory_bytes"].values())
        for name in names:
            record = survived(server, name, LIVE[name])
            assert sum(record["memory"].values()) == total, f"after {name}: {record}"
            yield record


def ending_faults(names: Sequence[str] = tuple(ENDS)) -> Iterator[dict[str, Any]]:
    """Yield one record per fault that ends a server, each followed by a new server."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            with broken_server(Path(folder), *FLAGS) as server:
                ENDS[name](server)
            seconds = round(time.monotonic() - started, 2)
            with broken_server(Path(folder), *FLAGS) as server:
                assert server.answer()[0] == 200
                memory = settled(server)["engine_memory_bytes"]
            yield {"fault": name, "seconds": seconds, "memory": memory}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m experiments.system.faults", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.jsonl")
    options = parser.parse_args(arguments)
    records = []
    for kind in (live_faults, ending_faults):
        for record in kind():
            print(
                record["fault"], "survived", *(f"{record.get('seconds', '')}".split()), flush=True
            )
            records.append(record)
    write_json_lines(options.out, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
