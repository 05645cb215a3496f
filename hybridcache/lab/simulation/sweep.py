"""Runs of a replay over one trace, and the identity of a trace in a results file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.grid import Place, collect_seldom, pickled, run_grid
from hybridcache.lab.simulation.result import RunResult, summarise
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.target import build_target
from hybridcache.lab.trace import Trace

__all__ = ["collect_seldom", "identity_of", "run_cell", "run_cells"]


def identity_of(trace: Trace) -> bytes:
    """Return bytes that identify a trace: its recipe, and the content of its file if it has one.
    O(bytes of the file)."""
    name = repr((trace.name, trace.unit)).encode()
    identity = name + pickled(f"trace {trace.name!r}", trace.source)
    reader: Any = trace.source
    while hasattr(reader, "source"):  # the head of another
        reader = reader.source
    path = getattr(reader, "path", None)
    if path is None:
        return identity
    with open(path, "rb") as file:
        return identity + hashlib.file_digest(file, "sha256").digest()


def run_cells(
    trace: Trace,
    cells: Sequence[Scenario],
    *,
    place: Place | None = None,
    resume_from: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RunResult]:
    """Return the result of each of ``cells`` (``Scenario.cells``), in their order; see
    ``run_grid``. ValueError for a trace without a request."""
    identity = identity_of(trace) if resume_from else b""
    return run_grid(
        trace,
        cells,
        run_cell,
        keys=[cell.key(identity) for cell in cells] if resume_from else (),
        read=RunResult.from_record,
        write=RunResult.as_record,
        place=place or Place(),
        resume_from=resume_from,
        progress=progress,
    )


def run_cell(trace: Trace, cell: Scenario) -> RunResult:
    """Replay ``trace`` through the one cache of ``cell``."""
    geometry = cell.geometry()
    config, serving = cell.config(geometry), cell.serving(geometry)
    target = build_target(config, trace.unit, serving.times)
    log = serve(target, trace.in_order(), trace.unit, serving)
    result = summarise(config, serving, log, target, trace.full_name)
    if not result.requests:
        raise ValueError(f"{trace.name}: {trace.is_empty_because}")
    return result
