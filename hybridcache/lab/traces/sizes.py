"""Sizes of a cache as people write them: GiB in words, bytes in numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.traces.frame import shown
from hybridcache.lab.traces.prefix_tree import InfiniteCache
from hybridcache.lab.traces.trace import Trace

TOO_LARGE_GIB = 2.0**50
"""Sizes of this many GiB or more are refused as mistakes."""
USUAL_POINTS = 15
"""Points of a range that does not say how many."""


def sizes(spec: str | float | Sequence[float], name: str = "gib") -> tuple[float, ...]:
    """GiB from ``"2:200:15"`` (15 points from 2 to 200, logarithmically spaced; 15 is the usual
    number), ``"6,40"``, or numbers; sessions a second if ``name`` is ``rate``. Percent signs are
    left out, for ``shares``. ValueError unless all differ, and are above 0 and below
    ``TOO_LARGE_GIB``.

    >>> sizes("2:200:3")
    (2.0, 20.0, 200.0)
    """
    try:
        found = _points(spec.replace("%", "") if name == "gib" and isinstance(spec, str) else spec)
    except (ValueError, TypeError):
        found = ()
    if not found or not all(0 < one < TOO_LARGE_GIB for one in found):
        unit, more = "sessions a second", ""
        if name == "gib":
            unit, more = "GiB", "; sizes also as shares of the working set: 1%:100%"
        raise ValueError(
            f"{name} {shown(spec)}: {unit} above 0, below {TOO_LARGE_GIB:.2g} are needed, as "
            "low:high:points (low first, 2 or more), as a,b,c, or as numbers" + more
        )
    if len(set(found)) < len(found):
        raise ValueError(f"{name} {shown(spec)}: one is given twice: give each once")
    return found


def shares(spec: str, whole_bytes: int) -> tuple[float, ...]:
    """Return ``sizes`` that are given as shares of ``whole_bytes``, all with ``%``. ValueError as
    there.

    >>> shares("1%:100%:3", 50 << 30)
    (0.5, 5.0, 50.0)
    """
    found, parts = sizes(spec), re.split("[:,]", spec)
    if not all(part.strip().endswith("%") for part in (parts[:2] if ":" in spec else parts)):
        raise ValueError(f"gib {shown(spec)}: give all sizes in GiB, or all with %")
    whole = whole_bytes / GIB
    # Rounded, but never above the working set.
    rounded = ((point, float(f"{whole * point / 100:.6g}")) for point in found)
    return tuple(min(size, whole) if point <= 100 else size for point, size in rounded)


def working_set_bytes(trace: Trace, geometry: ModelGeometry) -> int:
    """Return the bytes of all that a cache could keep: KV of every distinct token of prompts and
    answers, and one state a request. O(tokens)."""
    cache, num_requests = InfiniteCache(), 0
    for request in trace:
        cache.serve(request)
        num_requests += 1
    state_bytes = geometry.state_bytes if geometry.num_linear_layers else 0
    return cache.num_ids * trace.unit * geometry.kv_bytes_per_token + num_requests * state_bytes


def _points(spec: str | float | Sequence[float]) -> tuple[float, ...]:
    if isinstance(spec, str) and ":" in spec:
        low, high, count = (*spec.split(":"), str(USUAL_POINTS))[:3]
        is_range = 0 < float(low) < float(high) < TOO_LARGE_GIB
        if spec.count(":") > 2 or int(count) < 2 or not is_range:
            raise ValueError("the sizes go up")
        points = np.geomspace(float(low), float(high), int(count))
        return tuple(float(f"{point:.6g}") for point in points)
    if isinstance(spec, str):
        return tuple(float(part) for part in spec.split(","))
    several = (spec,) if isinstance(spec, int | float) else tuple(spec)
    if any(isinstance(one, bool) for one in several):
        raise ValueError("a truth value is no size")
    return tuple(map(float, several))


def budget_bytes(gib: float) -> int:
    return int(gib * GIB)
