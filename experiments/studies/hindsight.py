"""Best plans with hindsight, computed once per trace and size and stored in a results file.

The plan is that of the clairvoyant greedy, which is the same on every machine and proves nothing.

    python -m experiments.studies.hindsight    # table of the file
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import provenance
from hybridcache import ModelGeometry, Trace
from hybridcache.lab.optimum import best_plan
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.sizes import budget_bytes

NAME = "hindsight.jsonl"


@dataclass(frozen=True, slots=True)
class Hindsight:
    """Plan for one trace, model, grid and size. Rates are token hit rates."""

    trace: str
    content: str
    """Checksum of all prompts and answers, which distinguishes traces of the same name."""
    requests: int
    kv_bytes_per_token: int
    state_bytes: int
    grid: int
    capacity_bytes: int
    cached_tokens: int
    reached: float
    counts_running: bool = False
    """True if the plan leaves room for the running request."""

    @property
    def key(self) -> tuple[Any, ...]:
        sizes = self.kv_bytes_per_token, self.state_bytes, self.grid, self.capacity_bytes
        return self.content, *sizes, self.counts_running


def checksum(trace: Trace) -> str:
    """Return a checksum of all token ids, namespaces and the unit. O(tokens)."""
    found = zlib.crc32(repr(trace.unit).encode())
    for request in trace:
        for part in (repr(request.namespace).encode(), request.tokens.tobytes()):
            found = zlib.crc32(part, found)
        found = zlib.crc32(request.output.tobytes(), found)
    return f"{found:08x}"


class Hindsights:
    """Plans of one trace, from the file or newly computed."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._content = trace, checksum(trace)
        self._requests = sum(1 for _ in trace)

    def at(
        self,
        gib: float,
        geometry: ModelGeometry,
        grid: int,
        *,
        counts_running: bool = False,
    ) -> Hindsight:
        """Return the plan for one size, and store it in the file."""
        kv_bytes, state_bytes = geometry.kv_bytes_per_token, geometry.state_bytes
        capacity_bytes = budget_bytes(gib)
        sizes = kv_bytes, state_bytes, grid, capacity_bytes
        found = _read().get((self._content, *sizes, counts_running))
        if found is not None:
            return found
        best = best_plan(
            self._trace,
            capacity_bytes=capacity_bytes,
            kv_bytes_per_token=kv_bytes,
            state_bytes=state_bytes,
            grid=grid,
            counts_running=counts_running,
        )
        found = Hindsight(
            self._trace.name,
            self._content,
            self._requests,
            *sizes,
            int(best.cached_tokens.sum()),
            round(best.reached, 6),
            counts_running,
        )
        known = _read() | {found.key: found}
        new = _path().with_suffix(".new")  # Replaced atomically: another study may be reading.
        provenance.write_json_lines(new, map(asdict, known.values()))
        new.replace(_path())
        return found


def _path() -> Path:
    return provenance.RESULTS / NAME


def _read() -> dict[tuple[Any, ...], Hindsight]:
    if not _path().exists():
        return {}
    _, records = provenance.read_json_lines(_path())
    return {found.key: found for found in (Hindsight(**record) for record in records)}


def main() -> None:
    """Print one row per trace and model: number of requests and of sizes, and the state's bytes."""
    groups = Counter(
        (found.trace, found.requests, found.state_bytes, found.grid) for found in _read().values()
    )
    rows = [
        [trace, f"{requests:,}", f"{state_bytes / 2**20:.1f}", str(grid), str(num_sizes)]
        for (trace, requests, state_bytes, grid), num_sizes in sorted(groups.items())
    ]
    print(text_table(["trace", "requests", "state, MiB", "grid", "sizes"], rows))


if __name__ == "__main__":
    main()
