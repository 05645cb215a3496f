"""The reports of several caches as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from engine.schedule.report import CacheReport, LowerReport, PoolReport, TierReport
from hybridcache.scheduling.planner import AdmissionReport


def summed(reports: Sequence[CacheReport], gone: Mapping[str, int]) -> CacheReport:
    """Sizes and counts added up, rates of the sums; settings are those of the first. ``gone`` is
    what replicas that are no more had counted in ``usage``: a counter never falls.

    ValueError: there is no report."""
    if not reports:
        raise ValueError("no replica is up")
    usage = {
        name: gone.get(name, 0) + sum(each.usage[name] for each in reports)
        for name in reports[0].usage
    }
    return replace(
        reports[0],
        bytes=_pool([each.bytes for each in reports]),
        kv=_pool([each.kv for each in reports]),
        slots=_pool([each.slots for each in reports]),
        num_running=sum(each.num_running for each in reports),
        num_waiting=sum(each.num_waiting for each in reports),
        queue=_queue([each.queue for each in reports]),
        token_hit_rate=_rate(usage["cached_tokens"], usage["prompt_tokens"]),
        request_hit_rate=_rate(usage["hits"], usage["requests"]),
        usage=usage,
        lower=_lower([each.lower for each in reports if each.lower is not None]),
    )


def _queue(reports: Sequence[AdmissionReport]) -> AdmissionReport:
    """Sessions added up, the longest wait; the policies' figures are those of the first."""
    return AdmissionReport(
        sum(each.live_sessions for each in reports),
        sum(each.waiting_sessions for each in reports),
        max(each.oldest_wait_s for each in reports),
        reports[0].figures,
    )


def _pool(pools: Sequence[PoolReport]) -> PoolReport:
    names = [field.name for field in fields(PoolReport)]
    return PoolReport(**{name: sum(getattr(pool, name) for pool in pools) for name in names})


def _lower(reports: Sequence[LowerReport]) -> LowerReport | None:
    """Tiers added up; the folder, which replicas of one machine share, as the first one sees it
    that has a problem with it, or the first of all."""
    if not reports:
        return None
    names = [field.name for field in fields(TierReport) if field.name != "tier"]
    tiers = tuple(
        replace(same[0], **{name: sum(getattr(tier, name) for tier in same) for name in names})
        for same in zip(*(report.tiers for report in reports), strict=True)
    )
    folders = [report.folder for report in reports if report.folder is not None]
    folders.sort(key=lambda folder: folder.problem is None)
    return LowerReport(tiers, folders[0] if folders else None)


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
