"""Prometheus metrics, counted when requests end and read from the engine at each scrape."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.errors import QueueFull, RequestError
from engine.schedule.report import CacheReport
from engine.text.answers import FinishReason, RequestOutput
from hybridcache.command.extras import version
from hybridcache.radix.api import Losses

FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SLOW_S = (*FAST_S, 120, 300, 600)
COUNTERS: dict[str, tuple[str, ...]] = {
    "requests": ("Requests that ended, by reason.", "finish_reason"),
    "http_requests": (
        "HTTP requests by status, except for /health and /metrics; 499 if the client left before "
        "the answer began.",
        "status",
    ),
    "rejected_requests": ("Requests refused with 429 because the queue was full.",),
    "prompt_tokens": (
        "Prompt tokens of scheduled requests. /v1/cache omits requests with scores of their "
        "prompt.",
    ),
    "cached_tokens": ("Prompt tokens found in the cache.",),
    "lost_tokens": ("Prompt tokens computed, by loss cause.", "cause"),
    "generated_tokens": ("Tokens generated.",),
    "drafted_tokens": ("Draft tokens, by drafter and position.", "source", "place"),
    "accepted_tokens": ("Accepted draft tokens, by drafter and position.", "source", "place"),
    "verifications": (
        "Steps of a request that verified a draft; each gives one token and the accepted ones.",
    ),
    "token_steps": (
        "Steps of a request that gave tokens; each gives one token and the accepted ones.",
    ),
    "lost_requests": ("Requests that only the server or only its engine knew; each was ended.",),
    "preemptions": ("Preemptions of requests for lack of memory.",),
}
"""Counters of ended requests: help, then labels."""
OF_KEYS = ("requests", "prompt_tokens", "cached_tokens", "generated_tokens")
"""Counters of each key."""
HISTOGRAMS = {
    "queue_seconds": ("Time from arrival to scheduling.", SLOW_S),
    "ttft_seconds": ("Time from arrival to the first token.", SLOW_S),
    "tpot_seconds": ("Time per token after the first.", FAST_S),
    "e2e_seconds": ("Time from arrival to the end.", SLOW_S),
    "itl_seconds": ("Time between two pieces of an answer, counted while it runs.", FAST_S),
}
"""Help and buckets of times: of ended requests, but the last one."""
LIVE = "Sessions with an open request, or idle for 300 s at most; one that moved, per replica."
WAITING = "Sessions with a waiting request."
OLDEST = "Age of the oldest waiting request."
AGE = "Age of the values of this scrape: 0, or the time since a long step began."
PREFILLING = "Tokens of running prompts that are not complete: those computed, and all."
EVICTED = "Checkpoints evicted from the cache."
REBUILDS = "Errors in the middle of a step, after each of which the cache started again, empty."
REFUSALS = "Failed allocations with nothing left to evict."
WRITTEN = "1 if --state-dir is written, 0 if it has a problem (see /health)."
ERRORS = "File system errors and damaged records in --state-dir."
SKIPPED = "Entries not written to --state-dir, for lack of room or time or after an error."
STATE = "Always 1; the labels give the policy and the reason of its last limit change."
HELD = "Bytes of a tier outside the device."
MOVED = "Bytes offloaded to a tier (in) and loaded from it to the device (fetched)."
TRANSFERS = (
    ("transferred_prefixes", "prefixes", "Prefixes sent to or received from other engines."),
    ("failed_transfers", "failed", "Prefixes that were not transferred completely."),
    ("transferred_tokens", "tokens", "Tokens of KV that were transferred."),
    ("transfer_needed_bytes", "needed_bytes", "Bytes of KV and states that were transferred."),
    ("transfer_wire_bytes", "wire_bytes", "All bytes sent to or received from other engines."),
)


class Metrics(Collector):
    """Metrics of one engine in a separate registry. It collects those of a report itself."""

    content_type = CONTENT_TYPE_LATEST
    _report: CacheReport
    """Latest report."""

    def __init__(self, engine_pid: int | None) -> None:
        """``engine_pid``: id of the process that computes, or None if there are several."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # start times, which would double the series
        registry = self._registry = CollectorRegistry()
        if engine_pid is not None:
            ProcessCollector("engine", lambda: engine_pid, registry=registry)
        if engine_pid != os.getpid():
            ProcessCollector("server", registry=registry)
        versions = {"version": version(), "python": platform.python_version()}
        Info("engine_build", "Versions.", registry=registry).info(versions)

        self.counters = {
            name: Counter(name, help, labels, namespace="engine", registry=registry)
            for name, (help, *labels) in COUNTERS.items()
        }
        for name, values in (("requests", get_args(FinishReason)), ("lost_tokens", Losses._fields)):
            for value in values:  # Rates and alerts need the series before the first such request.
                self.counters[name].labels(value)
        self.histograms = {
            name: Histogram(name, help, namespace="engine", buckets=buckets, registry=registry)
            for name, (help, buckets) in HISTOGRAMS.items()
        }
        self.by_key: dict[str, tuple[int, ...]] = {}
        """Counters of each key with a request, in the order of ``OF_KEYS``."""
        registry.register(self)

    def count_key(self, name: str, tokens: Sequence[int]) -> None:
        """Count a request with the key ``name`` and its tokens of prompt, cache and answer."""
        before = self.by_key.get(name, (0, 0, 0, 0))
        self.by_key[name] = tuple(map(sum, zip(before, (1, *tokens), strict=True)))

    def observe(self, output: RequestOutput) -> None:
        """Count a request that ended; ``output`` is its last."""
        if output.failure is not None:
            self.count_failure(RequestError.from_wire(output.failure))
            return
        counters, num_tokens, timings = self.counters, len(output.output), output.timings
        counters["requests"].labels(output.finish_reason).inc()
        counters["preemptions"].inc(output.num_preemptions)
        if output.losses is not None:
            counters["prompt_tokens"].inc(len(output.prompt_token_ids))
            counters["cached_tokens"].inc(output.cached_len)
            for cause, number in output.losses._asdict().items():
                counters["lost_tokens"].labels(cause).inc(number)
        num_accepted = 0
        if output.drafts is not None:
            num_accepted = sum(output.drafts.accepted.values())
            counters["verifications"].inc(output.drafts.num_verified)
            for place, number in output.drafts.drafted.items():
                counters["drafted_tokens"].labels(*place).inc(number)
            for place, number in output.drafts.accepted.items():
                counters["accepted_tokens"].labels(*place).inc(number)
        counters["generated_tokens"].inc(num_tokens)
        counters["token_steps"].inc(max(0, num_tokens - num_accepted))
        durations = timings.queue_s, timings.ttft_s, timings.tpot_s(num_tokens), timings.e2e_s
        for histogram, duration_s in zip(self.histograms.values(), durations, strict=False):
            if duration_s is not None:
                histogram.observe(duration_s)

    def count_failure(self, error: Exception) -> None:
        """Count a request without an answer. Invalid requests do not count."""
        if isinstance(error, QueueFull):
            self.counters["rejected_requests"].inc()
        elif not isinstance(error, ValueError):
            self.counters["requests"].labels("error").inc()

    def render(self, report: CacheReport) -> bytes:
        """Return all metrics in Prometheus' text format, including the counters of ``report``."""
        self._report = report
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the latest report."""
        report, queue, usage = self._report, self._report.queue, self._report.usage
        yield _gauge("running_requests", "Requests being computed.", report.num_running)
        yield _gauge("waiting_requests", "Requests in the queue.", report.num_waiting)
        yield _gauge("live_sessions", LIVE, queue.live_sessions)
        yield _gauge("waiting_sessions", WAITING, queue.waiting_sessions)
        yield _gauge("oldest_wait_seconds", OLDEST, queue.oldest_wait_s)
        yield _gauge("report_age_seconds", AGE, report.age_s)
        parts = {("computed",): report.num_prefilled, ("all",): report.num_to_prefill}
        yield _gauge("prefilling_tokens", PREFILLING, parts, "part")
        yield _counter("evicted_tokens", "KV rows evicted from the cache.", usage["evicted_tokens"])
        yield _counter("evicted_checkpoints", EVICTED, usage["evicted_slots"])
        yield _counter("allocation_refusals", REFUSALS, usage["refusals"])
        yield _counter("cache_rebuilds", REBUILDS, usage["rebuilds"])
        for index, name in enumerate(OF_KEYS):
            by_key = {(key,): counts[index] for key, counts in self.by_key.items()}
            help = f"Number of {name} by API key, for answers of the model."
            yield _counter(f"key_{name}", help, by_key, "key")
        if report.transfers is not None:
            for name, key, help in TRANSFERS:
                yield _counter(name, help, report.transfers[key])
        if (folder := report.folder) is not None:
            yield _gauge("state_dir_bytes", "Bytes in --state-dir, as last written.", folder.kept)
            yield _gauge("state_dir_written", WRITTEN, int(folder.problem is None))
            yield _counter("state_dir_skipped", SKIPPED, folder.skipped)
            yield _counter("state_dir_errors", ERRORS, folder.errors)
        for name, help, pool in (
            ("kv_tokens", "KV rows, by owner.", report.kv),
            ("state_slots", "State slots, by owner.", report.slots),
            ("memory_bytes", f"Bytes of the {report.memory}, by owner.", report.bytes),
        ):
            owners = {(owner,): getattr(pool, owner) for owner in ("free", "cached", "held")}
            yield _gauge(name, help, owners, "owner")
        # Text values of the admission policy are labels of one gauge.
        texts = {name: text for name, text in queue.figures.items() if isinstance(text, str)}
        shown = {(n,): value for n, value in queue.figures.items() if n not in texts}
        yield _gauge("admission", "Numbers of the admission policy.", shown, "figure")
        words = {"policy": report.admission, "reason": ""} | texts
        yield _gauge("admission_state", STATE, {(*words.values(),): 1}, *words)
        if tiers := report.tiers:
            owned = {(t.tier, way): getattr(t, way) for t in tiers for way in ("free", "cached")}
            yield _gauge("tier_bytes", HELD, owned, "tier", "owner")
            ways = (("in", "taken_in"), ("fetched", "fetched"))
            moved = {(t.tier, way): getattr(t, name) for t in tiers for way, name in ways}
            yield _counter("tier_moved_bytes", MOVED, moved, "tier", "way")


def _family(kind: Any, name: str, help: str, values: Any, *labels: str) -> Metric:
    """Return a metric with one value, or with one for each combination of ``labels``."""
    family: Metric = kind(f"engine_{name}", help, labels=labels)
    for words, value in values.items() if labels else [((), values)]:
        family.add_metric(words, value)  # type: ignore[attr-defined]
    return family


_gauge, _counter = partial(_family, GaugeMetricFamily), partial(_family, CounterMetricFamily)
