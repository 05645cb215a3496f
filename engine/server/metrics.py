"""Prometheus metrics, counted when requests end and read from the engine at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.schedule.report import CacheReport, LowerReport
from engine.text.outputs import RequestOutput

FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SLOW_S = (*FAST_S, 120, 300, 600)


class Metrics:
    """Metrics of one engine in a separate registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, namespace="engine", registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, namespace="engine", buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests that ended, by reason.", "finish_reason")
        self.rejected = counter(
            "rejected_requests", "Requests refused with 429 because the queue was full."
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of scheduled requests.")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in the cache.")
        self.lost_tokens = counter("lost_tokens", "Prompt tokens computed, by loss cause.", "cause")
        self.generated_tokens = counter("generated_tokens", "Tokens generated.")
        self.drafted_tokens = counter(
            "drafted_tokens", "Draft tokens, by drafter and position.", "source", "place"
        )
        self.accepted_tokens = counter(
            "accepted_tokens", "Accepted draft tokens, by drafter and position.", "source", "place"
        )
        self.verifications = counter(
            "verifications",
            "Steps of a request that verified a draft; each gives one token and the accepted ones.",
        )
        self.giving_steps = counter(
            "token_steps",
            "Steps of a request that gave tokens; each gives one token and the accepted ones.",
        )
        self.preemptions = counter("preemptions", "Preemptions of requests for lack of memory.")
        self.queue_s = histogram("queue_seconds", "Time from arrival to scheduling.", SLOW_S)
        self.ttft_s = histogram("ttft_seconds", "Time from arrival to the first token.", SLOW_S)
        self.tpot_s = histogram("tpot_seconds", "Time per token after the first.", FAST_S)
        self.e2e_s = histogram("e2e_seconds", "Time from arrival to the end.", SLOW_S)

    def observe(self, output: RequestOutput) -> None:
        """Count a request that ended; ``output`` is its last."""
        self.requests.labels(output.finish_reason).inc()
        self.preemptions.inc(output.num_preemptions)
        if output.losses is not None:
            self.prompt_tokens.inc(len(output.prompt_token_ids))
            self.cached_tokens.inc(output.cached_len)
            for cause, num_tokens in output.losses._asdict().items():
                self.lost_tokens.labels(cause).inc(num_tokens)
        if output.drafts is not None:
            self.verifications.inc(output.drafts.num_verified)
            for metric, tokens in (
                (self.drafted_tokens, output.drafts.drafted),
                (self.accepted_tokens, output.drafts.accepted),
            ):
                for (source, place), number in tokens.items():
                    metric.labels(source, place).inc(number)
        num_tokens = len(output.output)
        num_accepted = 0 if output.drafts is None else output.drafts.accepted.total()
        self.generated_tokens.inc(num_tokens)
        self.giving_steps.inc(max(0, num_tokens - num_accepted))
        timings = output.timings
        for histogram, duration_s in (
            (self.queue_s, timings.queue_s),
            (self.ttft_s, timings.ttft_s),
            (self.tpot_s, timings.tpot_s(num_tokens)),
            (self.e2e_s, timings.e2e_s),
        ):
            if duration_s is not None:
                histogram.observe(duration_s)

    def count_aborted(self, num_requests: int) -> None:
        """Count requests of clients that disconnected before the first output."""
        self.requests.labels("abort").inc(num_requests)

    def render(self, report: CacheReport) -> bytes:
        """Return all metrics in Prometheus' text format, including the counters of ``report``."""
        now = CollectorRegistry(auto_describe=False)
        now.register(_ReportCollector(report))
        return generate_latest(self._registry) + generate_latest(now)


class _ReportCollector(Collector):
    """Metrics made from one report."""

    def __init__(self, report: CacheReport) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        report = self._report
        for name, help, pool in (
            ("kv_tokens", "KV rows, by owner.", report.kv),
            ("state_slots", "State slots, by owner.", report.slots),
            ("memory_bytes", f"Bytes of the {report.memory}, by owner.", report.bytes),
        ):
            gauge = GaugeMetricFamily(f"engine_{name}", help, labels=["owner"])
            for owner in ("free", "cached", "held"):
                gauge.add_metric([owner], getattr(pool, owner))
            yield gauge
        yield GaugeMetricFamily(
            "engine_running_requests", "Requests being computed.", report.num_running
        )
        yield GaugeMetricFamily(
            "engine_waiting_requests", "Requests in the queue.", report.num_waiting
        )
        yield from _queue_metrics(report)
        yield GaugeMetricFamily(
            "engine_draft_index_bytes",
            "Host memory of the drafters' text indices.",
            report.draft_index_bytes,
        )
        for name, help, key in (
            ("evicted_tokens", "KV rows evicted from the cache.", "evicted_tokens"),
            ("evicted_checkpoints", "Checkpoints evicted from the cache.", "evicted_slots"),
            ("allocation_refusals", "Failed allocations with nothing left to evict.", "refusals"),
        ):
            yield CounterMetricFamily(f"engine_{name}", help, report.usage[key])
        if report.lower is not None:
            yield from _lower_metrics(report.lower)
        if report.transfers is not None:
            for name, help, key in (
                (
                    "transferred_prefixes",
                    "Prefixes sent to or received from other engines.",
                    "prefixes",
                ),
                ("failed_transfers", "Prefixes that were not transferred completely.", "failed"),
                ("transferred_tokens", "Tokens of KV that were transferred.", "tokens"),
                (
                    "transfer_needed_bytes",
                    "Bytes of KV and states that were transferred.",
                    "needed_bytes",
                ),
                (
                    "transfer_wire_bytes",
                    "All bytes sent to or received from other engines.",
                    "wire_bytes",
                ),
            ):
                yield CounterMetricFamily(f"engine_{name}", help, report.transfers[key])


def _queue_metrics(report: CacheReport) -> Iterator[Metric]:
    """Yield metrics of sessions and of the admission policy. The policy's text values are labels of
    one gauge."""
    queue = report.queue
    yield GaugeMetricFamily(
        "engine_live_sessions",
        "Sessions with an open request, or idle for 300 s at most.",
        queue.live_sessions,
    )
    yield GaugeMetricFamily(
        "engine_waiting_sessions", "Sessions with a waiting request.", queue.waiting_sessions
    )
    yield GaugeMetricFamily(
        "engine_oldest_wait_seconds", "Age of the oldest waiting request.", queue.oldest_wait_s
    )
    numbers = GaugeMetricFamily(
        "engine_admission", "Numbers of the admission policy.", labels=["figure"]
    )
    words = {"policy": report.admission, "reason": ""}
    for name, value in queue.figures.items():
        if isinstance(value, str):
            words[name] = value
        else:
            numbers.add_metric([name], value)
    yield numbers
    state = GaugeMetricFamily(
        "engine_admission_state",
        "Always 1; the labels give the policy and the reason of its last limit change.",
        labels=list(words),
    )
    state.add_metric(list(words.values()), 1)
    yield state


def _lower_metrics(lower: LowerReport) -> Iterator[Metric]:
    held = GaugeMetricFamily(
        "engine_tier_bytes", "Bytes of a tier outside the device.", labels=["tier", "owner"]
    )
    moved = CounterMetricFamily(
        "engine_tier_moved_bytes",
        "Bytes offloaded to a tier (in) and loaded from it to the device (fetched).",
        labels=["tier", "way"],
    )
    for tier in lower.tiers:
        held.add_metric([tier.tier, "free"], tier.free)
        held.add_metric([tier.tier, "cached"], tier.cached)
        moved.add_metric([tier.tier, "in"], tier.taken_in)
        moved.add_metric([tier.tier, "fetched"], tier.fetched)
    yield held
    yield moved
    folder = lower.folder
    if folder is not None:
        yield GaugeMetricFamily(
            "engine_state_dir_bytes", "Bytes stored in --state-dir.", folder.kept
        )
        yield GaugeMetricFamily(
            "engine_state_dir_written",
            "1 if this engine writes to --state-dir, else 0.",
            int(folder.is_written),
        )
        yield CounterMetricFamily(
            "engine_state_dir_skipped",
            "Entries not written to --state-dir, for lack of room.",
            folder.skipped,
        )
        yield CounterMetricFamily(
            "engine_state_dir_errors",
            "File system errors in --state-dir.",
            folder.errors,
        )
