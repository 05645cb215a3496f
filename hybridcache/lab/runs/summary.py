"""The figures of one run, worked out from its request log."""

from __future__ import annotations

import numpy as np

from hybridcache.lab.results.result import Plain, RunResult, SessionResult
from hybridcache.lab.runs.serving import RequestLog
from hybridcache.lab.runs.target import Target
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.intervals import percentiles

RECORDED = (
    *("trace", "label", "model", "state_dtype", "gib", "memory", "kv_share", "policy"),
    *("checkpoints", "priority_classes", "baseline", "page_size", "grid", "servers"),
    *("times", "checkpoint_dtype", "host_gib", "disk_gib"),
)


def identify(scenario: Scenario, trace: str, priority_classes: bool | None) -> Plain:
    """Return the settings of a cell over the trace with the recipe ``trace``, as plain text and
    numbers. None for those that a rebuilt peer does not have."""
    geometry = scenario.geometry()
    settings = {name: getattr(scenario, name) for name in RECORDED}
    settings |= {"policy": str(scenario.policy), "checkpoints": str(scenario.checkpoints)}
    if scenario.baseline:
        settings |= dict.fromkeys(("memory", "policy", "checkpoints"))
    return settings | {
        "trace": trace,
        "model": geometry.name,
        "state_dtype": geometry.state_dtype,
        "checkpoint_dtype": geometry.checkpoint_dtype,
        "gib": scenario.size_gib,
        "priority_classes": priority_classes,
        "baseline": scenario.baseline or None,
        "times": describe_times(scenario.prefill_times(geometry)),
        "host_bytes_per_s": scenario.host_gb_s * 1e9 if scenario.host_gib else None,
        "disk_bytes_per_s": scenario.disk_gb_s * 1e9 if scenario.disk_gib else None,
    }


def summarise(scenario: Scenario, log: RequestLog, target: Target, trace: str) -> RunResult:
    """Return the figures of one run over the trace with the recipe ``trace``. O(requests)."""
    counters = target.counters()
    geometry = scenario.geometry()
    times = scenario.prefill_times(geometry)
    lengths = np.frombuffer(log.prompt_tokens, np.int64)
    cached = np.frombuffer(log.cached_tokens, np.int64)
    ttft = np.asarray(log.ttft_s, dtype=np.float64)
    row_bytes, copied = log.unit * geometry.kv_bytes_per_token, sum(log.copy_s)
    written, moved = counters.get("inserted_tokens"), counters.get("moved_tokens")
    spent = sum(log.prefill_s) + copied
    cold = sum(times.seconds(0, length) for length in log.prompt_tokens)
    return RunResult(
        config=identify(scenario, trace, target.priority_classes),
        requests=len(lengths),
        hits=int((cached > 0).sum()),
        bypassed=log.num_bypassed,
        prompt_tokens=int(lengths.sum()),
        cached_tokens=int(cached.sum()),
        losses=log.losses if log.has_causes else None,
        seconds=spent,
        seconds_saved=cold - spent,
        ttft_s=percentiles(ttft),
        ttft_mean_s=float(ttft.mean()) if len(ttft) else 0.0,
        checkpoints_made=counters.get("inserted_slots"),
        written_kv_bytes=None if written is None else written * row_bytes,
        moved_slabs=counters.get("moved_slabs"),
        moved_kv_bytes=None if moved is None else moved * row_bytes,
        copy_seconds=copied,
        tier_bytes={name: size for name, size in counters.items() if name.endswith("_bytes")}
        if scenario.host_gib or scenario.disk_gib
        else None,
        by_session=_sessions(log),
        control_us=log.control_s / max(len(lengths), 1) * 1e6,
        by_request=None if log.records is None else (*log.records,),
        evictions=None if target.items is None else (*target.items.evictions.values(),),
    )


def _sessions(log: RequestLog) -> tuple[SessionResult, ...]:
    found = []
    for session, sums in log.sessions.items():
        requests, prompt, cached = sums[-3:]
        losses = log.losses_of(sums) if log.has_causes else None
        found.append(SessionResult(str(session), requests, prompt, cached, losses))
    return tuple(found)


def describe_times(times: object) -> str:
    """Describe the source of times in one line: assumed machine, measured file or class."""
    describe = getattr(times, "describe", None)
    return str(describe()) if callable(describe) else type(times).__qualname__
