"""A simulator's run as records: the page in a file, to be sent to a colleague."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.simulation.serving import Serving, serve
from hybridcache.lab.simulation.simulate import Sweep
from hybridcache.lab.simulation.sizes import budget_bytes, sizes
from hybridcache.lab.simulation.target import LeaseTarget, RunConfig, Served, build_target
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.watch.page import Recording, recorded_page
from hybridcache.watch.recorder import Record, Recorder, RequestShown, node_id, slabs_record

MAX_RUNS = 8
MAX_RECORDS = 300_000
"""Limit for all runs together: about 20 MB."""


def page_of(trace: Trace, sweep: Sweep) -> str:
    """Return the page with every run of ``sweep`` in it. O(requests) a run.

    ValueError: rebuilt peers, which have no tree of ours; more runs, or longer ones, than a page
    takes; requests that are not served in turn.
    """
    geometry = sweep.geometry()
    configs = [
        replace(config, budget_bytes=budget_bytes(size))
        for config in sweep.competitors(geometry)
        for size in sizes(sweep.gib)
    ]
    if sweep.max_running is not None:
        raise ValueError("a page shows requests that are served in turn: leave max_running out")
    if any(config.baseline is not None for config in configs):
        raise ValueError("a page shows our own cache's tree: leave baseline out")
    if len(configs) > MAX_RUNS:
        raise ValueError(
            f"a page takes up to {MAX_RUNS} runs, these are {len(configs)}: give one or two sizes "
            "(gib) and few policies"
        )
    serving, room = sweep.serving(geometry), MAX_RECORDS
    recordings = []
    for config in configs:
        recordings.append(record_run(trace, config, serving, room))
        room -= len(recordings[-1].records)
    return recorded_page(recordings)


def record_run(
    trace: Trace, config: RunConfig, serving: Serving, max_records: int = MAX_RECORDS
) -> Recording:
    """Record one run from an empty cache, its requests in turn. ValueError if it makes more
    than ``max_records``."""
    target = _RecordedTarget(config, trace.unit, serving, max_records)
    log = serve(target, trace.in_order(), trace.unit, serving)
    for shown, ttft_s in zip(target.shown, log.ttft_s, strict=True):
        shown["first_token_s"] = shown["arrived_s"] + ttft_s
    return Recording(_meta(trace, config, target), target.records)


def _meta(trace: Trace, config: RunConfig, target: _RecordedTarget) -> dict[str, Any]:
    geometry: ModelGeometry = config.geometry
    arena = target.cache.arena
    return {
        "title": f"{config.label}, {(config.budget_bytes or 0) / GIB:.3g} GiB",
        "trace": f"{trace.full_name}, {geometry.name}",
        "kv_bytes": geometry.kv_bytes_per_token,
        "state_bytes": geometry.state_bytes if geometry.num_linear_layers else 0,
        "total_bytes": config.budget_bytes,
        "slab_rows": None if arena is None else arena.slab_rows * trace.unit,
        "num_slabs": 0 if arena is None else arena.num_slabs,
    }


class _RecordedTarget:
    """Cache as ``build_target`` makes it, with a record of every change."""

    def __init__(self, config: RunConfig, unit: int, serving: Serving, max_records: int) -> None:
        inner = build_target(config, unit)
        assert isinstance(inner, LeaseTarget)
        self._inner, self._config, self._unit = inner, config, unit
        self._max_records = max_records
        self.cache, self.priority_classes = inner.cache, inner.priority_classes
        self._recorder = Recorder(unit)
        self.cache.subscribe(self._recorder)
        self.records: list[Record] = []
        self.shown: list[dict[str, Any]] = []
        self._first_s: float | None = None
        self._num_at_slabs = 0

    def begin(self, request: TraceRequest) -> Served | None:
        served = self._inner.begin(request)
        if served is None:
            self.write(request, None)
            return None
        return _Recorded(self, request, served)

    def counters(self) -> dict[str, int]:
        return self._inner.counters()

    def write(self, request: TraceRequest, served: Served | None) -> None:
        """Record the changes made by ``request``, and the request."""
        if self._first_s is None:
            self._first_s = request.timestamp_s
        now_s = request.timestamp_s - self._first_s
        length, unit = request.num_tokens(self._unit), self._unit
        losses = None if served is None or served.losses is None else served.losses
        if losses is not None and served is not None:
            known = losses._replace(**{name: n * unit for name, n in losses._asdict().items()})
            new = length - served.cached_len * unit - sum(known) + known.never_seen
            losses = known._replace(never_seen=new)
        node = self.cache.match(request.tokens, request.namespace).node
        shown = RequestShown(
            id=str(len(self.shown)),
            conversation=_name(request.session),
            namespace=request.namespace,
            state="stop",
            prompt=length,
            computed=length,
            answer=request.num_answer_tokens(unit),
            cached=0 if served is None else served.cached_len * unit,
            losses=losses,
            node=node_id(node),
            preemptions=0,
            arrived_s=now_s,
            scheduled_s=now_s,
            first_token_s=None,
            finished_s=None,
        ).record()
        self.shown.append(shown[1])
        self.records += [["time", now_s, len(self.shown)], *self._recorder.take(), shown]
        self._write_memory()
        if len(self.records) > self._max_records:
            raise ValueError(
                f"a page takes {MAX_RECORDS:,} records, and these runs make more: shorten the "
                "trace (?head=1000), or compare fewer"
            )

    def _write_memory(self) -> None:
        cache, geometry = self.cache, self._config.geometry
        kv = [cache.free_tokens * self._unit, cache.cached_tokens * self._unit, 0]
        slots = [cache.free_slots, cache.num_checkpoints, 0]
        cached_bytes = kv[1] * geometry.kv_bytes_per_token + slots[1] * geometry.state_bytes
        total = self._config.budget_bytes or cached_bytes
        usage = cache.stats.total
        memory = {
            "bytes": [max(0, total - cached_bytes), cached_bytes, 0],
            "kv": kv,
            "slots": slots,
            "prompt_tokens": usage.prompt_tokens * self._unit,
            "cached_tokens": usage.cached_tokens * self._unit,
        }
        self.records.append(["memory", memory])
        # Slabs are many: the longer the run, the seldomer.
        num = len(self.shown)
        if cache.arena is not None and num - self._num_at_slabs >= num / 100:
            self._num_at_slabs = num
            self.records.append(slabs_record(cache.arena))


class _Recorded:
    """One request that is written down when it has finished."""

    def __init__(self, target: _RecordedTarget, request: TraceRequest, served: Served) -> None:
        self._target, self._request, self._served = target, request, served
        self.cached_len, self.losses = served.cached_len, served.losses
        self.missed_len, self.copy_s = served.missed_len, served.copy_s

    def prefilled(self) -> None:
        self._served.prefilled()

    def finish(self) -> None:
        self._served.finish()
        self._target.write(self._request, self._served)


def _name(session: Hashable) -> int | str:
    return session if isinstance(session, int) else str(session)[:40]
